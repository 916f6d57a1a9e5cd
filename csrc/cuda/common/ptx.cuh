// The PTX instructions that CUDA C++ has no name for, as inline functions: programmatic dependent launch, asynchronous
// copies into shared memory, matrix products, packed conversions. Needs sm_80.
#pragma once

#include <cuda_fp16.h>
#include <stdint.h>

#define DEVICE static __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__

// ---- programmatic dependent launch -------------------------------------------------------------------------------
// Both are no-ops below sm_90 and in a launch without the attribute. A kernel that may be launched with it must
// execute pdl_wait() in every thread before it reads what an earlier kernel wrote and before its first global store
// (an earlier kernel may still be reading what this one overwrites), even if it needs neither: the next kernel's
// wait covers this one only, and relies on this one having waited for those before it. A block that does neither may
// return at once where another block of its launch waits: the launch ends with its last block.

// Lets the next kernel of the stream start its prologue.
DEVICE void pdl_launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Returns once all kernels this one depends on have finished and their writes are visible.
DEVICE void pdl_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- asynchronous copies, global to shared -----------------------------------------------------------------------

DEVICE uint32_t smem_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes, both addresses 16-byte aligned; bypasses L1.
DEVICE void cp_async_16(uint32_t smem, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem), "l"(global) : "memory");
}

// 4 bytes, both addresses 4-byte aligned.
DEVICE void cp_async_4(uint32_t smem, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(smem), "l"(global) : "memory");
}

// As cp_async_16; with n_bytes = 0 nothing is read and 16 zero bytes are written.
DEVICE void cp_async_16_zfill(uint32_t smem, const void* global, uint32_t n_bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(global), "r"(n_bytes) : "memory");
}

DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's committed groups are unfinished.
template <int kPending>
DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- shared memory by address ---------------------------------------------------------------------------------------
// The address of an array is found out wherever it is used, which takes several instructions; a number is not.

DEVICE float load_shared(uint32_t at) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at) : "memory");
    return v;
}

// 16-byte aligned.
DEVICE float4 load_shared_float4(uint32_t at) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(at)
                 : "memory");
    return v;
}

DEVICE uint4 load_shared_uint4(uint32_t at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(at)
                 : "memory");
    return v;
}

DEVICE void store_shared(uint32_t at, float v) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(v) : "memory"); }

DEVICE void store_shared(uint32_t at, const uint4& v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

// ---- barriers in shared memory that copies arrive at --------------------------------------------------------------
// From sm_90 on one thread starts a copy of any multiple of 16 bytes; before, the whole warp copies.

// For kCopies copies each phase, each by one warp.
template <int kCopies = 1>
DEVICE void copy_barrier_init(uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
    constexpr int kArrivals = kCopies;
#else
    constexpr int kArrivals = 32 * kCopies;
#endif
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "n"(kArrivals) : "memory");
}

// Makes the initialized barriers known to the copy engine.
DEVICE void copy_barrier_fence() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// What becomes of the copied bytes in L2: weights are read once a step and leave first, so that all else has room.
enum class L2 { LEAVES_FIRST, KEPT };

// Starts copying n_bytes (a multiple of 16, addresses 16-byte aligned) for the barrier's current phase. A full warp.
template <L2 kL2 = L2::LEAVES_FIRST>
DEVICE void copy_to_smem(uint32_t barrier, uint32_t smem, const void* global, uint32_t n_bytes, int lane) {
#if __CUDA_ARCH__ >= 900
    if (lane == 0 && kL2 == L2::KEPT) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(n_bytes) : "memory");
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem),
            "l"(global), "r"(n_bytes), "r"(barrier)
            : "memory");
    } else if (lane == 0) {
        uint64_t policy;
        asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(n_bytes) : "memory");
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
            "%4;" ::"r"(smem),
            "l"(global), "r"(n_bytes), "r"(barrier), "l"(policy)
            : "memory");
    }
#else
    for (uint32_t at = lane * 16; at < n_bytes; at += 512)
        cp_async_16(smem + at, static_cast<const uint8_t*>(global) + at);
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
#endif
}

