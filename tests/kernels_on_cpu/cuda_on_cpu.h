// The CUDA C++ that the kernels of this project use, for a host compiler: types, built-in variables, intrinsics.
// Included before every kernel file. To be extended when a kernel uses more.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include <type_traits>

#include "runtime.h"

#define __CUDACC__ 1
#define __CUDA_ARCH__ 900
#define __CUDA_ARCH_FEAT_SM90_ALL 1
#define __host__
#define __device__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))

// Dynamic shared memory of this library; build.py turns `extern __shared__ T x[]` into pointers to it.
extern uint8_t on_cpu_dynamic[];

// ---- vectors

struct __align__(8) float2 {
    float x, y;
};
struct __align__(16) float4 {
    float x, y, z, w;
};
struct __align__(8) uint2 {
    unsigned x, y;
};
struct __align__(16) uint4 {
    unsigned x, y, z, w;
};
struct __align__(8) int2 {
    int x, y;
};
struct __align__(16) int4 {
    int x, y, z, w;
};
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

// ---- bits

namespace on_cpu {
template <class To, class From>
static inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
}  // namespace on_cpu

static inline float __uint_as_float(unsigned v) { return on_cpu::bits<float>(v); }
static inline float __int_as_float(int v) { return on_cpu::bits<float>(v); }
static inline unsigned __float_as_uint(float v) { return on_cpu::bits<unsigned>(v); }
static inline int __float_as_int(float v) { return on_cpu::bits<int>(v); }
static inline int __popc(unsigned v) { return __builtin_popcount(v); }
static inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
static inline int __ffs(int v) { return __builtin_ffs(v); }
static inline int __clz(int v) { return v ? __builtin_clz(v) : 32; }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}
static inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}
// Of each half, signed: the largest of a + b, c and 0.
static inline unsigned __viaddmax_s16x2_relu(unsigned a, unsigned b, unsigned c) {
    unsigned result = 0;
    for (int at = 0; at < 32; at += 16) {
        const auto half = [&](unsigned word) { return static_cast<int16_t>(word >> at); };
        const int largest = std::max<int>(std::max<int>(static_cast<int16_t>(half(a) + half(b)), half(c)), 0);
        result |= static_cast<unsigned>(largest) << at;
    }
    return result;
}
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
    unsigned out = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned s = selector >> (4 * i) & 15;
        unsigned byte = static_cast<unsigned>(both >> (8 * (s & 7))) & 0xff;
        if (s & 8) byte = byte & 0x80 ? 0xff : 0;
        out |= byte << (8 * i);
    }
    return out;
}

// ---- numbers

template <class A, class B>
static inline std::common_type_t<A, B> min(A a, B b) {
    const std::common_type_t<A, B> x = a, y = b;
    return y < x ? y : x;
}
template <class A, class B>
static inline std::common_type_t<A, B> max(A a, B b) {
    const std::common_type_t<A, B> x = a, y = b;
    return x < y ? y : x;
}

static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __frcp_rn(float a) { return 1.0f / a; }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline double __dsub_rn(double a, double b) { return a - b; }
// Approximations on a GPU, a few units in the last place off.
static inline float __fdividef(float a, float b) { return a / b; }
#define __expf(x) expf(x)  // a name that the C library has too
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline void sincospif(float x, float* sine, float* cosine) {
    const double turn = 3.14159265358979323846 * (x - 2.0 * rint(0.5 * x));
    *sine = static_cast<float>(sin(turn)), *cosine = static_cast<float>(cos(turn));
}

struct __half {
    uint16_t bits;
};
namespace on_cpu {
#ifdef __F16C__
static inline float half_value(uint32_t low_bits) { return _cvtsh_ss(static_cast<uint16_t>(low_bits)); }
static inline uint32_t half_bits(float v) { return _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT); }
#else
static inline float half_value(uint32_t low_bits) {
    return static_cast<float>(bits<_Float16>(static_cast<uint16_t>(low_bits)));
}
static inline uint32_t half_bits(float v) { return bits<uint16_t>(static_cast<_Float16>(v)); }
#endif
// a * b + c of float16 values, rounded once. The sum is exact in double wherever it lies near the middle between two
// float16 numbers; it goes to float32 by rounding to odd, which leaves the second rounding right.
static inline uint32_t half_fma(float a, float b, float c) {
    const double exact = static_cast<double>(a) * b + c;
    const float near = static_cast<float>(exact);
    uint32_t odd = bits<uint32_t>(near);
    if (static_cast<double>(near) != exact) odd = (fabs(static_cast<double>(near)) > fabs(exact) ? odd - 1 : odd) | 1;
    return half_bits(bits<float>(odd));
}
}  // namespace on_cpu
static inline __half __ushort_as_half(unsigned short v) { return {v}; }
static inline unsigned short __half_as_ushort(__half v) { return v.bits; }
static inline float __half2float(__half v) { return on_cpu::half_value(v.bits); }
static inline __half __float2half_rn(float v) { return {static_cast<uint16_t>(on_cpu::half_bits(v))}; }

