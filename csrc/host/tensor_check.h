// Looks for numbers that no weight may be: NaN and infinity in unquantized tensors and in block scales; and, for a GPU,
// weights of K-quants that it could not multiply.
//
// Why: one such number turns every token into garbage with no error anywhere. The file is read with pread into small
// buffers, not through its mapping: that runs at memory speed too, keeps the process small, and a file cut meanwhile is
// a short read.
#pragma once

#include <cstddef>
#include <cstdint>

#include "host/k_weights.h"

namespace check {

enum Number : uint8_t { kF32, kF16, kBF16, kE8M0 };

// Where the numbers of a type's block are that must be finite. An unquantized element is a block of one number.
struct Rule {
    uint32_t block_bytes;
    Number number;
    uint8_t n_at;  // 1 or 2
    uint16_t at[2];
    KQuant weights = kNoKQuant;  // whose weights must fit fp16 (k_weights.h)
};

// Bytes [offset, offset + nbytes) of the open file fd: whole blocks.
struct FileRange {
    int fd;
    Rule rule;
    uint64_t offset;
    uint64_t nbytes;
};

enum Kind : int { kFine = 0, kValue = 1, kScale = 2, kExponent = 3, kShort = 4, kErrno = 5, kPartial = 6, kLarge = 7 };

// The first fault: kValue/kScale: NaN or infinity, kExponent: an E8M0 scale of 255, kShort: the file ended,
// kErrno: a read failed with `error`, kPartial: the range is no run of whole blocks, kLarge: a weight is too large for
// a GPU.
struct Fault {
    Kind kind = kFine;
    int error = 0;
    size_t range = 0;
    uint64_t offset = 0;
};

// Checks whole blocks that lie in memory. Returns what the first bad number is called, its offset in `at` (kLarge: that
// of its block); kFine: there is none.
Kind scan(const Rule& rule, const uint8_t* data, size_t nbytes, size_t* at) noexcept;

// Checks all ranges with up to n_threads threads. The fault returned is the first in order of ranges and offsets.
Fault run(const FileRange* ranges, size_t n_ranges, int n_threads) noexcept;

}  // namespace check
