// Activations as the matrix kernels read them: fp16, every chunk of a row over a power of two of its own, with the norm
// before the product where there is one.
//
// A converted row has 64 bytes for each 32-column block in fragment order (x_slot: lane t's eight columns are 16
// adjacent bytes), up to whole 256-column pieces, then one float32 factor for each chunk. The power of two brings the
// chunk's largest magnitude into [2^13, 2^14): no activation overflows, none within 2^27 of the largest loses
// precision. convert.cu and the decode kernels use the same functions on the same pieces, so a row has the same bits
// wherever it is converted.
//
// For warpgroup products the same lies in another order, by rows or in tiles (convert_params.h).
//
// A piece is 256 columns and a warp: lane 4g + t has eight columns of block g, v[4j + i] column 16j + 4t + i of it.
// Sums over a row are those of its units of 128 columns, in order; a unit's is a tree over 16 lanes.
#pragma once

#include "params/convert_params.h"
#include "quant/types.cuh"

constexpr int kPieceColumns = 256;
constexpr int kUnitColumns = 128;
constexpr int kChunkPieces = 4;  // that a chunk has at most

// Bytes of the fragments of a converted row of k columns.
DEVICE int converted_fragment_bytes(int k) { return (k + kPieceColumns - 1) / kPieceColumns * (2 * kPieceColumns); }

// First of the lane's columns of a piece.
DEVICE int piece_column(int piece, int lane) { return piece * kPieceColumns + 32 * (lane >> 2) + 4 * (lane & 3); }

// The eight columns of x of which `column` is the first; zeros from column k on. k is a multiple of 32.
DEVICE void load_columns(float (&v)[8], const float* x, int column, int k) {
    float4 a = {}, b = {};
    if (column < k) {
        a = *reinterpret_cast<const float4*>(x + column);
        b = *reinterpret_cast<const float4*>(x + column + 16);
    }
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

// The same of columns that begin at `x`; zeros where that is null.
DEVICE void load_columns_at_once(float (&v)[8], const float* x) {
    float4 a = {}, b = {};
    if (x != nullptr) load_twice(a, b, x);
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

// Adds over the 16 lanes of each unit of a piece.
DEVICE float unit_sum(float v) {
#pragma unroll
    for (int d = 1; d < 16; d *= 2) v = __fadd_rn(v, __shfl_xor_sync(0xffffffffu, v, d));
    return v;
}

// Of a lane alone.
DEVICE float lane_squares(const float (&v)[8]) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = __fmaf_rn(v[i], v[i], sum);
    return sum;
}

DEVICE float sum_of_squares(const float (&v)[8]) { return unit_sum(lane_squares(v)); }

DEVICE float sum_of_values(const float (&v)[8]) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = __fadd_rn(sum, v[i]);
    return unit_sum(sum);
}

// The units' sums of a row of n columns in order.
DEVICE float row_sum(const float* units, int n) {
    const int n_units = (n + kUnitColumns - 1) / kUnitColumns;
    float sum = 0.0f;
#pragma unroll 1
    for (int first = 0; first < n_units; first += 8) {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (first + i < n_units) sum = __fadd_rn(sum, units[first + i]);
    }
    return sum;
}

// 1 / sqrt(mean square + eps), to 2^-22: without the slow paths of division and root, whose code a short kernel waits
// for. `inverse_n` is 1 / n.
DEVICE float norm_factor(float square_sum, float inverse_n, float eps) {
    return rsqrtf(__fmaf_rn(square_sum, inverse_n, eps));
}

// The lane's largest magnitude, as bits, which order as the magnitudes do.
DEVICE int largest_bits(const float (&v)[8]) {
    int largest = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = max(largest, __float_as_int(v[i]) & 0x7fffffff);
    return largest;
}

// The power of two of a chunk, from the largest bits of its lanes.
DEVICE float chunk_scale(int largest) {
    return __uint_as_float(row_scale_bits(static_cast<int>(__reduce_max_sync(0xffffffffu, largest)) >> 23));
}

// The lane's columns over `scale`, in fragment order.
DEVICE uint4 pack_columns(const float (&v)[8], float scale) {
    const float inverse = __uint_as_float(inverse_bits(__float_as_uint(scale)));
    return make_uint4(pack_f16(v[0] * inverse, v[1] * inverse), pack_f16(v[2] * inverse, v[3] * inverse),
                      pack_f16(v[4] * inverse, v[5] * inverse), pack_f16(v[6] * inverse, v[7] * inverse));
}

// Word i of v.
DEVICE uint32_t word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// What `pack_columns` made of the lanes' columns of a piece, in the order of warpgroup products: the lane's 16 bytes
// are those of its part (4 (block & 1) + t of step block / 2). A full warp: four lanes exchange words.
DEVICE uint4 in_product_order(const uint4& packed, int lane) {
    const int t = lane & 3;
    uint32_t words[4];
#pragma unroll
    for (int d = 0; d < 4; ++d) {
        const uint32_t word = __shfl_xor_sync(0xffffffffu, word_of(packed, t ^ d), d);  // of lane t ^ d
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if ((t ^ d) == i) words[i] = word;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}