// In place of a copy of the barrier's current phase. A full warp.
DEVICE void copy_nothing(uint32_t barrier, int lane) {
#if __CUDA_ARCH__ >= 900
    if (lane == 0)
#endif
        asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
}

// Waits for the end of the phase of that parity.
DEVICE void copy_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    do {
#if __CUDA_ARCH__ >= 900
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
#else
        asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
#endif
    } while (!done);
}

// ---- parts of a block ----------------------------------------------------------------------------------------------

// A barrier of n_threads of the block (whole warps), by a number from 1 to 15.
DEVICE void group_sync(int barrier, int n_threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(n_threads) : "memory");
}

// ---- loads -------------------------------------------------------------------------------------------------------

// Twice four floats, 16 on; the second load does not wait for the first.
DEVICE void load_twice(float4& a, float4& b, const float* global) {
    asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%8];\nld.global.v4.f32 {%4, %5, %6, %7}, [%8 + 64];"
                 : "=f"(a.x), "=f"(a.y), "=f"(a.z), "=f"(a.w), "=f"(b.x), "=f"(b.y), "=f"(b.z), "=f"(b.w)
                 : "l"(global)
                 : "memory");
}

// Keeps the compiler from moving loads across this point: hoisted above a loop's first products, they take more
// registers than there are.
DEVICE void keep_loads_here() { asm volatile("" ::: "memory"); }

// Brings the cache line of `global` into L2.
DEVICE void prefetch_l2(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// ---- what blocks tell each other and the host --------------------------------------------------------------------

// Adds to a counter in global memory; returns what was there. What this thread knew before (its own writes, and those
// of its block before a barrier) is visible to whoever reads the sum in the same way.
DEVICE uint32_t atomic_add_acq_rel(uint32_t* counter, uint32_t n) {
    uint32_t before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(n) : "memory");
    return before;
}

// What this thread knows is visible to the host before what it writes next.
DEVICE void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// ---- matrix products: d[16x8] += a[16x16] b[16x8], float32 accumulators ------------------------------------------
// With g = lane / 4 and t = lane % 4 (low half of a register first):
//   a[0] = A[g][2t, 2t+1]   a[1] = A[g+8][2t, 2t+1]   a[2] = A[g][2t+8, 2t+9]   a[3] = A[g+8][2t+8, 2t+9]
//   b[0] = B[2t, 2t+1][g]   b[1] = B[2t+8, 2t+9][g]
//   d[0], d[1] = D[g][2t, 2t+1]                       d[2], d[3] = D[g+8][2t, 2t+1]

DEVICE void mma_f16(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8x8 matrices of 16-bit elements from shared memory; lane i gives the address of row i % 8 of matrix i / 8.
DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem)
                 : "memory");
}

// ---- exponentials ------------------------------------------------------------------------------------------------

// 2^x to 2 ulp; 0 where that is below 2^-126. Exactly 1 of 0, 0 of -inf.
DEVICE float exp2_normal(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// ---- packed conversions and arithmetic ---------------------------------------------------------------------------

// Two floats to packed halves, round to nearest even; `lo` in the low half.
DEVICE uint32_t pack_f16(float lo, float hi) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}

// (a & b) | c in one instruction, which the compiler does not find where b and c are constants.
DEVICE uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

// (a & b) ^ c, likewise.
DEVICE uint32_t and_xor(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

DEVICE uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

DEVICE uint32_t sub_f16x2(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

DEVICE uint32_t mul_f16x2(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

// The low or high half of a word in both halves, as moves of halves, which the instructions that read the result do
// themselves.
DEVICE uint32_t both_low(uint32_t word) {
    uint32_t r;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {l, l};}" : "=r"(r) : "r"(word));
    return r;
}
DEVICE uint32_t both_high(uint32_t word) {
    uint32_t r;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {h, h};}" : "=r"(r) : "r"(word));
    return r;
}

DEVICE float f16_low(uint32_t pair) { return __half2float(__ushort_as_half(static_cast<uint16_t>(pair))); }
DEVICE float f16_high(uint32_t pair) { return __half2float(__ushort_as_half(static_cast<uint16_t>(pair >> 16))); }
