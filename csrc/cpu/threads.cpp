// See threads.h.
#include "threads.h"

#include <sched.h>

namespace worker_orcd {

// Times a waiting thread looks for a job before it sleeps: about 50 us, more than the serial part between two jobs of a
// decode step.
static constexpr int kSpins = 1500;

static inline void pause_cpu() { __builtin_ia32_pause(); }

ThreadPool::ThreadPool(int n_threads) {
    try {
        for (int i = 1; i < n_threads; ++i) workers_.emplace_back([this, i] { work(i); });
    } catch (...) {
        join();
        throw;
    }
}

ThreadPool::~ThreadPool() { join(); }

void ThreadPool::join() noexcept {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_.store(true);
    }
    wake_.notify_all();
    for (auto& w : workers_) w.join();
    workers_.clear();
}

void ThreadPool::take_chunks(uint32_t generation, int thread) noexcept {
    Job& job = jobs_[generation & 1];
    for (;;) {
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        if ((uint32_t)(ticket >> 32) != generation) return;
        uint32_t chunk = (uint32_t)ticket, n = job.n_chunks.load(std::memory_order_relaxed);
        Call call = job.call.load(std::memory_order_relaxed);
        const void* body = job.body.load(std::memory_order_relaxed);
        if (chunk >= n) return;
        // Succeeds only while this is still the current job, and then n, call and body were its own.
        if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
        if (!aborted()) call(body, chunk, thread);
        done_.fetch_add(1, std::memory_order_release);
    }
}

void ThreadPool::share(Call call, const void* body, int64_t n_chunks) noexcept {
    uint32_t generation = (uint32_t)(ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    Job& job = jobs_[generation & 1];
    job.call.store(call, std::memory_order_relaxed);
    job.body.store(body, std::memory_order_relaxed);
    job.n_chunks.store((uint32_t)n_chunks, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    ticket_.store((uint64_t)generation << 32, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) {
        std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_all();
    }
    take_chunks(generation, 0);
    for (int spin = 0; done_.load(std::memory_order_acquire) != (uint32_t)n_chunks; ++spin) {
        if (spin < kSpins)
            pause_cpu();
        else
            sched_yield();  // the last chunk is on a core that somebody else holds
    }
}

void ThreadPool::work(int thread) noexcept {
    uint32_t seen = 0;
    for (;;) {
        uint32_t generation = seen;
        for (int spin = 0; spin < kSpins; ++spin) {
            generation = (uint32_t)(ticket_.load(std::memory_order_acquire) >> 32);
            if (generation != seen || stop_.load(std::memory_order_relaxed)) break;
            pause_cpu();
        }
        if (generation == seen) {
            std::unique_lock<std::mutex> lock(mutex_);
            sleeping_.fetch_add(1, std::memory_order_seq_cst);
            wake_.wait(lock, [&] {
                generation = (uint32_t)(ticket_.load(std::memory_order_seq_cst) >> 32);
                return generation != seen || stop_.load(std::memory_order_relaxed);
            });
            sleeping_.fetch_sub(1, std::memory_order_relaxed);
        }
        if (stop_.load(std::memory_order_relaxed)) return;
        seen = generation;
        take_chunks(generation, thread);
    }
}

}  // namespace worker_orcd
