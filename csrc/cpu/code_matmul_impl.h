// Products of integer codes: activations in 16 bits with a scale for every 32 columns, weights as codes.h gives them.
//
//   y[t][o] = bias[o] + sum over groups g, ascending: scale[o][g] * (x_scale[t][g] * (float)dot[o][t][g])
//                                                     [+ shift[o][g] * x_sum[t][g]]
//
// dot is the exact integer sum over the columns of a group, so the order within it is free; the float operations are
// one multiplication and one fused multiply-add in the order of the groups. `code_matvec` (one token, straight from the
// blocks) and `code_panel` (many) hold 16 rows in 16 lanes and do just these, so a token's bits are the same from both.
// Included inside the namespace of an instruction set, after encode_impl.h.
#pragma once

// The words of even bytes, then of odd ones.
template <class Q>
WO_INLINE void split_bytes(I a, I* words) {
    if constexpr (Q::kSigned) {
        words[0] = words_right_signed(words_left(a, 8), 8);
        words[1] = words_right_signed(a, 8);
    } else {
        words[0] = iand(a, iset1(0x00FF00FF));
        words[1] = words_right(a, 8);
    }
}

// Bytes of 16 rows that stay in the first-level cache until they are used.
constexpr int64_t kShortRowsBytes = 24 * 1024;

// 16 outputs of one token.
template <class Q>
struct SixteenRows {
    const uint8_t* b;  // the block of row 0
    int64_t s;         // bytes from row to row
    const EncodedTile<const uint8_t>& x;

    // Lane 4 j + i is the sum over int32s of group j of partial[i].
    static WO_INLINE I sum_groups(const I* partial) {
        I a = iadd(interleave_low(partial[0], partial[1]), interleave_high(partial[0], partial[1]));
        I b = iadd(interleave_low(partial[2], partial[3]), interleave_high(partial[2], partial[3]));
        return iadd(join_low(a, b), join_high(a, b));
    }
    static WO_INLINE F add_group(F acc, F scale, I dot, int32_t sum, float x_scale) {
        if constexpr (Q::kOffset != 0) dot = isub(dot, iset1(Q::kOffset * sum));
        return fma(scale, mul(to_float(dot), set1(x_scale)), acc);
    }
    // Parts P.. of the block whose first columns are the `block`-th 32.
    template <int P>
    WO_INLINE F parts(const typename Q::Header& h, int64_t block, F acc) const {
        const uint8_t* pairs = x.pairs + 64 * block;
        I dots[2][4];
        for (int i = 0; i < 4; ++i) {
            I bytes[2], words[4];
            Q::template codes<P>(h, b, s, i, &bytes[0], &bytes[1]);
            split_bytes<Q>(bytes[0], words);
            split_bytes<Q>(bytes[1], words + 2);
            dots[0][i] =
                dot16(dot16(zero_ints(), words[0], load_everywhere(pairs)), words[1], load_everywhere(pairs + 16));
            dots[1][i] = dot16(dot16(Q::kGroup == 32 ? dots[0][i] : zero_ints(), words[2], load_everywhere(pairs + 32)),
                               words[3], load_everywhere(pairs + 48));
        }
        const float x_scale = value_at<float>(x.scales, block);
        const int32_t low = value_at<int32_t>(x.sums, 2 * block), high = value_at<int32_t>(x.sums, 2 * block + 1);
        if constexpr (Q::kGroup == 32) {
            acc = add_group(acc, Q::template scale<P, 0>(h), sum_groups(dots[1]), low + high, x_scale);
        } else {
            acc = add_group(acc, Q::template scale<P, 0>(h), sum_groups(dots[0]), low, x_scale);
            acc = add_group(acc, Q::template scale<P, 1>(h), sum_groups(dots[1]), high, x_scale);
        }
        if constexpr (Q::kShift) acc = fma(Q::template shift<P>(h), set1(value_at<float>(x.scaled_sums, block)), acc);
        if constexpr (P + 1 < Q::kParts) return parts<P + 1>(h, block + 1, acc);
        return acc;
    }
    // Asks for bytes that are used soon. Short rows end before the processor's own prefetch has seen them, so the next
    // 16 rows are asked for, as many bytes in each block as it uses; of long rows, which would not stay in the cache
    // until then, the lines 256 bytes on.
    WO_INLINE void prefetch(int64_t block) const {
        constexpr int kStep = Q::kParts == 1 ? 4 : 1, kBytes = kStep * Q::kBytes;  // blocks that are a line or more
        if (16 * s <= kShortRowsBytes) {
            const uint8_t* next = b + 16 * s + 15 * block / Q::kParts * Q::kBytes;
            for (int i = 0; i < 16 * Q::kBytes; i += 64) __builtin_prefetch(next + i);
        } else if (block / Q::kParts % kStep == 0) {
            for (int r = 0; r < 16; ++r)
                for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(b + r * s + 256 + i);
        }
    }
    WO_INLINE F run(int64_t n) {
        F acc = zero();
        for (int64_t block = 0; block < n / 32; block += Q::kParts, b += Q::kBytes) {
            prefetch(block);
            acc = parts<0>(Q::open(b, s), block, acc);
        }
        return acc;
    }
};

