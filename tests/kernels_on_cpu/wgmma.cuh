// csrc/cuda/common/wgmma.cuh for kernels that run on the CPU: the same functions.
#pragma once

#include "common/ptx.cuh"

// ---- products: each warp has rows of its own, so a warpgroup's is that of four warps. They run when they are waited
// for, which is when a GPU has read registers and shared memory at the latest: what was changed too early shows.

DEVICE uint64_t wgmma_matrix(uint32_t smem) {
    if (smem % 1024) on_cpu::fail("a matrix of a product at byte %u of shared memory, no multiple of 1,024", smem);
    return smem / 16 | 1ull << 62;
}
DEVICE uint64_t wgmma_eights(uint32_t smem, uint32_t along, uint32_t across) {
    if ((smem | along | across) % 16) on_cpu::fail("a matrix of a product at byte %u, no multiple of 16", smem);
    return smem / 16 | static_cast<uint64_t>(along / 16) << 16 | static_cast<uint64_t>(across / 16) << 32;
}
// Elements i and i + 1 of column c of a matrix.
DEVICE uint32_t wgmma_elements(uint64_t matrix, int i, int c) {
    const uint32_t at = (matrix & 0x3fff) * 16;
    if (matrix >> 62) {
        const uint32_t in_order = at + c * 128 + 2 * i;
        return load_shared_as<uint32_t>(in_order ^ (in_order >> 3 & 0x70));
    }
    const uint32_t along = (matrix >> 16 & 0x3fff) * 16, across = (matrix >> 32 & 0x3fff) * 16;
    return load_shared_as<uint32_t>(at + i / 8 * along + c / 8 * across + c % 8 * 16 + i % 8 * 2);
}
DEVICE void wgmma_fence() {}

static inline void run_product(const on_cpu::Product& p) {
    const int lane = on_cpu::current->lane, g = lane >> 2, t = lane & 3, row = threadIdx.x / 32 % 4 * 16 + g;
    uint32_t from_shared[4];  // rows +0, +8, columns +0, +8
    for (int i = 0; p.a == nullptr && i < 4; ++i)
        from_shared[i] = wgmma_elements(p.a_at, 2 * t + i / 2 * 8, row + i % 2 * 8);
    for (int j = 0; j < p.n / 4; ++j) {
        float sums[4] = {};
        if (p.adds) memcpy(sums, p.d + 4 * j, sizeof sums);
        on_cpu::mma_f16(sums, p.a ? p.a : from_shared, wgmma_elements(p.b, 2 * t, 8 * j + g),
                        wgmma_elements(p.b, 2 * t + 8, 8 * j + g));
        memcpy(p.d + 4 * j, sums, sizeof sums);
    }
}
DEVICE void wgmma_commit() { ++on_cpu::current->n_product_groups; }
template <int kPending>
DEVICE void wgmma_wait() {
    on_cpu::Thread& own = *on_cpu::current;
    auto p = own.products.begin();
    for (; p != own.products.end() && p->group < own.n_product_groups - kPending; ++p) run_product(*p);
    own.products.erase(own.products.begin(), p);
}
template <int n>
DEVICE void wgmma_f16(float (&d)[n], const uint32_t* a, uint64_t b, int adds) {
    on_cpu::current->products.push_back({d, n, a, 0, b, adds, on_cpu::current->n_product_groups});
}
template <int n>
DEVICE void wgmma_f16(float (&d)[n], uint64_t a, uint64_t b, int adds) {
    on_cpu::current->products.push_back({d, n, nullptr, a, b, adds, on_cpu::current->n_product_groups});
}

// ---- registers of a warpgroup

template <int kRegisters>
DEVICE void take_registers() {}
template <int kRegisters>
DEVICE void give_registers() {}

// ---- barriers in shared memory

DEVICE void barrier_init(uint32_t barrier, int n) { on_cpu::barrier_init(barrier, n); }
DEVICE void barrier_arrive(uint32_t barrier) { on_cpu::barrier_arrive(barrier, 0); }
DEVICE void barrier_arrive_after_copies(uint32_t barrier) { on_cpu::barrier_arrive_after_copies(barrier); }
DEVICE void fence_async() {}
DEVICE void barrier_expect(uint32_t barrier, uint32_t n_bytes) { on_cpu::barrier_arrive(barrier, n_bytes); }
DEVICE void copy_bytes(uint32_t barrier, uint32_t smem, const void* global, uint32_t n_bytes) {
    on_cpu::copy_bytes(barrier, smem, global, n_bytes);
}
DEVICE void group_arrive(int barrier, int n_threads) { on_cpu::arrive_at_group(barrier, n_threads); }
