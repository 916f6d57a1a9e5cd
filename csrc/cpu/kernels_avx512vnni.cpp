// The kernels for AVX-512 (F, BW, DQ, VL) with VNNI, FMA and F16C.
// Compiled with that instruction set alone; called only after cpuid was asked.
#include "kernels.h"

#include <immintrin.h>

// GCC 12 reports its own intrinsics' deliberately undefined registers.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#define WO_INLINE inline __attribute__((always_inline))
#define WO_DECODE WO_INLINE
#define WO_CODES
#define WO_VNNI
#define WO_ISA_NAME "avx512vnni"

namespace worker_orcd {
namespace {

#include "simd_avx512.h"
#include "simd_codes_avx512.h"
#include "kernels_impl.h"

}  // namespace

const Kernels* kernels_avx512vnni() { return &kTable; }

}  // namespace worker_orcd
