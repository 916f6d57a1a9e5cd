// The checks of tensor_check.h: one scan by the type's rule, threads that take chunks in
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

constexpr size_t kNumberBytes[] = {4, 2, 2, 1};

template <Number kNumber>
inline bool is_bad(const uint8_t* p) {
    if constexpr (kNumber == kE8M0) {
        return *p == 255;
    } else if constexpr (kNumber == kF32) {
        uint32_t v;
        std::memcpy(&v, p, 4);
        return (v & 0x7f800000u) == 0x7f800000u;
    } else {
        constexpr uint16_t kExponentMask = kNumber == kF16 ? 0x7c00 : 0x7f80;
        uint16_t v;
        std::memcpy(&v, p, 2);
        return (v & kExponentMask) == kExponentMask;
    }
}

// Offset in data[0, n) of the first bad number, or n: blocks of kBytes (0: of `block_bytes`) with numbers at at[0, kN)
// of each. Groups of 64 blocks keep the inner loop free of branches.
template <Number kNumber, size_t kN, size_t kBytes = 0>
size_t scan_blocks(const uint8_t* data, size_t n, size_t block_bytes, const uint16_t* at) {
    const size_t bytes = kBytes ? kBytes : block_bytes, first = kBytes ? 0 : at[0], second = kN > 1 ? at[1] : first;
    for (size_t group = 0; group < n; group += 64 * bytes) {
        const size_t end = std::min(n, group + 64 * bytes);
        bool bad = false;
        for (size_t i = group; i < end; i += bytes) {
            bad |= is_bad<kNumber>(data + i + first);
            if constexpr (kN > 1) bad |= is_bad<kNumber>(data + i + second);
        }
        if (!bad) continue;
        for (size_t i = group; i < end; i += bytes)
            for (size_t k = 0; k < kN; ++k)
                if (is_bad<kNumber>(data + i + (k ? second : first))) return i + (k ? second : first);
    }
    return n;
}

template <Number kNumber>
size_t scan_numbers(const Rule& r, const uint8_t* data, size_t n) {
    if (r.block_bytes == kNumberBytes[kNumber])  // a stride that the compiler knows
        return scan_blocks<kNumber, 1, kNumberBytes[kNumber]>(data, n, r.block_bytes, r.at);
    return (r.n_at == 1 ? scan_blocks<kNumber, 1> : scan_blocks<kNumber, 2>)(data, n, r.block_bytes, r.at);
}

size_t first_bad_number(const Rule& r, const uint8_t* data, size_t n) {
    switch (r.number) {
        case kF32:
            return scan_numbers<kF32>(r, data, n);
        case kF16:
            return scan_numbers<kF16>(r, data, n);
        case kBF16:
            return scan_numbers<kBF16>(r, data, n);
        case kE8M0:
            return scan_numbers<kE8M0>(r, data, n);
    }
    return n;
}

// Offset of the first block of data[0, n) whose weights a GPU cannot take; n: there is none.
size_t first_large(const Rule& r, const uint8_t* data, size_t n) {
    const KNumbers numbers = k_numbers(r.weights);
    const size_t bytes = r.block_bytes;
    for (size_t group = 0; group < n; group += 64 * bytes) {
        const size_t end = std::min(n, group + 64 * bytes);
        bool safe = true;
        for (size_t i = group; i < end; i += bytes) safe &= is_safe(numbers, data + i);
        if (safe) continue;
        for (size_t i = group; i < end; i += bytes)
            if (!k_weights_fit(r.weights, numbers, data + i)) return i;
    }
    return n;
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
        const Kind kind = check::scan(p.rule, buffer, c.nbytes, &at);
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

Kind scan(const Rule& rule, const uint8_t* data, size_t nbytes, size_t* at) noexcept {
    *at = first_bad_number(rule, data, nbytes);
    if (rule.weights != kNoKQuant) {
        const size_t whole = *at / rule.block_bytes * rule.block_bytes, large = first_large(rule, data, whole);
        if (large < whole) {
            *at = large;
            return kLarge;
        }
    }
    if (*at == nbytes) return kFine;
    if (rule.number == kE8M0) return kExponent;
    return rule.block_bytes == kNumberBytes[rule.number] ? kValue : kScale;
}

Fault run(const FileRange* ranges, size_t n_ranges, int n_threads) noexcept try {
    Work work;
    work.ranges = ranges;
    for (size_t i = 0; i < n_ranges; i++) {
        const FileRange& p = ranges[i];
        const uint32_t block = p.rule.block_bytes;
        if (p.nbytes % block) return {kPartial, 0, i, p.offset};
        const uint64_t step = kChunkBytes / block * block;
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
