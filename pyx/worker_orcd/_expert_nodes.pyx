# cython: language_level=3
"""The launches of a layer of experts: routing, the products of the chosen experts, their weighted sum.

Which rows an expert has is known on the device only. Routing leaves two lists there, one of the decode rows and one of
the prompt rows, and the products' grids are sized for the worst case: nothing here waits for the device, so all of it
can be recorded in a graph. Like `_nodes`, this module knows parameter structs, and no plan, file or tokenizer.
"""

from cuda.bindings cimport cydriver as cu
from libc.stdint cimport int32_t, int64_t, uint8_t, uintptr_t

from worker_orcd._driver cimport Kernel
from worker_orcd._nodes cimport Node, Shape


cdef extern from "params/experts_params.h" nogil:
    ctypedef struct ExpertItem:
        pass

    ctypedef struct ExpertList:
        int32_t* n_items
        ExpertItem* items
        int32_t* pairs

    ctypedef struct RouteParams:
        const float* x
        const uint8_t* w
        const float* bias
        float* partial
        float* ids
        float* gates
        int64_t x_stride
        int32_t k, n_k_tiles, n_expert, n_used, n_rows, item_rows
        ExpertList list

    ctypedef struct ExpertMatrix:
        const uint8_t* w
        const float* bias
        float* out
        int64_t out_stride

    ctypedef struct ExpertMatvecParams:
        ExpertMatrix m[2]
        ExpertList list
        const float* x
        const uint8_t* split
        int64_t x_stride, x_slot_stride, split_bytes, matrix_bytes
        int32_t split_slot_rows, n_matrices, n_out, n_used, k, n_k_tiles, ring_bytes

    ctypedef struct ExpertMatmulParams:
        ExpertMatrix m[2]
        ExpertList list
        const uint8_t* x
        const float* x_scale
        int64_t matrix_bytes
        int32_t x_bytes, x_slot_rows, n_out, n_used, n_k_tiles

    ctypedef struct ExpertSumParams:
        const float* x
        const float* gates
        float* out
        int64_t x_stride, out_stride
        int32_t n, n_used


cdef extern from "params/matmul_params.h" nogil:
    ctypedef struct ConvertParams:
        const float* x
        uint8_t* out
        float* scale
        int64_t x_stride, out_bytes
        int32_t k, k_pad, n_rows, n_pad_rows


cdef ExpertList expert_list(parts):
    """The list whose parts lie at the addresses (number of items, items, pairs)."""
    cdef ExpertList out
    cdef uintptr_t n_items, items, pairs
    n_items, items, pairs = parts
    out.n_items, out.items, out.pairs = <int32_t*>n_items, <ExpertItem*>items, <int32_t*>pairs
    return out


