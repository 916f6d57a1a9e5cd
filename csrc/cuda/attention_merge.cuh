// The splits of a row's heads added in order, from where the blocks of attention_decode.cu left them.
//
// They come to shared memory in two turns of as many as there is room for, all of them on their way at once, past L1,
// which may hold older bytes of the lines. Of a turn a warp finds for one or two of the heads what each split does to
// the sums (the maxima before a split may be taken in any order). Then a thread adds four dimensions of a head or two.
// Bytes: 4 * (head_dim + 4) per head and split.
#pragma once

#include "attention.cuh"

// Of what a split leaves for a head: head_dim sums, maximum, sum of weights, 0, 0.
template <int kHeadDim>
static constexpr int kPartialFloats = kHeadDim + 4;

template <int kHeadDim>
struct SplitMerge {
    static constexpr int kLeastWarps = DECODE_THREADS / 32;
    static constexpr int kQuads = kHeadDim / 4, kRowQuads = kPartialFloats<kHeadDim> / 4;
    static constexpr int kLaneSplits = 2, kMostSplits = 32 * kLaneSplits;                         // of a turn
    static constexpr int kItems = (DECODE_HEADS * kQuads + DECODE_THREADS - 1) / DECODE_THREADS;  // quads of a thread
    static_assert(DECODE_HEADS == 2 * kLeastWarps);

    // What a split does to the sums of a head, and the maximum with it.
    struct __align__(16) Step {
        Fade fade;
        float sum, top;
    };
    // Of a split and head in shared memory; both turns have room for one of most heads.
    static constexpr int kBytes = 16 * kRowQuads + sizeof(Step), kLeastBytes = 2 * DECODE_HEADS * kBytes;

    const float* partial;  // [n_heads, max_splits, kPartialFloats]
    float* out;            // [n_heads, head_dim]
    const float* sinks;    // [n_heads], as sink_of gives them
    int max_splits, n_heads, n_splits;

    // A turn in shared memory: what the splits left, [n_heads, size], and their steps, [n_heads, size].
    struct Turn {
        float4* rows;
        Step* steps;
        int size;
    };

    // `smem`: n_bytes, at least kLeastBytes. All threads of the block.
    DEVICE_MEMBER void run(uint8_t* smem, int n_bytes) const {
        const int size = min(n_bytes / (2 * kBytes * n_heads), kMostSplits);
        const int n_threads = blockDim.x, n_warps = n_threads / 32, warp = threadIdx.x / 32;
        const auto turn_at = [&](int i) {
            uint8_t* at = smem + i * (n_heads * size * kBytes);
            return Turn{reinterpret_cast<float4*>(at), reinterpret_cast<Step*>(at + n_heads * size * 16 * kRowQuads),
                        size};
        };
        copy(turn_at(0), 0);
        copy(turn_at(1), size);
        float4 acc[kItems] = {};
        float sum[kItems] = {}, last_top[kItems] = {};
        float top[2] = {-INFINITY, -INFINITY};  // of the two heads of the warp
#pragma unroll 1
        for (int split0 = 0, i = 0; split0 < n_splits; split0 += size, i ^= 1) {
            const Turn turn = turn_at(i);
            const int n = min(n_splits - split0, size);
            cp_async_wait<1>();
            __syncthreads();
#pragma unroll
            for (int half = 0; half < 2; half++)
                if (warp + half * n_warps < n_heads) find_steps(turn, warp + half * n_warps, n, top[half]);
            __syncthreads();
#pragma unroll
            for (int item = 0; item < kItems; item++) {
                const int head = head_of(item);
                if (head >= n_heads) break;
                const Step* steps = turn.steps + head * size;
                const float4* from = turn.rows + head * size * kRowQuads + quad_of(item);
#pragma unroll 4
                for (int s = 0; s < n; s++) {
                    const Step step = steps[s];
                    const float4 x = from[s * kRowQuads];
                    float4& to = acc[item];
                    to = make_float4(add_split(to.x, x.x, step.fade), add_split(to.y, x.y, step.fade),
                                     add_split(to.z, x.z, step.fade), add_split(to.w, x.w, step.fade));
                    sum[item] = add_split(sum[item], step.sum, step.fade);
                    last_top[item] = step.top;
                }
            }
            if (split0 + 2 * size < n_splits) __syncthreads();  // nobody reads the turn any more
            copy(turn, split0 + 2 * size);
        }
#pragma unroll
        for (int item = 0; item < kItems; item++) {
            const int head = head_of(item);
            if (head >= n_heads) break;
            const float factor = softmax_factor(last_top[item], sum[item], sinks[head]);
            reinterpret_cast<float4*>(out + head * kHeadDim)[quad_of(item)] =
                make_float4(__fmul_rn(acc[item].x, factor), __fmul_rn(acc[item].y, factor),
                            __fmul_rn(acc[item].z, factor), __fmul_rn(acc[item].w, factor));
        }
    }

    static DEVICE_MEMBER int head_of(int item) { return (threadIdx.x + item * blockDim.x) / kQuads; }
    static DEVICE_MEMBER int quad_of(int item) { return (threadIdx.x + item * blockDim.x) % kQuads; }

    // What splits split0 .. left, as far as there are some and they have room. A group of copies, maybe of none.
    DEVICE_MEMBER void copy(const Turn& turn, int split0) const {
        const int n = min(n_splits - split0, turn.size) * kRowQuads;
        if (n > 0) {
            int head = 0, at = threadIdx.x;
            while (true) {
                while (at >= n) at -= n, head++;
                if (head >= n_heads) break;
                cp_async_16(smem_address(turn.rows + head * turn.size * kRowQuads + at),
                            partial + ((int64_t)head * max_splits + split0) * kPartialFloats<kHeadDim> + 4 * at);
                at += blockDim.x;
            }
        }
        cp_async_commit();
    }

    // Steps of the first `n` splits of a turn for a head; `top` is the maximum of those before, then also of these.
    static DEVICE_MEMBER void find_steps(const Turn& turn, int head, int n, float& top) {
        const int lane = threadIdx.x % 32;
        float2 part[kLaneSplits];  // maximum, sum
        float most = -INFINITY;
#pragma unroll
        for (int i = 0; i < kLaneSplits; i++) {
            const int at = lane * kLaneSplits + i;
            part[i] = make_float2(-INFINITY, 0.f);
            if (at < n)
                part[i] = *reinterpret_cast<const float2*>(turn.rows + (head * turn.size + at) * kRowQuads + kQuads);
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
            const int at = lane * kLaneSplits + i;
            if (at < n) turn.steps[head * turn.size + at] = {f, part[i].y, running};
        }
    }
};
