// The runtime of runtime.h: fibers and what they wait for, shared memory, asynchronous copies, matrix products.
#include "runtime.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <string>
#include <vector>

#ifdef __F16C__
#include <immintrin.h>
#endif

uint3 blockIdx;
dim3 blockDim, gridDim;

namespace on_cpu {
namespace {

constexpr int kMaxThreads = 1024, kMaxWarps = kMaxThreads / 32;
constexpr size_t kStackBytes = (64 << 10) + 17 * 64;  // frames of neighbours lie in different cache sets
constexpr int kPoison = 0xFF;                         // four of them are a NaN, two a float16 NaN
constexpr int kGuard = 0xFD;
constexpr uint64_t kCanary = 0x5ca1ab1e0ddba11ull, kBarrierMark = 0xba221e2000000000ull;
constexpr uint32_t kNoGroup = ~0u;
constexpr int kIllegalAddress = 700, kLaunchFailed = 719;  // CUresult

// ---- from one fiber to another

#ifdef __x86_64__
using Place = void*;  // a stack pointer, with the registers that a call preserves above it
extern "C" void on_cpu_switch(Place* save, Place to);
asm(R"(
    .text
    .globl on_cpu_switch
    .hidden on_cpu_switch
    .type on_cpu_switch, @function
on_cpu_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
    .size on_cpu_switch, .-on_cpu_switch
)");
void switch_places(Place& save, Place& to) { on_cpu_switch(&save, to); }
void start_at(Place& place, uint8_t* stack, size_t n, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + (n & ~static_cast<size_t>(15)));
    *--top = nullptr;  // where `entry` would return to; it begins as if called
    *--top = reinterpret_cast<void*>(entry);
    top -= 6;
    memset(top, 0, 6 * sizeof *top);
    place = top;
}
#else
using Place = ucontext_t;
void switch_places(Place& save, Place& to) { swapcontext(&save, &to); }
void start_at(Place& place, uint8_t* stack, size_t n, void (*entry)()) {
    getcontext(&place);
    place.uc_stack.ss_sp = stack, place.uc_stack.ss_size = n, place.uc_link = nullptr;
    makecontext(&place, entry, 0);
}
#endif

// ---- what runs

struct Copy {
    uint8_t* to;
    const void* from;
    uint32_t n_read, n, group;
};

enum class Wait : uint8_t { COLLECTIVE, BARRIER, GROUP, COPY };

struct alignas(128) Fiber : Thread {
    Place place;
    Wait waits_for;
    bool has_ended, has_waited;        // pdl_wait
    uint32_t wait_mask, wait_address;  // of a collective; of a copy's barrier, or the number of a group's
    Collective wait_kind;
    uint32_t n_groups;         // cp_async_commit calls
    std::vector<Copy> copies;  // not waited for; from `first_copy` on
    size_t first_copy;
};

struct Gather {
    uint32_t mask, arrived;
    Collective kind;
};

struct WarpCopy {
    const Warp* warp;
    uint32_t arrived;  // lanes
    Copy copy;
};

struct CopyBarrier {
    uint32_t address;
    uint32_t phase;  // that have ended
    size_t n_copies;
    std::vector<WarpCopy> copies;  // of this phase
    // Of one that counts arrivals (n > 0), in this phase:
    int n, arrived;
    uint32_t bytes;  // announced and not under way
    std::vector<Copy> started;
    bool is_complete() const {
        if (n > 0) return arrived == n && bytes == 0;
        return copies.size() == n_copies &&
               std::all_of(copies.begin(), copies.end(), [](const WarpCopy& c) { return c.arrived == kFullWarp; });
    }
};

// A barrier of a part of the block.
struct GroupBarrier {
    int n, arrived;
    std::vector<Fiber*> waiting;
};

}  // namespace

struct Warp {
    uint32_t alive, runnable, at_barrier, at_copy;
    int first;           // its first thread
    Gather gathers[32];  // by the lowest lane of their mask
    uint64_t in[32], out[32];
    uint32_t reduced[32];         // by the lowest lane of the mask
    uint64_t partial[32][32];     // `out` of collectives of less than the warp, of each lane
    alignas(64) double a[32][8];  // of lane 4g + t: A[g][2t, 2t+1], A[g+8][..], A[g][2t+8, 2t+9], A[g+8][..]
    alignas(64) double b[16][8];
    alignas(64) double product[16][8];
    const uint8_t* rows[32];
    uint8_t matrix[32][16];
};

