// The conversion of a row of activations by a block of 256 threads: see convert.cu.
#pragma once

#include "common/activations.cuh"

constexpr int kConvertThreads = 256;
constexpr int kMaxUnits = 1 << 10;  // 131,072 columns
constexpr int kHeldPieces = 3;      // of a row that a warp holds at once: all where chunks are no longer than a piece

// Calls f(piece) for the pieces of this warp's chunks.
template <class F>
DEVICE void for_pieces(int n_pieces, F f) {
    for (int piece = threadIdx.x / 32; piece < n_pieces; piece += kConvertThreads / 32) f(piece);
}

// Sum over the row of what `f` makes of a piece (a sum in all lanes of each unit).
template <class F>
DEVICE float sum_over_row(float* units, int n, int n_pieces, F f) {
    const int lane = threadIdx.x % 32;
    for_pieces(n_pieces, [&](int piece) {
        const float sum = f(piece);
        if (lane % 16 == 0) units[2 * piece + lane / 16] = sum;
    });
    __syncthreads();
    return row_sum(units, n);
}

// Where a converted row goes: to a row of its own or, with kPlaces, to rows of tiles that a list names, or nowhere.
// Kernels of few rows have no code for the second: what they run once they wait for.
template <bool kPlaces>
struct ConvertedRow {
    const ConvertParams& p;
    uint8_t* out;
    int row;  // of tiles
    float* factors;
    int64_t factor_step;

    DEVICE_MEMBER ConvertedRow(const ConvertParams& params, int number, int) : p(params), row(number) {
        if (p.order == CONVERTED_TILES) {
            out = p.out;
            factors = p.factors + row, factor_step = p.factor_stride;
        } else {
            out = p.out + static_cast<int64_t>(row) * p.out_bytes;
            factors = reinterpret_cast<float*>(out + converted_fragment_bytes(p.k)), factor_step = 1;
        }
    }
    // A full warp.
    DEVICE_MEMBER void store(int piece, int lane, const uint4& packed) const {
        const uint4 v = p.order == CONVERTED_FRAGMENTS ? packed : in_product_order(packed, lane);
        *reinterpret_cast<uint4*>(p.order == CONVERTED_TILES ? in_tiles(out, p, piece, lane, row)
                                                             : out + (piece * 32 + lane) * 16) = v;
    }
    DEVICE_MEMBER void set_factor(int chunk, float factor) const { factors[chunk * factor_step] = factor; }

    // Where tiles have the lane's part of a piece of a row.
    static DEVICE_MEMBER uint8_t* in_tiles(uint8_t* tiles, const ConvertParams& p, int piece, int lane, int row) {
        const int block = lane >> 2, step = 4 * piece + block / 2, part = 4 * (block & 1) + (lane & 3);
        return tiles + (static_cast<int64_t>(step) * p.factor_stride + row) * 128 + (part ^ (row & 7)) * 16;
    }
};

template <>
struct ConvertedRow<true> {
    const ConvertParams& p;
    const int32_t* places;  // which are there after the wait

    DEVICE_MEMBER ConvertedRow(const ConvertParams& params, int row, int input)
        : p(params), places(p.places + static_cast<int64_t>(row) * p.places_stride + input) {}

    DEVICE_MEMBER void store(int piece, int lane, const uint4& packed) const {
        if (p.out == nullptr) return;
        const uint4 v = in_product_order(packed, lane);
        for (int i = 0; i < p.n_copies; ++i)
            *reinterpret_cast<uint4*>(ConvertedRow<false>::in_tiles(p.out, p, piece, lane, places[i])) = v;
    }
    DEVICE_MEMBER void set_factor(int chunk, float factor) const {
        if (p.out == nullptr) return;
        for (int i = 0; i < p.n_copies; ++i)
            p.factors[static_cast<int64_t>(chunk) * p.factor_stride + places[i]] = factor;
    }
};

// A row of chunks that are no longer than a piece, held at once: one way through memory, and the norm's weights before
// the wait. Other arguments as of `convert_row`.
template <bool kPlaces>
DEVICE void convert_held_row(const ConvertParams& p, const float* x, const ConvertedRow<kPlaces>& out, int k, int chunk,
                             int row, float (&units)[2][kMaxUnits]) {
    const int lane = threadIdx.x % 32, upper = lane / 16, half_lane = lane % 16;
    const int n_pieces = (p.k + kPieceColumns - 1) / kPieceColumns, n_chunks = (p.k + chunk - 1) / chunk;
    const bool has_norm = p.kind == CONVERT_RMS, halves = chunk < kPieceColumns;
    const auto piece_of = [&](int i) { return static_cast<int>(threadIdx.x) / 32 + i * (kConvertThreads / 32); };
    float v[kHeldPieces][8], w[kHeldPieces][8];
#pragma unroll
    for (int i = 0; i < kHeldPieces; ++i)
        if (has_norm) load_columns(w[i], p.weight, piece_column(piece_of(i), lane), k);
    pdl_wait();
#pragma unroll
    for (int i = 0; i < kHeldPieces; ++i) load_columns(v[i], x, piece_column(piece_of(i), lane), k);
    float* const scales = units[0];
#pragma unroll
    for (int i = 0; i < kHeldPieces; ++i) {
        const int piece = piece_of(i);
        if (piece >= n_pieces) break;
        if (has_norm) {
            const float square = sum_of_squares(v[i]);
            if (half_lane == 0) units[1][2 * piece + upper] = square;
#pragma unroll
            for (int j = 0; j < 8; ++j) v[i][j] = __fmul_rn(v[i][j], w[i][j]);
        }
        const int largest = largest_bits(v[i]);
        float scale = chunk_scale(halves && upper ? 0 : largest);
        if (halves) {
            const float second = chunk_scale(upper ? largest : 0);
            if (upper) scale = second;
        }
        out.store(piece, lane, pack_columns(v[i], scale));
        if (halves ? half_lane == 0 : lane == 0) scales[halves ? 2 * piece + upper : piece] = scale;
    }
    __syncthreads();
    float root = 1.0f;
    if (has_norm) {
        root = norm_factor(row_sum(units[1], p.k), __frcp_rn(static_cast<float>(p.k)), p.eps);
        if (p.roots != nullptr && k > 0 && threadIdx.x == 0) p.roots[row] = root;
    }
    for (int c = threadIdx.x; c < n_chunks; c += kConvertThreads) out.set_factor(c, __fmul_rn(scales[c], root));
}

