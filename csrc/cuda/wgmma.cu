// out[r, o] (+)= sum_k x[r, k] W[o, k] (+ bias[o]) for more than 8 rows r, quantized W, float32 results; or of two such
// products act(first) * second. For compute capability 9.0, where the tensor cores' largest products are; elsewhere
// matvec.cu and matmul.cu have the same bits.
//
// wgmma_<type>_<rows>(ManyRowsParams): tiles of 128 outputs x 64, 128 or 192 rows, or of 64 outputs x 16 or 32 rows,
// whose chunks of K four warpgroups share. One launch may cover several matrices of one type that share the input;
// their row tiles of 16 outputs are numbered through. The loop is common/many_rows.cuh; the numbers are those of all
// products (common/mma_tile.cuh).
//
// Bytes: weights once for each tile along the rows, x once for each tile along the outputs, both mostly from L2.
#include "common/many_rows.cuh"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <class Q, class S>
DEVICE void many_rows(const ManyRowsParams& p) {
    extern __shared__ __align__(1024) uint8_t smem[];
    using Rows = ManyRows<Q, S, DenseJob<S>>;
    pdl_launch_dependents();
    begin_many_rows<S>(smem);
    const int supplier = static_cast<int>(threadIdx.x) / 32 - S::kWarps;
    if (supplier < 0) {
        take_registers<S::kGroupRegisters>();
        Rows(p, smem).multiply();
    } else {
        give_registers<S::kSupplierRegisters>();
        const Rows rows(p, smem);
        if (supplier >= S::kK) rows.supply_weights(supplier / S::kK - 1);
        pdl_wait();
        if (supplier < S::kK && rows.lane == 0) rows.supply_x();
    }
}

#define DEFINE_ROWS(Type, name, m, k, rows)                                                      \
    extern "C" __global__ void __launch_bounds__((ManyRowsShape<Type, m, k, rows>::kThreads), 1) \
        wgmma_##name##_##rows(const __grid_constant__ ManyRowsParams p) {                        \
        many_rows<Type, ManyRowsShape<Type, m, k, rows>>(p);                                     \
    }
#define DEFINE(Type, name)             \
    DEFINE_ROWS(Type, name, 1, 4, 16)  \
    DEFINE_ROWS(Type, name, 1, 4, 32)  \
    DEFINE_ROWS(Type, name, 2, 1, 64)  \
    DEFINE_ROWS(Type, name, 2, 1, 128) \
    DEFINE_ROWS(Type, name, 2, 1, 192)
FOR_EACH_TYPE(DEFINE)

#endif