Thread* current;

namespace {

Fiber fibers[kMaxThreads];
Warp warps[kMaxWarps];
uint8_t* stacks;
Place scheduler;

const Launch* launch;
int n_threads, n_warps, n_alive;
int n_at_barrier, barrier_any, barrier_result;
bool barrier_is_or;
constexpr int kMaxGroups = 16;
GroupBarrier group_barriers[kMaxGroups];
std::vector<CopyBarrier> copy_barriers;
std::vector<uint16_t> barrier_at;  // by address / 8: one more than the index in copy_barriers
int failed;                        // the status, or 0
std::string message;
thread_local bool is_running;
bool some_block_waited;  // in pdl_wait

// ---- order

uint64_t seed, random_state;

uint32_t random_below(uint32_t n) {
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return static_cast<uint32_t>((random_state >> 32) * n >> 32);
}

Fiber* own() { return static_cast<Fiber*>(current); }

int nth_lane(uint32_t lanes, int n) {
    while (n--) lanes &= lanes - 1;
    return __builtin_ctz(lanes);
}

// Who runs next in the usual order: the next lane of the warp, else somebody of the next warp; null where all wait.
Fiber* any_fiber() {
    int warp = static_cast<int>(own()->warp - warps), lane = own()->lane + 1;
    if (seed && n_warps > 1 && random_below(4) == 0) warp = static_cast<int>(random_below(n_warps));
    for (int i = 0; i < n_warps; ++i, lane = 0) {
        Warp& w = warps[warp];
        if (w.runnable) {
            if (seed)
                lane = nth_lane(w.runnable, random_below(__builtin_popcount(w.runnable)));
            else if (lane < 32 && w.runnable >> lane)
                lane += __builtin_ctz(w.runnable >> lane);
            else
                lane = __builtin_ctz(w.runnable);
            return &fibers[w.first + lane];
        }
        warp = warp + 1 == n_warps ? 0 : warp + 1;
    }
    return nullptr;
}

// ---- errors

std::string text_of(const char* format, va_list arguments) {
    char text[1024];
    vsnprintf(text, sizeof text, format, arguments);
    return text;
}

__attribute__((format(printf, 1, 2))) std::string text_of(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::string text = text_of(format, arguments);
    va_end(arguments);
    return text;
}

std::string block_text() {
    return text_of("kernel %s, block (%u, %u, %u)", launch->kernel->name, blockIdx.x, blockIdx.y, blockIdx.z);
}

void set_error(const std::string& text, int status = kLaunchFailed) {
    if (!failed) message = text, failed = status;
}

const char* name_of(Collective kind) {
    static const char* const names[] = {"__syncwarp",        "a shuffle",         "a ballot", "__reduce_add_sync",
                                        "__reduce_min_sync", "__reduce_max_sync", "mma_f16",  "ldmatrix_x4"};
    return names[static_cast<int>(kind)];
}

std::string wait_text(const Fiber& f) {
    if (f.waits_for == Wait::BARRIER) return "a barrier of the block";
    if (f.waits_for == Wait::GROUP) {
        const GroupBarrier& g = group_barriers[f.wait_address];
        return text_of("barrier %u, where %d of %d threads have come", f.wait_address, g.arrived, g.n);
    }
    if (f.waits_for == Wait::COPY)
        return text_of("the barrier at byte %u of shared memory, to which not all have come", f.wait_address);
    const Gather& g = f.warp->gathers[__builtin_ctz(f.wait_mask)];
    return text_of("%s (lanes %08x), which lanes %08x have not reached", name_of(f.wait_kind), f.wait_mask,
                   f.wait_mask & ~g.arrived);
}

// Every thread that is left waits.
std::string deadlock_text() {
    struct Group {
        int warp, n, first;  // warp: -1 for what the block waits at
        std::string what;
    };
    std::vector<Group> groups;
    for (int i = 0; i < n_threads; ++i) {
        if (fibers[i].has_ended) continue;
        const int warp = fibers[i].waits_for == Wait::BARRIER ? -1 : i / 32;
        const std::string what = wait_text(fibers[i]);
        auto at = std::find_if(groups.begin(), groups.end(),
                               [&](const Group& g) { return g.warp == warp && g.what == what; });
        if (at == groups.end()) at = groups.insert(at, {warp, 0, i, what});
        ++at->n;
    }
    std::string text = block_text() + ": nobody can go on";
    for (size_t i = 0; i < groups.size() && i < 4; ++i) {
        const Group& g = groups[i];
        text += text_of("; %d threads", g.n) + (g.warp < 0 ? "" : text_of(" of warp %d", g.warp)) +
                text_of(" (the first is %d) wait at %s", g.first, g.what.c_str());
    }
    if (groups.size() > 4) text += text_of("; and %zu more groups", groups.size() - 4);
    if (n_alive < n_threads) text += text_of("; %d threads have ended", n_threads - n_alive);
    return text;
}

// ---- fibers

[[noreturn]] void leave() {
    switch_places(own()->place, scheduler);
    abort();
}

__attribute__((noinline)) Fiber* fiber_of_another_warp() {
    Fiber* next = any_fiber();
    if (next == nullptr) {
        set_error(deadlock_text());
        leave();
    }
    return next;
}

inline void run_others() {
    Fiber* self = own();
    Fiber* next;
    const Warp& warp = *self->warp;
    if (!seed && warp.runnable) {
        const uint32_t above = warp.runnable & 0xfffffffeu << self->lane;
        next = &fibers[warp.first + __builtin_ctz(above ? above : warp.runnable)];
    } else {
        next = fiber_of_another_warp();
    }
    current = next;
    switch_places(self->place, next->place);
}

// Waits until somebody makes this thread runnable.
inline void wait(Wait why) {
    own()->waits_for = why;
    own()->warp->runnable &= ~(1u << own()->lane);
    run_others();
}

void release_barrier() {
    barrier_result = barrier_any, barrier_any = 0, n_at_barrier = 0;
    for (int i = 0; i < n_warps; ++i) warps[i].runnable |= warps[i].at_barrier, warps[i].at_barrier = 0;
}

void thread_main() {
    launch->kernel->run(launch->params);
    Fiber* self = own();
    if (self->first_copy < self->copies.size()) fail("it ends with asynchronous copies that it has not waited for");
    if (!self->products.empty()) fail("it ends with products of warpgroups that it has not waited for");
    const uint32_t bit = 1u << self->lane;
    self->has_ended = true;
    self->warp->alive &= ~bit, self->warp->runnable &= ~bit;
    --n_alive;
    if (n_at_barrier > 0 && n_at_barrier == n_alive) release_barrier();
    if (n_alive == 0) leave();
    run_others();
    abort();
}

// ---- faults of the kernel's own loads and stores

struct sigaction before[3];
const int kSignals[3] = {SIGSEGV, SIGBUS, SIGFPE};
int fault_signal;  // of this launch, or 0
void* fault_address;

void fault_landing() {
    if (fault_signal == SIGFPE) fail("it divides by zero");
    fail("it reads or writes at address %p, which does not exist or is not aligned", fault_address);
}

void on_fault(int number, siginfo_t* info, void* context) {
#ifdef __x86_64__
    if (is_running) {
        fault_signal = number, fault_address = info->si_addr;
        auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
        registers[REG_RSP] = ((registers[REG_RSP] - 256) & ~15ll) - 8;
        registers[REG_RIP] = reinterpret_cast<long long>(fault_landing);
        return;
    }
#endif
    for (int i = 0; i < 3; ++i)
        if (kSignals[i] == number) sigaction(number, &before[i], nullptr);  // and it happens again
}

// ---- one block

void begin_block() {
    const Library& l = *launch->library;
    memset(l.dynamic, kPoison, launch->dynamic_bytes);
    memset(l.dynamic + launch->dynamic_bytes, kGuard, kGuardBytes);
    memset(l.fixed, kPoison, l.fixed_end - l.fixed);
    for (const CopyBarrier& b : copy_barriers) barrier_at[b.address / 8] = 0;
    copy_barriers.clear();
    for (GroupBarrier& g : group_barriers) g.arrived = 0, g.waiting.clear();
    n_alive = n_threads, n_at_barrier = barrier_any = 0;
    for (int i = 0; i < n_warps; ++i) {
        Warp& w = warps[i];
        const int n = std::min(32, n_threads - 32 * i);
        w.alive = w.runnable = n == 32 ? kFullWarp : (1u << n) - 1;
        w.at_barrier = w.at_copy = 0, w.first = 32 * i;
        for (Gather& g : w.gathers) g.arrived = 0;
    }
    for (int i = 0; i < n_threads; ++i) {
        Fiber& f = fibers[i];
        const unsigned x = blockDim.x, y = blockDim.y;
        f.index = {i % x, i / x % y, i / (x * y)};
        f.lane = i % 32, f.warp = &warps[i / 32];
        f.has_ended = f.has_waited = false;
        f.n_groups = 0, f.first_copy = 0, f.copies.clear();
        f.products.clear(), f.n_product_groups = 0;
        uint8_t* stack = stacks + i * kStackBytes;
        memcpy(stack, &kCanary, sizeof kCanary);
        start_at(f.place, stack, kStackBytes, thread_main);
    }
}

// A block that has nothing to do may return without waiting, if another one of the launch waits.
void check_pdl_waits() {
    const auto has_waited = [](const Fiber& f) { return f.has_waited; };
    const int n = static_cast<int>(std::count_if(fibers, fibers + n_threads, has_waited));
    if (launch->pdl && n > 0 && n < n_threads)
        set_error(block_text() + text_of(": %d of %d threads end without pdl_wait() in a launch that may overlap",
                                         n_threads - n, n_threads));
    some_block_waited |= n > 0;
}

void check_block() {
    check_pdl_waits();
    for (int i = 0; i < n_threads; ++i)
        if (memcmp(stacks + i * kStackBytes, &kCanary, sizeof kCanary))
            set_error(block_text() + ": a thread needs more stack than the runtime has (kStackBytes)");
    const uint8_t* guard = launch->library->dynamic + launch->dynamic_bytes;
    for (size_t i = 0; i < kGuardBytes && !failed; ++i)
        if (guard[i] != kGuard)
            set_error(block_text() + text_of(": something was written at byte %zu of dynamic shared memory, of which "
                                             "the launch asked for %u",
                                             launch->dynamic_bytes + i, launch->dynamic_bytes));
    for (const CopyBarrier& b : copy_barriers)
        if (!b.copies.empty() || !b.started.empty())
            set_error(block_text() + text_of(": it ends with a copy that nobody waited for, of the barrier at byte %u "
                                             "of shared memory",
                                             b.address));
}

void run_block() {
    begin_block();
    const int first = seed ? static_cast<int>(random_below(n_threads)) : 0;
    current = &fibers[first];
    switch_places(scheduler, fibers[first].place);
    if (!failed) check_block();
    current = nullptr;
}

// ---- collectives

[[noreturn]] __attribute__((noinline)) void fail_arrival(uint32_t mask, Collective kind, const Gather& g) {
    const Fiber& f = *own();
    if (!(mask >> f.lane & 1)) fail("%s with lanes %08x is not for lane %d", name_of(kind), mask, f.lane);
    const uint32_t ended = mask & ~f.warp->alive;
    if (ended) fail("%s with lanes %08x: lanes %08x have ended", name_of(kind), mask, ended);
    fail("%s with lanes %08x, while other lanes of its warp are at %s with lanes %08x", name_of(kind), mask,
         name_of(g.kind), g.mask);
}

// Whether the calling lane is the last of the mask; `kind` and mask must be those of the others.
inline bool arrive(uint32_t mask, Collective kind) {
    Fiber& f = *own();
    Warp& w = *f.warp;
    Gather& g = w.gathers[__builtin_ctz(mask | 1u << 31)];  // of any mask
    if (!g.arrived) g.mask = mask, g.kind = kind;
    if (!(mask >> f.lane & 1) || (mask & ~w.alive) || g.mask != mask || g.kind != kind) fail_arrival(mask, kind, g);
    g.arrived |= 1u << f.lane;
    if (g.arrived == mask) {
        g.arrived = 0;
        w.runnable |= mask;
        return true;
    }
    f.wait_mask = mask, f.wait_kind = kind;
    return false;
}

#ifndef __F16C__
float half_value(uint16_t bits) {
    _Float16 h;
    memcpy(&h, &bits, 2);
    return static_cast<float>(h);
}
#endif

// ---- shared memory

uint8_t* shared_at(uint32_t address, uint32_t n, const char* what) {
    const Library& l = *launch->library;
    uint8_t* p = l.dynamic + static_cast<int32_t>(address);
    const bool is_dynamic = p >= l.dynamic && p + n <= l.dynamic + launch->dynamic_bytes;
    if (!is_dynamic && !(p >= l.fixed && p + n <= l.fixed_end))
        fail("%s of %u bytes at byte %d of shared memory, of which the launch asked for %u", what, n,
             static_cast<int32_t>(address), launch->dynamic_bytes);
    return p;
}

void start_copy(const Copy& c) {
    const uint32_t unit = c.n == 4 ? 4 : 16;
    if (reinterpret_cast<uintptr_t>(c.to) % unit || reinterpret_cast<uintptr_t>(c.from) % unit || c.n % unit)
        fail("an asynchronous copy of %u bytes from %p is not %u-byte aligned on both sides", c.n, c.from, unit);
    memset(c.to, kPoison, c.n);
}

void finish_copy(const Copy& c) {
    memcpy(c.to, c.from, c.n_read);
    memset(c.to + c.n_read, 0, c.n - c.n_read);
}

CopyBarrier& barrier_of(uint32_t address) {
    const uint16_t at = address < kMaxDynamic ? barrier_at[address / 8] : 0;
    if (at == 0) fail("the barrier at byte %d of shared memory was never initialized", static_cast<int32_t>(address));
    const uint64_t mark = kBarrierMark | address;
    if (memcmp(launch->library->dynamic + address, &mark, 8))
        fail("the barrier at byte %u of shared memory was overwritten", address);
    return copy_barriers[at - 1];
}

}  // namespace

