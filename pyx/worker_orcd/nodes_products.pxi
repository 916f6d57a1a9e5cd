# Products with weight matrices; included by _nodes.pyx. Rows come as float32 and are converted first where a kernel
# wants them so: to split bf16 halves for decode rows, to float16 for prefill rows.


cdef class Conversion:
    """convert_split or convert_f16 with its parameters.

    Args:
        kernel: the `Kernel`.
        fields: `ConvertParams`; later: n_rows, n_pad_rows.
        by_column: convert_split, whose blocks take 2048 columns of a row; convert_f16 takes whole rows.
    """

    cdef Kernel kernel
    cdef c.ConvertParams p
    cdef unsigned int columns

    def __init__(self, Kernel kernel, dict fields, bint by_column):
        c.fill_ConvertParams(&self.p, fields, ("n_rows", "n_pad_rows"))
        self.kernel, self.columns = kernel, (self.p.k_pad // 8 + 255) // 256 if by_column else 0

    cdef int enqueue(self, LaunchList launches, int64_t x_offset, int64_t row, int n, int n_pad) except -1:
        """Convert `n` rows from x + x_offset on into rows [row, row + n_pad) of the workspace; the rest are zeros."""
        cdef c.ConvertParams p = self.p
        p.x += x_offset
        p.out += row * p.out_bytes
        if p.scale != NULL:
            p.scale += row
        p.n_rows, p.n_pad_rows = n, n_pad
        if self.columns:
            return launches.add(self.kernel, self.columns, n_pad, 1, 256, 0, &p, sizeof(p), True)
        return launches.add(self.kernel, n_pad, 1, 1, 256, 0, &p, sizeof(p), True)


cdef class Bound:
    """A kernel with its launch geometry, a `cuda.layout.Launch`."""

    cdef Kernel kernel
    cdef unsigned int gx, gy, block, smem
    cdef int32_t ring_bytes
    cdef int tile_rows
    cdef bint needs_split

    def __init__(self, Kernel kernel, launch):
        self.kernel, self.block, self.smem = kernel, launch.block, launch.smem
        self.gx, self.gy, _ = launch.grid
        self.ring_bytes, self.tile_rows, self.needs_split = launch.ring_bytes, launch.tile_rows, launch.needs_split

    cdef int enqueue(self, LaunchList launches, const void* params, size_t nbytes) except -1:
        return launches.add(self.kernel, self.gx, self.gy, 1, self.block, self.smem, params, nbytes, True)


cdef class MatMulNode(Node):
    """Products of one input with up to four matrices of one type.

    Decode rows (and all rows with `outputs`) go through the matvec family in groups of up to 64, prefill rows through
    the matmul family: within each, a row's sums do not depend on the other rows.

    Args:
        name: of the op.
        to_split, to_half: the `Conversion`s of the input.
        matvec: `MatvecParams`; later: n_rows, ring_bytes.
        matmuls: `MatmulParams` of each matrix; later: n_rows.
        decode: for each number of decode rows, from 1 on, the `Bound` kernel.
        prefill: `prefill(n_out, n_rows)` gives that of prefill.
        outputs: the rows are the step's output rows.
    """

    cdef c.MatvecParams v
    cdef c.MatmulParams m[c.MATVEC_MAX_MATRICES]
    cdef Conversion to_split, to_half
    cdef list decode
    cdef object prefill
    cdef bint outputs

    def __init__(self, str name, Conversion to_split, Conversion to_half, dict matvec, list matmuls, list decode,
                 prefill, bint outputs):
        cdef int i
        Node.__init__(self, name)
        self.to_split, self.to_half, self.outputs = to_split, to_half, outputs
        self.decode, self.prefill = [None, *decode], prefill
        c.fill_MatvecParams(&self.v, matvec, ("n_rows", "ring_bytes"))
        for i in range(self.v.n_matrices):
            c.fill_MatmulParams(&self.m[i], matmuls[i], ("n_rows",))

    cdef int enqueue(self, LaunchList launches, const Shape* shape) except -1:
        cdef int most = len(self.decode) - 1
        cdef int n_matvec = shape.n_out if self.outputs else shape.n_decode, row = 0
        while row < n_matvec:
            self._matvec(launches, row, min(most, n_matvec - row))
            row += most
        if not self.outputs and shape.n_rows > n_matvec:
            self._matmul(launches, n_matvec, shape.n_rows - n_matvec)
        return 0

    cdef int _matvec(self, LaunchList launches, int row, int n) except -1:
        """Rows [row, row + n), n <= 64."""
        cdef Bound bound = self.decode[n]
        cdef c.MatvecParams p = self.v
        cdef int i
        for i in range(p.n_matrices):
            p.m[i].out += row * p.m[i].out_stride
        p.x += row * p.x_stride
        p.n_rows, p.ring_bytes = n, bound.ring_bytes
        if bound.needs_split:
            self.to_split.enqueue(launches, row * p.x_stride, 0, n, bound.tile_rows)
        return bound.enqueue(launches, &p, sizeof(p))

    cdef int _matmul(self, LaunchList launches, int row, int n) except -1:
        """Prompt rows [row, row + n)."""
        cdef c.MatmulParams p
        cdef Bound bound
        cdef int i
        self.to_half.enqueue(launches, row * self.v.x_stride, 0, n, (n + 63) // 64 * 64)  # whole tiles of the kernels
        for i in range(self.v.n_matrices):
            p = self.m[i]
            p.out += row * p.out_stride
            p.n_rows = n
            bound = self.prefill(p.n_out, n)
            bound.enqueue(launches, &p, sizeof(p))
        return 0
