// A read-only file mapping that survives the file being cut: reads behind the cut see zeros, and a flag says so.
//
// Why: reading a mapped page whose file was truncated (or whose disk fails) raises SIGBUS, which ends the process. One
// process-wide handler, installed with the first mapping, puts zero pages over the rest of the mapping that faulted and
// marks it; whoever computes from the mapping asks `was_cut` afterwards. Faults elsewhere go to the handler before
// ours. The state is static: exactly one extension (_gguf) may include this header.
#pragma once

#include <errno.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <mutex>

namespace mapping {

constexpr int kSlots = 1024;  // mappings at a time; each holds a file descriptor as well

// What the handler reads: lock-free, never freed. end == 0: not in use.
struct Slot {
    std::atomic<uintptr_t> begin{0}, end{0};
    std::atomic<int> cut{0};
    bool taken = false;  // under `lock`
};

inline Slot slots[kSlots];
inline std::mutex lock;
inline struct sigaction previous;
inline uintptr_t page_bytes = 4096;
inline bool installed = false;

inline void on_sigbus(int signal, siginfo_t* info, void* context) {
    const int saved = errno;
    const uintptr_t addr = reinterpret_cast<uintptr_t>(info->si_addr);
    if (info->si_code > 0) {  // a fault, not a signal that somebody sent
        for (Slot& s : slots) {
            const uintptr_t begin = s.begin.load(), end = s.end.load();
            if (end == 0 || addr < begin || addr >= end || s.begin.load() != begin) continue;
            const uintptr_t page = addr & ~(page_bytes - 1);
            s.cut.store(1);
            void* zeros = mmap(reinterpret_cast<void*>(page), end - page, PROT_READ,
                               MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (zeros == MAP_FAILED) break;
            errno = saved;
            return;
        }
    }
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(signal, info, context);
    } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
        previous.sa_handler(signal);
    } else {  // the default action, taken when the faulting instruction runs again or the signal is sent again
        sigaction(SIGBUS, &previous, nullptr);
        if (info->si_code <= 0) raise(SIGBUS);
    }
    errno = saved;
}

// Maps fd[0, size), size > 0. Returns the slot index, *base the address; -errno on failure.
inline int map_file(int fd, uint64_t size, const uint8_t** base) {
    std::lock_guard<std::mutex> guard(lock);
    if (!installed) {
        page_bytes = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
        struct sigaction action{};
        action.sa_sigaction = on_sigbus;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigemptyset(&action.sa_mask);
        if (sigaction(SIGBUS, nullptr, &previous) != 0 || sigaction(SIGBUS, &action, nullptr) != 0) return -errno;
        installed = true;
    }
    int i = 0;
    while (i < kSlots && slots[i].taken) i++;
    if (i == kSlots) return -EMFILE;
    void* p = mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED) return -errno;
    Slot& s = slots[i];
    const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
    s.taken = true;
    s.cut.store(0);
    s.begin.store(begin);
    s.end.store((begin + size + page_bytes - 1) & ~(page_bytes - 1));
    *base = static_cast<const uint8_t*>(p);
    return i;
}

inline void unmap(int slot, uint64_t size) {
    std::lock_guard<std::mutex> guard(lock);
    Slot& s = slots[slot];
    void* p = reinterpret_cast<void*>(s.begin.load());
    s.end.store(0);
    s.begin.store(0);
    munmap(p, size);
    s.taken = false;
}

inline bool was_cut(int slot) { return slots[slot].cut.load() != 0; }

}  // namespace mapping
