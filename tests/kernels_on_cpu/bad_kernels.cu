// Small kernels with one mistake each, which the runtime must report; with p.is_right they do the same without it.
// For bad_kernel_cases.py only: no GPU ever runs them. One block of 64 threads, kSmemBytes of dynamic shared memory.
//
// Right, out[i] = in[63 - i] for all of them.
#include "common/ptx.cuh"
#include "common/wgmma.cuh"

struct BadParams {
    const float* in;  // [64], 16-byte aligned
    float* out;       // [64]
    int32_t is_right;
};

static constexpr int kFloats = 64, kBarrierAt = 4 * kFloats;

#define BAD_KERNEL(name)                                                                               \
    DEVICE void name##_body(const BadParams& p, float* smem, int i);                                   \
    extern "C" __global__ void __launch_bounds__(64) bad_##name(const __grid_constant__ BadParams p) { \
        extern __shared__ __align__(16) float smem[];                                                  \
        name##_body(p, smem, threadIdx.x);                                                             \
    }                                                                                                  \
    DEVICE void name##_body(const BadParams& p, float* smem, int i)

BAD_KERNEL(no_barrier) {
    pdl_wait();
    smem[i] = p.in[i];
    if (p.is_right) __syncthreads();
    p.out[i] = smem[63 - i];
}

// Threads look at those before them: in the usual order these have run.
BAD_KERNEL(no_barrier_in_order) {
    pdl_wait();
    smem[i] = p.in[63 - i];
    if (p.is_right) __syncthreads();
    const float before = smem[i > 0 ? i - 1 : 0];
    p.out[i] = i > 0 && before != p.in[64 - i] ? -1.0f : smem[i];
}

BAD_KERNEL(no_wait_for_copies) {
    pdl_wait();
    if (i < 16) cp_async_16(smem_address(smem + 4 * i), p.in + 4 * i);
    cp_async_commit();
    if (p.is_right) cp_async_wait<0>();
    __syncthreads();
    p.out[i] = smem[63 - i];
    cp_async_wait<0>();
}

BAD_KERNEL(copies_left_at_end) {
    pdl_wait();
    if (i < 16) cp_async_16(smem_address(smem + 4 * i), p.in + 4 * i);
    cp_async_commit();
    if (p.is_right) cp_async_wait<0>();
    p.out[i] = p.in[63 - i];
}

BAD_KERNEL(lane_ends_before_shuffle) {
    pdl_wait();
    const float v = p.in[63 - i];
    if (!p.is_right && i == 5) return;
    p.out[i] = __shfl_xor_sync(0xffffffffu, __shfl_xor_sync(0xffffffffu, v, 1), 1);
}

BAD_KERNEL(lane_stays_away) {
    pdl_wait();
    p.out[i] = p.in[63 - i];
    if (p.is_right || i != 37) __syncwarp();
    __syncthreads();
}

BAD_KERNEL(two_collectives) {
    pdl_wait();
    const float v = p.in[63 - i];
    if (p.is_right || i % 2 == 0)
        p.out[i] = __shfl_sync(0xffffffffu, v, i % 32);
    else
        p.out[i] = __any_sync(0xffffffffu, v > 0.0f);
}

BAD_KERNEL(warp_stays_away) {
    pdl_wait();
    p.out[i] = p.in[63 - i];
    const uint32_t barrier = smem_address(smem) + kBarrierAt;
    if (i == 0) copy_barrier_init(barrier);
    __syncthreads();
    if (i < 32 && !p.is_right) copy_wait(barrier, 0);  // for a copy that nobody starts
    __syncthreads();
}

BAD_KERNEL(write_past_the_end) {
    pdl_wait();
    smem[p.is_right ? i : i + 32 + 64] = p.in[i];
    p.out[i] = p.in[63 - i];
}

BAD_KERNEL(copy_past_the_end) {
    pdl_wait();
    cp_async_16(smem_address(smem + (p.is_right ? 0 : 96)), p.in);
    cp_async_commit();
    cp_async_wait<0>();
    p.out[i] = p.in[63 - i];
}

