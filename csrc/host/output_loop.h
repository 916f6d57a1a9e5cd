// The loop of the output thread: tokens of the ring go to the sinks of their jobs and from there to clients, until
// somebody must hear of something - the end of a job, a piece that is waited for, a token that Python decodes.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "host/job_sink.h"
#include "host/token_queue.h"

namespace worker_orcd {

struct Report {
    enum Kind {
        kWoken = 0,    // a mark that belongs to no job asked for a look at the clock
        kToken = 1,    // `value` is a token of a job that is decoded elsewhere
        kMark = 2,     // `value` is the mark that ends the sequence; its text is complete, if it is decoded here
        kStopped = 3,  // a stop string is complete
        kPiece = 4     // a piece is there that is waited for
    };
    int64_t seq_id;
    int32_t kind, value;
};

class OutputLoop {
  public:
    // `failed`: the mark of a sequence that ends without what its text holds back.
    explicit OutputLoop(int32_t failed) : failed_(failed) {}

    // Tokens of `seq_id` go to `sink`, or are reported where it does not decode.
    void add(int64_t seq_id, std::shared_ptr<JobSink> sink) {
        std::lock_guard<std::mutex> lock(mutex_);
        sinks_[seq_id] = std::move(sink);
    }

    // Tokens of `seq_id` go nowhere from now on.
    void remove(int64_t seq_id) {
        std::lock_guard<std::mutex> lock(mutex_);
        sinks_.erase(seq_id);
    }

    // Works until there is something to report, `timeout_s` is over, or the queue is closed and empty. A negative
    // token is a mark, -1 the sign of an engine that could draw none, which its own mark follows.
    void run(TokenQueue& queue, double timeout_s, std::vector<Report>& reports) {
        const auto end = Clock::now() + std::chrono::duration<double>(timeout_s);
        double left = timeout_s;
        do {
            entries_.resize(kBatch);
            entries_.resize(queue.pop_some(entries_.data(), kBatch, left));
            if (entries_.empty()) return;
            find_sinks();
            for (size_t i = 0; i < entries_.size(); ++i) feed(entries_[i], found_[i].get(), reports);
            for (const int64_t seq_id : told_) reports.push_back(Report{seq_id, Report::kPiece, 0});
            told_.clear();
            flush_streams();
            found_.clear();
            left = std::chrono::duration<double>(end - Clock::now()).count();
        } while (reports.empty() && left > 0);
    }

  private:
    using Clock = std::chrono::steady_clock;

    static constexpr size_t kBatch = 4096;

    void find_sinks() {
        std::lock_guard<std::mutex> lock(mutex_);
        for (const TokenEntry& entry : entries_) {
            const auto at = sinks_.find(entry.seq_id);
            found_.push_back(at == sinks_.end() ? nullptr : at->second);
        }
    }

    void feed(const TokenEntry& entry, JobSink* sink, std::vector<Report>& reports) {
        if (sink == nullptr) {
            if (entry.token < -1 && entry.seq_id == 0) reports.push_back(Report{0, Report::kWoken, entry.token});
            return;  // else: of a sequence past its end
        }
        if (entry.token == -1) return;
        if (!sink->decodes()) {
            reports.push_back(Report{entry.seq_id, entry.token >= 0 ? Report::kToken : Report::kMark, entry.token});
            return;
        }
        if (entry.token >= 0) {
            const Fed fed = sink->push(entry.token);
            if (fed.stopped)
                reports.push_back(Report{entry.seq_id, Report::kStopped, 0});
            else if (fed.told)
                told_.push_back(entry.seq_id);
            return;
        }
        const bool stopped = entry.token != failed_ && sink->end().stopped;
        reports.push_back(Report{entry.seq_id, stopped ? Report::kStopped : Report::kMark, entry.token});
    }

    void flush_streams() {
        for (const auto& sink : found_)
            if (sink != nullptr)
                if (std::shared_ptr<ClientStream> stream = sink->stream()) streams_.push_back(std::move(stream));
        std::sort(streams_.begin(), streams_.end());
        streams_.erase(std::unique(streams_.begin(), streams_.end()), streams_.end());
        for (const auto& stream : streams_) stream->flush();
        streams_.clear();
    }

    const int32_t failed_;
    std::mutex mutex_;
    std::unordered_map<int64_t, std::shared_ptr<JobSink>> sinks_;
    // of the thread that runs it, kept for their memory
    std::vector<TokenEntry> entries_;
    std::vector<std::shared_ptr<JobSink>> found_;
    std::vector<std::shared_ptr<ClientStream>> streams_;
    std::vector<int64_t> told_;
};

}  // namespace worker_orcd
