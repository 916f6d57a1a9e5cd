// Products with quantized weights: one token straight from the blocks, many tokens over dequantized panels.
//
//   y[t][o] = tree(acc) + bias[o],  acc[lane] = fma(W[o][k], x[t][k], acc[lane]) over k = lane, lane + 16, ...
//
// `matvec` decodes a block in registers and uses it once: it moves the file's bytes and nothing else. `matmul_panel`
// decodes a few rows of weights into a buffer that stays in the L2 cache and runs a register tile of kTileRows outputs
// x kTileTokens tokens over it, so a weight is decoded once per step. Both give the same bits for a token.
// Included inside the namespace of an instruction set.
#pragma once

// Decodes n values at `src`; the tail of an unquantized row is zero-padded to 16 by going through a copy.
struct DequantizeAction {
    const uint8_t* src;
    float* dst;
    int64_t n;

    template <class Q, int P>
    WO_INLINE void parts(const uint8_t* block, float* out) {
        F w[Q::kVectors];
        Q::template decode<P>(block, w);
        for (int v = 0; v < Q::kVectors; ++v) store(out + 16 * (P * Q::kVectors + v), w[v]);
        if constexpr (P + 1 < Q::kParts) parts<Q, P + 1>(block, out);
    }
    template <class Q>
    WO_INLINE void run() {
        constexpr int kBlock = Q::kParts * Q::kVectors * 16;
        const uint8_t* block = src;
        int64_t i = 0;
        for (; i + kBlock <= n; i += kBlock, block += Q::kBytes) parts<Q, 0>(block, dst + i);
        if constexpr (Q::kParts * Q::kVectors == 1) {
            if (i < n) {
                uint8_t tail[64] = {};
                float values[16];
                __builtin_memcpy(tail, block, (size_t)(n - i) * (Q::kBytes / 16));
                parts<Q, 0>(tail, values);
                __builtin_memcpy(dst + i, values, (size_t)(n - i) * 4);
            }
        }
    }
};

static bool dequantize(int type, const uint8_t* src, float* dst, int64_t n) {
    DequantizeAction action{src, dst, n};
    return with_decoder(type, action);
}

// Rows of weights that the one-token kernel works on at a time: enough chains to hide the latency of the fma.
constexpr int kMatvecRows = 2;

// How far ahead blocks are asked for. Rows of a few hundred bytes end before the hardware's own prefetch gets going:
// on a Zen 4 with weights in memory this doubles Q5_0 (4.9 to 8.3 GB/s a core) and changes nothing in cache.
constexpr int kPrefetchBytes = 4096;

struct MatvecAction {
    const MatmulTask& task;
    int64_t o0, o1;

    template <class Q, int R, int P>
    WO_INLINE void parts(const uint8_t* const* block, const float* x, F* acc) {
        for (int r = 0; r < R; ++r) {
            F w[Q::kVectors];
            Q::template decode<P>(block[r], w);
            for (int v = 0; v < Q::kVectors; ++v) acc[r] = fma(w[v], load(x + 16 * (P * Q::kVectors + v)), acc[r]);
        }
        if constexpr (P + 1 < Q::kParts) parts<Q, R, P + 1>(block, x, acc);
    }
    template <class Q, int R>
    WO_INLINE void rows(int64_t o) {
        constexpr int kBlock = Q::kParts * Q::kVectors * 16;
        const Matrix& w = task.w;
        const uint8_t* block[R];
        F acc[R];
        for (int r = 0; r < R; ++r) {
            block[r] = w.data + (o + r) * w.row_bytes;
            acc[r] = zero();
        }
        const float* x = task.x[0];
        for (int64_t k = 0; k < w.n_in; k += kBlock) {
            for (int r = 0; r < R; ++r)
                for (int i = 0; i < Q::kBytes; i += 64) __builtin_prefetch(block[r] + kPrefetchBytes + i);
            parts<Q, R, 0>(block, x + k, acc);
            for (int r = 0; r < R; ++r) block[r] += Q::kBytes;
        }
        float* y = task.y[0];
        for (int r = 0; r < R; ++r) y[o + r] = sum(acc[r]) + (task.bias ? task.bias[o + r] : 0.0f);
    }
    template <class Q>
    WO_INLINE void run() {
        int64_t o = o0;
        for (; o + kMatvecRows <= o1; o += kMatvecRows) rows<Q, kMatvecRows>(o);
        for (; o < o1; ++o) rows<Q, 1>(o);
    }
};

