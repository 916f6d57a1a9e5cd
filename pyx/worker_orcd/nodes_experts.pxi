# The launches of a layer of experts: routing, and the products of the chosen experts; included by _nodes.pyx.
#
# Which rows an expert has is known on the device only. Routing leaves two lists there, one of the decode rows and one
# of the prefill rows, and the products' grids are sized for the worst case: nothing here waits for the device, so all
# of it can be recorded in a graph.


cdef dict NO_LIST = {"n_items": 0, "items": 0, "pairs": 0}


cdef class RouteNode(Node):
    """The experts of every row, and the lists of the decode rows and of the prefill rows.

    Args:
        name: of the op.
        logits, choose, make_list: the kernels route_logits_<type>, route_choose and route_list.
        fields: `RouteParams`; later: list, n_rows, item_rows.
        decode_list, prefill_list: `ExpertList`s.
        partial_floats: scratch of a row's logits.
        grid: `grid(n_rows)` of `logits`.
        item_rows: `item_rows(n_rows)`, most pairs of a prefill item.
    """

    cdef c.RouteParams p
    cdef c.ExpertList decode_list, prefill_list
    cdef Kernel logits, choose, make_list
    cdef int64_t partial_floats
    cdef object grid, item_rows

    def __init__(self, str name, Kernel logits, Kernel choose, Kernel make_list, dict fields, dict decode_list,
                 dict prefill_list, int64_t partial_floats, grid, item_rows):
        Node.__init__(self, name)
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
            p.n_rows, p.item_rows, p.list = n_prefill, 0, self.prefill_list
            launches.add(self.choose, (n_prefill + 31) // 32, 1, 1, 1024, 0, &p, sizeof(p), True)
            p.item_rows = self.item_rows(n_prefill)
            launches.add(self.make_list, 1, 1, 1, 1024, 0, &p, sizeof(p), True)
        return 0


cdef class ExpertProduct:
    """A launch of expert_few_*, for 1 to 8 rows.

    Args:
        fields: `ExpertFewParams`; later: n_rows, x_slot_rows and what a `Bound` says.
        bounds: for each number of rows, from 1 on, the `Bound` kernel.
    """

    cdef c.ExpertFewParams p
    cdef list bounds

    def __init__(self, dict fields, list bounds):
        c.fill_ExpertFewParams(&self.p, fields, ("n_rows", "x_slot_rows", "n_warps", "n_groups", "depth", "batch",
                                                 "ring_bytes", "factors", "barriers"))
        self.bounds = [None, *bounds]

    cdef int enqueue(self, LaunchList launches, int n, int x_slot_rows) except -1:
        cdef Bound bound = self.bounds[n]
        cdef c.ExpertFewParams p = self.p
        p.n_rows, p.x_slot_rows = n, x_slot_rows
        p.n_warps, p.n_groups, p.depth, p.batch = bound.n_warps, bound.n_groups, bound.depth, bound.batch
        p.ring_bytes, p.factors, p.barriers = bound.ring_bytes, bound.factors, bound.barriers
        return bound.enqueue(launches, &p, sizeof(p))


cdef class ExpertProductNode(Node):
    """Products of every row and slot with one or two matrices, of one type and shape, of the expert in that slot.

    Args:
        name: of the op.
        conversion: of the input.
        few: the `ExpertProduct`s for few decode rows.
        matvec: `ExpertMatvecParams`; later: x_slot_rows, ring_bytes.
        matmul: `ExpertMatmulParams`; later: x_slot_rows.
        decode: for each larger number of decode rows the `Bound` kernel.
        prefill: `prefill(n_rows)` gives that of prefill.
        glu: the `GluRows` of what expert_few_* does itself (PRODUCT_GLU), or None.
    """

    cdef c.ExpertMatvecParams v
    cdef c.ExpertMatmulParams m
    cdef Conversion conversion
    cdef GluRows glu
    cdef list few, decode
    cdef object prefill
    cdef int few_rows       # most rows of a launch of `few`

    def __init__(self, str name, Conversion conversion, list few, dict matvec, dict matmul, list decode, prefill,
                 GluRows glu=None):
        Node.__init__(self, name)
        self.conversion, self.few, self.glu = conversion, few, glu
        self.few_rows = len((<ExpertProduct>few[0]).bounds) - 1
        self.decode, self.prefill = [None] * (self.few_rows + 1) + decode, prefill
        c.fill_ExpertMatvecParams(&self.v, matvec, ("x_slot_rows", "ring_bytes"))
        c.fill_ExpertMatmulParams(&self.m, matmul, ("x_slot_rows",))

    cdef int enqueue(self, LaunchList launches, const Shape* shape) except -1:
        if shape.n_decode:
            self._decode(launches, shape.n_decode)
        if shape.n_rows > shape.n_decode:
            self._prefill(launches, shape.n_decode, shape.n_rows - shape.n_decode)
        return 0

    cdef int _decode(self, LaunchList launches, int n) except -1:
        """Rows [0, n), n <= 64."""
        cdef int x_slot_rows = n if self.conversion.n_inputs > 1 else 0
        cdef ExpertProduct product
        cdef Bound bound
        cdef c.ExpertMatvecParams p
        self.conversion.enqueue(launches, 0, 0, n, n)
        if n <= self.few_rows:
            for product in self.few:
                product.enqueue(launches, n, x_slot_rows)
            return 0
        bound, p = self.decode[n], self.v
        p.x_slot_rows, p.ring_bytes = x_slot_rows, bound.ring_bytes
        bound.enqueue(launches, &p, sizeof(p))
        if self.glu is not None:
            self.glu.enqueue(launches, 0, n)
        return 0

    cdef int _prefill(self, LaunchList launches, int row, int n) except -1:
        """Prompt rows [row, row + n)."""
        cdef Bound bound = self.prefill(n)
        cdef c.ExpertMatmulParams p = self.m
        cdef int i
        self.conversion.enqueue(launches, row, 0, n, n)
        p.x_slot_rows = n if self.conversion.n_inputs > 1 else 0
        for i in range(self.v.n_matrices):
            p.m[i].out += row * p.m[i].out_stride
        bound.enqueue(launches, &p, sizeof(p))
        if self.glu is not None:
            self.glu.enqueue(launches, row, n)
        return 0
