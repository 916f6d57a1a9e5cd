// What compiled kernels and the stand-in driver know of the runtime that runs CUDA kernels on the CPU.
//
// A grid runs block by block on one OS thread; each thread of a block is a fiber, which runs until it waits for others.
// So whatever kernels do between two synchronizations happens in one order, the same in every run; KERNELS_ON_CPU_ORDER
// (a number) chooses another one. What a GPU would leave undefined is an error that names kernel, block and thread, or
// is made to show: shared memory that was never written, and the target of a copy that was not waited for, hold NaN.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

#include "launch.h"

struct uint3 {
    unsigned x, y, z;
};
typedef uint3 dim3;

namespace on_cpu {

// Bytes of shared memory that a block may ask for, and of the guard band behind what it asked for.
constexpr size_t kMaxDynamic = 232448, kGuardBytes = 4096;
constexpr unsigned kFullWarp = 0xffffffffu;

using Kernel = OnCpuKernel;
using Library = OnCpuLibrary;
using Launch = OnCpuLaunch;

// A thread's part of a product of a warpgroup.
struct Product {
    float* d;
    int n;              // sums of the thread
    const uint32_t* a;  // null: of a_at
    uint64_t a_at, b;
    int adds, group;
};

struct Warp;
// A thread of the block that runs.
struct Thread {
    uint3 index;
    int lane;
    Warp* warp;
    std::vector<Product> products;  // that it has not waited for
    int n_product_groups;
};
extern Thread* current;

// ---- for kernels

// Ends the launch with an error of this thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void sync_threads();
int sync_threads_or(int predicate);
void sync_group(int barrier, int n);
void arrive_at_group(int barrier, int n);

enum class Collective { SYNC_WARP, SHUFFLE, BALLOT, MATCH_ANY, REDUCE_ADD, REDUCE_MIN, REDUCE_MAX, MMA, LDMATRIX };
// The values of the 32 lanes, once all lanes of the mask have given theirs; valid until the lane's next collective.
const uint64_t* gather(unsigned mask, Collective kind, uint64_t value);
// Sum, least or largest of the 32-bit values.
uint32_t reduce(unsigned mask, Collective kind, uint32_t value, bool is_signed);
void mma_f16(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1);
void ldmatrix_x4(uint32_t (&r)[4], const uint8_t* row);

// Copies that are under way until they are waited for. Addresses of shared memory are offsets from `Library::dynamic`.
void cp_async(uint32_t to, const void* from, uint32_t n_read, uint32_t n);
void cp_async_commit();
void cp_async_wait(int pending);
void copy_barrier_init(uint32_t barrier, int n_copies);
void copy_to_smem(uint32_t barrier, uint32_t to, const void* from, uint32_t n, int lane);
void copy_wait(uint32_t barrier, uint32_t parity);
// Barriers that count arrivals and announced bytes; copy_wait waits for these too.
void barrier_init(uint32_t barrier, int n);
void barrier_arrive(uint32_t barrier, uint32_t n_bytes);
void barrier_arrive_after_copies(uint32_t barrier);
void copy_bytes(uint32_t barrier, uint32_t to, const void* from, uint32_t n);
void pdl_wait();

}  // namespace on_cpu

extern uint3 blockIdx;
extern dim3 blockDim, gridDim;
#define threadIdx (on_cpu::current->index)
