// The checks of tensor_check.h: one table of where the scales of a block are, one scan, threads that take chunks in
// order.
//
// Bytes moved: every byte of the ranges once, into a buffer that stays in the level-2 cache.
#include "tensor_check.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace check {
namespace {

enum class Number : uint8_t { F32, F16, BF16, E8M0 };

template <Number kNumber>
inline bool is_bad(const uint8_t* p) {
    if constexpr (kNumber == Number::E8M0) {
        return *p == 255;
    } else if constexpr (kNumber == Number::F32) {
        uint32_t v;
        std::memcpy(&v, p, 4);
        return (v & 0x7f800000u) == 0x7f800000u;
    } else {
        constexpr uint16_t kExponentMask = kNumber == Number::F16 ? 0x7c00 : 0x7f80;
        uint16_t v;
        std::memcpy(&v, p, 2);
        return (v & kExponentMask) == kExponentMask;
    }
}

// Offset in data[0, n) of the first bad number, or n: blocks of kBytes with numbers at kAt of each. Groups of 64 blocks
// keep the inner loop free of branches.
template <Number kNumber, size_t kBytes, size_t... kAt>
size_t scan_blocks(const uint8_t* data, size_t n) {
    constexpr size_t kGroup = 64 * kBytes;
    for (size_t group = 0; group < n; group += kGroup) {
        const size_t end = std::min(n, group + kGroup);
        bool bad = false;
        for (size_t i = group; i < end; i += kBytes) bad |= (is_bad<kNumber>(data + i + kAt) | ...);
        if (!bad) continue;
        for (size_t i = group; i < end; i += kBytes)
            for (size_t at : {kAt...})
                if (is_bad<kNumber>(data + i + at)) return i + at;
    }
    return n;
}

// How a type is checked; an unquantized element is a block of one value.
struct Rule {
    uint32_t type;
    size_t bytes;  // of a block
    Kind kind;     // what a bad number there is called
    size_t (*scan_blocks)(const uint8_t* data, size_t n);
};

constexpr Rule kRules[] = {
    {0, 4, kValue, scan_blocks<Number::F32, 4, 0>},
    {1, 2, kValue, scan_blocks<Number::F16, 2, 0>},
    {2, 18, kScale, scan_blocks<Number::F16, 18, 0>},        // Q4_0: d
    {3, 20, kScale, scan_blocks<Number::F16, 20, 0, 2>},     // Q4_1: d, m
    {6, 22, kScale, scan_blocks<Number::F16, 22, 0>},        // Q5_0: d
    {7, 24, kScale, scan_blocks<Number::F16, 24, 0, 2>},     // Q5_1: d, m
    {8, 34, kScale, scan_blocks<Number::F16, 34, 0>},        // Q8_0: d
    {10, 84, kScale, scan_blocks<Number::F16, 84, 80, 82>},  // Q2_K: behind 16 scales, 64 quants: d, dmin
    {11, 110, kScale, scan_blocks<Number::F16, 110, 108>},   // Q3_K: behind 32 high bits, 64 quants, 12 scales: d
    {12, 144, kScale, scan_blocks<Number::F16, 144, 0, 2>},  // Q4_K: d, dmin
    {13, 176, kScale, scan_blocks<Number::F16, 176, 0, 2>},  // Q5_K: d, dmin
    {14, 210, kScale, scan_blocks<Number::F16, 210, 208>},   // Q6_K: behind 128 low bits, 64 high bits, 16 scales: d
    {30, 2, kValue, scan_blocks<Number::BF16, 2, 0>},
    {39, 17, kExponent, scan_blocks<Number::E8M0, 17, 0>},  // MXFP4: e
};

const Rule* rule_of(uint32_t type) {
    for (const Rule& r : kRules)
        if (r.type == type) return &r;
    return nullptr;
}

constexpr size_t kChunkBytes = 256 * 1024;

// A run of whole blocks of one range, at most kChunkBytes.
struct Chunk {
    size_t range;
    uint64_t offset;
    size_t nbytes;
};

struct Work {
    const FileRange* ranges;
    std::vector<Chunk> chunks;
    std::atomic<size_t> next{0};
    std::atomic<size_t> first_bad{SIZE_MAX};  // chunks behind it need no scan
    std::mutex lock;
    Fault fault;

    void report(size_t chunk, Fault f) {
        std::lock_guard<std::mutex> guard(lock);
        if (chunk >= first_bad.load()) return;
        first_bad.store(chunk);
        f.range = chunks[chunk].range;
        fault = f;
    }

    Fault scan(const Chunk& c, uint8_t* buffer) const {
        const FileRange& p = ranges[c.range];
        for (size_t have = 0; have < c.nbytes;) {
            const ssize_t n = pread(p.fd, buffer + have, c.nbytes - have, static_cast<off_t>(c.offset + have));
            if (n < 0 && errno == EINTR) continue;
            if (n < 0) return {kErrno, errno, 0, c.offset + have};
            if (n == 0) return {kShort, 0, 0, c.offset + have};
            have += static_cast<size_t>(n);
        }
        size_t at = 0;
        const Kind kind = check::scan(p.type, buffer, c.nbytes, &at);
        return {kind, 0, 0, c.offset + at};
    }

    void drain(uint8_t* buffer) {
        for (size_t i; (i = next.fetch_add(1)) < chunks.size() && i < first_bad.load();) {
            const Fault f = scan(chunks[i], buffer);
            if (f.kind != kFine) report(i, f);
        }
    }
};

}  // namespace

bool knows(uint32_t type) noexcept { return rule_of(type) != nullptr; }

Kind scan(uint32_t type, const uint8_t* data, size_t nbytes, size_t* at) noexcept {
    const Rule& r = *rule_of(type);
    *at = r.scan_blocks(data, nbytes);
    return *at == nbytes ? kFine : r.kind;
}

Fault run(const FileRange* ranges, size_t n_ranges, int n_threads) noexcept try {
    Work work;
    work.ranges = ranges;
    for (size_t i = 0; i < n_ranges; i++) {
        const FileRange& p = ranges[i];
        const Rule* r = rule_of(p.type);
        if (!r || p.nbytes % r->bytes) return {kType, 0, i, p.offset};
        const uint64_t step = kChunkBytes / r->bytes * r->bytes;
        for (uint64_t at = 0; at < p.nbytes; at += step)
            work.chunks.push_back({i, p.offset + at, static_cast<size_t>(std::min(step, p.nbytes - at))});
    }
    const size_t n = std::min<size_t>(std::max(n_threads, 1), std::max<size_t>(work.chunks.size(), 1));
    std::unique_ptr<uint8_t[]> buffers(new uint8_t[n * kChunkBytes]);
    sigset_t all, before;  // signals are for the threads of the program, not for these
    sigfillset(&all);
    for (int fatal : {SIGBUS, SIGSEGV, SIGFPE, SIGILL, SIGABRT}) sigdelset(&all, fatal);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    std::vector<std::thread> threads;
    threads.reserve(n);
    try {
        for (size_t t = 1; t < n; t++) threads.emplace_back(&Work::drain, &work, buffers.get() + t * kChunkBytes);
    } catch (const std::exception&) {  // no more threads to be had: those there are do it
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    work.drain(buffers.get());
    for (std::thread& t : threads) t.join();
    return work.fault;
} catch (const std::exception&) {
    return {kErrno, ENOMEM, 0, n_ranges ? ranges[0].offset : 0};
}

}  // namespace check