// product = A B: four rows at a time, whose eight sums of half a row stay in registers.
typedef double Quad __attribute__((vector_size(32)));
static void multiply(Warp& w) {
    const Quad* b = reinterpret_cast<const Quad*>(w.b);
    for (int first = 0; first < 8; first += 4) {
        for (int upper = 0; upper < 2; ++upper) {
            Quad sum[4][2] = {};
#pragma GCC unroll 16
            for (int k = 0; k < 16; ++k) {
#pragma GCC unroll 4
                for (int m = 0; m < 4; ++m) {
                    const double a = w.a[4 * (first + m) + k % 8 / 2][k / 8 * 4 + upper * 2 + k % 2];
                    sum[m][0] += a * b[2 * k], sum[m][1] += a * b[2 * k + 1];
                }
            }
            memcpy(w.product[first + 8 * upper], sum, sizeof sum);
        }
    }
}

// ---- for kernels

void fail(const char* format, ...) {
    const bool was_running = is_running;
    is_running = false;
    va_list arguments;
    va_start(arguments, format);
    const uint3& t = current->index;
    set_error(block_text() + text_of(", thread (%u, %u, %u): ", t.x, t.y, t.z) + text_of(format, arguments),
              fault_signal && fault_signal != SIGFPE ? kIllegalAddress : kLaunchFailed);
    va_end(arguments);
    is_running = was_running;
    leave();
}

