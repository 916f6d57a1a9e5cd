// Rotary embedding of q and k in place, and k and v into the paged cache as float16; the arithmetic is in rope.cuh.
//
// Grid: x = row; the head pairs of a row are spread over the blocks of y and their threads. Each block first puts the
// row's cosines and sines into shared memory.
// Bytes per row: 8 per element of q and k, 4 of v, 2 of k and v in the cache.
#include "rope.cuh"

extern "C" __global__ void __launch_bounds__(256) rope_kv(const __grid_constant__ RopeKvParams p) {
    __shared__ float2 turn[ROPE_MAX_PAIRS];  // cos, sin
    pdl_launch_dependents();
    pdl_wait();
    const int row = blockIdx.x;
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
    const int n_k = p.k ? p.n_head_kv : 0, n_v = p.v ? p.n_head_kv : 0;
    uint16_t* cache = nullptr;  // K of head 0 in the row's block
    if (p.v) {
        const int block = p.block_table[(int64_t)slot * p.max_blocks + position / KV_BLOCK];
        if (block >= 0) cache = p.kv + kv_offset(block, 0, p.n_head_kv, p.head_dim);
    }
    const int in_block = position % KV_BLOCK;
    const int head_halves = 2 * KV_BLOCK * p.head_dim;
    const int n_items = (n_q + n_k + n_v) * half_head;
    for (int item = blockIdx.y * blockDim.x + threadIdx.x; item < n_items; item += gridDim.y * blockDim.x) {
        int head = item / half_head;
        const int pair = item % half_head;
        const RopePair at = rope_pair(pair, half_rot, p.rope_type);
        if (head >= n_q + n_k) {
            head -= n_q + n_k;
            if (!cache) continue;
            const float* v = p.v + (int64_t)row * p.v_stride + head * p.head_dim;
            uint16_t* to = cache + (int64_t)head * head_halves;
            to[kv_v_at(in_block, 2 * pair, p.head_dim)] = to_cache(v[2 * pair]);
            to[kv_v_at(in_block, 2 * pair + 1, p.head_dim)] = to_cache(v[2 * pair + 1]);
            continue;
        }
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
