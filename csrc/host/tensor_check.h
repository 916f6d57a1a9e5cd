// Looks for numbers that no weight may be: NaN and infinity in unquantized tensors and in block scales.
//
// Why: one such number turns every token into garbage with no error anywhere. The file is read with pread into small
// buffers, not through its mapping: that runs at memory speed too, keeps the process small, and a file cut meanwhile is
// a short read.
#pragma once

#include <cstddef>
#include <cstdint>

namespace check {

// Bytes [offset, offset + nbytes) of the open file fd: whole blocks of ggml type `type`.
struct FileRange {
    int fd;
    uint32_t type;
    uint64_t offset;
    uint64_t nbytes;
};

enum Kind : int { kFine = 0, kValue = 1, kScale = 2, kExponent = 3, kShort = 4, kErrno = 5, kType = 6 };

// The first fault: kValue/kScale: NaN or infinity, kExponent: an E8M0 scale of 255, kShort: the file ended,
// kErrno: a read failed with `error`, kType: no rule for the range's type.
struct Fault {
    Kind kind = kFine;
    int error = 0;
    size_t range = 0;
    uint64_t offset = 0;
};

// Whether `type` has a rule.
bool knows(uint32_t type) noexcept;

// Checks whole blocks of `type`, which must have a rule, that lie in memory. Returns what the first bad number is
// called, its offset in `at`; kFine: there is none.
Kind scan(uint32_t type, const uint8_t* data, size_t nbytes, size_t* at) noexcept;

// Checks all ranges with up to n_threads threads. The fault returned is the first in order of ranges and offsets.
Fault run(const FileRange* ranges, size_t n_ranges, int n_threads) noexcept;

}  // namespace check
