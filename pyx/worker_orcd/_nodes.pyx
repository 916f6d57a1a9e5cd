# cython: language_level=3
"""One object per launch of a step: a kernel, its parameter struct, and how its grid follows the step's shape.

Parameters are given as dicts, by the field names of csrc/params, with addresses and strides that are fixed when a node
is made; `enqueue` only sets what depends on the number of rows, which is what each node lists as `later`. The engine
makes the nodes from lowered ops and enqueues them in order into a list of launches, for a stream or a graph.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from worker_orcd cimport _params as c
from worker_orcd._driver cimport Kernel, LaunchList

#: numbers of the kernels' parameters by the plan's words
NORM_KINDS = {"rms": c.NORM_RMS, "layer": c.NORM_LAYER}
ROPE_TYPES = {"interleaved": c.ROPE_INTERLEAVED, "neox": c.ROPE_NEOX}
GLU_KINDS = {"silu": c.GLU_SILU, "gelu_tanh": c.GLU_GELU_TANH, "swiglu_oai": c.GLU_SWIGLU_OAI}
#: what a conversion does before: the norm, or nothing
CONVERT_KINDS = {"rms": c.CONVERT_RMS, "layer": c.CONVERT_LAYER, None: c.CONVERT_PLAIN}
#: what becomes of the results of a product
PRODUCT_MODES = {"store": c.PRODUCT_STORE, "add": c.PRODUCT_ADD, "glu": c.PRODUCT_GLU, "mix": c.PRODUCT_MIX}
#: at least what decode attention takes beside its dynamic shared memory
DECODE_STATIC_SMEM = 4096


def decode_max_splits(int context_length, int window):
    """Splits of the workspace that decode attention needs for a sequence of up to `context_length` positions."""
    return c.decode_max_splits(context_length, window)


def attention_heads(int n_head, int n_head_kv):
    """Blocks in y of a decode attention launch: KV heads times tiles of query heads."""
    return n_head_kv * c.decode_head_tiles(n_head, n_head_kv)


def decode_partial_rows(int heads):
    """Rows, of `attention_heads` blocks each, whose splits the workspace has room for; of more rows none needs it."""
    return c.decode_partial_rows(heads)


def decode_shapes(int head_dim, int max_smem):
    """What a block of decode attention can be: (groups, depth, dynamic shared memory bytes), from the least to what
    `max_smem` bytes allow."""
    shapes = [(1, 1), (c.DECODE_GROUPS, 1), (c.DECODE_GROUPS, c.DECODE_DEPTH)]
    all_ = [(groups, depth, c.decode_smem_bytes(head_dim, groups, depth)) for groups, depth in shapes]
    return tuple(shape for i, shape in enumerate(all_) if i == 0 or shape[2] + DECODE_STATIC_SMEM <= max_smem)


def decode_grid(int n_rows, int heads, int max_splits, tuple shapes, int sm_count, int max_smem):
    """The decode attention launch of `n_rows` rows: (blocks that share a row, groups, depth, dynamic shared memory
    bytes). Results depend on none of them.

    Args:
        heads, max_splits, shapes: `attention_heads`, `decode_max_splits` and `decode_shapes`.
        sm_count, max_smem: multiprocessors of the GPU, and the shared memory of one.
    """
    blocks = heads * n_rows
    # the workspace has no room for the splits of more rows; and many blocks fit together, where few are faster each
    if n_rows > c.decode_partial_rows(heads):
        return 1, *shapes[0]
    # of a few rows with many heads, too, small ones are faster
    is_few = blocks <= sm_count and (n_rows < 4 or blocks < 32)
    groups, depth, smem = shapes[len(shapes) - 1] if is_few else shapes[0]
    # as many blocks as run at once
    splits = max(1, min(max_splits, sm_count * min(2 // groups, max_smem // smem) // blocks))
    return splits, groups, depth, smem


def prefill_smem(int head_dim, bint by_warpgroups):
    """Dynamic shared memory of prefill attention: of attention_prefill_* or attention_warpgroup_*."""
    return c.warpgroup_smem_bytes(head_dim) if by_warpgroups else c.prefill_smem_bytes(head_dim)


def norm_threads(int n, bint is_scalar):
    """Threads of a block of norm_vec4 or norm_scalar for rows of `n` columns."""
    return c.norm_threads(n, is_scalar)


def sample_groups(int n_vocab):
    """Groups of tokens of a row of logits."""
    return c.sample_groups(n_vocab)


def sample_sizes(int n_vocab):
    """Workspace of sampling per row, in bytes: (best, arrived, group_keys, group_weights, bin_weights, bin_counts)."""
    groups = c.sample_groups(n_vocab)
    return 8, 4, groups * 8, groups * 8, c.SAMPLE_BINS * 8, c.SAMPLE_BINS * 4


cdef class Node:
    """Base: a named launch. `enqueue` queues it for a step of the given shape; zero rows queue nothing."""

    cdef int enqueue(self, LaunchList launches, const Shape* shape) except -1:
        raise NotImplementedError

    def __init__(self, str name):
        self.name = name


cdef class RowNode(Node):
    """One kernel over the tokens of a step, with parameters that do not change.

    Args:
        name: of the op.
        kernel: the `Kernel`.
        struct, fields: its parameters, a struct of csrc/params.
        grid: blocks in (x, y); 0 stands for the number of rows.
        block: threads of a block.
        outputs: the rows are the step's output rows.
    """

    cdef Kernel kernel
    cdef uint64_t params[c.MAX_PARAMS_WORDS]
    cdef unsigned int grid[2]
    cdef unsigned int block
    cdef bint outputs

    def __init__(self, str name, Kernel kernel, str struct, dict fields, tuple grid, unsigned int block,
                 bint outputs=False):
        Node.__init__(self, name)
        c.fill(struct, self.params, fields)
        self.kernel, self.block, self.outputs = kernel, block, outputs
        self.grid[0], self.grid[1] = grid

    cdef int enqueue(self, LaunchList launches, const Shape* shape) except -1:
        cdef unsigned int rows = shape.n_out if self.outputs else shape.n_rows
        if rows == 0:
            return 0
        return launches.add(self.kernel, self.grid[0] or rows, self.grid[1] or rows, 1, self.block, 0, self.params,
                            sizeof(self.params), True)


cdef class AttentionNode(Node):
    """Attention of decode rows (split over positions) and of prefill rows (tiles).

    Args:
        name: of the op.
        decode_kernel, prefill_kernel: allowed the last of `decode_shapes`, `prefill_smem`.
        decode: `AttentionDecodeParams`; later: groups, depth; kv_group and head_tiles follow from n_head and n_head_kv.
            With k and v it rotates and fills the cache itself.
        prefill: `AttentionPrefillParams`.
        smem: `decode_shapes` and `prefill_smem`.
        sm_count, max_smem: multiprocessors of the GPU, and the shared memory of one.
        rope: of prefill rows, where decode rows rotate by themselves: the kernel rope_kv, its `RopeKvParams`, blocks
            of a row.
    """

    cdef Kernel decode_kernel, prefill_kernel, rope_kernel
    cdef c.AttentionDecodeParams d
    cdef c.AttentionPrefillParams p
    cdef c.RopeKvParams r
    cdef tuple decode_shapes
    cdef unsigned int heads, prefill_smem, sm_count, max_smem, rope_blocks

    def __init__(self, str name, Kernel decode_kernel, Kernel prefill_kernel, dict decode, dict prefill, tuple smem,
                 unsigned int sm_count, unsigned int max_smem, tuple rope=None):
        Node.__init__(self, name)
        self.decode_kernel, self.prefill_kernel = decode_kernel, prefill_kernel
        self.sm_count, self.max_smem = sm_count, max_smem
        c.fill_AttentionDecodeParams(&self.d, decode, ("groups", "depth", "kv_group", "head_tiles"))
        c.fill_AttentionPrefillParams(&self.p, prefill, ())
        self.d.kv_group = self.d.n_head // self.d.n_head_kv
        self.d.head_tiles = c.decode_head_tiles(self.d.n_head, self.d.n_head_kv)
        self.heads = attention_heads(self.d.n_head, self.d.n_head_kv)
        self.decode_shapes, self.prefill_smem = smem
        if rope is not None:
            self.rope_kernel, fields, self.rope_blocks = rope
            c.fill_RopeKvParams(&self.r, fields, ())

    cdef int enqueue(self, LaunchList launches, const Shape* shape) except -1:
        if shape.n_decode:
            self._decode(launches, shape.n_decode)
        if self.rope_kernel is not None and shape.n_rows > shape.n_decode:
            self._rope(launches, shape.n_decode, shape.n_rows - shape.n_decode)
        if shape.n_tiles:
            launches.add(self.prefill_kernel, shape.n_tiles, self.p.n_head, 1, 128, self.prefill_smem, &self.p,
                         sizeof(self.p), True)
        return 0

    cdef int _decode(self, LaunchList launches, unsigned int n_rows) except -1:
        cdef c.AttentionDecodeParams p = self.d
        cdef unsigned int splits, smem
        splits, p.groups, p.depth, smem = decode_grid(n_rows, self.heads, p.max_splits, self.decode_shapes,
                                                      self.sm_count, self.max_smem)
        return launches.add(self.decode_kernel, splits, self.heads, n_rows, p.groups * c.DECODE_THREADS, smem, &p,
                            sizeof(p), True)

    cdef int _rope(self, LaunchList launches, int row, int n) except -1:
        """Prompt rows [row, row + n)."""
        cdef c.RopeKvParams p = self.r
        p.q += row * p.q_stride
        p.k += row * p.k_stride
        p.v += row * p.v_stride
        p.positions += row
        p.slots += row
        return launches.add(self.rope_kernel, n, self.rope_blocks, 1, 256, 0, &p, sizeof(p), True)


cdef class SampleNode(Node):
    """The next token of every output row.

    Args:
        name: of the launch.
        largest, draw: the kernels sample_max and sample_draw.
        fields: `SampleParams`; sample_draw is launched where its `draw_follows` says so.
        sm_count: multiprocessors of the GPU.
    """

    cdef Kernel largest, draw
    cdef c.SampleParams p
    cdef unsigned int sm_count

    def __init__(self, str name, Kernel largest, Kernel draw, dict fields, unsigned int sm_count):
        Node.__init__(self, name)
        self.largest, self.draw, self.sm_count = largest, draw, sm_count
        c.fill_SampleParams(&self.p, fields, ())

    cdef int enqueue(self, LaunchList launches, const Shape* shape) except -1:
        cdef unsigned int rows = shape.n_out
        if rows == 0:
            return 0
        cdef unsigned int blocks = c.sample_blocks(self.p.n_vocab, rows, self.sm_count)
        launches.add(self.largest, blocks, rows, 1, c.SAMPLE_THREADS, 0, &self.p, sizeof(self.p), True)
        if self.p.draw_follows:
            launches.add(self.draw, blocks, rows, 1, c.SAMPLE_THREADS, 0, &self.p, sizeof(self.p), True)
        return 0


include "nodes_products.pxi"
include "nodes_experts.pxi"
