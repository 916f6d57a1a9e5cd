// The kernels for any x86-64: the reference of the other two, and for processors without AVX2.
#include "kernels.h"

#define WO_INLINE inline __attribute__((always_inline))
#define WO_DECODE __attribute__((noinline))  // inlined everywhere it takes a minute to compile
#define WO_ISA_NAME "baseline"

namespace worker_orcd {
namespace {

#include "simd_baseline.h"
#include "kernels_impl.h"

}  // namespace

const Kernels* kernels_baseline() { return &kTable; }

}  // namespace worker_orcd
