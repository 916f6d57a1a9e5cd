// From the router to the lists of the expert products, and the weighted sum of their results.
//
// route_logits_<type>(RouteParams): the router's logits x W^T, as float32 sums over each of ROUTE_SLICES parts of K.
//   A block takes 16 experts (a row tile) and one part, each of its warps for ROUTE_ROWS rows. Grid (row tiles *
//   ROUTE_SLICES, rows / (8 * ROUTE_ROWS)), 256 threads.
// route_choose(RouteParams): logit = its parts in order + bias; the n_used largest (ties: the lower id); softmax over
//   those. A warp a row; grid any, 1024 threads. With item_rows a single block, which also makes the list.
// route_list(RouteParams): the list alone, for more rows. One block of 1024 threads.
// route_few_<type>(RouteFewParams): all of that in one launch, with the conversion of the rows for the experts'
//   products. A warp has its part of the router in shared memory before it waits; the block that ends last chooses.
// expert_sum(ExpertSumParams): grid (n / 1024, rows), 256 threads.
//
// Where a norm comes before, x times its weight is multiplied, and 1 / root comes to the sum.
//
// A row's logits are the same bits in a decode step and in any chunk of a prompt, so its experts do not depend on how
// it came. Weights are exact, products float32. Bytes: the router once per 8 * ROUTE_ROWS rows, from L2; x once per 16
// experts.
#include "common/convert_row.cuh"
#include "common/order.cuh"
#include "params/experts_params.h"
#include "quant/types.cuh"

constexpr uint32_t kAll = 0xffffffffu;

// The 16 weights of rows g and g + 8 (pair & 1) that a lane holds of one sub-tile, times the rows' x.
template <class Q, int kRows>
DEVICE void add_sub_tile(float (&sum)[kRows][2], const RouteParams& p, const uint8_t* packed_tile, int k_tile, int sub,
                         int row0, int lane) {
    const auto codes = load_codes<Q>(packed_tile, sub, lane);
#pragma unroll
    for (int b = 0; b < 2; ++b) {
        keep_loads_here();  // of all rows of x they would be too many
        const int column0 = k_tile * Q::kTileK + sub * kSubK + 32 * b;
        if (column0 >= p.k) break;
        float w[8][2];
#pragma unroll
        for (int i = 0; i < 8; ++i) exact_weights<Q>(w[i][0], w[i][1], codes, packed_tile, sub, 8 * b + i, lane);
        const int column = column0 + 4 * (lane & 3);
        float4 norm[2];
#pragma unroll
        for (int j = 0; j < 2; ++j)
            if (p.norm_weight != nullptr) norm[j] = *reinterpret_cast<const float4*>(p.norm_weight + column + 16 * j);
#pragma unroll
        for (int n = 0; n < kRows; ++n) {
            if (row0 + n >= p.n_rows) break;
            const float* x = p.x + (row0 + n) * p.x_stride + column;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float4 v = *reinterpret_cast<const float4*>(x + 16 * j);
                if (p.norm_weight != nullptr) {
                    v.x = __fmul_rn(v.x, norm[j].x), v.y = __fmul_rn(v.y, norm[j].y);
                    v.z = __fmul_rn(v.z, norm[j].z), v.w = __fmul_rn(v.w, norm[j].w);
                }
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float& s = sum[n][r];
                    s = fmaf(w[4 * j + r][0], v.x, s), s = fmaf(w[4 * j + r][1], v.y, s);
                    s = fmaf(w[4 * j + 2 + r][0], v.z, s), s = fmaf(w[4 * j + 2 + r][1], v.w, s);
                }
            }
        }
    }
}

// A row tile's sums over part `slice` of K for rows [row0, row0 + kRows); tile(i, k_tile) is where the i-th packed tile
// of the part is. A warp.
template <class Q, int kRows, class F>
DEVICE void slice_sums(const RouteParams& p, int row_tile, int slice, int row0, F tile) {
    const int lane = threadIdx.x % 32, n_pad = (p.n_expert + kTileRows - 1) / kTileRows * kTileRows;
    float sum[kRows][2] = {};
    for (int i = 0, k_tile = slice; k_tile < p.n_k_tiles; ++i, k_tile += ROUTE_SLICES)
#pragma unroll 1
        for (int sub = 0; sub < Q::kSubs; ++sub)
            add_sub_tile<Q, kRows>(sum, p, tile(i, k_tile), k_tile, sub, row0, lane);
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
        if (row0 + n >= p.n_rows) break;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float s = sum[n][r];
            s += __shfl_xor_sync(kAll, s, 1);
            s += __shfl_xor_sync(kAll, s, 2);
            if (lane % 4 == 0)
                p.partial[(static_cast<int64_t>(row0 + n) * ROUTE_SLICES + slice) * n_pad + row_tile * kTileRows +
                          lane / 4 + 8 * r] = s;
        }
    }
}

