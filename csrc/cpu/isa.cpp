// Which kernels this processor runs. The only place that asks cpuid.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace worker_orcd {

static bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
static bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
static bool has_avx512vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

const Kernels* kernels_by_name(const char* name) {
    if (!std::strcmp(name, "avx512vnni")) return has_avx512vnni() ? kernels_avx512vnni() : nullptr;
    if (!std::strcmp(name, "avx512")) return has_avx512() ? kernels_avx512() : nullptr;
    if (!std::strcmp(name, "avx2")) return has_avx2() ? kernels_avx2() : nullptr;
    if (!std::strcmp(name, "baseline")) return kernels_baseline();
    return nullptr;
}

const Kernels* choose_kernels() {
    const char* wanted = std::getenv("WORKER_ORCD_CPU_ISA");
    if (wanted && *wanted) return kernels_by_name(wanted);
    if (has_avx512vnni()) return kernels_avx512vnni();
    return has_avx512() ? kernels_avx512() : has_avx2() ? kernels_avx2() : kernels_baseline();
}

}  // namespace worker_orcd
