// csrc/cuda/common/wgmma.cuh for kernels that run on the CPU: the same functions.
#pragma once

#include "common/ptx.cuh"

// ---- products: each warp has rows of its own, so a warpgroup's is that of four warps

DEVICE uint64_t wgmma_matrix(uint32_t smem) {
    if (smem % 1024) on_cpu::fail("a matrix of a product at byte %u of shared memory, no multiple of 1,024", smem);
    return smem / 16;
}
DEVICE void wgmma_fence() {}
DEVICE void wgmma_commit() {}
template <int kPending>
DEVICE void wgmma_wait() {}

template <int n>
DEVICE void wgmma_f16(float (&d)[n], const uint32_t* a, uint64_t b, int adds) {
    const int g = on_cpu::current->lane >> 2, t = on_cpu::current->lane & 3;
    for (int j = 0; j < n / 4; ++j) {
        uint32_t words[2];
        for (int h = 0; h < 2; ++h) {  // rows of b 2t + 8h and the one after, column 8j + g
            const uint32_t at = static_cast<uint32_t>(b) * 16 + (8 * j + g) * 128 + 16 * h + 4 * t;
            words[h] = load_shared_as<uint32_t>(at ^ (at >> 3 & 0x70));
        }
        float sums[4] = {};
        if (adds) memcpy(sums, d + 4 * j, sizeof sums);
        on_cpu::mma_f16(sums, a, words[0], words[1]);
        memcpy(d + 4 * j, sums, sizeof sums);
    }
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