template <class Q>
DEVICE void route_logits(const RouteParams& p) {
    const int row_tile = blockIdx.x / ROUTE_SLICES, slice = blockIdx.x % ROUTE_SLICES;
    const uint8_t* packed_tiles = p.w + static_cast<int64_t>(row_tile) * p.n_k_tiles * Q::kPackedTileBytes;

    pdl_launch_dependents();
    // No kernel writes the router's weights: they come to L2 while the kernel before ends.
    for (int k_tile = slice; k_tile < p.n_k_tiles; k_tile += ROUTE_SLICES)
        for (int at = threadIdx.x * 128; at < Q::kPackedTileBytes; at += 256 * 128)
            prefetch_l2(packed_tiles + k_tile * Q::kPackedTileBytes + at);
    pdl_wait();
    slice_sums<Q, ROUTE_ROWS>(p, row_tile, slice, (blockIdx.y * 8 + threadIdx.x / 32) * ROUTE_ROWS,
                              [&](int, int k_tile) { return packed_tiles + k_tile * Q::kPackedTileBytes; });
}

// The largest key of the warp.
DEVICE uint64_t warp_largest(uint64_t key) {
    const uint32_t high = static_cast<uint32_t>(key >> 32);
    const uint32_t most = __reduce_max_sync(kAll, high);
    const uint32_t low = __reduce_max_sync(kAll, high == most ? static_cast<uint32_t>(key) : 0u);
    return static_cast<uint64_t>(most) << 32 | low;
}

// One row by one warp, whose lanes have kPerLane experts each; returns the expert of slot `lane`. NaN has a place in
// the order, so that every choice is an expert.
template <int kPerLane>
DEVICE int choose(const RouteParams& p, int row, int lane) {
    const int n_pad = (p.n_expert + kTileRows - 1) / kTileRows * kTileRows;
    const float* partial = p.partial + static_cast<int64_t>(row) * ROUTE_SLICES * n_pad;
    const float root = p.roots != nullptr ? p.roots[row] : 1.0f;
    uint64_t keys[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        const int e = lane + 32 * i;
        keys[i] = 0;
        if (e >= p.n_expert) continue;
        float parts[ROUTE_SLICES], logit = 0.0f;
#pragma unroll
        for (int s = 0; s < ROUTE_SLICES; ++s) parts[s] = partial[s * n_pad + e];
#pragma unroll
        for (int s = 0; s < ROUTE_SLICES; ++s) logit += parts[s];
        logit = __fmul_rn(logit, root);
        keys[i] = order_key(p.bias != nullptr ? __fadd_rn(logit, p.bias[e]) : logit, e);
    }
    float logit = 0.0f, total = 0.0f;
    int expert = EXPERTS_MAX;
    for (int slot = 0; slot < p.n_used; ++slot) {
        uint64_t best = 0;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) best = keys[i] > best ? keys[i] : best;
        best = warp_largest(best);
#pragma unroll
        for (int i = 0; i < kPerLane; ++i)
            if (keys[i] == best) keys[i] = 0;
        if (slot == lane) logit = key_value(best), expert = static_cast<int>(0xffffffffu - static_cast<uint32_t>(best));
    }
    const float mine = expf(logit - __shfl_sync(kAll, logit, 0));
    for (int slot = 0; slot < p.n_used; ++slot) total += __shfl_sync(kAll, mine, slot);
    if (lane < p.n_used) {
        p.ids[row * p.n_used + lane] = static_cast<float>(expert);
        p.gates[row * p.n_used + lane] = mine / total;
    }
    return expert;
}

DEVICE int choose(const RouteParams& p, int row, int lane) {
    return p.n_expert <= 32 ? choose<1>(p, row, lane) : choose<EXPERTS_MAX / 32>(p, row, lane);
}

// The list of one row, whose slots have the experts that their lanes give. A warp.
DEVICE void make_list_of_one(const RouteParams& p, int expert, int lane) {
    int rank = 0;
    for (int slot = 0; slot < p.n_used; ++slot) rank += __shfl_sync(kAll, expert, slot) < expert;
    if (lane < p.n_used) {
        p.list.items[rank] = {expert, rank, 1, 0};
        p.list.pairs[rank] = lane;
    }
    if (lane == 0) *p.list.n_items = p.n_used;
}