// ---- memory

template <class T>
static inline T __ldcg(const T* p) {
    return *p;
}
template <class T>
static inline T __ldg(const T* p) {
    return *p;
}
template <class T>
static inline void __stcg(T* p, T v) {
    *p = v;
}
static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// Nothing else runs meanwhile.
template <class T>
static inline T atomicAdd(T* p, std::common_type_t<T> v) {
    const T before = *p;
    *p = before + v;
    return before;
}
template <class T>
static inline T atomicMax(T* p, std::common_type_t<T> v) {
    const T before = *p;
    *p = before < v ? v : before;
    return before;
}
template <class T>
static inline T atomicMin(T* p, std::common_type_t<T> v) {
    const T before = *p;
    *p = v < before ? v : before;
    return before;
}
template <class T>
static inline T atomicOr(T* p, std::common_type_t<T> v) {
    const T before = *p;
    *p = before | v;
    return before;
}
template <class T>
static inline T atomicExch(T* p, std::common_type_t<T> v) {
    const T before = *p;
    *p = v;
    return before;
}

// ---- what threads do together

static inline void __syncthreads() { on_cpu::sync_threads(); }
static inline int __syncthreads_or(int predicate) { return on_cpu::sync_threads_or(predicate); }
static inline void __syncwarp(unsigned mask = on_cpu::kFullWarp) {
    on_cpu::gather(mask, on_cpu::Collective::SYNC_WARP, 0);
}

namespace on_cpu {
template <class T>
static inline T shuffle(unsigned mask, T v, int source) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    const uint64_t* all = gather(mask, Collective::SHUFFLE, bits<Word>(v));
    if (source < 0 || source > 31) return v;
    if (!(mask >> source & 1)) fail("a shuffle reads lane %d, which is not in its mask %08x", source, mask);
    return bits<T>(static_cast<Word>(all[source]));
}
}  // namespace on_cpu
template <class T>
static inline T __shfl_sync(unsigned mask, T v, int source) {
    return on_cpu::shuffle(mask, v, source & 31);
}
template <class T>
static inline T __shfl_xor_sync(unsigned mask, T v, int lanes) {
    return on_cpu::shuffle(mask, v, on_cpu::current->lane ^ lanes);
}
template <class T>
static inline T __shfl_up_sync(unsigned mask, T v, unsigned delta) {
    return on_cpu::shuffle(mask, v, on_cpu::current->lane - static_cast<int>(delta));
}
template <class T>
static inline T __shfl_down_sync(unsigned mask, T v, unsigned delta) {
    return on_cpu::shuffle(mask, v, on_cpu::current->lane + static_cast<int>(delta));
}
static inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const uint64_t* all = on_cpu::gather(mask, on_cpu::Collective::BALLOT, predicate != 0);
    unsigned out = 0;
    for (int lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) out |= static_cast<unsigned>(all[lane]) << lane;
    return out;
}
static inline unsigned __match_any_sync(unsigned mask, int v) {
    const uint64_t* all = on_cpu::gather(mask, on_cpu::Collective::MATCH_ANY, static_cast<uint32_t>(v));
    unsigned out = 0;
    for (int lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1 && all[lane] == static_cast<uint32_t>(v)) out |= 1u << lane;
    return out;
}
static inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
static inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
#define ON_CPU_REDUCE(name, KIND)                                                                                \
    static inline unsigned name(unsigned mask, unsigned v) {                                                     \
        return on_cpu::reduce(mask, on_cpu::Collective::KIND, v, false);                                         \
    }                                                                                                            \
    static inline int name(unsigned mask, int v) {                                                               \
        return static_cast<int>(on_cpu::reduce(mask, on_cpu::Collective::KIND, static_cast<uint32_t>(v), true)); \
    }
ON_CPU_REDUCE(__reduce_add_sync, REDUCE_ADD)
ON_CPU_REDUCE(__reduce_min_sync, REDUCE_MIN)
ON_CPU_REDUCE(__reduce_max_sync, REDUCE_MAX)
