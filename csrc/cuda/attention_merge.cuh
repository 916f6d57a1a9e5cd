// The splits of a row's heads added in order, from where the blocks of attention_decode.cu left them.
//
// First a warp finds for one or two of the heads what each split does to the sums (the maxima before a split may be
// taken in any order). Then a thread adds four dimensions of a head; sixteen of its loads are in flight. Reads past L1,
// which may hold older bytes of the lines. Bytes: 4 * (head_dim + 4) per head and split.
#pragma once

#include "attention.cuh"

// Of what a split leaves for a head: head_dim sums, maximum, sum of weights, 0, 0.
template <int kHeadDim>
static constexpr int kPartialFloats = kHeadDim + 4;

template <int kHeadDim>
struct SplitMerge {
    static constexpr int kLeastWarps = DECODE_THREADS / 32;
    static constexpr int kRowFloats = kPartialFloats<kHeadDim>, kQuads = kHeadDim / 4;
    static constexpr int kSplits = 64;  // whose steps are in shared memory at a time
    static constexpr int kLaneSplits = kSplits / 32;
    static constexpr int kLoads = 16;
    static_assert(DECODE_HEADS == 2 * kLeastWarps);

    // What a split does to the sums of a head, and the maximum with it.
    struct __align__(16) Step {
        Fade fade;
        float sum, top;
    };
    static constexpr int kBytes = DECODE_HEADS * kSplits * sizeof(Step);

    const float* partial;  // [n_heads, max_splits, kRowFloats]
    float* out;            // [n_heads, head_dim]
    const float* sinks;    // [n_heads], as sink_of gives them
    int max_splits, n_heads, n_splits;

    DEVICE_MEMBER const float* row_of(int head, int split) const {
        return partial + ((int64_t)head * max_splits + split) * kRowFloats;
    }

    // `smem`: kBytes. All threads of the block.
    DEVICE_MEMBER void run(uint8_t* smem) const {
        Step* steps = reinterpret_cast<Step*>(smem);  // [DECODE_HEADS, kSplits]
        const int n_threads = blockDim.x, n_warps = n_threads / 32, warp = threadIdx.x / 32;
#pragma unroll 1
        for (int item0 = 0; item0 < n_heads * kQuads; item0 += n_threads) {
            const int head = (item0 + threadIdx.x) / kQuads, dim = (item0 + threadIdx.x) % kQuads * 4;
            float top[2] = {-INFINITY, -INFINITY};  // of the two heads of the warp
            float4 acc = make_float4(0.f, 0.f, 0.f, 0.f);
            float last_top = -INFINITY, sum = 0.f;
#pragma unroll 1
            for (int split0 = 0; split0 < n_splits; split0 += kSplits) {
                const int n = n_splits - split0 < kSplits ? n_splits - split0 : kSplits;
                const float* from = row_of(head, split0) + dim;
                float4 x[kLoads];
                load(x, from, head < n_heads ? n : 0);
                __syncthreads();  // nobody reads the steps any more
#pragma unroll
                for (int half = 0; half < 2; half++)
                    if (warp + half * n_warps < n_heads) find_steps(steps, warp + half * n_warps, split0, n, top[half]);
                __syncthreads();
                if (head >= n_heads) continue;
                for (int s0 = 0; s0 < n; s0 += kLoads) {
                    if (s0 > 0) load(x, from + s0 * kRowFloats, n - s0);
#pragma unroll
                    for (int i = 0; i < kLoads; i++) {
                        if (s0 + i >= n) break;
                        const Step step = steps[head * kSplits + s0 + i];
                        acc = make_float4(add_split(acc.x, x[i].x, step.fade), add_split(acc.y, x[i].y, step.fade),
                                          add_split(acc.z, x[i].z, step.fade), add_split(acc.w, x[i].w, step.fade));
                        sum = add_split(sum, step.sum, step.fade);
                        last_top = step.top;
                    }
                }
            }
            if (head >= n_heads) continue;
            const float factor = softmax_factor(last_top, sum, sinks[head]);
            *reinterpret_cast<float4*>(out + head * kHeadDim + dim) = make_float4(
                __fmul_rn(acc.x, factor), __fmul_rn(acc.y, factor), __fmul_rn(acc.z, factor), __fmul_rn(acc.w, factor));
        }
    }

    // Steps of splits split0 .. split0 + n of a head; `top` is the maximum of those before, then also of these.
    DEVICE_MEMBER void find_steps(Step* steps, int head, int split0, int n, float& top) const {
        const int lane = threadIdx.x % 32;
        float2 part[kLaneSplits];  // maximum, sum
        float most = -INFINITY;
#pragma unroll
        for (int i = 0; i < kLaneSplits; i++) {
            const int at = lane * kLaneSplits + i;
            part[i] = make_float2(-INFINITY, 0.f);
            if (at < n) part[i] = __ldcg(reinterpret_cast<const float2*>(row_of(head, split0 + at) + kHeadDim));
        }
#pragma unroll
        for (int i = 0; i < kLaneSplits; i++) most = fmaxf(most, part[i].x);
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            const float before = __shfl_up_sync(0xffffffffu, most, offset);
            if (lane >= offset) most = fmaxf(most, before);
        }
        float running = __shfl_up_sync(0xffffffffu, most, 1);  // of the lanes before this one
        running = lane > 0 ? fmaxf(top, running) : top;
        top = fmaxf(top, __shfl_sync(0xffffffffu, most, 31));
#pragma unroll
        for (int i = 0; i < kLaneSplits; i++) {
            const Fade f = fade_of(running, part[i].x);
            steps[head * kSplits + lane * kLaneSplits + i] = {f, part[i].y, running};
        }
    }

    // Four dimensions of up to kLoads splits.
    static DEVICE_MEMBER void load(float4 (&x)[kLoads], const float* from, int n) {
#pragma unroll
        for (int i = 0; i < kLoads; i++)
            if (i < n) x[i] = __ldcg(reinterpret_cast<const float4*>(from + i * kRowFloats));
    }
};
