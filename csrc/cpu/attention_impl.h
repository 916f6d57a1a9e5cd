// Writing the paged float16 cache, and attention over it.
//
//   out[r, h] = sum_j e_j v_j / (sum_j e_j [+ e^(sink_h - m)]),  e_j = exp(scale * q . k_j - m)
//
// over the key blocks of 64 positions in ascending order with a running maximum (Milakov & Gimelshein 2018). Blocks
// start at multiples of 64 of the absolute position and the arithmetic within one depends on the row's own position
// alone, so a row gives the same bits whatever rows it is computed with. Keys are stored dimension-major: a vector then
// holds one dimension of 16 keys and scores need no sum over lanes. A call converts each block to float32 once and uses
// it for all rows and query heads of the call. Included inside the namespace of an instruction set.
#pragma once

static void kv_write(const float* k, const float* v, int n_head_kv, int head_dim, int v_stride, uint16_t* block,
                     int position_in_block) {
    uint16_t* v_part = block + (int64_t)n_head_kv * head_dim * kBlockPositions;
    for (int h = 0; h < n_head_kv; ++h) {
        uint16_t* k_out = block + (int64_t)h * head_dim * kBlockPositions + position_in_block;
        uint16_t* v_out = v_part + ((int64_t)h * kBlockPositions + position_in_block) * v_stride;
        for (int d = 0; d < head_dim; d += 16) {
            int n = head_dim - d < 16 ? head_dim - d : 16;
            const float *kd = k + (int64_t)h * head_dim + d, *vd = v + (int64_t)h * head_dim + d;
            uint16_t half[16];
            store_f16(half, n == 16 ? load(kd) : load_tail(kd, n, 0));
            for (int i = 0; i < n; ++i) k_out[(int64_t)(d + i) * kBlockPositions] = half[i];
            store_f16(v_out + d, n == 16 ? load(vd) : load_tail(vd, n, 0));
        }
    }
}

// acc[0 .. 16 D) += sum over positions [p0, p1] of weights[p] * v[p][...], in ascending p.
template <int D>
WO_INLINE void weighted_sum(const float* v, int v_stride, const float* weights, int p0, int p1, float* acc) {
    F a[D];
    for (int d = 0; d < D; ++d) a[d] = load(acc + 16 * d);
    for (int p = p0; p <= p1; ++p) {
        F w = set1(weights[p]);
        for (int d = 0; d < D; ++d) a[d] = fma(w, load(v + (int64_t)p * v_stride + 16 * d), a[d]);
    }
    for (int d = 0; d < D; ++d) store(acc + 16 * d, a[d]);
}

// One query head and one block: keys [p0, p1] of it. k [head_dim][64], v [64][v_stride], acc [v_stride].
static void attend_block(const float* q, const float* k, const float* v, int head_dim, int v_stride, float scale,
                         int p0, int p1, float* weights, float* acc, float* max_seen, float* total) {
    constexpr int kGroups = kBlockPositions / 16;
    const F minus_infinity = set1(-__builtin_inff());
    F s[kGroups];
    for (int g = 0; g < kGroups; ++g) s[g] = zero();
    if (p1 < 16) {  // the first group alone: what a short sequence needs
        for (int d = 0; d < head_dim; ++d) s[0] = fma(set1(q[d]), load(k + d * kBlockPositions), s[0]);
    } else {
        for (int d = 0; d < head_dim; ++d) {
            F qd = set1(q[d]);
            for (int g = 0; g < kGroups; ++g) s[g] = fma(qd, load(k + d * kBlockPositions + 16 * g), s[g]);
        }
    }
    F top = minus_infinity;
    for (int g = 0; g < kGroups; ++g) {
        uint32_t from = p0 <= 16 * g ? 0 : p0 >= 16 * g + 16 ? 16 : (uint32_t)(p0 - 16 * g);
        uint32_t to = p1 < 16 * g ? 0 : p1 >= 16 * g + 15 ? 16 : (uint32_t)(p1 - 16 * g + 1);
        uint32_t valid = ((1u << to) - 1) & ~((1u << from) - 1);
        s[g] = select(valid, mul(s[g], set1(scale)), minus_infinity);
        top = max(top, s[g]);
    }
    float m = max_lane(top);
    if (!(m > *max_seen)) m = *max_seen;
    F exps = zero();
    for (int g = 0; g < kGroups; ++g) {
        F e = exp16(sub(s[g], set1(m)));
        exps = add(exps, e);
        store(weights + 16 * g, e);
    }
    float correction = exp1(*max_seen - m);
    *total = *total * correction + sum(exps);
    *max_seen = m;
    int d = 0;
    F c = set1(correction);
    for (int i = 0; i < v_stride; i += 16) store(acc + i, mul(load(acc + i), c));
    for (; d + 64 <= v_stride; d += 64) weighted_sum<4>(v + d, v_stride, weights, p0, p1, acc + d);
    for (; d < v_stride; d += 16) weighted_sum<1>(v + d, v_stride, weights, p0, p1, acc + d);
}

