# The launches of a layer of experts: routing, and the products of the chosen experts; included by _nodes.pyx.
#
# Which rows an expert has is known on the device only. Routing leaves two lists there, one of the decode rows and one
# of the prefill rows, and the products' grids are sized for the worst case: nothing here waits for the device, so all
# of it can be recorded in a graph.


cdef dict NO_LIST = {"n_items": 0, "items": 0, "pairs": 0, "places": 0}


cdef class RouteNode(Node):
    """The experts of every row, and the lists of the decode rows and of the prefill rows.

    Args:
        name: of the op.
        logits, choose, make_list: the kernels route_logits_<type>, route_choose and route_list.
        fields: `RouteParams`; later: list, n_rows, item_rows.
        decode_list, prefill_list: `ExpertList`s; the second with the places that some lists of many rows have.
        partial_floats: scratch of a row's logits.
        grid: `grid(n_rows)` of `logits`.
        item_rows: `item_rows(n_rows)`, most pairs of a prefill item.
        conversion: of the rows for the experts' products, with the norm that comes before both; or None.
        few: all of that in one launch, for few decode rows: kernel, blocks of logits for each number of rows from 1 on,
            shared memory and counter; or None.
        many_rows: `many_rows(n_rows)`, most pairs of an item of wgmma_experts_*, where these have all rows of a step
            of more than 8, and places of their list, 0: the rows are gathered; or None.
    """

    cdef c.RouteParams p
    cdef c.ExpertList decode_list, prefill_list
    cdef Kernel logits, choose, make_list, few
    cdef Conversion conversion
    cdef int64_t partial_floats
    cdef object grid, item_rows, many_rows
    cdef unsigned int few_smem
    cdef list logit_blocks
    cdef uint64_t arrived

    def __init__(self, str name, Kernel logits, Kernel choose, Kernel make_list, dict fields, dict decode_list,
                 dict prefill_list, int64_t partial_floats, grid, item_rows, Conversion conversion=None,
                 tuple few=None, many_rows=None):
        Node.__init__(self, name)
        self.conversion, self.many_rows = conversion, many_rows
        if few is not None:
            self.few, self.logit_blocks, self.few_smem, self.arrived = few
        self.logits, self.choose, self.make_list = logits, choose, make_list
        c.fill_RouteParams(&self.p, {**fields, "list": NO_LIST}, ("n_rows", "item_rows"))
        c.fill_ExpertList(&self.decode_list, decode_list, ())
        c.fill_ExpertList(&self.prefill_list, prefill_list, ())
        self.partial_floats, self.grid, self.item_rows = partial_floats, grid, item_rows

    cdef int enqueue(self, LaunchList launches, const Shape* shape) except -1:
        cdef c.RouteParams p = self.p
        cdef int row = shape.n_decode, n_prefill = shape.n_rows - shape.n_decode
        cdef unsigned int gx, gy
        if shape.n_rows == 0:
            return 0
        if self.many_rows is not None:
            if shape.n_rows > c.MANY_ROWS_FROM:
                return self._many(launches, shape.n_rows)
            row, n_prefill = shape.n_rows, 0
        elif row > c.ROUTE_CHOOSE_ROWS:
            row, n_prefill = 0, shape.n_rows
        if self.few is not None and n_prefill == 0 and row <= len(self.logit_blocks):
            return self._few(launches, row)
        if self.conversion is not None:
            self.conversion.enqueue(launches, 0, 0, shape.n_rows, shape.n_rows)
        p.n_rows = shape.n_rows
        gx, gy, _ = self.grid(p.n_rows)
        launches.add(self.logits, gx, gy, 1, 256, 0, &p, sizeof(p), True)
        if row:
            p.n_rows, p.item_rows, p.list = row, c.EXPERT_DECODE_ROWS, self.decode_list
            launches.add(self.choose, 1, 1, 1, 1024, 0, &p, sizeof(p), True)
        if n_prefill:
            p.partial += row * self.partial_floats
            p.ids += row * p.n_used
            p.gates += row * p.n_used
            if p.roots != NULL:
                p.roots += row
            p.n_rows, p.item_rows, p.list = n_prefill, 0, self.prefill_list
            p.list.places = NULL
            launches.add(self.choose, (n_prefill + 31) // 32, 1, 1, 1024, 0, &p, sizeof(p), True)
            p.item_rows = self.item_rows(n_prefill)
            launches.add(self.make_list, 1, 1, 1, 1024, 0, &p, sizeof(p), True)
        return 0

    cdef int _many(self, LaunchList launches, int n) except -1:
        """Rows [0, n), of whatever kind; their list is that of prefill rows."""
        cdef c.RouteParams p = self.p
        cdef unsigned int gx, gy
        cdef int n_places
        item_rows, n_places = self.many_rows(n)
        if self.conversion is not None:
            if n_places:
                self.conversion.enqueue_roots(launches, n)
            else:
                self.conversion.enqueue(launches, 0, 0, n, n, c.CONVERTED_LINES)
        p.n_rows, p.list = n, self.prefill_list
        if n_places == 0:
            p.list.places = NULL
        gx, gy, _ = self.grid(n)
        launches.add(self.logits, gx, gy, 1, 256, 0, &p, sizeof(p), True)
        if n > c.ROUTE_CHOOSE_ROWS:
            launches.add(self.choose, (n + 31) // 32, 1, 1, 1024, 0, &p, sizeof(p), True)
        p.item_rows = item_rows
        launches.add(self.make_list if n > c.ROUTE_CHOOSE_ROWS else self.choose, 1, 1, 1, 1024, 0, &p, sizeof(p), True)
        if n_places and self.conversion is not None:
            self.conversion.enqueue_places(launches, n, p.list.places, p.n_used, n_places)
        return 0

    cdef int _few(self, LaunchList launches, int n) except -1:
        """Decode rows [0, n), n <= 8."""
        cdef c.RouteFewParams p
        cdef unsigned int logit_blocks = self.logit_blocks[n - 1]
        memset(&p, 0, sizeof(p))
        p.route, p.convert = self.p, self.conversion.p
        p.route.n_rows, p.route.item_rows, p.route.list = n, c.EXPERT_DECODE_ROWS, self.decode_list
        p.convert.n_rows = p.convert.n_pad_rows = n
        p.arrived, p.n_logit_blocks = <uint32_t*>self.arrived, logit_blocks
        p.slice_bytes = self.few_smem // 8
        return launches.add(self.few, logit_blocks + n, 1, 1, 256, self.few_smem, &p, sizeof(p), True)


cdef class ExpertProduct:
    """A launch of expert_few_*, for 1 to 8 rows.

    Args:
        fields: `ExpertFewParams`; later: n_rows, x_slot_rows, holds_next, has_list and what a `Bound` says.
        bounds: for each number of rows, from 1 on, the `Bound` kernel.
    """

    cdef c.ExpertFewParams p
    cdef list bounds

    def __init__(self, dict fields, list bounds):
        c.fill_ExpertFewParams(&self.p, fields, ("n_rows", "x_slot_rows", "n_warps", "n_groups", "depth", "batch",
                                                 "ring_bytes", "x_smem", "factors", "barriers", "holds_next",
                                                 "has_list"))
        self.bounds = [None, *bounds]

    cdef bint converts(self, int n) except -1:
        """Whether the launch for `n` rows takes float32 rows."""
        return self.p.x != NULL and (<Bound>self.bounds[n]).x_smem > 0

    cdef int enqueue(self, LaunchList launches, int n, int x_slot_rows, bint mixes, bint holds_next,
                     bint has_list) except -1:
        """With `mixes` PRODUCT_MIX is what it says, else PRODUCT_STORE."""
        cdef Bound bound = self.bounds[n]
        cdef c.ExpertFewParams p = self.p
        if not self.converts(n):
            p.x = NULL
        if p.mode == c.PRODUCT_MIX and not mixes:
            p.mode = c.PRODUCT_STORE
        p.n_rows, p.x_slot_rows, p.holds_next, p.has_list = n, x_slot_rows, holds_next, has_list
        p.n_warps, p.n_groups, p.depth, p.batch = bound.n_warps, bound.n_groups, bound.depth, bound.batch
        p.ring_bytes, p.x_smem, p.factors, p.barriers = bound.ring_bytes, bound.x_smem, bound.factors, bound.barriers
        return bound.enqueue(launches, &p, sizeof(p))


cdef class ExpertProductNode(Node):
    """Products of every row and slot with one or two matrices, of one type and shape, of the expert in that slot.

    Args:
        name: of the op.
        conversion: of the input; or None, it is that of the `RouteNode` before.
        few: the `ExpertProduct`s for few decode rows.
        matvec: `ExpertMatvecParams`; later: x_slot_rows, ring_bytes.
        matmul: `ExpertMatmulParams`; later: x_slot_rows.
        decode: for each larger number of decode rows the `Bound` kernel.
        prefill: `prefill(n_rows)` gives that of prefill.
        glu: the `GluRows` of what expert_few_* does itself (PRODUCT_GLU), or None.
        total: the `RowNode` of the sum that expert_few_* makes itself (PRODUCT_MIX), or None.
        many, wgmma: `many(n_rows)` gives the `Bound` kernel wgmma_experts_*, its `ManyExpertRowsParams` (later:
            x_slot_rows, n_tiles_m, factors, factor_stride); or None. It has all rows of a step of more than 8, with
            the gated activation.
    """

    cdef c.ExpertMatvecParams v
    cdef c.ExpertMatmulParams m
    cdef c.ManyExpertRowsParams w
    cdef Conversion conversion
    cdef GluRows glu
    cdef RowNode total
    cdef list few, decode
    cdef object prefill, many
    cdef ExpertProductNode after
    cdef bint follows
    cdef int few_rows       # most rows of a launch of `few`

    def __init__(self, str name, Conversion conversion, list few, dict matvec, dict matmul, list decode, prefill,
                 GluRows glu=None, RowNode total=None, many=None, dict wgmma=None):
        Node.__init__(self, name)
        self.conversion, self.few, self.glu, self.total = conversion, few, glu, total
        self.few_rows = len((<ExpertProduct>few[0]).bounds) - 1
        self.decode, self.prefill = [None] * (self.few_rows + 1) + decode, prefill
        c.fill_ExpertMatvecParams(&self.v, matvec, ("x_slot_rows", "ring_bytes"))
        c.fill_ExpertMatmulParams(&self.m, matmul, ("x_slot_rows",))
        self.many = many
        if many is not None:
            c.fill_ManyExpertRowsParams(&self.w, wgmma, ("x_slot_rows", "n_tiles_m", "factors", "factor_stride"))

    def precede(self, ExpertProductNode after):
        """The launches of `after`, whose rows have the same experts, come next."""
        if len(self.few) == 1:
            self.after, after.follows = after, True

    cdef bint converts(self, int n) except -1:
        """Whether the products of `n` decode rows need no other launch before them."""
        return n <= self.few_rows and (<ExpertProduct>self.few[0]).converts(n)

    cdef int enqueue(self, LaunchList launches, const Shape* shape) except -1:
        cdef bint few_alone = shape.n_rows == shape.n_decode and shape.n_decode <= self.few_rows
        cdef int n_decode = shape.n_decode if shape.n_decode <= c.ROUTE_CHOOSE_ROWS else 0
        if self.many is not None and shape.n_rows:
            if shape.n_rows <= self.few_rows:
                return self._decode(launches, shape.n_rows, True)
            self._many(launches, shape.n_rows)
            return self.total.enqueue(launches, shape) if self.total is not None else 0
        if n_decode:
            self._decode(launches, n_decode, few_alone)
        if shape.n_rows > n_decode:
            self._prefill(launches, n_decode, shape.n_rows - n_decode)
        if self.total is not None and not few_alone:
            self.total.enqueue(launches, shape)
        return 0

    cdef int _decode(self, LaunchList launches, int n, bint few_alone) except -1:
        """Decode rows [0, n), n <= 64; with `few_alone` they are all of the step."""
        cdef bint several = self.conversion is not None and self.conversion.n_inputs > 1
        cdef int x_slot_rows = n if several else 0
        cdef ExpertProduct product
        cdef Bound bound
        cdef c.ExpertMatvecParams p
        if self.conversion is not None and not self.converts(n):
            self.conversion.enqueue(launches, 0, 0, n, n)
        if n <= self.few_rows:
            holds_next = few_alone and self.after is not None and self.after.converts(n)
            has_list = few_alone and self.follows and self.converts(n)
            for product in self.few:
                product.enqueue(launches, n, x_slot_rows, few_alone, holds_next, has_list)
            return 0
        bound, p = self.decode[n], self.v
        p.x_slot_rows, p.ring_bytes = x_slot_rows, bound.ring_bytes
        bound.enqueue(launches, &p, sizeof(p))
        if self.glu is not None:
            self.glu.enqueue(launches, 0, n)
        return 0

    cdef int _many(self, LaunchList launches, int n) except -1:
        """Rows [0, n), of whatever kind."""
        cdef Bound bound = self.many(n)
        cdef c.ManyExpertRowsParams p = self.w
        if bound.places:
            if self.conversion is not None:
                self.conversion.enqueue_places(launches, n, p.list.places, p.n_used, bound.places)
            p.factors, p.factor_stride = tile_factors(p.x, p.k, bound.places), bound.places
        elif self.conversion is not None:
            self.conversion.enqueue(launches, 0, 0, n, n, c.CONVERTED_LINES)
            p.x_slot_rows = n if self.conversion.n_inputs > 1 else 0
        p.n_tiles_m = bound.tiles_m
        return bound.enqueue(launches, &p, sizeof(p))

    cdef int _prefill(self, LaunchList launches, int row, int n) except -1:
        """Prompt rows [row, row + n)."""
        cdef Bound bound = self.prefill(n)
        cdef c.ExpertMatmulParams p = self.m
        cdef int i
        if self.conversion is None:
            p.x += row * p.x_bytes
        else:
            self.conversion.enqueue(launches, row, 0, n, n)
            p.x_slot_rows = n if self.conversion.n_inputs > 1 else 0
        for i in range(self.v.n_matrices):
            p.m[i].out += row * p.m[i].out_stride
        bound.enqueue(launches, &p, sizeof(p))
        if self.glu is not None:
            self.glu.enqueue(launches, row, n)
        return 0
