// The queue of sampled tokens from an engine's decode loop to the output thread, and what is told to that loop.
//
// Both are used without the GIL, so they are plain C++: a bounded ring under one mutex (a step pushes at most
// max_seqs entries, so the lock is taken a few hundred times a second) and an atomic flag. Header-only because two
// extensions (the CPU and the CUDA engine) push into objects that a third (_ring) owns.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace worker_orcd {

struct TokenEntry {
    int64_t seq_id;
    int32_t token;  // < 0: a marker put by Python
};

class TokenQueue {
  public:
    explicit TokenQueue(size_t capacity) : ring_(capacity) {}

    // Appends n entries in order, waiting for space while full. Returns how many went in: fewer than n only when the
    // queue was closed.
    size_t push_many(const int64_t* seq_ids, const int32_t* tokens, size_t n) noexcept {
        size_t done = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        while (done < n) {
            not_full_.wait(lock, [this] { return closed_ || size_ < ring_.size(); });
            if (closed_) break;
            while (done < n && size_ < ring_.size()) {
                ring_[(head_ + size_) % ring_.size()] = TokenEntry{seq_ids[done], tokens[done]};
                ++size_;
                ++done;
            }
            not_empty_.notify_one();
        }
        return done;
    }

    // As push_many, but waits for nothing: all n entries go in, or none. 1: they are in; 0: there is no room for all;
    // -1: the queue is closed.
    int try_push_many(const int64_t* seq_ids, const int32_t* tokens, size_t n) noexcept {
        std::lock_guard<std::mutex> lock(mutex_);
        if (closed_) return -1;
        if (ring_.size() - size_ < n) return 0;
        for (size_t i = 0; i < n; ++i) ring_[(head_ + size_++) % ring_.size()] = TokenEntry{seq_ids[i], tokens[i]};
        not_empty_.notify_one();
        return 1;
    }

    // Moves up to max_n entries to `out`, waiting up to timeout_s for the first one. Returns their number; 0 after the
    // timeout or when closed and empty.
    size_t pop_some(TokenEntry* out, size_t max_n, double timeout_s) noexcept {
        std::unique_lock<std::mutex> lock(mutex_);
        if (size_ == 0 && !closed_ && timeout_s > 0)
            not_empty_.wait_for(lock, std::chrono::duration<double>(timeout_s),
                                [this] { return closed_ || size_ > 0; });
        size_t n = size_ < max_n ? size_ : max_n;
        for (size_t i = 0; i < n; ++i) out[i] = ring_[(head_ + i) % ring_.size()];
        head_ = (head_ + n) % ring_.size();
        size_ -= n;
        if (n > 0) not_full_.notify_all();
        if (size_ > 0) not_empty_.notify_one();
        return n;
    }

    void close() noexcept {
        std::lock_guard<std::mutex> lock(mutex_);
        closed_ = true;
        not_empty_.notify_all();
        not_full_.notify_all();
    }

    bool closed() noexcept {
        std::lock_guard<std::mutex> lock(mutex_);
        return closed_;
    }

    size_t size() noexcept {
        std::lock_guard<std::mutex> lock(mutex_);
        return size_;
    }

    size_t capacity() const noexcept { return ring_.size(); }

  private:
    std::mutex mutex_;
    std::condition_variable not_empty_, not_full_;
    std::vector<TokenEntry> ring_;
    size_t head_ = 0, size_ = 0;
    bool closed_ = false;
};

// What other threads tell an engine's call, and how far it is. An interrupt ends a decode run at its next step
// boundary; an abort, which is one too, gives up the step under way, where the engine can.
struct ControlFlag {
    void interrupt() noexcept { interrupted_.store(true, std::memory_order_release); }
    void abort() noexcept {
        aborted_.store(true, std::memory_order_release);
        interrupt();
    }
    void clear() noexcept {
        interrupted_.store(false, std::memory_order_release);
        aborted_.store(false, std::memory_order_release);
    }
    bool interrupted() const noexcept { return interrupted_.load(std::memory_order_acquire); }
    bool aborted() const noexcept { return aborted_.load(std::memory_order_relaxed); }

    // Steps that have ended since the start, for whoever watches that there are any. One thread counts.
    void step_done() noexcept { n_steps_.fetch_add(1, std::memory_order_relaxed); }
    uint64_t n_steps() const noexcept { return n_steps_.load(std::memory_order_relaxed); }

  private:
    std::atomic<bool> interrupted_{false}, aborted_{false};
    std::atomic<uint64_t> n_steps_{0};
};

}  // namespace worker_orcd
