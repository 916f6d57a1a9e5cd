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


cdef class ExpertProductNode(Node):
    """Products of every row and slot with one or two matrices, of one type and shape, of the expert in that slot.

    Args:
        name: of the op.
        to_split, to_half: the `Conversion`s of the input.
        matvec: `ExpertMatvecParams`; later: split_slot_rows, ring_bytes.
        matmul: `ExpertMatmulParams`; later: x_slot_rows.
        decode: for each number of decode rows, from 1 on, the `Bound` kernel.
        prefill: `prefill(n_rows)` gives that of prefill.
    """

    cdef c.ExpertMatvecParams v
    cdef c.ExpertMatmulParams m
    cdef Conversion to_split, to_half
    cdef list decode
    cdef object prefill
    cdef int n_inputs       # that a row has: one, or one for each slot

    def __init__(self, str name, Conversion to_split, Conversion to_half, dict matvec, dict matmul, list decode,
                 prefill):
        Node.__init__(self, name)
        self.to_split, self.to_half, self.decode, self.prefill = to_split, to_half, [None, *decode], prefill
        c.fill_ExpertMatvecParams(&self.v, matvec, ("split_slot_rows", "ring_bytes"))
        c.fill_ExpertMatmulParams(&self.m, matmul, ("x_slot_rows",))
        self.n_inputs = self.v.n_used if self.v.x_slot_stride else 1

    cdef int enqueue(self, LaunchList launches, const Shape* shape) except -1:
        if shape.n_decode:
            self._decode(launches, shape.n_decode)
        if shape.n_rows > shape.n_decode:
            self._prefill(launches, shape.n_decode, shape.n_rows - shape.n_decode)
        return 0

    cdef int _decode(self, LaunchList launches, int n) except -1:
        """Rows [0, n), n <= 64."""
        cdef Bound bound = self.decode[n]
        cdef c.ExpertMatvecParams p = self.v
        cdef int i
        if bound.needs_split:
            for i in range(self.n_inputs):
                self.to_split.enqueue(launches, i * p.x_slot_stride, i * n, n, n)
        p.split_slot_rows, p.ring_bytes = n if self.n_inputs > 1 else 0, bound.ring_bytes
        return bound.enqueue(launches, &p, sizeof(p))

    cdef int _prefill(self, LaunchList launches, int row, int n) except -1:
        """Prompt rows [row, row + n)."""
        cdef Bound bound = self.prefill(n)
        cdef c.ExpertMatmulParams p = self.m
        cdef int i
        for i in range(self.n_inputs):
            self.to_half.enqueue(launches, row * self.v.x_stride + i * self.v.x_slot_stride, i * n, n, n)
        p.x_slot_rows = n if self.n_inputs > 1 else 0
        for i in range(self.v.n_matrices):
            p.m[i].out += row * p.m[i].out_stride
        return bound.enqueue(launches, &p, sizeof(p))