BAD_KERNEL(never_written) { p.out[i] = p.is_right ? (pdl_wait(), p.in[63 - i]) : (pdl_wait(), smem[i]); }

BAD_KERNEL(no_pdl_wait) {
    if (p.is_right || i != 40) pdl_wait();
    p.out[i] = p.in[63 - i];
}

BAD_KERNEL(no_block_waits) {
    if (p.is_right) pdl_wait();
    p.out[i] = p.in[63 - i];
}

// The first warp copies twice with one barrier; p.is_right waits between.
BAD_KERNEL(copy_before_the_phase_ends) {
    pdl_wait();
    const uint32_t barrier = smem_address(smem) + kBarrierAt;
    if (i == 0) copy_barrier_init(barrier);
    __syncthreads();
    if (i < 32) {
        copy_to_smem(barrier, smem_address(smem), p.in, 4 * kFloats, i);
        if (p.is_right) copy_wait(barrier, 0);
        __syncwarp();
        copy_to_smem(barrier, smem_address(smem), p.in, 4 * kFloats, i);
        copy_wait(barrier, 1);
    }
    __syncthreads();
    p.out[i] = smem[63 - i];
}

BAD_KERNEL(wrong_parity) {
    pdl_wait();
    const uint32_t barrier = smem_address(smem) + kBarrierAt;
    if (i == 0) copy_barrier_init(barrier);
    __syncthreads();
    if (i < 32) copy_to_smem(barrier, smem_address(smem), p.in, 4 * kFloats, i);
    copy_wait(barrier, p.is_right ? 0 : 1);
    p.out[i] = smem[63 - i];
    copy_wait(barrier, 0);
}

BAD_KERNEL(part_of_a_warp_copies) {
    pdl_wait();
    const uint32_t barrier = smem_address(smem) + kBarrierAt;
    if (i == 0) copy_barrier_init(barrier);
    __syncthreads();
    if (i < (p.is_right ? 32 : 16)) copy_to_smem(barrier, smem_address(smem), p.in, 4 * kFloats, i);
    copy_wait(barrier, 0);
    p.out[i] = smem[63 - i];
}

// Each warp copies a half for one phase of the barrier.
BAD_KERNEL(copy_missing_in_a_phase) {
    pdl_wait();
    const uint32_t barrier = smem_address(smem) + kBarrierAt;
    const int warp = i / 32;
    if (i == 0) copy_barrier_init<2>(barrier);
    __syncthreads();
    if (p.is_right || warp == 0)
        copy_to_smem<L2::KEPT>(barrier, smem_address(smem + 32 * warp), p.in + 32 * warp, 2 * kFloats, i % 32);
    copy_wait(barrier, 0);
    p.out[i] = smem[63 - i];
    if (!p.is_right) return;
    __syncthreads();
    if (warp == 0)
        copy_to_smem(barrier, smem_address(smem), p.in, 4 * kFloats, i);
    else
        copy_nothing(barrier, i % 32);
    copy_wait(barrier, 1);
    p.out[i] = smem[63 - i];
}

BAD_KERNEL(warp_stays_away_from_a_group) {
    pdl_wait();
    smem[i] = p.in[i];
    if (p.is_right || i < 32) group_sync(1, 64);
    if (!p.is_right) __syncthreads();
    p.out[i] = smem[63 - i];
}

BAD_KERNEL(group_of_two_sizes) {
    pdl_wait();
    smem[i] = p.in[i];
    group_sync(1, p.is_right || i < 32 ? 64 : 32);
    p.out[i] = smem[63 - i];
}

// A barrier that counts arrivals and bytes.
BAD_KERNEL(more_come_than_it_counts) {
    pdl_wait();
    const uint32_t barrier = smem_address(smem) + kBarrierAt;
    if (i == 0) barrier_init(barrier, p.is_right ? 64 : 63);
    if (!p.is_right && i == 0) barrier_expect(barrier, 16);  // so that no phase ends
    smem[i] = p.in[i];
    __syncthreads();
    barrier_arrive(barrier);
    if (p.is_right) copy_wait(barrier, 0);
    p.out[i] = smem[63 - i];
}