static int block_barrier(bool is_or, int predicate) {
    Fiber& f = *own();
    if (n_at_barrier == 0)
        barrier_is_or = is_or;
    else if (barrier_is_or != is_or)
        fail("__syncthreads and __syncthreads_or meet at one barrier");
    barrier_any |= predicate != 0;
    f.warp->at_barrier |= 1u << f.lane;
    ++n_at_barrier;
    if (n_at_barrier == n_alive)
        release_barrier();
    else
        wait(Wait::BARRIER);
    return barrier_result;
}
void sync_threads() { block_barrier(false, 0); }
int sync_threads_or(int predicate) { return block_barrier(true, predicate); }

// Whether this thread is the last of a part of the block to come to a barrier, and the others go on.
static bool come_to_group(int barrier, int n) {
    if (barrier < 1 || barrier >= kMaxGroups || n % 32) fail("barrier %d for %d threads", barrier, n);
    GroupBarrier& g = group_barriers[barrier];
    if (g.arrived && g.n != n) fail("barrier %d for %d threads, where others came for %d", barrier, n, g.n);
    g.n = n;
    if (++g.arrived < n) return false;
    for (const Fiber* f : g.waiting) f->warp->runnable |= 1u << f->lane;
    g.arrived = 0, g.waiting.clear();
    return true;
}
void sync_group(int barrier, int n) {
    if (come_to_group(barrier, n)) return;
    group_barriers[barrier].waiting.push_back(own());
    own()->wait_address = static_cast<uint32_t>(barrier);
    wait(Wait::GROUP);
}
void arrive_at_group(int barrier, int n) { come_to_group(barrier, n); }