cdef class RouteNode(Node):
    """The experts of every row, and the lists of the decode rows and of the prompt rows.

    Args:
        name: of the op.
        kernels: `kernels(image, name, smem)` gives a `Kernel` that may use `smem` bytes.
        layout, experts: the modules `cuda.layout` and `expert_layout`.
        type_id, k, n_expert, n_used: of the router matrix [n_expert, k] at `w`, and of the choice.
        bias: [n_expert] or 0.
        x, x_stride: the input.
        partial: scratch of the logits.
        ids, gates: where the choice is written, [rows, n_used].
        decode_list, prefill_list: addresses of the parts of the lists.
    """

    cdef RouteParams p
    cdef ExpertList decode_list, prefill_list
    cdef object experts
    cdef Kernel logits, choose, make_list
    cdef int64_t partial_floats     # of a row

    def __init__(self, str name, kernels, layout, experts, int type_id, int k, int n_expert, int n_used, uintptr_t w,
                 uintptr_t bias, uintptr_t x, int x_stride, uintptr_t partial, uintptr_t ids, uintptr_t gates,
                 decode_list, prefill_list):
        Node.__init__(self, name)
        self.experts = experts
        self.logits = kernels("route", f"route_logits_{layout.kernel_suffix(type_id)}", 0)
        self.choose, self.make_list = kernels("route", "route_choose", 0), kernels("route", "route_list", 0)
        self.p.x, self.p.w, self.p.bias, self.p.partial = <float*>x, <uint8_t*>w, <float*>bias, <float*>partial
        self.p.ids, self.p.gates, self.p.x_stride = <float*>ids, <float*>gates, x_stride
        self.p.k, self.p.n_k_tiles = k, layout.n_k_tiles(type_id, k)
        self.p.n_expert, self.p.n_used = n_expert, n_used
        self.partial_floats = experts.route_partial_bytes(1, n_expert) // 4
        self.decode_list, self.prefill_list = expert_list(decode_list), expert_list(prefill_list)

    cdef int enqueue(self, cu.CUstream stream, const Shape* shape) except -1:
        cdef RouteParams p = self.p
        cdef int row = shape.n_decode, n_prompt = shape.n_rows - shape.n_decode
        cdef unsigned int gx, gy
        if shape.n_rows == 0:
            return 0
        p.n_rows = shape.n_rows
        gx, gy, _ = self.experts.route_grid(p.n_rows, p.n_expert)
        self.logits.enqueue(stream, gx, gy, 1, 256, 0, &p, True)
        if row:
            p.n_rows, p.item_rows, p.list = row, self.experts.DECODE_ROWS, self.decode_list
            self.choose.enqueue(stream, 1, 1, 1, 1024, 0, &p, True)
        if n_prompt:
            p.partial += row * self.partial_floats
            p.ids += row * p.n_used
            p.gates += row * p.n_used
            p.n_rows, p.item_rows, p.list = n_prompt, 0, self.prefill_list
            self.choose.enqueue(stream, (n_prompt + 31) // 32, 1, 1, 1024, 0, &p, True)
            p.item_rows = self.experts.prefill_rows(n_prompt, p.n_used, p.n_expert)
            self.make_list.enqueue(stream, 1, 1, 1, 1024, 0, &p, True)
        return 0


cdef class ExpertProductNode(Node):
    """Products of every row and slot with one or two matrices, of one type and shape, of the expert in that slot.

    Args:
        name, kernels, layout, experts: as in `RouteNode`.
        type_id, k, n_out, n_expert, n_used: of the matrices [n_out, k] of each expert, and of the choice.
        parts: (w, bias, out, out_stride) of each; device addresses, strides in floats.
        x, x_stride: the input; slot s reads columns x_slot_stride * s on.
        decode_list, prefill_list: addresses of the parts of the lists that routing made.
        split, half, half_scale: workspaces for converted rows, a row for each row and, where slots have inputs of their
            own, slot: of 64 rows x_split_bytes each, of max_batch_tokens x_f16_bytes each and a float each.
        n_sm, max_smem: of the GPU.
    """

    cdef ExpertMatvecParams v
    cdef ExpertMatmulParams m
    cdef ConvertParams to_split, to_half
    cdef object experts
    cdef list launches, decode_kernels
    cdef Kernel convert_split, convert_f16, few_rows, many_rows
    cdef int type_id, n_expert, n_inputs
    cdef uintptr_t split, half, half_scale

    def __init__(self, str name, kernels, layout, experts, int type_id, int k, int n_out, int n_expert, int n_used,
                 list parts, uintptr_t x, int x_stride, int x_slot_stride, decode_list, prefill_list, uintptr_t split,
                 uintptr_t half, uintptr_t half_scale, int n_sm, int max_smem):
        cdef int i
        cdef uintptr_t w, bias, out
        Node.__init__(self, name)
        if not 1 <= len(parts) <= experts.MAX_MATRICES:
            raise ValueError(f"{len(parts)} expert matrices in one launch")
        self.experts, self.type_id, self.n_expert = experts, type_id, n_expert
        self.n_inputs = n_used if x_slot_stride else 1
        self.split, self.half, self.half_scale = split, half, half_scale
        for i, (w, bias, out, out_stride) in enumerate(parts):
            self.v.m[i].w, self.v.m[i].bias, self.v.m[i].out = <uint8_t*>w, <float*>bias, <float*>out
            self.v.m[i].out_stride = out_stride
            self.m.m[i] = self.v.m[i]
        self.v.list, self.m.list = expert_list(decode_list), expert_list(prefill_list)
        self.v.x, self.v.x_stride, self.v.x_slot_stride = <float*>x, x_stride, x_slot_stride
        self.v.split, self.v.split_bytes = <uint8_t*>split, layout.x_split_bytes(type_id, k)
        self.v.matrix_bytes = self.m.matrix_bytes = layout.packed_bytes(type_id, n_out, k)
        self.v.n_matrices, self.v.n_out, self.v.n_used, self.v.k = len(parts), n_out, n_used, k
        self.v.n_k_tiles = self.m.n_k_tiles = layout.n_k_tiles(type_id, k)
        self.m.x, self.m.x_scale, self.m.x_bytes = <uint8_t*>half, <float*>half_scale, layout.x_f16_bytes(type_id, k)
        self.m.n_out, self.m.n_used = n_out, n_used
        self.to_split.out_bytes, self.to_half.out_bytes = self.v.split_bytes, self.m.x_bytes
        self.to_split.x_stride = self.to_half.x_stride = x_stride
        self.to_split.k = self.to_half.k = k
        self.to_split.k_pad = self.to_half.k_pad = layout.k_padded(type_id, k)
        self.convert_split = kernels("convert", "convert_split", 0)
        self.convert_f16 = kernels("convert", "convert_f16", 0)
        self.launches = [None] + [experts.decode_launch(type_id, k, n_out, len(parts), n, n_used, n_expert, n_sm=n_sm,
                                                        max_smem=max_smem) for n in range(1, 65)]
        self.decode_kernels = [None] + [kernels("experts_decode", at.kernel, at.smem) for at in self.launches[1:]]
        few, many = experts.PREFILL_ROWS
        suffix = layout.kernel_suffix(type_id)
        self.few_rows = kernels("experts_prefill", f"expert_matmul_{suffix}_{few}", experts.prefill_smem(type_id, few))
        self.many_rows = kernels("experts_prefill", f"expert_matmul_{suffix}_{many}", experts.prefill_smem(type_id, many))

    cdef int enqueue(self, cu.CUstream stream, const Shape* shape) except -1:
        if shape.n_decode:
            self._decode(stream, shape.n_decode)
        if shape.n_rows > shape.n_decode:
            self._prompt(stream, shape.n_decode, shape.n_rows - shape.n_decode)
        return 0

    cdef int _decode(self, cu.CUstream stream, int n) except -1:
        """Rows [0, n), n <= 64."""
        cdef Kernel kernel = self.decode_kernels[n]
        cdef int i
        launch = self.launches[n]
        if launch.needs_split:
            self.to_split.n_rows = self.to_split.n_pad_rows = n
            for i in range(self.n_inputs):
                self.to_split.x = self.v.x + i * self.v.x_slot_stride
                self.to_split.out = <uint8_t*>self.split + i * n * self.v.split_bytes
                self.convert_split.enqueue(stream, (self.to_split.k_pad // 8 + 255) // 256, n, 1, 256, 0, &self.to_split,
                                           True)
        self.v.split_slot_rows = n if self.n_inputs > 1 else 0
        self.v.ring_bytes = launch.ring_bytes
        return kernel.enqueue(stream, launch.grid[0], 1, 1, launch.block, launch.smem, &self.v, True)

    cdef int _prompt(self, cu.CUstream stream, int row, int n) except -1:
        """Prompt rows [row, row + n)."""
        cdef ExpertMatmulParams p = self.m
        cdef int i
        self.to_half.n_rows = self.to_half.n_pad_rows = n
        for i in range(self.n_inputs):
            self.to_half.x = self.v.x + row * self.v.x_stride + i * self.v.x_slot_stride
            self.to_half.out = <uint8_t*>self.half + <int64_t>i * n * p.x_bytes
            self.to_half.scale = <float*>self.half_scale + <int64_t>i * n
            self.convert_f16.enqueue(stream, n, 1, 1, 256, 0, &self.to_half, True)
        p.x_slot_rows = n if self.n_inputs > 1 else 0
        for i in range(self.v.n_matrices):
            p.m[i].out += row * p.m[i].out_stride
        launch = self.experts.prefill_launch(self.type_id, p.n_out, self.v.n_matrices, n, p.n_used, self.n_expert)
        few = launch.kernel == self.few_rows.name
        return (self.few_rows if few else self.many_rows).enqueue(
            stream, launch.grid[0], launch.grid[1], 1, launch.block, launch.smem, &p, True)


cdef class ExpertSumNode(Node):
    """The slots' results of every row, weighted and added in slot order."""

    cdef Kernel kernel
    cdef ExpertSumParams p

    def __init__(self, str name, Kernel kernel, uintptr_t x, int x_stride, uintptr_t gates, uintptr_t out, int out_stride,
                 int n, int n_used):
        Node.__init__(self, name)
        self.kernel = kernel
        self.p.x, self.p.gates, self.p.out = <float*>x, <float*>gates, <float*>out
        self.p.x_stride, self.p.out_stride, self.p.n, self.p.n_used = x_stride, out_stride, n, n_used

    cdef int enqueue(self, cu.CUstream stream, const Shape* shape) except -1:
        if shape.n_rows == 0:
            return 0
        return self.kernel.enqueue(stream, (self.p.n + 1023) // 1024, shape.n_rows, 1, 256, 0, &self.p, True)