BAD_KERNEL(bytes_nobody_expects) {
    pdl_wait();
    const uint32_t barrier = smem_address(smem) + kBarrierAt;
    if (i == 0) barrier_init(barrier, 1);
    __syncthreads();
    if (i == 0) {
        barrier_expect(barrier, p.is_right ? 4 * kFloats : 2 * kFloats);
        copy_bytes(barrier, smem_address(smem), p.in, 4 * kFloats);
    }
    copy_wait(barrier, 0);
    p.out[i] = smem[63 - i];
}

BAD_KERNEL(bytes_that_never_come) {
    pdl_wait();
    const uint32_t barrier = smem_address(smem) + kBarrierAt;
    if (i == 0) barrier_init(barrier, 1);
    __syncthreads();
    if (i == 0) {
        barrier_expect(barrier, 4 * kFloats);
        copy_bytes(barrier, smem_address(smem), p.in, p.is_right ? 4 * kFloats : 2 * kFloats);
    }
    copy_wait(barrier, 0);
    p.out[i] = smem[63 - i];
}

// Copies by lanes whose barrier is waited for by others.
BAD_KERNEL(no_wait_for_lanes_copies) {
    pdl_wait();
    const uint32_t barrier = smem_address(smem) + kBarrierAt;
    if (i == 0) barrier_init(barrier, 16);
    __syncthreads();
    if (i < 16) {
        cp_async_16(smem_address(smem + 4 * i), p.in + 4 * i);
        barrier_arrive_after_copies(barrier);
    }
    if (p.is_right) copy_wait(barrier, 0);
    const float v = smem[63 - i];
    if (!p.is_right) copy_wait(barrier, 0);
    p.out[i] = v;
}

BAD_KERNEL(arrival_missing_in_a_group) {
    pdl_wait();
    smem[i] = p.in[i];
    if (i >= 32 && p.is_right)
        group_arrive(1, 64);
    else if (i < 32)
        group_sync(1, 64);
    if (p.is_right) __syncthreads();
    p.out[i] = smem[63 - i];
}

BAD_KERNEL(matrix_that_is_not_aligned) {
    pdl_wait();
    smem[i] = p.in[i];
    __syncthreads();
    const float v = smem[63 - i];
    float d[8];
    const uint32_t a[4] = {};
    wgmma_f16(d, a, wgmma_matrix(smem_address(smem) + (p.is_right ? 0 : 128)), 0);
    wgmma_commit();
    wgmma_wait<0>();
    p.out[i] = v;
}

BAD_KERNEL(products_left_at_end) {
    pdl_wait();
    smem[i] = 0.0f;
    float d[8];
    const uint32_t a[4] = {};
    wgmma_f16(d, a, wgmma_matrix(smem_address(smem)), 0);
    wgmma_commit();
    if (p.is_right) wgmma_wait<0>();
    p.out[i] = p.in[63 - i];
}

// Of two groups only the first is over when the operand of the second changes.
BAD_KERNEL(operand_changed_too_early) {
    pdl_wait();
    smem[i] = 0.0f;
    __syncthreads();
    const uint64_t zeros = wgmma_eights(smem_address(smem), 128, 0);
    float d[4], e[4];
    uint32_t a[4] = {}, b[4] = {};
    wgmma_f16(d, a, zeros, 0);
    wgmma_commit();
    wgmma_f16(e, b, zeros, 0);
    wgmma_commit();
    wgmma_wait<1>();
    const float first = d[0] + d[1] + d[2] + d[3];
    if (p.is_right) wgmma_wait<0>();
    b[0] = 0x7c00u;  // infinite
    wgmma_wait<0>();
    p.out[i] = p.in[63 - i] + first + e[0] + e[1] + e[2] + e[3];
}

BAD_KERNEL(null_pointer) {
    pdl_wait();
    const float* from = p.is_right || i != 9 ? p.in : nullptr;
    p.out[i] = from[63 - i];
}

BAD_KERNEL(misaligned_copy) {
    pdl_wait();
    cp_async_16(smem_address(smem), p.in + (p.is_right ? 0 : 1));
    cp_async_commit();
    cp_async_wait<0>();
    p.out[i] = p.in[63 - i];
}
