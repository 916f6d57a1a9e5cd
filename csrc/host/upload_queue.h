// Who may fill which staging window during a load, and when a window is full. Used without the Python lock by several
// reader threads and one coordinator, and by the thread that waits for them and shows how far they are.
//
// A load is a list of chunks, in windows; readers take chunks in order. A chunk of window w may be sent only once
// window w is open, which is when what was in its memory before (window w - n_windows) has been consumed. When every
// chunk of a window has been sent, the coordinator consumes it and opens the next. Readers never wait for a later chunk
// than their own, so they cannot block each other.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace worker_orcd {

struct UploadChunk {
    uint64_t offset;  // in its file
    uint64_t to;      // device address
    uint32_t nbytes;  // at most the chunk size of the load
    uint32_t window;  // ascending over the list
    int32_t fd;
    int32_t rule;  // index of what its blocks are checked by, in the load's list; -1: any bytes
};

class UploadQueue {
  public:
    void add(const UploadChunk& chunk) {
        chunks_.push_back(chunk);
        if (chunk.window >= left_.size()) left_.resize(chunk.window + 1, 0);
        ++left_[chunk.window];
    }

    size_t n_chunks() const noexcept { return chunks_.size(); }
    size_t n_windows() const noexcept { return left_.size(); }

    // The next chunk and its window's turn: waits until it may be sent. False: nothing is left, or the load has
    // stopped.
    bool take(UploadChunk* out) noexcept {
        std::unique_lock<std::mutex> lock(mutex_);
        if (stopped_ || next_ == chunks_.size()) return false;
        *out = chunks_[next_++];
        opened_.wait(lock, [&] { return stopped_ || out->window < open_; });
        return !stopped_;
    }

    // The chunk's copy is queued on a stream.
    void sent(const UploadChunk& chunk) noexcept {
        std::lock_guard<std::mutex> lock(mutex_);
        bytes_ += chunk.nbytes;
        if (--left_[chunk.window] == 0) full_.notify_all();
    }

    // Waits up to timeout_s for `window` to be full. 1: it is; 0: not yet; -1: the load has stopped.
    int wait_full(uint32_t window, double timeout_s) noexcept {
        std::unique_lock<std::mutex> lock(mutex_);
        full_.wait_for(lock, std::chrono::duration<double>(timeout_s), [&] { return stopped_ || left_[window] == 0; });
        return stopped_ ? -1 : left_[window] == 0;
    }

    // Windows [0, n) may be filled.
    void open(size_t n) noexcept {
        std::lock_guard<std::mutex> lock(mutex_);
        open_ = n;
        opened_.notify_all();
    }

    // A thread of the load is at work; the coordinator has consumed `n` windows.
    void began() noexcept {
        report([&] { ++n_began_; });
    }
    void consumed(size_t n) noexcept {
        report([&] { n_consumed_ = n; });
    }

    // For the thread that waits for the load: up to timeout_s until n threads have begun, or until more than n windows
    // are consumed. 1: so it is; 0: not yet; -1: the load has stopped.
    int wait_began(size_t n, double timeout_s) noexcept {
        return wait_report(timeout_s, [&] { return n_began_ >= n; });
    }
    int wait_consumed(size_t n, double timeout_s) noexcept {
        return wait_report(timeout_s, [&] { return n_consumed_ > n; });
    }
    size_t n_consumed() noexcept {
        std::lock_guard<std::mutex> lock(mutex_);
        return n_consumed_;
    }

    // Ends the load: everybody who waits returns.
    void stop() noexcept {
        std::lock_guard<std::mutex> lock(mutex_);
        stopped_ = true;
        opened_.notify_all();
        full_.notify_all();
        reported_.notify_all();
    }

    uint64_t bytes_sent() noexcept {
        std::lock_guard<std::mutex> lock(mutex_);
        return bytes_;
    }

  private:
    template <class Change>
    void report(Change change) noexcept {
        std::lock_guard<std::mutex> lock(mutex_);
        change();
        reported_.notify_all();
    }

    template <class Condition>
    int wait_report(double timeout_s, Condition condition) noexcept {
        std::unique_lock<std::mutex> lock(mutex_);
        reported_.wait_for(lock, std::chrono::duration<double>(timeout_s), [&] { return stopped_ || condition(); });
        return stopped_ ? -1 : condition();
    }

    std::mutex mutex_;
    std::condition_variable opened_, full_, reported_;
    std::vector<UploadChunk> chunks_;
    std::vector<size_t> left_;  // [n_windows] chunks that are not sent yet
    size_t next_ = 0, open_ = 0, n_began_ = 0, n_consumed_ = 0;
    uint64_t bytes_ = 0;
    bool stopped_ = false;
};

}  // namespace worker_orcd
