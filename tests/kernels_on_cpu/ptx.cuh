// csrc/cuda/common/ptx.cuh for kernels that run on the CPU: the same functions.
#pragma once

#include "cuda_on_cpu.h"

#define DEVICE static inline
#define DEVICE_MEMBER inline

// ---- programmatic dependent launch

DEVICE void pdl_launch_dependents() {}
DEVICE void pdl_wait() { on_cpu::pdl_wait(); }

// ---- asynchronous copies, global to shared

DEVICE uint32_t smem_address(const void* p) {
    return static_cast<uint32_t>(static_cast<const uint8_t*>(p) - on_cpu_dynamic);
}
DEVICE void cp_async_16(uint32_t smem, const void* global) { on_cpu::cp_async(smem, global, 16, 16); }
DEVICE void cp_async_4(uint32_t smem, const void* global) { on_cpu::cp_async(smem, global, 4, 4); }
DEVICE void cp_async_16_zfill(uint32_t smem, const void* global, uint32_t n_bytes) {
    on_cpu::cp_async(smem, global, n_bytes, 16);
}
DEVICE void cp_async_commit() { on_cpu::cp_async_commit(); }
template <int kPending>
DEVICE void cp_async_wait() {
    on_cpu::cp_async_wait(kPending);
}

// ---- shared memory by address

template <class T>
T load_shared_as(uint32_t at) {
    T v;
    memcpy(&v, on_cpu_dynamic + static_cast<int32_t>(at), sizeof v);
    return v;
}
DEVICE float load_shared(uint32_t at) { return load_shared_as<float>(at); }
DEVICE float4 load_shared_float4(uint32_t at) { return load_shared_as<float4>(at); }
DEVICE uint4 load_shared_uint4(uint32_t at) { return load_shared_as<uint4>(at); }
template <class T>
DEVICE void store_shared(uint32_t at, T v) {
    memcpy(on_cpu_dynamic + static_cast<int32_t>(at), &v, sizeof v);
}

// ---- barriers in shared memory that copies arrive at

template <int kCopies = 1>
DEVICE void copy_barrier_init(uint32_t barrier) {
    on_cpu::copy_barrier_init(barrier, kCopies);
}
DEVICE void copy_barrier_fence() {}
enum class L2 { LEAVES_FIRST, KEPT };
template <L2 kL2 = L2::LEAVES_FIRST>
DEVICE void copy_to_smem(uint32_t barrier, uint32_t smem, const void* global, uint32_t n_bytes, int lane) {
    on_cpu::copy_to_smem(barrier, smem, global, n_bytes, lane);
}
DEVICE void copy_nothing(uint32_t barrier, int lane) { on_cpu::copy_to_smem(barrier, 0, nullptr, 0, lane); }
DEVICE void copy_wait(uint32_t barrier, uint32_t parity) { on_cpu::copy_wait(barrier, parity); }

// ---- parts of a block

DEVICE void group_sync(int barrier, int n_threads) { on_cpu::sync_group(barrier, n_threads); }

// ---- loads

DEVICE void load_twice(float4& a, float4& b, const float* global) {
    memcpy(&a, global, sizeof a);
    memcpy(&b, global + 16, sizeof b);
}
DEVICE void keep_loads_here() {}
DEVICE void prefetch_l2(const void*) {}

// ---- what blocks tell each other and the host

DEVICE uint32_t atomic_add_acq_rel(uint32_t* counter, uint32_t n) {
    return __atomic_fetch_add(counter, n, __ATOMIC_ACQ_REL);
}
DEVICE void fence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// ---- matrix products

DEVICE void mma_f16(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) { on_cpu::mma_f16(d, a, b0, b1); }
DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t smem) {
    on_cpu::ldmatrix_x4(r, on_cpu_dynamic + static_cast<int32_t>(smem));
}

// ---- exponentials

DEVICE float exp2_normal(float x) {
    const float r = exp2f(x);
    return r < 1.17549435e-38f ? 0.0f : r;  // NaN stays
}

// ---- packed conversions and arithmetic

DEVICE uint32_t pack_f16(float lo, float hi) { return on_cpu::half_bits(lo) | on_cpu::half_bits(hi) << 16; }
DEVICE uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | c; }
DEVICE uint32_t and_xor(uint32_t a, uint32_t b, uint32_t c) { return (a & b) ^ c; }
DEVICE uint32_t both_low(uint32_t word) { return (word & 0xffffu) | word << 16; }
DEVICE uint32_t both_high(uint32_t word) { return word >> 16 | (word & 0xffff0000u); }

DEVICE float f16_low(uint32_t pair) { return on_cpu::half_value(pair); }
DEVICE float f16_high(uint32_t pair) { return on_cpu::half_value(pair >> 16); }

DEVICE uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
    return on_cpu::half_fma(f16_low(a), f16_low(b), f16_low(c)) |
           on_cpu::half_fma(f16_high(a), f16_high(b), f16_high(c)) << 16;
}
// float32 has more than twice the bits of float16: rounding twice gives what rounding once does.
DEVICE uint32_t sub_f16x2(uint32_t a, uint32_t b) {
    return pack_f16(f16_low(a) - f16_low(b), f16_high(a) - f16_high(b));
}
DEVICE uint32_t mul_f16x2(uint32_t a, uint32_t b) {
    return pack_f16(f16_low(a) * f16_low(b), f16_high(a) * f16_high(b));
}
