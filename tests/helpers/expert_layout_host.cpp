// Numbers of the expert kernels, compiled for the CPU. Built and called by tests/cuda/test_expert_layout.py.
#include "params/experts_params.h"
#include "matmul_shapes.cuh"

extern "C" {
#define DEFINE(Type, name)                                                                                            \
    int prompt_smem_##name(int rows) {                                                                                \
        using Few = MatmulShape<Type, 4, 1, 2>;                                                                       \
        using Many = MatmulShape<Type, 4, 1, 8>;                                                                      \
        return rows == Few::kRows ? Few::bytes(Few::kStages) : rows == Many::kRows ? Many::bytes(Many::kStages) : -1; \
    }                                                                                                                 \
    int decode_row_tiles_##name() { return MatvecShape<Type, 1>::kRowTiles; }
FOR_EACH_TYPE(DEFINE)
extern const int constants[6];
const int constants[] = {ROUTE_SLICES,       ROUTE_ROWS,          ROUTE_FEW_ROWS,
                         EXPERT_DECODE_ROWS, EXPERT_MAX_MATRICES, EXPERT_GATHERED_ROWS};
}
