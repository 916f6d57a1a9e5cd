// The kernels for AVX2, FMA and F16C.
// Compiled with that instruction set alone; called only after cpuid was asked.
#include "kernels.h"

#include <immintrin.h>

#define WO_INLINE inline __attribute__((always_inline))
#define WO_DECODE WO_INLINE
#define WO_CODES
#define WO_ISA_NAME "avx2"

namespace worker_orcd {
namespace {

#include "simd_avx2.h"
#include "simd_codes_avx2.h"
#include "kernels_impl.h"

}  // namespace

const Kernels* kernels_avx2() { return &kTable; }

}  // namespace worker_orcd
