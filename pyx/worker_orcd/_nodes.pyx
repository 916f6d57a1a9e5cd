# cython: language_level=3
"""One object per launch of a step: a kernel, its parameter struct, and how its grid follows the step's shape.

Pointers and strides are fixed when a node is made; `enqueue` only fills in what depends on the number of rows. The
engine makes the nodes from lowered records and enqueues them in order, straight into a stream or into a graph.
This module knows the parameter structs of the kernels, and no plan, file or tokenizer.
"""

from cuda.bindings cimport cydriver as cu
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t

from worker_orcd._driver cimport Kernel


cdef extern from "params/ops_params.h" nogil:
    ctypedef struct NormParams:
        float* x
        const float* residual
        const float* weight
        const float* bias
        float* out
        int32_t x_stride, residual_stride, out_stride
        int32_t n, kind, n_group
        float eps

    ctypedef struct RopeKvParams:
        float* q
        float* k
        const float* v
        const float* inv_freq
        const int32_t* rope_tables
        uint16_t* kv
        const int32_t* block_table
        const int32_t* positions
        const int32_t* slots
        int32_t q_stride, k_stride, v_stride
        int32_t n_head, n_head_kv, head_dim, n_rot, rope_type, max_blocks
        float mscale

    ctypedef struct AttentionDecodeParams:
        const float* q
        const uint16_t* kv
        const int32_t* block_table
        const int32_t* positions
        const int32_t* slots
        const float* sinks
        float* out
        float* partial
        uint32_t* counters
        int32_t q_stride, out_stride
        int32_t n_head, n_head_kv, max_blocks, max_splits, window
        float scale

    ctypedef struct AttentionTile:
        int32_t row, n_rows, position, slot

    ctypedef struct AttentionPrefillParams:
        const float* q
        const uint16_t* kv
        const int32_t* block_table
        const AttentionTile* tiles
        const float* sinks
        float* out
        int32_t q_stride, out_stride
        int32_t n_head, n_head_kv, max_blocks, window
        float scale

    ctypedef struct PointwiseParams:
        const float* a
        const float* b
        float* out
        const int32_t* rows
        int32_t a_stride, b_stride, out_stride
        int32_t n, kind

    ctypedef struct SlotSampling:
        pass

    ctypedef struct SamplePartial:
        pass

    ctypedef struct SampleParams:
        const float* logits
        const SlotSampling* samples
        const int32_t* slots
        int32_t* positions
        uint32_t* seen
        SamplePartial* partial
        uint64_t* chunk_weights
        uint64_t* bin_weights
        uint32_t* bin_counts
        uint32_t* done
        int32_t* next_tokens
        int32_t* out
        uint64_t* step
        uint64_t* host_step
        int32_t* failed
        int32_t logits_stride, n_vocab, n_chunks, seen_words, out_steps, out_stride, advance

    enum: SAMPLE_DRAW_SMEM
    enum: SAMPLE_BINS
    int32_t sample_chunks(int32_t n_vocab)
    int32_t norm_threads(int32_t n, int32_t is_scalar)
    int32_t c_decode_max_splits "decode_max_splits"(int32_t context_length, int32_t window)
    int32_t decode_head_tiles(int32_t n_head, int32_t n_head_kv)
    int32_t decode_smem_bytes(int32_t head_dim)
    int32_t prefill_smem_bytes(int32_t head_dim)


cdef extern from "params/matmul_params.h" nogil:
    enum: MATVEC_MAX_MATRICES

    ctypedef struct RowsParams:
        const uint8_t* w
        const int32_t* index
        float* out
        int64_t out_stride
        float scale
        int32_t k, n_table, n_rows, add

    ctypedef struct ConvertParams:
        const float* x
        uint8_t* out
        float* scale
        int64_t x_stride, out_bytes
        int32_t k, k_pad, n_rows, n_pad_rows

    ctypedef struct MatvecMatrix:
        const uint8_t* w
        const float* bias
        float* out
        int64_t out_stride
        int32_t n_out, row_tile0, add, unused

    ctypedef struct MatvecParams:
        MatvecMatrix m[4]
        const float* x
        const uint8_t* split
        int64_t x_stride, split_bytes
        int32_t n_matrices, n_row_tiles, k, n_k_tiles, n_rows, ring_bytes

    ctypedef struct MatmulParams:
        const uint8_t* w
        const uint8_t* x
        const float* x_scale
        const float* bias
        float* out
        int64_t x_bytes, out_stride
        int32_t n_out, n_k_tiles, n_rows, add


