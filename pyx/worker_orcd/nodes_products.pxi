# Products with weight matrices; included by _nodes.pyx. Rows come as float32 and are converted to fp16 first, with the
# norm before the product where there is one: by a launch of its own, or by the product itself for one decode row.


cdef class Conversion:
    """convert_rows with its parameters.

    Args:
        kernel, to_places: the `Kernel`s convert_rows and convert_rows_to_places.
        fields: `ConvertParams`; later: n_rows, n_pad_rows, order, factors, factor_stride, places,
            places_stride, n_copies.
        n_inputs: that a row has: one, or one for each slot of a row of experts.
    """

    cdef Kernel kernel, to_places
    cdef c.ConvertParams p
    cdef int n_inputs

    def __init__(self, Kernel kernel, Kernel to_places, dict fields, int n_inputs=1):
        c.fill_ConvertParams(&self.p, fields, ("n_rows", "n_pad_rows", "order", "factors", "factor_stride", "places",
                                               "places_stride", "n_copies"))
        self.kernel, self.to_places, self.n_inputs = kernel, to_places, n_inputs

    cdef int enqueue(self, LaunchList launches, int64_t x_row, int64_t row, int n, int n_pad,
                     int order=c.CONVERTED_FRAGMENTS) except -1:
        """Convert `n` rows from row `x_row` of x on into converted rows [row, row + n_pad) (of each input); the rest
        are zeros."""
        cdef c.ConvertParams p = self.p
        p.order = order
        p.x += x_row * p.x_stride
        p.out += row * p.out_bytes
        p.n_rows, p.n_pad_rows = n, n_pad
        return launches.add(self.kernel, n_pad, self.n_inputs, 1, 256, 0, &p, sizeof(p), True)

    cdef int enqueue_tiles(self, LaunchList launches, int n) except -1:
        """Convert rows [0, n) into tiles, with their factors behind (`tile_factors`)."""
        cdef c.ConvertParams p = self.p
        p.order, p.n_rows, p.n_pad_rows = c.CONVERTED_TILES, n, (n + 7) // 8 * 8
        p.factors, p.factor_stride = tile_factors(p.out, p.k, p.n_pad_rows), p.n_pad_rows
        return launches.add(self.kernel, p.n_pad_rows, self.n_inputs, 1, 256, 0, &p, sizeof(p), True)

    cdef int enqueue_roots(self, LaunchList launches, int n) except -1:
        """Leave what norms leave of rows [0, n), and convert none."""
        cdef c.ConvertParams p = self.p
        p.out, p.n_rows, p.n_pad_rows = <uint8_t*>NULL, n, n
        return launches.add(self.to_places, n, self.n_inputs, 1, 256, 0, &p, sizeof(p), True)

    cdef int enqueue_places(self, LaunchList launches, int n, const int32_t* places, int n_used,
                            int n_places) except -1:
        """Convert rows [0, n) into tiles of `n_places` rows: each of the `n_used` inputs of a row to its place, or the
        one that a row has to all of them."""
        cdef c.ConvertParams p = self.p
        p.order, p.n_rows, p.n_pad_rows = c.CONVERTED_TILES, n, n
        p.factors, p.factor_stride = tile_factors(p.out, p.k, n_places), n_places
        p.places, p.places_stride, p.n_copies = places, n_used, n_used // self.n_inputs
        return launches.add(self.to_places, n, self.n_inputs, 1, 256, 0, &p, sizeof(p), True)


cdef float* tile_factors(const uint8_t* rows, int k, int n) noexcept:
    """Where the factors are of tiles of `n` rows of `k` columns at `rows`."""
    return <float*>(rows + c.tiles_bytes(k, n))


cdef class Bound:
    """A kernel with its launch geometry, a `cuda.layout.Launch`."""

    cdef Kernel kernel
    cdef unsigned int gx, gy, block, smem
    cdef int32_t ring_bytes, n_warps, n_groups, depth, batch, x_smem, factors, staged, barriers, block_tiles, more_tiles
    cdef int32_t n_staged, tiles_m, tiles_n, places

    def __init__(self, Kernel kernel, launch):
        self.kernel, self.block, self.smem = kernel, launch.block, launch.smem
        self.gx, self.gy, _ = launch.grid
        self.ring_bytes, self.n_warps, self.n_groups = launch.ring_bytes, launch.n_warps, launch.n_groups
        self.depth, self.batch, self.x_smem = launch.depth, launch.batch, launch.x_smem
        self.factors, self.barriers = launch.factors, launch.barriers
        self.n_staged, self.staged = launch.n_staged, launch.staged
        self.block_tiles, self.more_tiles = launch.block_tiles, launch.more_tiles
        self.tiles_m, self.tiles_n, self.places = launch.tiles_m, launch.tiles_n, launch.places

    cdef int enqueue(self, LaunchList launches, const void* params, size_t nbytes) except -1:
        return launches.add(self.kernel, self.gx, self.gy, 1, self.block, self.smem, params, nbytes, True)


