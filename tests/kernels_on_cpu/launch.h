// What the stand-in driver knows of kernels that run on the CPU. Plain C.
#ifndef KERNELS_ON_CPU_LAUNCH_H
#define KERNELS_ON_CPU_LAUNCH_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    const char* name;
    void (*run)(const void* params);  // one thread
    uint32_t param_bytes, max_threads;
} OnCpuKernel;

// What the library of a kernel file exports as `on_cpu_library`.
typedef struct {
    const OnCpuKernel* kernels;  // the last has no name
    uint8_t* dynamic;            // dynamic shared memory, and a guard band for behind it
    uint8_t *fixed, *fixed_end;  // static shared memory of all its kernels
} OnCpuLibrary;

typedef struct {
    const OnCpuLibrary* library;
    const OnCpuKernel* kernel;
    unsigned grid[3], block[3], dynamic_bytes;
    int pdl;  // whether it has the attribute of programmatic dependent launch
    const void* params;
} OnCpuLaunch;

// Runs a launch to its end and returns 0, or the CUresult of what went wrong and its text in `error`. One launch at a
// time.
int on_cpu_run(const OnCpuLaunch* launch, char* error, size_t error_bytes);

#ifdef __cplusplus
}
#endif

#endif