// A stable counting sort of the pairs by expert, and its cut into items. The whole block, whose first kWarps warps have
// a run of pairs each.
template <int kWarps>
DEVICE void make_list(const RouteParams& p) {
    __shared__ int place[kWarps]
                        [EXPERTS_MAX];  // of a warp's pairs of an expert: how many, then where the next one goes
    __shared__ int count[EXPERTS_MAX], first_place[EXPERTS_MAX], first_item[EXPERTS_MAX];
    const bool has_places = p.list.places != nullptr;
    // Pairs of an item of an expert that has n.
    const auto item_rows = [&](int n) {
        if (!has_places || n <= p.item_rows) return p.item_rows;
        const int n_items = (n + p.item_rows - 1) / p.item_rows;
        return ((n + n_items - 1) / n_items + 7) / 8 * 8;
    };
    const int n_pairs = p.n_rows * p.n_used, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int rounds = (n_pairs + 32 * kWarps - 1) / (32 * kWarps), run = 32 * rounds;
    const int n_runs = (n_pairs + run - 1) / run;
    const auto expert_of = [&](int pair) { return pair < n_pairs ? static_cast<int>(p.ids[pair]) : -1; };
    // Calls f(pair, its expert, the lanes whose pairs have the same) for the warp's pairs, 32 after 32.
    const auto for_pairs = [&](auto f) {
        if (warp >= n_runs) return;
        int pair = warp * run + lane, next = expert_of(pair);
        for (int i = 0; i < rounds; ++i, pair += 32) {
            const int expert = next;
            if (i + 1 < rounds) next = expert_of(pair + 32);
            f(pair, expert, __match_any_sync(kAll, expert));
            __syncwarp();
        }
    };
    for (int i = threadIdx.x; i < n_runs * EXPERTS_MAX; i += blockDim.x) place[i / EXPERTS_MAX][i % EXPERTS_MAX] = 0;
    __syncthreads();
    for_pairs([&](int, int expert, uint32_t same) {
        if (expert >= 0 && (same & ((1u << lane) - 1u)) == 0) place[warp][expert] += __popc(same);
    });
    __syncthreads();
    for (int e = threadIdx.x; e < p.n_expert; e += blockDim.x) {
        int n = 0;
        for (int w = 0; w < n_runs; ++w) {
            const int mine = place[w][e];
            place[w][e] = n;
            n += mine;
        }
        count[e] = n;
    }
    __syncthreads();
    if (warp == 0) {
        int places = 0, items = 0;
        for (int base = 0; base < p.n_expert; base += 32) {
            const int e = base + lane, n = e < p.n_expert ? count[e] : 0, rows = item_rows(n);
            const int n_places = has_places ? (n + 7) / 8 * 8 : n, n_items = (n + rows - 1) / rows;
            int places_to = n_places, items_to = n_items;
            for (int d = 1; d < 32; d *= 2) {
                const int a = __shfl_up_sync(kAll, places_to, d), b = __shfl_up_sync(kAll, items_to, d);
                if (lane >= d) places_to += a, items_to += b;
            }
            if (e < p.n_expert) {
                first_place[e] = places + places_to - n_places;
                first_item[e] = items + items_to - n_items;
            }
            places += __shfl_sync(kAll, places_to, 31), items += __shfl_sync(kAll, items_to, 31);
        }
        if (lane == 0) *p.list.n_items = items;
    }
    __syncthreads();
    for_pairs([&](int pair, int expert, uint32_t same) {
        const uint32_t before = same & ((1u << lane) - 1u);
        const int at = expert >= 0 ? first_place[expert] + place[warp][expert] + __popc(before) : 0;
        __syncwarp();
        if (expert < 0) return;
        p.list.pairs[at] = pair;
        if (has_places) p.list.places[pair] = at;
        if (before == 0) place[warp][expert] += __popc(same);
    });
    for (int e = warp; e < p.n_expert; e += blockDim.x / 32) {
        const int n = count[e], rows = item_rows(n);
        for (int i = lane; i * rows < n; i += 32)
            p.list.items[first_item[e] + i] = {e, first_place[e] + i * rows, min(rows, n - i * rows), 0};
    }
}

extern "C" __global__ void __launch_bounds__(1024) route_choose(const __grid_constant__ RouteParams p) {
    pdl_launch_dependents();
    pdl_wait();
    const int n_warps = blockDim.x / 32;
    for (int row = blockIdx.x * n_warps + threadIdx.x / 32; row < p.n_rows; row += gridDim.x * n_warps)
        choose(p, row, threadIdx.x % 32);
    if (p.item_rows == 0) return;
    __syncthreads();
    make_list<32>(p);
}