cdef class GluRows:
    """The gated activation of some rows, where no product applies it.

    Args:
        kernel: glu.
        fields: `PointwiseParams`.
    """

    cdef Kernel kernel
    cdef c.PointwiseParams p

    def __init__(self, Kernel kernel, dict fields):
        c.fill_PointwiseParams(&self.p, fields, ())
        self.kernel = kernel

    cdef int enqueue(self, LaunchList launches, int64_t row, int n) except -1:
        """Rows [row, row + n)."""
        cdef c.PointwiseParams p = self.p
        p.a += row * p.a_stride
        p.b += row * p.b_stride
        p.out += row * p.out_stride
        return launches.add(self.kernel, (p.n + 1023) // 1024, n, 1, 256, 0, &p, sizeof(p), True)


cdef class DecodeProduct:
    """A launch of decode_*, for 1 to 8 rows.

    Args:
        fields: `DecodeParams`; later: n_rows and what a `Bound` says.
        inline: a single row is converted by the product.
        bounds: for each number of rows, from 1 on, the `Bound` kernel.
    """

    cdef c.DecodeParams p
    cdef bint inline
    cdef list bounds

    def __init__(self, dict fields, bint inline, list bounds):
        c.fill_DecodeParams(&self.p, fields, ("n_rows", "n_warps", "n_groups", "depth", "batch", "ring_bytes", "x_smem",
                                              "factors", "n_staged", "staged", "barriers", "block_tiles", "more_tiles"))
        self.inline, self.bounds = inline, [None, *bounds]

    cdef int fill(self, c.DecodeParams* p, Bound bound, int n) except -1:
        """The parameters of a launch for `n` rows."""
        p[0] = self.p
        if n > 1 or not self.inline:
            p.x = p.norm_weight = NULL
        p.n_rows, p.n_warps, p.n_groups, p.depth, p.batch = n, bound.n_warps, bound.n_groups, bound.depth, bound.batch
        p.ring_bytes, p.x_smem, p.factors, p.barriers = bound.ring_bytes, bound.x_smem, bound.factors, bound.barriers
        p.n_staged, p.staged = bound.n_staged, bound.staged
        p.block_tiles, p.more_tiles = bound.block_tiles, bound.more_tiles
        return 0

    cdef int enqueue(self, LaunchList launches, int n) except -1:
        cdef Bound bound = self.bounds[n]
        cdef c.DecodeParams p
        self.fill(&p, bound, n)
        return bound.enqueue(launches, &p, sizeof(p))


cdef class DecodePair:
    """Two `DecodeProduct`s of one input in one launch.

    Args:
        first, second: these.
        bounds: for each number of rows, from 1 on, the `Bound`s of the launch and of the two that it has the blocks of;
            or None, where each has a launch of its own.
    """

    cdef DecodeProduct first, second
    cdef list bounds

    def __init__(self, DecodeProduct first, DecodeProduct second, list bounds):
        self.first, self.second, self.bounds = first, second, [None, *bounds]

    cdef int enqueue(self, LaunchList launches, int n) except -1:
        cdef Bound both, first, second
        cdef c.DecodePairParams p
        memset(&p, 0, sizeof(p))
        both, first, second = self.bounds[n]
        self.first.fill(&p.p[0], first, n)
        self.second.fill(&p.p[1], second, n)
        p.n_first_blocks = first.gx
        return both.enqueue(launches, &p, sizeof(p))


cdef class MatMulNode(Node):
    """Products of one input with up to four matrices of one type.

    Up to 8 rows go through decode_*, more through wgmma_* where the GPU has it. Elsewhere decode rows (and all rows
    with `outputs`) go through decode_* or matvec_*, prompt rows, and all where there are many decode rows, through
    matmul_*. A row has the same bits in each.

    Args:
        name: of the op.
        conversion: of the input, or None where a node before has converted it for this one.
        inline: a single decode row is converted by the product.
        decode: the `DecodeProduct`s for few decode rows.
        matvec: `MatvecParams`; later: n_rows, ring_bytes.
        matvecs: for each larger number of decode rows the `Bound` kernel.
        matmuls: `MatmulParams` of each matrix; later: n_rows.
        prefill: `prefill(n_out, n_rows)` gives that of prefill.
        outputs: the rows are the step's output rows.
        glu: the `GluRows` of what decode_* and wgmma_* do themselves (PRODUCT_GLU), or None.
        many, wgmma: `many(n_rows)` gives the `Bound` kernel wgmma_*, its `ManyRowsParams` (later: factors,
            factor_stride, n_rows, n_tiles_m, n_tiles_n); or None.
    """

    cdef c.MatvecParams v
    cdef c.MatmulParams m[c.MATVEC_MAX_MATRICES]
    cdef c.ManyRowsParams w
    cdef Conversion conversion
    cdef GluRows glu
    cdef DecodePair pair
    cdef list decode, matvecs
    cdef object prefill, many
    cdef bint inline, outputs, leads
    cdef int n_matmuls, few_rows, matvec_rows   # most rows of a launch of `decode`, and of a matvec

    def __init__(self, str name, Conversion conversion, bint inline, list decode, dict matvec, list matvecs,
                 list matmuls, prefill, bint outputs, GluRows glu=None, many=None, dict wgmma=None):
        cdef int i
        Node.__init__(self, name)
        self.conversion, self.inline, self.outputs, self.glu = conversion, inline, outputs, glu
        self.decode, self.few_rows = decode, len((<DecodeProduct>decode[0]).bounds) - 1
        self.matvecs = [None] * (self.few_rows + 1) + matvecs
        self.matvec_rows = len(self.matvecs) - 1
        self.prefill, self.n_matmuls, self.many = prefill, len(matmuls), many
        if many is not None:
            c.fill_ManyRowsParams(&self.w, wgmma, ("factors", "factor_stride", "n_rows", "n_tiles_m", "n_tiles_n"))
        c.fill_MatvecParams(&self.v, matvec, ("n_rows", "ring_bytes"))
        for i in range(self.n_matmuls):
            c.fill_MatmulParams(&self.m[i], matmuls[i], ("n_rows",))

    cdef int enqueue(self, LaunchList launches, const Shape* shape) except -1:
        cdef int n_few = shape.n_out if self.outputs else shape.n_decode
        cdef int n_prompt = 0 if self.outputs else shape.n_rows - n_few
        cdef int first, n_pad
        if self.many is not None:
            n_few, n_prompt = n_few + n_prompt, 0
            if n_few > self.few_rows:
                return self._many(launches, n_few)
        elif n_few > self.matvec_rows:
            n_few, n_prompt = 0, n_few + n_prompt
        first = 1 if n_few == 1 and self.inline else 0
        if self.conversion is not None and n_few + n_prompt > first:
            n_pad = n_few - first + (n_prompt + 63) // 64 * 64     # whole tiles of the prefill kernels
            self.conversion.enqueue(launches, first, first, n_few + n_prompt - first, n_pad)
        if n_few:
            self._few(launches, n_few)
        if n_prompt:
            self._prompt(launches, n_few, n_prompt)
        return 0

    def join(self, MatMulNode after, DecodePair pair):
        """Few decode rows of this node and of the next one, whose products are those of `pair`, share a launch."""
        self.pair, self.leads, after.pair = pair, True, pair

    cdef int _few(self, LaunchList launches, int n) except -1:
        """Decode rows [0, n)."""
        cdef Bound bound
        cdef DecodeProduct product
        cdef c.MatvecParams v
        if n <= self.few_rows:
            if self.pair is not None and self.pair.bounds[n] is not None:
                return self.pair.enqueue(launches, n) if self.leads else 0
            for product in self.decode:
                product.enqueue(launches, n)
            return 0
        bound, v = self.matvecs[n], self.v
        v.n_rows, v.ring_bytes = n, bound.ring_bytes
        bound.enqueue(launches, &v, sizeof(v))
        if self.glu is not None:
            self.glu.enqueue(launches, 0, n)
        return 0

    cdef int _many(self, LaunchList launches, int n) except -1:
        """Rows [0, n), of whatever kind."""
        cdef Bound bound = self.many(n)
        cdef c.ManyRowsParams p = self.w
        if self.conversion is not None:
            self.conversion.enqueue_tiles(launches, n)
        p.factor_stride = (n + 7) // 8 * 8
        p.factors = tile_factors(p.x, p.k, p.factor_stride)
        p.n_rows, p.n_tiles_m, p.n_tiles_n = n, bound.tiles_m, bound.tiles_n
        return bound.enqueue(launches, &p, sizeof(p))

    cdef int _prompt(self, LaunchList launches, int row, int n) except -1:
        """Prompt rows [row, row + n)."""
        cdef c.MatmulParams p
        cdef Bound bound
        cdef int i
        for i in range(self.n_matmuls):
            p = self.m[i]
            p.x += row * p.x_bytes
            p.out += row * p.out_stride
            p.n_rows = n
            bound = self.prefill(p.n_out, n)
            bound.enqueue(launches, &p, sizeof(p))
        if self.glu is not None:
            self.glu.enqueue(launches, row, n)
        return 0
