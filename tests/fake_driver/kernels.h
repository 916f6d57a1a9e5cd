// Kernels that run on the CPU (tests/kernels_on_cpu), for libcuda.c: from the libraries in the folder
// FAKE_CUDA_KERNELS.
#pragma once

#include <dirent.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels_on_cpu/launch.h"

enum { MOST_KERNEL_FILES = 64, MOST_DYNAMIC = 48 << 10 };  // the latter until cuFuncSetAttribute raises it

// A function handle; `kernel` is null where there is only the name.
typedef struct {
    const char* name;
    const OnCpuLibrary* library;
    const OnCpuKernel* kernel;
    int most_dynamic;
} Function;

static const OnCpuLibrary* kernel_files[MOST_KERNEL_FILES];
static int (*run_on_cpu)(const OnCpuLaunch*, char*, size_t);
static pthread_once_t kernels_once = PTHREAD_ONCE_INIT;
static pthread_mutex_t cpu = PTHREAD_MUTEX_INITIALIZER;  // held by the kernel that runs

static int has_kernels(void) { return getenv("FAKE_CUDA_KERNELS") != NULL; }

static void load_kernels(void) {
    const char* folder = getenv("FAKE_CUDA_KERNELS");
    char path[4096];
    snprintf(path, sizeof path, "%s/runtime.so", folder);
    void* runtime = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
    DIR* files = opendir(folder);
    if (!runtime || !files) {
        fprintf(stderr, "FAKE_CUDA_KERNELS: no kernels in %s: %s\n", folder, runtime ? "no such folder" : dlerror());
        return;
    }
    run_on_cpu = (int (*)(const OnCpuLaunch*, char*, size_t))dlsym(runtime, "on_cpu_run");
    int n = 0;
    for (struct dirent* file; (file = readdir(files)) && n < MOST_KERNEL_FILES;) {
        const char* end = strrchr(file->d_name, '.');
        if (!end || strcmp(end, ".so") || !strcmp(file->d_name, "runtime.so") || strstr(file->d_name, ".tmp."))
            continue;
        snprintf(path, sizeof path, "%s/%s", folder, file->d_name);
        void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        const OnCpuLibrary* kernels = library ? dlsym(library, "on_cpu_library") : NULL;
        if (kernels)
            kernel_files[n++] = kernels;
        else
            fprintf(stderr, "FAKE_CUDA_KERNELS: %s: %s\n", path, dlerror());
    }
    closedir(files);
}

// A new handle of the kernel `name`, null where there is none.
static Function* find_kernel(const char* name) {
    pthread_once(&kernels_once, load_kernels);
    for (int i = 0; i < MOST_KERNEL_FILES && kernel_files[i]; ++i)
        for (const OnCpuKernel* k = kernel_files[i]->kernels; k->name; ++k)
            if (!strcmp(k->name, name)) {
                Function* f = malloc(sizeof *f);
                *f = (Function){k->name, kernel_files[i], k, MOST_DYNAMIC};
                return f;
            }
    return NULL;
}

// Whether a GPU would take the launch: grid, block, shared memory.
static int is_possible(const Function* f, const unsigned* size) {
    for (int i = 0; i < 6; ++i)
        if (size[i] == 0) return 0;
    return size[1] < 65536 && size[2] < 65536 && (size_t)size[3] * size[4] * size[5] <= f->kernel->max_threads &&
           size[6] <= (unsigned)f->most_dynamic;
}

// Runs a launch; its status. stderr says what went wrong.
static int run_kernel(const Function* f, const unsigned* size, int pdl, const void* params) {
    OnCpuLaunch launch = {f->library, f->kernel, {size[0], size[1], size[2]}, {size[3], size[4], size[5]}, size[6],
                          pdl,        params};
    char error[2048];
    pthread_mutex_lock(&cpu);
    int status = run_on_cpu(&launch, error, sizeof error);
    pthread_mutex_unlock(&cpu);
    if (status) fprintf(stderr, "%s\n", error);
    return status;
}