extern "C" __global__ void __launch_bounds__(1024) route_list(const __grid_constant__ RouteParams p) {
    pdl_launch_dependents();
    pdl_wait();
    make_list<32>(p);
}

template <class Q>
DEVICE void route_few(const RouteFewParams& p) {
    extern __shared__ __align__(128) uint8_t smem[];  // [warps] parts of the router
    __shared__ float units[2][kMaxUnits];
    __shared__ int is_last;
    const RouteParams& route = p.route;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    pdl_launch_dependents();
    if (static_cast<int>(blockIdx.x) < p.n_logit_blocks) {
        const int n_row_blocks = p.n_logit_blocks / ((route.n_rows + ROUTE_FEW_ROWS - 1) / ROUTE_FEW_ROWS);
        const int row0 = blockIdx.x / n_row_blocks * ROUTE_FEW_ROWS;
        const int job = blockIdx.x % n_row_blocks * (kConvertThreads / 32) + warp;
        const int row_tile = job / ROUTE_SLICES, slice = job % ROUTE_SLICES;
        uint8_t* const mine = smem + warp * p.slice_bytes;
        const bool exists = row_tile * kTileRows < route.n_expert;
        if (exists) {
            const uint8_t* from = route.w + static_cast<int64_t>(row_tile) * route.n_k_tiles * Q::kPackedTileBytes;
            for (int i = 0, k_tile = slice; k_tile < route.n_k_tiles; ++i, k_tile += ROUTE_SLICES)
                for (int at = lane * 16; at < Q::kPackedTileBytes; at += 512)
                    cp_async_16(smem_address(mine + i * Q::kPackedTileBytes + at),
                                from + k_tile * Q::kPackedTileBytes + at);
        }
        cp_async_commit();
        cp_async_wait<0>();
        __syncwarp();
        pdl_wait();
        if (exists)
            slice_sums<Q, ROUTE_FEW_ROWS>(route, row_tile, slice, row0,
                                          [&](int i, int) { return mine + i * Q::kPackedTileBytes; });
    } else {
        convert_row(p.convert, blockIdx.x - p.n_logit_blocks, 0, units);
    }
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomic_add_acq_rel(p.arrived, 1) == gridDim.x - 1;
    __syncthreads();
    if (!is_last) return;
    if (threadIdx.x == 0) *p.arrived = 0;
    if (route.n_rows == 1) {
        if (warp == 0) make_list_of_one(route, choose(route, 0, lane), lane);
        return;
    }
    for (int row = warp; row < route.n_rows; row += kConvertThreads / 32) choose(route, row, lane);
    __syncthreads();
    make_list<1>(route);
}

extern "C" __global__ void __launch_bounds__(256) expert_sum(const __grid_constant__ ExpertSumParams p) {
    pdl_launch_dependents();
    pdl_wait();
    const int i = 4 * (blockIdx.x * blockDim.x + threadIdx.x), row = blockIdx.y;
    if (i >= p.n) return;
    float4 sum = {};
    for (int slot = 0; slot < p.n_used; ++slot) {
        const float gate = p.gates[row * p.n_used + slot];
        const float4 v =
            *reinterpret_cast<const float4*>(p.x + row * p.x_stride + static_cast<int64_t>(slot) * p.n + i);
        sum.x = fmaf(gate, v.x, sum.x), sum.y = fmaf(gate, v.y, sum.y);
        sum.z = fmaf(gate, v.z, sum.z), sum.w = fmaf(gate, v.w, sum.w);
    }
    float4* const out = reinterpret_cast<float4*>(p.out + row * p.out_stride + i);
    if (p.add) {
        const float4 before = *out;
        sum.x = __fadd_rn(before.x, sum.x), sum.y = __fadd_rn(before.y, sum.y);
        sum.z = __fadd_rn(before.z, sum.z), sum.w = __fadd_rn(before.w, sum.w);
    }
    *out = sum;
}

#define DEFINE(Type, name)                                                                                            \
    extern "C" __global__ void __launch_bounds__(256, 1) route_logits_##name(const __grid_constant__ RouteParams p) { \
        route_logits<Type>(p);                                                                                        \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256, 1) route_few_##name(const __grid_constant__ RouteFewParams p) { \
        route_few<Type>(p);                                                                                           \
    }
FOR_EACH_TYPE(DEFINE)