const uint64_t* gather(unsigned mask, Collective kind, uint64_t value) {
    const int lane = current->lane;
    Warp& w = *current->warp;
    w.in[lane] = value;
    if (arrive(mask, kind)) {
        if (mask == kFullWarp) {
            memcpy(w.out, w.in, sizeof w.out);
        } else {
            for (int i = 0; i < 32; ++i)
                if (mask >> i & 1) memcpy(w.partial[i], w.in, sizeof w.in);
        }
    } else {
        wait(Wait::COLLECTIVE);
    }
    return mask == kFullWarp ? w.out : w.partial[lane];
}

uint32_t reduce(unsigned mask, Collective kind, uint32_t value, bool is_signed) {
    const uint64_t* all = gather(mask, kind, value);
    const uint32_t flip = is_signed ? 0x80000000u : 0;  // order of signed numbers as that of unsigned ones
    uint32_t sum = 0, least = ~0u, largest = 0;
    for (int i = 0; i < 32; ++i) {
        if (!(mask >> i & 1)) continue;
        const uint32_t v = static_cast<uint32_t>(all[i]);
        sum += v, least = std::min(least, v ^ flip), largest = std::max(largest, v ^ flip);
    }
    return kind == Collective::REDUCE_ADD ? sum : kind == Collective::REDUCE_MIN ? least ^ flip : largest ^ flip;
}

