// The body of one HTTP answer on its way to a client that may read slowly or not at all.
//
// Any thread appends; `flush` frames what came since the last one and sends as much as the socket takes at once. What
// is left waits here, and the epoll that watches the socket is asked to tell when it can be written again. Nothing
// blocks. The socket belongs to somebody else, who calls `release` before closing it.
#pragma once

#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <mutex>
#include <string>

#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

namespace worker_orcd {

// Changes what `epoll` is told of a socket: `op` is EPOLL_CTL_ADD, _MOD or _DEL, and the going away of its other side
// is always among the events. 0; or -1, and errno says why.
inline int change_watch(int epoll, int op, int fd, uint32_t also = 0) {
    struct epoll_event event = {};
    event.events = EPOLLRDHUP | also;
    event.data.fd = fd;
    return ::epoll_ctl(epoll, op, fd, &event);
}

class ClientStream {
  public:
    enum State {
        kOpen = 0,  // more may come, or waits for the client
        kSent = 1,  // finished, and the system has all of it
        kGone = 2   // the client has gone, or the socket was released
    };

    // `chunked`: frames by HTTP/1.1's chunks; else the bytes as they are. `epoll` watches `fd` for its going away.
    // `wake`: an eventfd, told once when more than `limit` bytes wait.
    ClientStream(int fd, bool chunked, int epoll, int wake, size_t limit)
        : fd_(fd), epoll_(epoll), wake_(wake), chunked_(chunked), limit_(limit) {}
    ClientStream(const ClientStream&) = delete;
    ClientStream& operator=(const ClientStream&) = delete;

    // Calls fill(std::string&), which appends bytes of the body. Nothing is taken any more once too much waits.
    template <class Fill>
    void append(Fill fill) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (fd_ < 0 || finished_) return;
        lost_ = lost_ || overflowed_;
        if (!lost_) fill(body_);
    }

    // Sends the head of the answer, which is not framed, and the first bytes of the body with it.
    State begin(const char* head, size_t n_head, const char* data, size_t n) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (fd_ >= 0 && !finished_) {
            out_.append(head, n_head);
            body_.append(data, n);
        }
        return send_some();
    }

    // Appends bytes however much waits (there are few of them: the events of a beginning or an end), and sends.
    State write(const char* data, size_t n) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (fd_ >= 0 && !finished_) body_.append(data, n);
        return send_some();
    }

    // Appends the last bytes of the body, ends it, and sends.
    State finish(const char* data, size_t n) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (fd_ >= 0 && !finished_) {
            body_.append(data, n);
            frame();
            if (chunked_) out_ += "0\r\n\r\n";
            finished_ = true;
        }
        return send_some();
    }

    // Sends what was appended.
    State flush() {
        std::lock_guard<std::mutex> lock(mutex_);
        return send_some();
    }

    // The socket can be written again.
    State writable() {
        std::lock_guard<std::mutex> lock(mutex_);
        blocked_ = false;
        const State state = send_some();
        if (fd_ >= 0 && !blocked_) watch(0);
        return state;
    }

    // The socket is somebody else's from now on.
    void release() {
        std::lock_guard<std::mutex> lock(mutex_);
        fd_ = -1;
        body_.clear();
        out_.clear();
        sent_ = 0;
    }

    // Whether more waited than may.
    bool overflowed() {
        std::lock_guard<std::mutex> lock(mutex_);
        return overflowed_;
    }

    // Whether something was not taken because of that: what follows would follow a gap.
    bool lost() {
        std::lock_guard<std::mutex> lock(mutex_);
        return lost_;
    }

    // Seconds since the last byte was given to the system; 0 while some wait for the client.
    double silent_seconds() {
        std::lock_guard<std::mutex> lock(mutex_);
        if (blocked_ || fd_ < 0) return 0.0;
        return std::chrono::duration<double>(Clock::now() - last_write_).count();
    }

  private:
    using Clock = std::chrono::steady_clock;

    void frame() {
        if (body_.empty()) return;
        if (chunked_) {
            char head[24];
            out_.append(head, (size_t)std::snprintf(head, sizeof head, "%zx\r\n", body_.size()));
            out_ += body_;
            out_ += "\r\n";
        } else {
            out_ += body_;
        }
        body_.clear();
    }

    State send_some() {
        if (fd_ < 0) return kGone;
        frame();
        while (!blocked_ && sent_ < out_.size()) {
            const ssize_t n = ::send(fd_, out_.data() + sent_, out_.size() - sent_, MSG_DONTWAIT | MSG_NOSIGNAL);
            if (n >= 0) {
                sent_ += (size_t)n;
                last_write_ = Clock::now();
            } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
                blocked_ = true;
                watch(EPOLLOUT);
            } else if (errno != EINTR) {
                return kGone;
            }
        }
        if (sent_ == out_.size()) {
            out_.clear();
            sent_ = 0;
            if (out_.capacity() > kKept) out_.shrink_to_fit();
            return finished_ ? kSent : kOpen;
        }
        if (sent_ > kKept) {
            out_.erase(0, sent_);
            sent_ = 0;
        }
        if (!overflowed_ && out_.size() - sent_ > limit_) {
            overflowed_ = true;
            const uint64_t one = 1;
            // it fails only where its count is at its end, and then somebody has been told already
            if (::write(wake_, &one, sizeof one) < 0) return kOpen;
        }
        return kOpen;
    }

    void watch(uint32_t also) { change_watch(epoll_, EPOLL_CTL_MOD, fd_, also); }

    static constexpr size_t kKept = 1 << 16;  // bytes of a buffer that are not given back

    std::mutex mutex_;
    int fd_, epoll_, wake_;
    const bool chunked_;
    const size_t limit_;
    std::string body_;  // not framed yet
    std::string out_;   // framed; sent up to sent_
    size_t sent_ = 0;
    bool blocked_ = false, finished_ = false, overflowed_ = false, lost_ = false;
    Clock::time_point last_write_ = Clock::now();
};

}  // namespace worker_orcd
