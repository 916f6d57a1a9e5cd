// Activations as the decode kernels read them: float32 split into two bf16 terms, x = high + low, with a relative error
// of 2^-17 over the whole range of float32.
//
// A split row holds for each 32-column block 64 bytes of high terms and 64 of low ones, in fragment order (x_slot: lane
// t's eight columns are 16 adjacent bytes), and after all blocks two float32 sums for each block, of its halves, for
// the minima of types that have them. convert.cu and the decode kernels use the same functions, so a row has the same
// bits wherever it is converted.
#pragma once

#include "quant/layout.cuh"

// Bytes of the sums begin here in a split row of n_blocks blocks.
DEVICE int split_sums_offset(int n_blocks) { return n_blocks * 128; }

// Lane t's columns of a 32-column block: v[4j + i] is column 16j + 4t + i. `x` is the block's first column.
DEVICE void load_columns(float (&v)[8], const float* x, int t) {
    const float4 a = *reinterpret_cast<const float4*>(x + 4 * t);
    const float4 b = *reinterpret_cast<const float4*>(x + 16 + 4 * t);
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

// Writes lane t's columns of a block, item = 4 * block + t, of a split row of n_blocks blocks. Full warps must call:
// the four lanes of a block add up its sums. `x` is the row, or null for a row of zeros; blocks from n_x_blocks on are
// zeros.
DEVICE void split_item(uint8_t* row, const float* x, int item, int n_blocks, int n_x_blocks) {
    const int block = item >> 2, t = item & 3;
    float v[8] = {};
    if (x != nullptr && block < n_x_blocks) load_columns(v, x + 32 * block, t);
    uint32_t high[4], low[4];
    float sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        high[i] = pack_bf16(v[2 * i], v[2 * i + 1]);
        low[i] = pack_bf16(v[2 * i] - bf16_low(high[i]), v[2 * i + 1] - bf16_high(high[i]));
        sum[i >> 1] += (bf16_low(high[i]) + bf16_low(low[i])) + (bf16_high(high[i]) + bf16_high(low[i]));
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], 1);
        sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], 2);
    }
    if (block >= n_blocks) return;
    *reinterpret_cast<uint4*>(row + block * 128 + t * 16) = make_uint4(high[0], high[1], high[2], high[3]);
    *reinterpret_cast<uint4*>(row + block * 128 + 64 + t * 16) = make_uint4(low[0], low[1], low[2], low[3]);
    if (t == 0) *reinterpret_cast<float2*>(row + split_sums_offset(n_blocks) + block * 8) = make_float2(sum[0], sum[1]);
}