// Products are exact; the 16 of an output are added in double, in order, and that to the accumulator, with one
// rounding.
void mma_f16(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
    Warp& w = *current->warp;
    const int lane = current->lane, g = lane >> 2, t = lane & 3;
    double* own_a = w.a[lane];
#ifdef __F16C__
    const __m256 floats = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a)));
    _mm256_store_pd(own_a, _mm256_cvtps_pd(_mm256_castps256_ps128(floats)));
    _mm256_store_pd(own_a + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(floats, 1)));
    alignas(32) double own_b[4];
    _mm256_store_pd(own_b, _mm256_cvtps_pd(_mm_cvtph_ps(_mm_set_epi32(0, 0, b1, b0))));
#else
    double own_b[4];
    for (int i = 0; i < 8; ++i) own_a[i] = half_value(static_cast<uint16_t>(a[i / 2] >> (16 * (i % 2))));
    for (int i = 0; i < 4; ++i) own_b[i] = half_value(static_cast<uint16_t>((i < 2 ? b0 : b1) >> (16 * (i % 2))));
#endif
    w.b[2 * t][g] = own_b[0], w.b[2 * t + 1][g] = own_b[1], w.b[2 * t + 8][g] = own_b[2], w.b[2 * t + 9][g] = own_b[3];
    if (arrive(kFullWarp, Collective::MMA)) {
        multiply(w);
    } else {
        wait(Wait::COLLECTIVE);
    }
    for (int i = 0; i < 4; ++i) d[i] = static_cast<float>(d[i] + w.product[g + i / 2 * 8][2 * t + i % 2]);
}

void ldmatrix_x4(uint32_t (&r)[4], const uint8_t* row) {
    Warp& w = *current->warp;
    const int lane = current->lane;
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix_x4 of a row that is not 16-byte aligned");
    shared_at(static_cast<uint32_t>(row - launch->library->dynamic), 16, "ldmatrix_x4");
    w.rows[lane] = row;
    if (arrive(kFullWarp, Collective::LDMATRIX)) {
        for (int i = 0; i < 32; ++i) memcpy(w.matrix[i], w.rows[i], 16);
    } else {
        wait(Wait::COLLECTIVE);
    }
    for (int i = 0; i < 4; ++i) memcpy(&r[i], &w.matrix[8 * i + lane / 4][lane % 4 * 4], 4);
}