// Writes lanes [skip, 16) and their bias.
WO_INLINE void store_outputs(F acc, const float* bias, float* y, int skip) {
    float v[16];
    store(v, acc);
    for (int i = skip; i < 16; ++i) y[i] = v[i] + (bias ? bias[i] : 0.0f);
}

// Calls body(o, skip) for 16 rows at a time; the last 16 may begin with `skip` that were there before.
template <class Body>
WO_INLINE void for_sixteen(int64_t o0, int64_t o1, const Body& body) {
    for (int64_t o = o0; o < o1; o += 16) {
        const int64_t first = o + 16 <= o1 ? o : o1 - 16;
        body(first, (int)(o - first));
    }
}

struct CodeMatvec {
    const MatmulTask& task;
    int64_t o0, o1;

    template <class Q>
    WO_INLINE void run() {
        const Matrix& w = task.w;
        const EncodedTile<const uint8_t> x(task.encoded, w.n_in, 1);
        for_sixteen(o0, o1, [&](int64_t o, int skip) {
            SixteenRows<Q> rows{w.data + o * w.row_bytes, w.row_bytes, x};
            store_outputs(rows.run(w.n_in), task.bias ? task.bias + o : nullptr, task.y[0] + o, skip);
        });
    }
};

static void code_matvec(const MatmulTask& task, int64_t o0, int64_t o1) {
    CodeMatvec action{task, o0, o1};
    with_codes(task.w.type, action);
}

// Decodes 16 rows into a panel: for each group of columns kGroup / 2 vectors (lane r: a pair of row r's codes), then
// the scales, then the shifts (where the type has some).
template <class Q>
struct PanelWriter {
    const uint8_t* b;
    int64_t s;
    uint8_t* out;

    WO_INLINE void pairs(const I (*words)[4], int k) {
        I rows[4];
        for (int i = 0; i < 4; ++i) rows[i] = words[i][k];
        store_ints(out, column<0>(rows));
        store_ints(out + 64, column<1>(rows));
        store_ints(out + 128, column<2>(rows));
        store_ints(out + 192, column<3>(rows));
        out += 256;
    }
    WO_INLINE void floats(F a) {
        store((float*)out, a);
        out += 64;
    }
    template <int P>
    WO_INLINE void parts(const typename Q::Header& h) {
        I words[4][4];
        for (int i = 0; i < 4; ++i) {
            I bytes[2];
            Q::template codes<P>(h, b, s, i, &bytes[0], &bytes[1]);
            split_bytes<Q>(bytes[0], words[i]);
            split_bytes<Q>(bytes[1], words[i] + 2);
        }
        for (int k = 0; k < 4; ++k) {
            pairs(words, k);
            if (Q::kGroup == 16 && k == 1) floats(Q::template scale<P, 0>(h));
        }
        floats(Q::template scale<P, Q::kGroup == 16 ? 1 : 0>(h));
        if constexpr (Q::kShift) floats(Q::template shift<P>(h));
        if constexpr (P + 1 < Q::kParts) parts<P + 1>(h);
    }
    WO_INLINE void run(int64_t n) {
        for (int64_t k = 0; k < n; k += 32 * Q::kParts, b += Q::kBytes) parts<0>(Q::open(b, s));
    }
};

