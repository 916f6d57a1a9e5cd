// out[r, s, o] = sum_k x[r(, s), k] W[e, o, k] (+ bias[e, o]) for every slot s of more than 8 rows, e = ids[r, s]; or
// of two such products act(first) * second. For compute capability 9.0; elsewhere experts_decode.cu and
// experts_prefill.cu have the same bits.
//
// wgmma_experts_<type>_<rows>(ManyExpertRowsParams): tiles of 256 outputs x up to 16 or 32 pairs of one expert, whose
// rows of x are gathered, or of 192 outputs x up to 96 (64 at least are computed), whose rows lie together. How many
// items there are is known on the device only: the grid is what the GPU holds at once. The loop is
// common/many_rows.cuh; the numbers are those of all products (common/mma_tile.cuh).
//
// Bytes: an expert's weights once for each of its items; x once for each tile along the outputs, from L2.
#include "common/many_rows.cuh"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <class Q, class S>
DEVICE void many_expert_rows(const ManyExpertRowsParams& p) {
    extern __shared__ __align__(1024) uint8_t smem[];
    using Rows = ManyRows<Q, S, ExpertJob<S>>;
    pdl_launch_dependents();
    begin_many_rows<S>(smem);
    pdl_wait();  // for the list
    const int supplier = static_cast<int>(threadIdx.x) / 32 - S::kWarps;
    if (supplier < 0) {
        take_registers<S::kGroupRegisters>();
        Rows(p, smem).multiply();
    } else {
        give_registers<S::kSupplierRegisters>();
        const Rows rows(p, smem);
        if (supplier >= S::kXSuppliers)
            rows.supply_weights(supplier - S::kXSuppliers);
        else if constexpr (S::kGathers)
            rows.gather_x(supplier);
        else if (rows.lane == 0)
            rows.supply_x();
    }
}

#define DEFINE_ROWS(Type, name, m, rows, gathers, width)                                                         \
    extern "C" __global__ void __launch_bounds__((ManyRowsShape<Type, m, 1, rows, gathers, width>::kThreads), 1) \
        wgmma_experts_##name##_##rows(const __grid_constant__ ManyExpertRowsParams p) {                          \
        many_expert_rows<Type, ManyRowsShape<Type, m, 1, rows, gathers, width>>(p);                              \
    }
#define DEFINE(Type, name)                   \
    DEFINE_ROWS(Type, name, 4, 16, true, 16) \
    DEFINE_ROWS(Type, name, 4, 32, true, 32) \
    DEFINE_ROWS(Type, name, 3, 96, false, 32)
static_assert(EXPERT_GATHERED_ROWS == 32);
FOR_EACH_TYPE(DEFINE)

#endif