void cp_async(uint32_t to, const void* from, uint32_t n_read, uint32_t n) {
    if (n_read > n) fail("an asynchronous copy reads %u bytes for %u", n_read, n);
    Fiber& f = *own();
    const Copy copy = {shared_at(to, n, "an asynchronous copy"), from, n_read, n, f.n_groups};
    start_copy(copy);
    f.copies.push_back(copy);
}

void cp_async_commit() { ++own()->n_groups; }

void cp_async_wait(int pending) {
    Fiber& f = *own();
    const int64_t end = static_cast<int64_t>(f.n_groups) - pending;  // groups before this one
    while (f.first_copy < f.copies.size() && f.copies[f.first_copy].group < end) finish_copy(f.copies[f.first_copy++]);
    if (f.first_copy == f.copies.size()) f.copies.clear(), f.first_copy = 0;
}

static void make_barrier(uint32_t barrier, size_t n_copies, int n) {
    uint8_t* p = shared_at(barrier, 8, "a barrier");
    if (barrier >= kMaxDynamic || barrier % 8)
        fail("a barrier at byte %d of shared memory", static_cast<int32_t>(barrier));
    if (barrier_at[barrier / 8]) fail("the barrier at byte %u of shared memory is initialized twice", barrier);
    const uint64_t mark = kBarrierMark | barrier;
    memcpy(p, &mark, 8);
    copy_barriers.push_back({barrier, 0, n_copies, {}, n, 0, 0, {}});
    barrier_at[barrier / 8] = static_cast<uint16_t>(copy_barriers.size());
}
void copy_barrier_init(uint32_t barrier, int n_copies) { make_barrier(barrier, static_cast<size_t>(n_copies), 0); }
void barrier_init(uint32_t barrier, int n) { make_barrier(barrier, 0, n); }

static void end_phase(CopyBarrier& b) {
    for (const WarpCopy& c : b.copies)
        if (c.copy.n) finish_copy(c.copy);
    for (const Copy& c : b.started) finish_copy(c);
    ++b.phase, b.copies.clear(), b.started.clear(), b.arrived = 0;
}

static void wake_waiting(const CopyBarrier& b) {
    if (b.is_complete())
        for (int i = 0; i < n_warps; ++i) warps[i].runnable |= warps[i].at_copy, warps[i].at_copy = 0;
}

// A barrier that counts, in the phase of whoever comes now.
static CopyBarrier& counting(uint32_t barrier) {
    CopyBarrier& b = barrier_of(barrier);
    if (b.n == 0) fail("the barrier at byte %u of shared memory counts the copies of warps", barrier);
    if (b.is_complete()) end_phase(b);  // and nobody has waited yet
    return b;
}

void barrier_arrive(uint32_t barrier, uint32_t n_bytes) {
    CopyBarrier& b = counting(barrier);
    if (b.arrived == b.n) fail("more come to the barrier at byte %u of shared memory than it counts", barrier);
    ++b.arrived, b.bytes += n_bytes;
    wake_waiting(b);
}

void barrier_arrive_after_copies(uint32_t barrier) {
    CopyBarrier& b = counting(barrier);
    Fiber& f = *own();
    b.started.insert(b.started.end(), f.copies.begin() + static_cast<ptrdiff_t>(f.first_copy), f.copies.end());
    f.copies.clear(), f.first_copy = 0;
    barrier_arrive(barrier, 0);
}

void copy_bytes(uint32_t barrier, uint32_t to, const void* from, uint32_t n) {
    CopyBarrier& b = barrier_of(barrier);
    if (b.n == 0 || n % 16 || b.bytes < n)
        fail("%u bytes that the barrier at byte %u of shared memory does not expect", n, barrier);
    const Copy copy = {shared_at(to, n, "a copy"), from, n, n, kNoGroup};
    start_copy(copy);
    b.started.push_back(copy), b.bytes -= n;
    wake_waiting(b);
}