static void attention(const AttentionTask& t, int r0, int r1, int h0, int h1, float* scratch) {
    const int kv_head = h0 / (t.n_head / t.n_head_kv), group = h1 - h0, hd = t.head_dim, vs = t.v_stride;
    float* k = scratch;                                  // [head_dim][64]
    float* v = k + (int64_t)hd * kBlockPositions;        // [64][v_stride]
    float* weights = v + (int64_t)vs * kBlockPositions;  // [64]
    float* acc = weights + kBlockPositions;              // [rows][group][v_stride]
    const int queries = (r1 - r0) * group;
    float* max_seen = acc + (int64_t)queries * vs;  // [rows][group]
    float* total = max_seen + queries;              // [rows][group]

    for (int i = 0; i < queries; ++i) {
        int h = h0 + i % group;
        max_seen[i] = t.sinks ? t.sinks[h] : -__builtin_inff();
        total[i] = t.sinks ? 1.0f : 0.0f;
    }
    for (int64_t i = 0; i < (int64_t)queries * vs; ++i) acc[i] = 0;

    const int64_t k_size = (int64_t)t.n_head_kv * hd * kBlockPositions;
    const int64_t block_size = k_size + (int64_t)t.n_head_kv * vs * kBlockPositions;
    const int first = t.window > 0 && t.positions[r0] >= t.window ? t.positions[r0] - t.window + 1 : 0;
    const int last = t.positions[r1 - 1];
    for (int b = first / kBlockPositions; b <= last / kBlockPositions; ++b) {
        const int start = b * kBlockPositions;
        const int used = last - start < kBlockPositions - 1 ? last - start + 1 : kBlockPositions;
        const uint16_t* block = t.cache + t.blocks[b] * block_size;
        const uint16_t* k16 = block + (int64_t)kv_head * hd * kBlockPositions;
        const uint16_t* v16 = block + k_size + (int64_t)kv_head * kBlockPositions * vs;
        for (int d = 0; d < hd; ++d)
            for (int p = 0; p < used; p += 16)
                store(k + d * kBlockPositions + p, load_f16(k16 + d * kBlockPositions + p));
        for (int p = round_up16(used); p < kBlockPositions; p += 16)
            for (int d = 0; d < hd; ++d) store(k + d * kBlockPositions + p, zero());
        for (int64_t i = 0; i < (int64_t)used * vs; i += 16) store(v + i, load_f16(v16 + i));
        for (int r = r0; r < r1; ++r) {
            const int pos = t.positions[r];
            const int lowest = t.window > 0 && pos >= t.window ? pos - t.window + 1 : 0;
            if (pos < start || lowest >= start + kBlockPositions) continue;
            const int p0 = lowest > start ? lowest - start : 0;
            const int p1 = pos - start < kBlockPositions - 1 ? pos - start : kBlockPositions - 1;
            for (int g = 0; g < group; ++g) {
                const int i = (r - r0) * group + g;
                attend_block(t.q + r * t.q_stride + (int64_t)(h0 + g) * hd, k, v, hd, vs, t.scale, p0, p1, weights,
                             acc + (int64_t)i * vs, max_seen + i, total + i);
            }
        }
    }
    for (int i = 0; i < queries; ++i) {
        float* out = t.out + (int64_t)(r0 + i / group) * t.out_stride + (int64_t)(h0 + i % group) * hd;
        const float inv = 1.0f / total[i];
        for (int d = 0; d < hd; ++d) out[d] = acc[(int64_t)i * vs + d] * inv;
    }
}