KINDS = {"rms": 0, "layer": 1}
ROPE_TYPES = {"interleaved": 0, "neox": 1}
GLUS = {"silu": 0, "gelu_tanh": 1, "swiglu_oai": 2}


def decode_max_splits(int context_length, int window):
    """Splits of the workspace that decode attention needs for a sequence of up to `context_length` positions."""
    return c_decode_max_splits(context_length, window)


def sample_sizes(int n_vocab):
    """Workspace of sampling per row, in bytes: (partial, chunk_weights, bin_weights, bin_counts)."""
    chunks = sample_chunks(n_vocab)
    return chunks * sizeof(SamplePartial), chunks * 8, SAMPLE_BINS * 8, SAMPLE_BINS * 4


def attention_heads(int n_head, int n_head_kv):
    """Blocks in y of a decode attention launch: KV heads times tiles of query heads."""
    return n_head_kv * decode_head_tiles(n_head, n_head_kv)


cdef class Node:
    """Base: a named launch. `enqueue` queues it for a step of the given shape; zero rows queue nothing."""

    cdef int enqueue(self, cu.CUstream stream, const Shape* shape) except -1:
        raise NotImplementedError

    def __init__(self, str name):
        self.name = name


cdef class NormNode(Node):
    """RMS or layer norm of every row (of output rows with `outputs`); `group` > 0: of each run of that many columns."""

    cdef Kernel kernel
    cdef NormParams p
    cdef bint outputs
    cdef int threads

    def __init__(self, str name, lib, str kind, float eps, uintptr_t x, int x_stride, uintptr_t weight, uintptr_t bias,
                 uintptr_t out, int out_stride, int n, bint outputs, int group=0):
        Node.__init__(self, name)
        self.outputs = outputs
        aligned = n % 4 == 0 and x_stride % 4 == 0 and out_stride % 4 == 0 and (x | out | weight | bias) % 16 == 0
        self.kernel = lib.kernel("norm_group" if group else "norm_vec4" if aligned else "norm_scalar")
        self.p.x, self.p.weight, self.p.bias, self.p.out = <float*>x, <float*>weight, <float*>bias, <float*>out
        self.p.x_stride, self.p.out_stride, self.p.eps, self.p.kind = x_stride, out_stride, eps, KINDS[kind]
        self.p.n = group if group else n
        self.p.n_group = n // group if group else 0
        self.threads = 256 if group else norm_threads(n, 0 if aligned else 1)

    cdef int enqueue(self, cu.CUstream stream, const Shape* shape) except -1:
        cdef unsigned int rows = shape.n_out if self.outputs else shape.n_rows
        if rows == 0:
            return 0
        if self.p.n_group:
            return self.kernel.enqueue(stream, (self.p.n_group + 7) // 8, rows, 1, 256, 0, &self.p, True)
        return self.kernel.enqueue(stream, rows, 1, 1, self.threads, 0, &self.p, True)


cdef class EmbedNode(Node):
    """Rows of a repacked matrix by token (or position) index; with `add` onto what is there."""

    cdef Kernel kernel
    cdef RowsParams p
    cdef int threads

    def __init__(self, str name, Kernel kernel, uintptr_t w, uintptr_t index, uintptr_t out, int out_stride, float scale,
                 int k, int n_table, bint add, int threads):
        Node.__init__(self, name)
        self.kernel, self.threads = kernel, threads
        self.p.w, self.p.index, self.p.out = <uint8_t*>w, <int32_t*>index, <float*>out
        self.p.out_stride, self.p.scale, self.p.k, self.p.n_table, self.p.add = out_stride, scale, k, n_table, add

    cdef int enqueue(self, cu.CUstream stream, const Shape* shape) except -1:
        if shape.n_rows == 0:
            return 0
        self.p.n_rows = shape.n_rows
        return self.kernel.enqueue(stream, shape.n_rows, 1, 1, self.threads, 0, &self.p, True)


cdef class RopeKvNode(Node):
    """Rotation of q and k in place and k, v into the cache; a null `q` rotates nothing of q, a null `v` stores nothing."""

    cdef Kernel kernel
    cdef RopeKvParams p
    cdef unsigned int split

    def __init__(self, str name, lib, uintptr_t q, int q_stride, uintptr_t k, int k_stride, uintptr_t v, int v_stride,
                 uintptr_t inv_freq, uintptr_t rope_tables, uintptr_t kv, uintptr_t block_table, uintptr_t positions,
                 uintptr_t slots, int n_head, int n_head_kv, int head_dim, int n_rot, str rope_type, int max_blocks, float mscale):
        Node.__init__(self, name)
        self.kernel = lib.kernel("rope_kv")
        self.p.q, self.p.k, self.p.v = <float*>q, <float*>k, <float*>v
        self.p.q_stride, self.p.k_stride, self.p.v_stride = q_stride, k_stride, v_stride
        self.p.inv_freq, self.p.kv, self.p.block_table = <float*>inv_freq, <uint16_t*>kv, <int32_t*>block_table
        self.p.positions, self.p.slots = <int32_t*>positions, <int32_t*>slots
        self.p.rope_tables = <int32_t*>rope_tables
        self.p.n_head, self.p.n_head_kv, self.p.head_dim = n_head, n_head_kv, head_dim
        self.p.n_rot, self.p.max_blocks, self.p.mscale = n_rot, max_blocks, mscale
        self.p.rope_type = ROPE_TYPES[rope_type] if rope_type else 0
        items = (n_head + 2 * n_head_kv) * head_dim // 2
        self.split = max(1, min(8, (items + 511) // 512))

    cdef int enqueue(self, cu.CUstream stream, const Shape* shape) except -1:
        if shape.n_rows == 0:
            return 0
        return self.kernel.enqueue(stream, shape.n_rows, self.split, 1, 256, 0, &self.p, True)


cdef class AttentionNode(Node):
    """Attention of decode rows (split over positions) and of prompt rows (tiles)."""

    cdef Kernel decode_kernel, prefill_kernel
    cdef AttentionDecodeParams d
    cdef AttentionPrefillParams p
    cdef unsigned int heads, decode_smem, prefill_smem, sm_count

    def __init__(self, str name, decode_lib, prefill_lib, uintptr_t q, int q_stride, uintptr_t out, int out_stride,
                 uintptr_t kv, uintptr_t block_table, uintptr_t positions, uintptr_t slots, uintptr_t tiles,
                 uintptr_t sinks, uintptr_t partial, uintptr_t counters, int n_head, int n_head_kv, int head_dim,
                 int max_blocks, int max_splits, int window, float scale, unsigned int sm_count):
        Node.__init__(self, name)
        self.heads = attention_heads(n_head, n_head_kv)
        self.decode_smem, self.prefill_smem = decode_smem_bytes(head_dim), prefill_smem_bytes(head_dim)
        self.decode_kernel = decode_lib.kernel(f"attention_decode_{head_dim}", self.decode_smem)
        self.prefill_kernel = prefill_lib.kernel(f"attention_prefill_{head_dim}", self.prefill_smem)
        self.sm_count = sm_count
        self.d.q, self.d.kv, self.d.block_table = <float*>q, <uint16_t*>kv, <int32_t*>block_table
        self.d.positions, self.d.slots, self.d.sinks = <int32_t*>positions, <int32_t*>slots, <float*>sinks
        self.d.out, self.d.partial, self.d.counters = <float*>out, <float*>partial, <uint32_t*>counters
        self.d.q_stride, self.d.out_stride, self.d.n_head, self.d.n_head_kv = q_stride, out_stride, n_head, n_head_kv
        self.d.max_blocks, self.d.max_splits, self.d.window, self.d.scale = max_blocks, max_splits, window, scale
        self.p.q, self.p.kv, self.p.block_table = <float*>q, <uint16_t*>kv, <int32_t*>block_table
        self.p.tiles, self.p.sinks, self.p.out = <AttentionTile*>tiles, <float*>sinks, <float*>out
        self.p.q_stride, self.p.out_stride, self.p.n_head, self.p.n_head_kv = q_stride, out_stride, n_head, n_head_kv
        self.p.max_blocks, self.p.window, self.p.scale = max_blocks, window, scale

    cdef int enqueue(self, cu.CUstream stream, const Shape* shape) except -1:
        cdef unsigned int splits
        if shape.n_decode:
            # enough blocks for two a multiprocessor; results do not depend on how many there are
            splits = max(1, min(<unsigned int>self.d.max_splits,
                                (2 * self.sm_count + self.heads * shape.n_decode - 1) // (self.heads * shape.n_decode)))
            self.decode_kernel.enqueue(stream, splits, self.heads, shape.n_decode, 128, self.decode_smem, &self.d, True)
        if shape.n_tiles:
            self.prefill_kernel.enqueue(stream, shape.n_tiles, self.p.n_head, 1, 128, self.prefill_smem, &self.p, True)
        return 0


cdef class PointwiseNode(Node):
    """glu, act_gelu_tanh, add or gather_rows over every row (output rows with `outputs`)."""

    cdef Kernel kernel
    cdef PointwiseParams p
    cdef bint outputs

    def __init__(self, str name, lib, str kernel, uintptr_t a, int a_stride, uintptr_t b, int b_stride, uintptr_t out,
                 int out_stride, uintptr_t rows, int n, str kind="", bint outputs=False):
        Node.__init__(self, name)
        self.kernel, self.outputs = lib.kernel(kernel), outputs
        self.p.a, self.p.b, self.p.out, self.p.rows = <float*>a, <float*>b, <float*>out, <int32_t*>rows
        self.p.a_stride, self.p.b_stride, self.p.out_stride, self.p.n = a_stride, b_stride, out_stride, n
        self.p.kind = GLUS[kind] if kind else 0

    cdef int enqueue(self, cu.CUstream stream, const Shape* shape) except -1:
        cdef unsigned int rows = shape.n_out if self.outputs else shape.n_rows
        if rows == 0:
            return 0
        return self.kernel.enqueue(stream, ((self.p.n + 3) // 4 + 255) // 256, rows, 1, 256, 0, &self.p, True)


cdef struct MatvecLaunch:
    unsigned int grid, block, smem
    int32_t ring_bytes
    int32_t pad_rows    # rows of the kernel's tiles
    bint needs_split


cdef class MatMulNode(Node):
    """Products of one input with up to four matrices of one type.

    Decode rows (and all rows with `outputs`) go through the matvec family in groups of up to 64, prompt rows through
    the matmul family: within each, a row's sums do not depend on the other rows.

    Args:
        name: of the op.
        kernels: `kernels(image, name, smem)` gives a `Kernel` that may use `smem` bytes.
        layout: the module `cuda.layout`.
        type_id, k: of the matrices.
        parts: (w, bias, out, out_stride, n_out) of each; device addresses, strides in floats.
        x, x_stride: the input.
        add: add to what is in `out`.
        outputs: the rows are the step's output rows.
        split, half, half_scale: workspaces for converted input rows: 64 rows of x_split_bytes; max_batch_tokens (rounded up to
            128) rows of x_f16_bytes; as many floats.
        n_sm, max_smem: of the GPU.
    """

    cdef MatvecParams v
    cdef MatmulParams m[4]
    cdef ConvertParams to_split, to_half
    cdef int n_parts, stride
    cdef bint outputs
    cdef uintptr_t x
    cdef MatvecLaunch launches[65]
    cdef list matvec_kernels, part_n_out
    cdef object kernels, layout
    cdef Kernel convert_split, convert_f16, small, large
    cdef int type_id, k, warps, n_sm, max_smem

    def __init__(self, str name, kernels, layout, int type_id, int k, list parts, uintptr_t x, int x_stride, bint add,
                 bint outputs, uintptr_t split, uintptr_t half, uintptr_t half_scale, int n_sm, int max_smem):
        cdef int i, strips = 0
        cdef uintptr_t w, bias, out
        Node.__init__(self, name)
        if not 1 <= len(parts) <= MATVEC_MAX_MATRICES:
            raise ValueError(f"{len(parts)} matrices in one launch")
        self.kernels, self.layout, self.type_id, self.k = kernels, layout, type_id, k
        self.n_parts, self.stride, self.outputs, self.x = len(parts), x_stride, outputs, x
        self.n_sm, self.max_smem = n_sm, max_smem
        self.part_n_out = [part[4] for part in parts]
        units, k_pad = layout.n_k_tiles(type_id, k), layout.k_padded(type_id, k)
        for i, (w, bias, out, out_stride, n_out) in enumerate(parts):
            self.v.m[i].w, self.v.m[i].bias, self.v.m[i].out = <uint8_t*>w, <float*>bias, <float*>out
            self.v.m[i].out_stride, self.v.m[i].n_out = out_stride, n_out
            self.v.m[i].row_tile0, self.v.m[i].add = strips, add
            self.m[i].w, self.m[i].bias, self.m[i].out = <uint8_t*>w, <float*>bias, <float*>out
            self.m[i].x, self.m[i].x_scale = <uint8_t*>half, <float*>half_scale
            self.m[i].x_bytes, self.m[i].out_stride = layout.x_f16_bytes(type_id, k), out_stride
            self.m[i].n_out, self.m[i].n_k_tiles, self.m[i].add = n_out, units, add
            strips += layout.n_row_tiles(n_out)
        self.v.split, self.v.x_stride = <uint8_t*>split, x_stride
        self.v.split_bytes = layout.x_split_bytes(type_id, k)
        self.v.n_matrices, self.v.n_row_tiles, self.v.k, self.v.n_k_tiles = self.n_parts, strips, k, units
        self.warps = layout.matvec_warps(type_id, k)
        self.to_split.out, self.to_split.out_bytes = <uint8_t*>split, self.v.split_bytes
        self.to_half.out, self.to_half.scale = <uint8_t*>half, <float*>half_scale
        self.to_half.out_bytes = layout.x_f16_bytes(type_id, k)
        self.to_split.x_stride = self.to_half.x_stride = x_stride
        self.to_split.k = self.to_half.k = k
        self.to_split.k_pad = self.to_half.k_pad = k_pad
        self.convert_split = kernels("convert", "convert_split", 0)
        self.convert_f16 = kernels("convert", "convert_f16", 0)
        self.matvec_kernels = [None] * 65
        suffix = layout.kernel_suffix(type_id)
        if not outputs:
            self.large = kernels("matmul", f"matmul_{suffix}", layout.matmul_stages(type_id, False)[2])
            self.small = kernels("matmul", f"matmul_{suffix}_small", layout.matmul_stages(type_id, True)[2])
        for i in range(1, 65):
            launch = layout.matvec_launch(type_id, k, tuple(self.part_n_out), i, n_sm=n_sm,
                                          max_smem=max_smem)
            self.launches[i].grid, self.launches[i].block, self.launches[i].smem = launch.grid[0], launch.block, launch.smem
            self.launches[i].ring_bytes, self.launches[i].needs_split = launch.ring_bytes, launch.needs_split
            self.launches[i].pad_rows = 8 * int(launch.kernel.rsplit("_", 1)[1])
            self.matvec_kernels[i] = kernels("matvec", launch.kernel, launch.smem)

    cdef int enqueue(self, cu.CUstream stream, const Shape* shape) except -1:
        cdef int n_matvec = shape.n_out if self.outputs else shape.n_decode, row = 0
        while row < n_matvec:
            self._matvec(stream, row, min(64, n_matvec - row))
            row += 64
        if not self.outputs and shape.n_rows > n_matvec:
            self._matmul(stream, n_matvec, shape.n_rows - n_matvec)
        return 0

    cdef int _matvec(self, cu.CUstream stream, int row, int n) except -1:
        """Rows [row, row + n), n <= 64."""
        cdef MatvecLaunch* launch = &self.launches[n]
        cdef MatvecParams p = self.v
        cdef int i
        cdef Kernel kernel = self.matvec_kernels[n]
        for i in range(self.n_parts):
            p.m[i].out = p.m[i].out + row * p.m[i].out_stride
        p.x = <float*>self.x + <int64_t>row * self.stride
        p.n_rows, p.ring_bytes = n, launch.ring_bytes
        if launch.needs_split:
            self.to_split.x = p.x
            self.to_split.n_rows, self.to_split.n_pad_rows = n, launch.pad_rows
            self.convert_split.enqueue(stream, (self.to_split.k_pad // 8 + 255) // 256, launch.pad_rows, 1, 256, 0,
                                       &self.to_split, True)
        return kernel.enqueue(stream, launch.grid, 1, 1, launch.block, launch.smem, &p, True)

    cdef int _matmul(self, cu.CUstream stream, int row, int n) except -1:
        """Prompt rows [row, row + n)."""
        cdef MatmulParams p
        cdef int i, side
        cdef bint few
        self.to_half.x = <float*>self.x + <int64_t>row * self.stride
        self.to_half.n_rows, self.to_half.n_pad_rows = n, (n + 63) // 64 * 64  # whole tiles of the kernels
        self.convert_f16.enqueue(stream, self.to_half.n_pad_rows, 1, 1, 256, 0, &self.to_half, True)
        for i in range(self.n_parts):
            p = self.m[i]
            p.out = p.out + row * p.out_stride
            p.n_rows = n
            launch = self.layout.matmul_launch(self.type_id, p.n_out, n, self.n_sm)
            few = launch.kernel.endswith("_small")
            (self.small if few else self.large).enqueue(stream, launch.grid[0], launch.grid[1], 1, launch.block, launch.smem,
                                                        &p, True)
        return 0


cdef class SampleNode(Node):
    """The next token of every output row.

    Args:
        lib: the library of the sampling kernels.
        addresses: device addresses by name: logits, samples, seen, partial, chunk_weights, bin_weights, bin_counts,
            done, step, failed.
        slots, positions: of the rows.
        next_tokens: where the drawn tokens become the next step's input, or 0.
        out, host_step: device addresses of the pinned token ring [out_steps, out_stride] and its step number.
        n_vocab: size of the vocabulary.
        advance: count the positions up.
        greedy: every row takes its largest logit, so no weights are needed.
    """

    cdef Kernel largest, weigh, draw
    cdef SampleParams p
    cdef bint greedy

    def __init__(self, str name, lib, dict addresses, uintptr_t slots, uintptr_t positions, uintptr_t next_tokens,
                 uintptr_t out, uintptr_t host_step, int n_vocab, int out_steps, int out_stride, bint advance, bint greedy):
        Node.__init__(self, name)
        self.largest, self.weigh = lib.kernel("sample_max"), lib.kernel("sample_weigh")
        self.draw = lib.kernel("sample_draw", SAMPLE_DRAW_SMEM)
        self.greedy = greedy
        self.p.logits, self.p.samples = <float*><uintptr_t>addresses["logits"], <SlotSampling*><uintptr_t>addresses["samples"]
        self.p.slots, self.p.positions = <int32_t*>slots, <int32_t*>positions
        self.p.seen = <uint32_t*><uintptr_t>addresses["seen"]
        self.p.partial = <SamplePartial*><uintptr_t>addresses["partial"]
        self.p.chunk_weights = <uint64_t*><uintptr_t>addresses["chunk_weights"]
        self.p.bin_weights = <uint64_t*><uintptr_t>addresses["bin_weights"]
        self.p.bin_counts = <uint32_t*><uintptr_t>addresses["bin_counts"]
        self.p.done, self.p.step = <uint32_t*><uintptr_t>addresses["done"], <uint64_t*><uintptr_t>addresses["step"]
        self.p.failed = <int32_t*><uintptr_t>addresses["failed"]
        self.p.next_tokens, self.p.out, self.p.host_step = <int32_t*>next_tokens, <int32_t*>out, <uint64_t*>host_step
        self.p.logits_stride = self.p.n_vocab = n_vocab
        self.p.n_chunks, self.p.seen_words = sample_chunks(n_vocab), (n_vocab + 31) // 32
        self.p.out_steps, self.p.out_stride, self.p.advance = out_steps, out_stride, advance

    cdef int enqueue(self, cu.CUstream stream, const Shape* shape) except -1:
        cdef unsigned int rows = shape.n_out
        if rows == 0:
            return 0
        self.largest.enqueue(stream, self.p.n_chunks, rows, 1, 256, 0, &self.p, True)
        if not self.greedy:
            self.weigh.enqueue(stream, self.p.n_chunks, rows, 1, 256, 0, &self.p, True)
        return self.draw.enqueue(stream, rows, 1, 1, 1024, SAMPLE_DRAW_SMEM, &self.p, True)
