// A small pool of threads that shares the chunks of one job at a time with the calling thread.
//
// A step of a small model is some hundred jobs of a few microseconds, so waiting threads spin for a moment before they
// sleep, and a job is over as soon as its chunks are done: a worker that the system has not woken (or has put aside)
// takes none and delays nobody. Which thread runs a chunk never matters to a result.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "host/token_queue.h"

namespace worker_orcd {

class ThreadPool {
  public:
    // n_threads counts the calling thread; n_threads - 1 are started. Throws std::system_error.
    explicit ThreadPool(int n_threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int n_threads() const noexcept { return (int)workers_.size() + 1; }

    // While `control` (null: nothing) is aborted, `run` skips the chunks that are left: what it was to compute is not
    // there. Not while a `run` is under way.
    void heed(const ControlFlag* control) noexcept { control_ = control; }
    bool aborted() const noexcept { return control_ != nullptr && control_->aborted(); }

    // Calls body(chunk, thread) for each chunk of [0, n_chunks), thread < n_threads(); returns when all are done.
    // `body` must not throw.
    template <class Body>
    void run(int64_t n_chunks, const Body& body) noexcept {
        if (n_chunks <= 0) return;
        if (workers_.empty() || n_chunks == 1) {
            for (int64_t c = 0; c < n_chunks && !aborted(); ++c) body(c, 0);
            return;
        }
        auto call = [](const void* b, int64_t chunk, int thread) { (*(const Body*)b)(chunk, thread); };
        share(call, &body, n_chunks);
    }

  private:
    using Call = void (*)(const void* body, int64_t chunk, int thread);
    // What a worker needs of a job. Two take turns: a late worker may still read the one before.
    struct Job {
        std::atomic<Call> call{nullptr};
        std::atomic<const void*> body{nullptr};
        std::atomic<uint32_t> n_chunks{0};
    };

    void share(Call call, const void* body, int64_t n_chunks) noexcept;
    void work(int thread) noexcept;
    void join() noexcept;
    // Takes chunks of the job of `generation` until none is left.
    void take_chunks(uint32_t generation, int thread) noexcept;

    const ControlFlag* control_ = nullptr;  // read by whoever has taken a chunk
    Job jobs_[2];
    // generation << 32 | next chunk: a chunk is taken only from the job that was looked at
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<uint32_t> done_{0};
    alignas(64) std::atomic<int> sleeping_{0};
    std::atomic<bool> stop_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
};

}  // namespace worker_orcd