// The barrier counts every lane, as below sm_90: all of the warp must come.
void copy_to_smem(uint32_t barrier, uint32_t to, const void* from, uint32_t n, int lane) {
    CopyBarrier& b = barrier_of(barrier);
    if (lane != current->lane) fail("copy_to_smem as lane %d, which is lane %d", lane, current->lane);
    const Warp* warp = current->warp;
    auto at = std::find_if(b.copies.begin(), b.copies.end(),
                           [&](const WarpCopy& c) { return c.warp == warp && !(c.arrived >> lane & 1); });
    const Copy copy = {n ? shared_at(to, n, "a copy") : nullptr, from, n, n, kNoGroup};
    if (at == b.copies.end()) {
        if (b.copies.size() == b.n_copies)
            fail("copy_to_smem at the barrier at byte %u of shared memory, whose phase before has not ended", barrier);
        at = b.copies.insert(at, {warp, 0, copy});
    }
    if (at->copy.to != copy.to || at->copy.from != from || at->copy.n != n)
        fail("the lanes of a warp start different copies at the barrier at byte %u of shared memory", barrier);
    at->arrived |= 1u << lane;
    if (lane == 0 && n) start_copy(copy);
    wake_waiting(b);
}

void copy_wait(uint32_t barrier, uint32_t parity) {
    for (;;) {
        CopyBarrier& b = barrier_of(barrier);
        if ((b.phase & 1) != parity) return;
        if (b.is_complete()) {
            end_phase(b);
            return;
        }
        Fiber& f = *own();
        f.wait_address = barrier, f.warp->at_copy |= 1u << f.lane;
        wait(Wait::COPY);
    }
}

void pdl_wait() { own()->has_waited = true; }

}  // namespace on_cpu

int on_cpu_run(const OnCpuLaunch* l, char* error, size_t error_bytes) {
    using namespace on_cpu;
    static uint64_t n_launches = 0;
    if (!stacks) {
        void* p = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) {
            snprintf(error, error_bytes, "no memory for stacks");
            return kLaunchFailed;
        }
        stacks = static_cast<uint8_t*>(p);
        barrier_at.resize(kMaxDynamic / 8);
        const char* order = getenv("KERNELS_ON_CPU_ORDER");
        seed = order ? strtoull(order, nullptr, 10) : 0;
    }
    launch = l;
    failed = fault_signal = 0, message.clear();
    blockDim = {l->block[0], l->block[1], l->block[2]}, gridDim = {l->grid[0], l->grid[1], l->grid[2]};
    n_threads = static_cast<int>(l->block[0] * l->block[1] * l->block[2]), n_warps = (n_threads + 31) / 32;
    random_state = (seed + 1) * 0x9E3779B97F4A7C15ull ^ ++n_launches * 0xD1B54A32D192ED03ull;

    const uint64_t n_blocks = static_cast<uint64_t>(l->grid[0]) * l->grid[1] * l->grid[2];
    std::vector<uint32_t> order;
    if (seed) {
        order.resize(n_blocks);
        for (uint64_t i = 0; i < n_blocks; ++i) {
            const uint32_t at = random_below(static_cast<uint32_t>(i + 1));
            order[i] = order[at], order[at] = static_cast<uint32_t>(i);
        }
    }
    struct sigaction action = {};
    action.sa_sigaction = on_fault, action.sa_flags = SA_SIGINFO;
    for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &action, &before[i]);
    is_running = true, some_block_waited = false;
    for (uint64_t i = 0; i < n_blocks && !failed; ++i) {
        const uint64_t at = seed ? order[i] : i;
        blockIdx = {static_cast<unsigned>(at % l->grid[0]), static_cast<unsigned>(at / l->grid[0] % l->grid[1]),
                    static_cast<unsigned>(at / (static_cast<uint64_t>(l->grid[0]) * l->grid[1]))};
        run_block();
    }
    is_running = false;
    if (l->pdl && !failed && !some_block_waited)
        set_error(block_text() + ": this and all other blocks end without pdl_wait() in a launch that may overlap");
    for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &before[i], nullptr);
    if (failed) snprintf(error, error_bytes, "%s", message.c_str());
    return failed;
}
