// Rotary embedding of q and k in place, and k and v into the paged cache as float16; the arithmetic is in rope.cuh.
//
// Grid: x = row; the head pairs of a row are spread over the blocks of y and their threads. Each block first puts the
// row's cosines and sines into shared memory. V of eight rows is stored by the blocks of the first of them: of eight
// neighbouring positions a dimension's values lie together.
// Bytes per row: 8 per element of q and k, 4 of v, 2 of k and v in the cache.
#include "rope.cuh"

constexpr int kTogether = 8;

// K of head 0 in the block of a row's position; null where the row has no block.
DEVICE uint16_t* cache_of(const RopeKvParams& p, int slot, int position) {
    const int block = slot < 0 ? -1 : p.block_table[(int64_t)slot * p.max_blocks + position / KV_BLOCK];
    return block < 0 ? nullptr : p.kv + kv_offset(block, 0, p.n_head_kv, p.head_dim);
}

// V of up to kTogether rows from row0 on.
DEVICE void store_v(const RopeKvParams& p, int row0) {
    const int n_rows = min(kTogether, (int)gridDim.x - row0), position0 = p.positions[row0], slot0 = p.slots[row0];
    const int head_halves = 2 * KV_BLOCK * p.head_dim, n_items = p.n_head_kv * p.head_dim;
    const int first = blockIdx.y * blockDim.x + threadIdx.x, step = gridDim.y * blockDim.x;
    bool are_neighbours = n_rows == kTogether && position0 % kTogether == 0;
    for (int i = 1; i < n_rows; i++)
        are_neighbours = are_neighbours && p.slots[row0 + i] == slot0 && p.positions[row0 + i] == position0 + i;
    if (are_neighbours) {
        uint16_t* const cache = cache_of(p, slot0, position0);
        if (!cache) return;
        for (int item = first; item < n_items; item += step) {
            const int head = item / p.head_dim, dim = item % p.head_dim;
            const float* v = p.v + (int64_t)row0 * p.v_stride + item;
            float x[kTogether];
#pragma unroll
            for (int i = 0; i < kTogether; i++) x[i] = v[(int64_t)i * p.v_stride];
            uint32_t packed[kTogether / 2];
#pragma unroll
            for (int i = 0; i < kTogether; i += 2)
                packed[i / 2] = to_cache(x[i]) | static_cast<uint32_t>(to_cache(x[i + 1])) << 16;
            uint16_t* to = cache + (int64_t)head * head_halves + kv_v_at(position0 % KV_BLOCK, dim, p.head_dim);
            *reinterpret_cast<uint4*>(to) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
        }
        return;
    }
    for (int i = 0; i < n_rows; i++) {
        const int row = row0 + i, position = p.positions[row];
        uint16_t* const cache = cache_of(p, p.slots[row], position);
        if (!cache) continue;
        const float* v = p.v + (int64_t)row * p.v_stride;
        for (int item = first; item < n_items; item += step) {
            const int head = item / p.head_dim, dim = item % p.head_dim;
            cache[(int64_t)head * head_halves + kv_v_at(position % KV_BLOCK, dim, p.head_dim)] = to_cache(v[item]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) rope_kv(const __grid_constant__ RopeKvParams p) {
    __shared__ float2 turn[ROPE_MAX_PAIRS];  // cos, sin
    pdl_launch_dependents();
    pdl_wait();
    const int row = blockIdx.x;
    if (p.v && row % kTogether == 0) store_v(p, row);
    const int slot = p.slots[row];
    if (slot < 0) return;
    const int position = p.positions[row];
    const int half_rot = p.n_rot / 2, half_head = p.head_dim / 2;
    const float* inv_freq = p.rope_tables ? p.inv_freq + p.rope_tables[slot] * half_rot : p.inv_freq;
    for (int pair = threadIdx.x; pair < half_rot; pair += blockDim.x) {
        turn[pair] = rope_turn(position, inv_freq[pair], p.mscale);
    }
    __syncthreads();

    const int n_q = p.q && p.n_rot > 0 ? p.n_head : 0;
    const int n_k = p.k ? p.n_head_kv : 0;
    uint16_t* const cache = p.v ? cache_of(p, slot, position) : nullptr;
    const int in_block = position % KV_BLOCK;
    const int head_halves = 2 * KV_BLOCK * p.head_dim;
    const int n_items = (n_q + n_k) * half_head;
    for (int item = blockIdx.y * blockDim.x + threadIdx.x; item < n_items; item += gridDim.y * blockDim.x) {
        int head = item / half_head;
        const int pair = item % half_head;
        const RopePair at = rope_pair(pair, half_rot, p.rope_type);
        const bool is_q = head < n_q;
        if (!is_q) head -= n_q;
        float* x = is_q ? p.q + (int64_t)row * p.q_stride : p.k + (int64_t)row * p.k_stride;
        x += head * p.head_dim;
        float2 ab = make_float2(x[at.first], x[at.second]);
        if (at.is_rotated) {
            ab = rotate(ab.x, ab.y, turn[pair]);
            x[at.first] = ab.x;
            x[at.second] = ab.y;
        }
        if (!is_q && cache) {
            uint16_t* to = cache + (int64_t)head * head_halves;
            to[kv_k_at(in_block, at.first, p.head_dim)] = to_cache(ab.x);
            to[kv_k_at(in_block, at.second, p.head_dim)] = to_cache(ab.y);
        }
    }
}