// 16 outputs of a tile of T tokens; the first `skip` are not written.
template <int GROUP, bool SHIFT, int T>
static void code_tile(const uint8_t* panel, int64_t n, int32_t offset, const uint8_t* encoded, const float* bias,
                      float* const* y, int skip) {
    constexpr int kVectorBytes = 4 * kNativeLanes;
    const EncodedTile<const uint8_t> x(encoded, n, T);
    for (int lane = 0; lane < 16; lane += kNativeLanes) {
        const uint8_t *w = panel + 4 * lane, *pairs = x.pairs;
        NativeF acc[T];
        for (int t = 0; t < T; ++t) acc[t] = native_zero();
        for (int64_t g = 0; g < n / GROUP; ++g) {
            NativeI dot[T];
            for (int t = 0; t < T; ++t) dot[t] = native_zero_ints();
            for (int k = 0; k < GROUP / 2; ++k, w += 64, pairs += 4 * T) {
                const NativeI codes = native_load_ints(w);
                for (int t = 0; t < T; ++t) dot[t] = native_dot16(dot[t], codes, native_pair(pairs + 4 * t));
            }
            const NativeF scale = native_load((const float*)w);
            w += 64;
            const int64_t block = g * GROUP / 32 * T;
            for (int t = 0; t < T; ++t) {
                if (offset != 0) {
                    int32_t sum = value_at<int32_t>(x.sums, (g * GROUP / 16) * T + t);
                    if constexpr (GROUP == 32) sum += value_at<int32_t>(x.sums, (2 * g + 1) * T + t);
                    dot[t] = native_minus(dot[t], offset * sum);
                }
                acc[t] = native_fma(scale, native_scaled(dot[t], value_at<float>(x.scales, block + t)), acc[t]);
            }
            if constexpr (SHIFT) {
                const NativeF shift = native_load((const float*)w);
                w += 64;
                for (int t = 0; t < T; ++t)
                    acc[t] = native_fma(shift, value_at<float>(x.scaled_sums, block + t), acc[t]);
            }
        }
        for (int t = 0; t < T; ++t) {
            float v[kVectorBytes / 4];
            native_store(v, acc[t]);
            for (int i = lane < skip ? skip - lane : 0; i < kNativeLanes; ++i)
                y[t][lane + i] = v[i] + (bias ? bias[lane + i] : 0.0f);
        }
    }
}

template <int GROUP, bool SHIFT>
static void code_tile_of(int tokens, const uint8_t* panel, int64_t n, int32_t offset, const uint8_t* encoded,
                         const float* bias, float* const* y, int skip) {
    switch (tokens) {
        case 1:
            return code_tile<GROUP, SHIFT, 1>(panel, n, offset, encoded, bias, y, skip);
        case 2:
            return code_tile<GROUP, SHIFT, 2>(panel, n, offset, encoded, bias, y, skip);
        case 4:
            return code_tile<GROUP, SHIFT, 4>(panel, n, offset, encoded, bias, y, skip);
        case 6:
            return code_tile<GROUP, SHIFT, 6>(panel, n, offset, encoded, bias, y, skip);
        case 12:
            if constexpr (kEncodedTokens >= 12)
                return code_tile<GROUP, SHIFT, 12>(panel, n, offset, encoded, bias, y, skip);
    }
}

struct CodePanel {
    const MatmulTask& task;
    int64_t o0, o1;
    uint8_t* panel;

    template <class Q>
    WO_INLINE void run() {
        const Matrix& w = task.w;
        for_sixteen(o0, o1, [&](int64_t o, int skip) {
            PanelWriter<Q> writer{w.data + o * w.row_bytes, w.row_bytes, panel};
            writer.run(w.n_in);
            const float* bias = task.bias ? task.bias + o : nullptr;
            for (int t = 0, tokens; t < task.n_tokens; t += tokens) {
                tokens = encoded_tile(task.n_tokens - t, kEncodedTokens);
                float* y[kEncodedTokens];
                for (int i = 0; i < tokens; ++i) y[i] = task.y[t + i] + o;
                code_tile_of<Q::kGroup, Q::kShift>(tokens, panel, w.n_in, Q::kOffset,
                                                   task.encoded + t * encoded_row_bytes(w.n_in), bias, y, skip);
            }
        });
    }
};

static void code_panel(const MatmulTask& task, int64_t o0, int64_t o1, uint8_t* panel) {
    CodePanel action{task, o0, o1, panel};
    with_codes(task.w.type, action);
}

struct NoAction {
    template <class Q>
    WO_INLINE void run() {}
};
static bool has_codes(int type) {
    NoAction action;
    return with_codes(type, action);
}
