// The layout functions of csrc/cuda/quant compiled for the CPU: repack a matrix word by word, read it back as lanes do;
// and the sizes of the kernels. Built and called by tests/cuda/test_layout.py.
#include "params/matmul_params.h"
#include "matmul_shapes.cuh"

template <class Q>
static void repack(const uint8_t* raw, uint8_t* out, int n_out, int k) {
    const int n_k_tiles = (k + Q::kTileK - 1) / Q::kTileK, n_row_tiles = (n_out + 15) / 16, n_blocks = k / Q::kBlockK;
    const int64_t row_bytes = static_cast<int64_t>(n_blocks) * Q::kBlockBytes;
    for (int s = 0; s < n_row_tiles; ++s)
        for (int u = 0; u < n_k_tiles; ++u) {
            const int block0 = u * (Q::kTileK / Q::kBlockK), left = n_out - 16 * s;
            const RawRowTile row_tile{raw + 16 * s * row_bytes + block0 * Q::kBlockBytes, row_bytes,
                                      left < 16 ? left : 16, n_blocks - block0, Q::kBlockBytes};
            uint8_t* packed_tile = out + (static_cast<int64_t>(s) * n_k_tiles + u) * Q::kPackedTileBytes;
            for (int w = 0; w < Q::kPackedTileBytes / 4; ++w) {
                const uint32_t word = packed_word<Q>(row_tile, w);
                memcpy(packed_tile + 4 * w, &word, 4);
            }
        }
}

// out [16 * n_row_tiles, n_k_tiles * kTileK]: every element as the fragments of a warp see it.
template <class Q>
static void unpack(const uint8_t* w, float* out, int n_out, int k) {
    const int n_k_tiles = (k + Q::kTileK - 1) / Q::kTileK, n_row_tiles = (n_out + 15) / 16;
    const int64_t width = static_cast<int64_t>(n_k_tiles) * Q::kTileK;
    for (int s = 0; s < n_row_tiles; ++s)
        for (int u = 0; u < n_k_tiles; ++u)
            for (int lane = 0; lane < 32; ++lane)
                for (int sub = 0; sub < Q::kSubs; ++sub) {
                    const uint8_t* packed_tile = w + (static_cast<int64_t>(s) * n_k_tiles + u) * Q::kPackedTileBytes;
                    const auto codes = load_codes<Q>(packed_tile, sub, lane);
                    for (int pair = 0; pair < 16; ++pair) {
                        float low, high;
                        Q::values(codes, pair, low, high);
                        const int r = pair & 1;
                        if constexpr (!kDense<Q>) {
                            float scale[2][2], min[2][2] = {};
                            Q::scales(Q::load_scales(packed_tile, lane), 2 * sub + (pair >> 3), scale, min);
                            const int j = Q::kScaleK == 16 ? (pair >> 2) & 1 : 0;
                            low = scale[j][r] * low, high = scale[j][r] * high;
                            if constexpr (Q::kHasMin) low += min[j][r], high += min[j][r];
                        }
                        float* row = out + (16 * s + pair_row(lane, pair)) * width + u * Q::kTileK + sub * kSubK;
                        row[pair_column(lane, pair)] = low;
                        row[pair_column(lane, pair) + 1] = high;
                    }
                }
}

// out [4]
template <class S>
static void matvec_numbers(int* out) {
    out[0] = S::kStageKTiles, out[1] = S::kRowTiles, out[2] = S::kDepth, out[3] = S::kSlotBytes;
}
template <class S>
static void matmul_numbers(int* out) {
    out[0] = S::kStages, out[1] = S::kSlots, out[2] = S::bytes(S::kStages), out[3] = S::kRows;
}

template <class S>
static void many_rows_numbers(int* out) {
    out[0] = S::kXDepth, out[1] = S::kWDepth, out[2] = S::kBytes, out[3] = S::kThreads;
}

template <class Q>
static int early_tiles() {
    if constexpr (kDense<Q>)
        return 0;
    else
        return kEarlyTiles<Q>;
}

extern "C" {
#define DEFINE(Type, name)                                                                                         \
    int tile_k_##name() { return Type::kTileK; }                                                                   \
    int packed_tile_bytes_##name() { return Type::kPackedTileBytes; }                                              \
    int row_scaled_##name() { return kRowScaled<Type>; }                                                           \
    int early_tiles_##name() { return early_tiles<Type>(); }                                                       \
    void matvec_##name(int tiles, int* out) {                                                                      \
        if (tiles == 1) matvec_numbers<MatvecShape<Type, 1>>(out);                                                 \
        if (tiles == 2) matvec_numbers<MatvecShape<Type, 2>>(out);                                                 \
        if (tiles == 4) matvec_numbers<MatvecShape<Type, 4>>(out);                                                 \
        if (tiles == 8) matvec_numbers<MatvecShape<Type, 8>>(out);                                                 \
    }                                                                                                              \
    void matmul_##name(int small, int* out) {                                                                      \
        small ? matmul_numbers<MatmulShape<Type, 2, 2, 4>>(out) : matmul_numbers<MatmulShape<Type, 4, 1, 8>>(out); \
    }                                                                                                              \
    void many_rows_##name(int rows, int* out) {                                                                    \
        if (rows == 16) many_rows_numbers<ManyRowsShape<Type, 1, 4, 16>>(out);                                     \
        if (rows == 32) many_rows_numbers<ManyRowsShape<Type, 1, 4, 32>>(out);                                     \
        if (rows == 64) many_rows_numbers<ManyRowsShape<Type, 2, 1, 64>>(out);                                     \
        if (rows == 128) many_rows_numbers<ManyRowsShape<Type, 2, 1, 128>>(out);                                   \
        if (rows == 192) many_rows_numbers<ManyRowsShape<Type, 2, 1, 192>>(out);                                   \
    }                                                                                                              \
    void many_expert_rows_##name(int rows, int* out) {                                                             \
        if (rows == 16) many_rows_numbers<ManyRowsShape<Type, 4, 1, 16, true>>(out);                               \
        if (rows == 32) many_rows_numbers<ManyRowsShape<Type, 4, 1, 32, true>>(out);                               \
        if (rows == 96) many_rows_numbers<ManyRowsShape<Type, 3, 1, 96, false, 32>>(out);                          \
    }                                                                                                              \
    void repack_##name(const uint8_t* raw, uint8_t* out, int n, int k) { repack<Type>(raw, out, n, k); }           \
    void unpack_##name(const uint8_t* w, float* out, int n, int k) { unpack<Type>(w, out, n, k); }
FOR_EACH_TYPE(DEFINE)
int x_slot_of(int k) { return x_slot(k); }
int next_stage_of(int stage, int chunk_stages, int n_warps) { return next_stage(stage, chunk_stages, n_warps); }
int chunk_columns_of(int k) { return chunk_columns(k); }
extern const int decode_threads[2];
const int decode_threads[] = {PRODUCT_THREADS, PRODUCT_FEW_THREADS};
int column_of(int lane, int pair) { return pair_column(lane, pair); }
}