static void matvec(const MatmulTask& task, int64_t o0, int64_t o1) {
    MatvecAction action{task, o0, o1};
    with_decoder(task.w.type, action);
}

#ifndef WO_OWN_TILE
// acc[t][r] = lane sums of kTileRows rows of the panel (stride n, a multiple of 16) times T tokens.
template <int T>
WO_INLINE void accumulate_tile(const float* panel, int64_t n, const float* const* x, F (*acc)[kTileRows]) {
    F a[T][kTileRows];
    const float* xt[T];
    for (int t = 0; t < T; ++t) {
        xt[t] = x[t];
        for (int r = 0; r < kTileRows; ++r) a[t][r] = zero();
    }
    for (int64_t k = 0; k < n; k += 16) {
        F w[kTileRows];
        for (int r = 0; r < kTileRows; ++r) w[r] = load(panel + r * n + k);
        for (int t = 0; t < T; ++t) {
            F v = load(xt[t] + k);
            for (int r = 0; r < kTileRows; ++r) a[t][r] = fma(w[r], v, a[t][r]);
        }
    }
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < kTileRows; ++r) acc[t][r] = a[t][r];
}
#endif

template <int T>
WO_INLINE void tile(const float* panel, int64_t n, const float* const* x, const float* bias, float* const* y,
                    int64_t o) {
    F acc[T][kTileRows];
    accumulate_tile<T>(panel, n, x, acc);
    for (int t = 0; t < T; ++t) {
        float s[4];
        sum4(acc[t][0], acc[t][1], acc[t][2], acc[t][3], s);
        for (int r = 0; r < kTileRows; ++r) y[t][o + r] = s[r] + (bias ? bias[o + r] : 0.0f);
    }
}

WO_INLINE void single(const float* row, int64_t n, const float* x, const float* bias, float* y, int64_t o) {
    F acc = zero();
    for (int64_t k = 0; k < n; k += 16) acc = fma(load(row + k), load(x + k), acc);
    y[o] = sum(acc) + (bias ? bias[o] : 0.0f);
}

static_assert(kTileRows == 4 && kTileTokens <= 6, "sum4 and the switch below");

static void tile_tokens(int t, const float* panel, int64_t n, const float* const* x, const float* bias, float* const* y,
                        int64_t o) {
    switch (t) {
        case 1:
            tile<1>(panel, n, x, bias, y, o);
            return;
        case 2:
            if constexpr (kTileTokens >= 2) tile<2>(panel, n, x, bias, y, o);
            return;
        case 3:
            if constexpr (kTileTokens >= 3) tile<3>(panel, n, x, bias, y, o);
            return;
        case 4:
            if constexpr (kTileTokens >= 4) tile<4>(panel, n, x, bias, y, o);
            return;
        case 5:
            if constexpr (kTileTokens >= 5) tile<5>(panel, n, x, bias, y, o);
            return;
        case 6:
            if constexpr (kTileTokens >= 6) tile<6>(panel, n, x, bias, y, o);
            return;
    }
}

static void matmul_panel(const MatmulTask& task, int64_t o0, int64_t o1, float* panel) {
    const Matrix& w = task.w;
    const int64_t n = round_up16(w.n_in);
    for (int64_t o = o0; o < o1; ++o) {
        float* row = panel + (o - o0) * n;
        for (int64_t k = w.n_in; k < n; ++k) row[k] = 0;
        dequantize(w.type, w.data + o * w.row_bytes, row, w.n_in);
    }
    for (int t = 0; t < task.n_tokens; t += kTileTokens) {
        int n_t = task.n_tokens - t < kTileTokens ? task.n_tokens - t : kTileTokens;
        int64_t o = o0;
        for (; o + kTileRows <= o1; o += kTileRows)
            tile_tokens(n_t, panel + (o - o0) * n, n, task.x + t, task.bias, task.y + t, o);
        for (; o < o1; ++o)
            for (int i = t; i < t + n_t; ++i) single(panel + (o - o0) * n, n, task.x[i], task.bias, task.y[i], o);
    }
}