// Input `input` of row `row`. `units` is scratch; a block converts once, after the wait, which is here.
template <bool kPlaces = false>
DEVICE void convert_row(const ConvertParams& p, int row, int input, float (&units)[2][kMaxUnits]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const bool exists = row < p.n_rows;
    const float* x = p.x + (exists ? row : 0) * p.x_stride + input * p.input_stride;
    const ConvertedRow<kPlaces> out(p, kPlaces ? row : input * p.n_pad_rows + row, input);
    // of a row that does not exist there are no columns, so all are zeros
    const int k = exists ? p.k : 0, n_pieces = (p.k + kPieceColumns - 1) / kPieceColumns;
    const int chunk = chunk_columns(p.k), n_chunks = (p.k + chunk - 1) / chunk;
    if (p.kind != CONVERT_LAYER && chunk <= kPieceColumns && n_pieces <= kHeldPieces * (kConvertThreads / 32)) {
        convert_held_row(p, x, out, k, chunk, row, units);
        return;
    }
    pdl_wait();
    float mean = 0.0f, root = 1.0f;
    if (p.kind == CONVERT_LAYER) {
        mean = sum_over_row(units[0], p.k, n_pieces, [&](int piece) {
            float v[8];
            load_columns(v, x, piece_column(piece, lane), k);
            return sum_of_values(v);
        });
        mean = __fdiv_rn(mean, static_cast<float>(p.k));
    }
    if (p.kind != CONVERT_PLAIN) {
        const float square = sum_over_row(units[1], p.k, n_pieces, [&](int piece) {
            float v[8];
            load_columns(v, x, piece_column(piece, lane), k);
            if (p.kind == CONVERT_LAYER) {
#pragma unroll
                for (int i = 0; i < 8; ++i) v[i] = piece_column(piece, lane) < k ? v[i] - mean : 0.0f;
            }
            return sum_of_squares(v);
        });
        root = norm_factor(square, __frcp_rn(static_cast<float>(p.k)), p.eps);
        if (p.roots != nullptr && exists && threadIdx.x == 0) p.roots[row] = root;
    }
    const auto apply_norm = [&](float (&v)[8], int piece) {
        if (p.kind == CONVERT_PLAIN) return;
        float w[8], b[8] = {};
        load_columns(w, p.weight, piece_column(piece, lane), k);
        if (p.bias != nullptr) load_columns(b, p.bias, piece_column(piece, lane), k);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            v[i] = p.kind == CONVERT_RMS ? __fmul_rn(v[i], w[i])
                                         : __fmaf_rn(__fmul_rn(__fsub_rn(v[i], mean), root), w[i], b[i]);
    };
    const float norm = p.kind == CONVERT_RMS ? root : 1.0f;
    if (chunk < kPieceColumns) {  // two chunks in a piece
        for_pieces(n_pieces, [&](int piece) {
            float v[8];
            load_columns(v, x, piece_column(piece, lane), k);
            apply_norm(v, piece);
            const int largest = largest_bits(v), upper = lane / 16;
            const float scales[2] = {chunk_scale(upper ? 0 : largest), chunk_scale(upper ? largest : 0)};
            const float scale = scales[upper];
            out.store(piece, lane, pack_columns(v, scale));
            if (lane % 16 == 0 && 2 * piece + upper < n_chunks)
                out.set_factor(2 * piece + upper, __fmul_rn(scale, norm));
        });
        return;
    }
    for (int c = warp; c < n_chunks; c += kConvertThreads / 32) {
        const int first = c * (chunk / kPieceColumns), n = min(n_pieces - first, chunk / kPieceColumns);
        float v[kChunkPieces][8];  // on their way at once
        int largest = 0;
#pragma unroll
        for (int i = 0; i < kChunkPieces; ++i)
            if (i < n) load_columns(v[i], x, piece_column(first + i, lane), k);
#pragma unroll
        for (int i = 0; i < kChunkPieces; ++i) {
            if (i >= n) break;
            apply_norm(v[i], first + i);
            largest = max(largest, largest_bits(v[i]));
        }
        const float scale = chunk_scale(largest);
#pragma unroll
        for (int i = 0; i < kChunkPieces; ++i)
            if (i < n) out.store(first + i, lane, pack_columns(v[i], scale));
        if (lane == 0) out.set_factor(c, __fmul_rn(scale, norm));
    }
}
