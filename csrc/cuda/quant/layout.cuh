// The order in which quantized matrices lie in device memory, and how a row's blocks get there.
//
// A matrix W [n_out, K] in GGUF blocks is cut into row tiles of 16 rows and k tiles of kTileK columns (64 for types
// with 32-element blocks and for unquantized ones, 256 for K-quants: whole blocks, so that no scale is stored twice).
// The packed tile of row tile s and k tile u is kPackedTileBytes long, the (s * n_k_tiles + u)-th of the matrix: a row
// tile is one contiguous stream of the bytes that its 16 rows have in the file, bit for bit, in another order. Padding
// (zero bits, so zero weights) exists only below the last row and, where K is an odd number of 32-column blocks, right
// of the last column.
//
// Inside a packed tile: the code planes, then the scales. A plane of kBits holds one kBits-wide part of every code (two
// planes of five- and six-bit codes share them otherwise, see `FiveBits` and `SixBits`),
// ordered so that lane l = 4g + t of a warp loads exactly what it needs for A fragments of mma.m16n8k16 in loads of up
// to 16 bytes, coalesced, with the codes at shifts from which one `and` (and one `or` of a magic exponent) makes a
// packed pair. Per sub-tile of 64 columns, a lane owns 16 pairs: pair P = 8b + i of 32-column block b, i = 4j + 2h + r,
// holds
//     row  g + 8r,   columns  32b + 16j + 4t + 2h  (low half of the register)  and the one after it (high half),
// that is, register a[2h + r] of product j (of two per block). The columns of a product are a permutation of the
// mathematical order; activations are stored in the same permutation (see `x_slot`).
//
// The layout functions are plain C++ and are tested on the CPU. What differs by type is in the other headers here.
#pragma once

#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "params/host_device.h"

#ifdef __CUDACC__
#include "common/ptx.cuh"
#endif

constexpr int kTileRows = 16;
constexpr int kSubK = 64;
constexpr int kLanes = 32;

// ---- where an element lives --------------------------------------------------------------------------------------

HOST_DEVICE int pair_row(int lane, int pair) { return (lane >> 2) + 8 * (pair & 1); }

// Column, within the sub-tile of 64, of the low element of a lane's pair (0..15).
HOST_DEVICE int pair_column(int lane, int pair) {
    return 32 * (pair >> 3) + 16 * ((pair >> 2) & 1) + 4 * (lane & 3) + 2 * ((pair >> 1) & 1);
}

// Place of column k (0..31) of a 32-column block in a stored activation block: lane t's eight values are adjacent.
HOST_DEVICE int x_slot(int k) { return 8 * ((k >> 2) & 3) + 4 * (k >> 4) + (k & 3); }

// ---- code planes -------------------------------------------------------------------------------------------------

// One plane of one packed tile: kBits words per lane and sub-tile, in chunks of at most 16 bytes per lane.
template <int kBits>
struct Plane {
    static constexpr int kChunkWords = kBits < 4 ? kBits : 4;
    static constexpr int kChunkBytes = kChunkWords * 4 * kLanes;
    static constexpr int kSubBytes = kBits * 4 * kLanes;
    // Pairs in a word; two words make a pair at 32 bits.
    static constexpr int kPairs = kBits < 32 ? 16 / kBits : 0;

    struct Place {
        int sub, lane, word;
    };
    // Which word of which lane lies at byte `offset` of the plane.
    static HOST_DEVICE Place place(int offset) {
        const int in_sub = offset % kSubBytes, in_chunk = in_sub % kChunkBytes;
        return {offset / kSubBytes, in_chunk / (kChunkWords * 4),
                in_sub / kChunkBytes * kChunkWords + in_chunk % (kChunkWords * 4) / 4};
    }

    // The word at `place`, gathered from code(row, column of the k tile): row 0..15.
    template <class Code>
    static HOST_DEVICE uint32_t gather(Place at, Code code) {
        if constexpr (kBits == 32) {
            const int pair = at.word / 2;
            return code(pair_row(at.lane, pair), at.sub * kSubK + pair_column(at.lane, pair) + at.word % 2);
        } else {
            uint32_t word = 0;
            for (int i = 0; i < kPairs; ++i) {
                const int pair = at.word * kPairs + i;
                const int row = pair_row(at.lane, pair), k = at.sub * kSubK + pair_column(at.lane, pair);
                word |= code(row, k) << (kBits * i) | code(row, k + 1) << (16 + kBits * i);
            }
            return word;
        }
    }

    // A lane's words of one sub-tile; `plane` points to the plane in shared or global memory.
    static HOST_DEVICE void load(uint32_t (&words)[kBits], const uint8_t* plane, int sub, int lane) {
        const uint8_t* p = plane + sub * kSubBytes + lane * (kChunkWords * 4);
#pragma unroll
        for (int c = 0; c < kBits / kChunkWords; ++c) {
#ifdef __CUDA_ARCH__
            if constexpr (kChunkWords == 4) {
                const uint4 v = *reinterpret_cast<const uint4*>(p + c * kChunkBytes);
                words[4 * c] = v.x, words[4 * c + 1] = v.y, words[4 * c + 2] = v.z, words[4 * c + 3] = v.w;
            } else if constexpr (kChunkWords == 2) {
                const uint2 v = *reinterpret_cast<const uint2*>(p);
                words[0] = v.x, words[1] = v.y;
            } else {
                words[0] = *reinterpret_cast<const uint32_t*>(p);
            }
#else
            memcpy(&words[kChunkWords * c], p + c * kChunkBytes, kChunkWords * 4);
#endif
        }
    }

#ifdef __CUDACC__
    // The word of `pair` with its codes at bits 0 and 16 and anything beside them.
    static DEVICE_MEMBER uint32_t shifted(const uint32_t (&words)[kBits], int pair) {
        return words[pair / kPairs] >> (kBits * (pair % kPairs));
    }
    // `base` with the codes of `pair` put in at bits kTo and 16 + kTo, which are 0 there. kBits <= 16.
    template <int kTo = 0>
    static DEVICE_MEMBER uint32_t or_codes(const uint32_t (&words)[kBits], int pair, uint32_t base) {
        constexpr uint32_t kMask = ((1u << kBits) - 1u) << kTo;
        const uint32_t word = words[pair / kPairs];
        const int from = kBits * (pair % kPairs);
        return and_or(from >= kTo ? word >> (from - kTo) : word << (kTo - from), kMask | kMask << 16, base);
    }
#endif

    // The codes of `pair`, shifted to bits kTo and 16 + kTo; everything else 0. kBits <= 16.
    template <int kTo = 0>
    static HOST_DEVICE uint32_t codes(const uint32_t (&words)[kBits], int pair) {
        constexpr uint32_t kMask = ((1u << kBits) - 1u) << kTo;
        const uint32_t word = words[pair / kPairs];
        const int from = kBits * (pair % kPairs);
        return (from >= kTo ? word >> (from - kTo) : word << (kTo - from)) & (kMask | kMask << 16);
    }
};

// ---- raw GGUF blocks ---------------------------------------------------------------------------------------------

// The up to 16 rows of a row tile in GGUF order, from some block of each row on.
struct RawRowTile {
    const uint8_t* rows;  // that block of the first row
    int64_t row_bytes;
    int n_rows;    // rows that exist, at most 16
    int n_blocks;  // blocks that exist, from rows on
    int block_bytes;

    // Block b of `row`, or null in the padding.
    HOST_DEVICE const uint8_t* block(int row, int b) const {
        return row < n_rows && b < n_blocks ? rows + row * row_bytes + static_cast<int64_t>(b) * block_bytes : nullptr;
    }
};

// Little-endian reads at any alignment: GGUF blocks have odd sizes.
HOST_DEVICE uint32_t raw_u16(const uint8_t* p) { return p[0] | static_cast<uint32_t>(p[1]) << 8; }
HOST_DEVICE uint32_t raw_u32(const uint8_t* p) { return raw_u16(p) | raw_u16(p + 2) << 16; }
// Byte, half or word at `offset` of a block, 0 in the padding.
HOST_DEVICE uint32_t pad_u8(const uint8_t* block, int offset) { return block ? block[offset] : 0u; }
HOST_DEVICE uint32_t pad_u16(const uint8_t* block, int offset) { return block ? raw_u16(block + offset) : 0u; }
HOST_DEVICE uint32_t pad_u32(const uint8_t* block, int offset) { return block ? raw_u32(block + offset) : 0u; }

// Five-bit codes: a lane's five words of a sub-tile, four of the low plane and one of the high, have three pairs each
// in bits 0, 5 and 10 of their halves, and in bit 15 one bit of the last pair.
struct FiveBits {
    static constexpr int kWords = 5, kLastPair = 15;

    // Word `word` of `lane`, gathered from code(row, column of the k tile): row 0..15.
    template <class Code>
    static HOST_DEVICE uint32_t gather(int sub, int lane, int word, Code code) {
        const auto both = [&](int pair) {
            const int row = pair_row(lane, pair), k = sub * kSubK + pair_column(lane, pair);
            return code(row, k) | code(row, k + 1) << 16;
        };
        uint32_t bits = (both(kLastPair) >> word & 0x00010001u) << 15;
        for (int i = 0; i < 3; ++i) bits |= both(3 * word + i) << (5 * i);
        return bits;
    }
    static HOST_DEVICE uint32_t word(const uint32_t (&low)[4], const uint32_t (&high)[1], int index) {
        return index < 4 ? low[index] : high[0];
    }
    // The codes of `pair` at bits 0 and 16; everything else 0.
    static HOST_DEVICE uint32_t codes(const uint32_t (&low)[4], const uint32_t (&high)[1], int pair) {
        if (pair < kLastPair) return word(low, high, pair / 3) >> (5 * (pair % 3)) & 0x001f001fu;
        uint32_t codes = 0;
#pragma unroll
        for (int i = 0; i < kWords; ++i) codes |= word(low, high, i) >> (15 - i) & 0x00010001u << i;
        return codes;
    }
};

// Six-bit codes: a lane's six words of a sub-tile, four of the low plane and two of the high, have a pair each in bits
// 0-5 of their halves and one in bits 10-15. Of the last four pairs the upper four bits are in bits 6-9 of the words of
// the low plane, the lower two in those of the high one.
struct SixBits {
    static constexpr int kWords = 6, kFirstSplit = 2 * kWords;

    // Word `word` of `lane`, gathered from code(row, column of the k tile): row 0..15.
    template <class Code>
    static HOST_DEVICE uint32_t gather(int sub, int lane, int word, Code code) {
        const auto both = [&](int pair) {
            const int row = pair_row(lane, pair), k = sub * kSubK + pair_column(lane, pair);
            return code(row, k) | code(row, k + 1) << 16;
        };
        uint32_t bits = both(word) | both(kWords + word) << 10;
        if (word < 4) return bits | (both(kFirstSplit + word) & 0x003c003cu) << 4;
        for (int i = 0; i < 2; ++i) bits |= (both(kFirstSplit + 2 * (word - 4) + i) & 0x00030003u) << (6 + 2 * i);
        return bits;
    }
    static HOST_DEVICE uint32_t word(const uint32_t (&low)[4], const uint32_t (&high)[2], int index) {
        return index < 4 ? low[index] : high[index - 4];
    }
    // Of one of the last four pairs: the word with the lower two bits, these at bits 4 and 20.
    static HOST_DEVICE uint32_t lower_at_4(const uint32_t (&high)[2], int pair) {
        return high[(pair - kFirstSplit) / 2] >> (2 + 2 * (pair % 2));
    }
    // The codes of `pair` at bits 0 and 16; everything else 0.
    static HOST_DEVICE uint32_t codes(const uint32_t (&low)[4], const uint32_t (&high)[2], int pair) {
        if (pair < kFirstSplit) return word(low, high, pair % kWords) >> (pair < kWords ? 0 : 10) & 0x003f003fu;
        return ((low[pair - kFirstSplit] & 0x03c003c0u) | (lower_at_4(high, pair) & 0x00300030u)) >> 4;
    }
};

// Word `index` of the packed tile of type Q that the first k tile of `raw` becomes.
template <class Q>
HOST_DEVICE uint32_t packed_word(const RawRowTile& raw, int index) {
    const int offset = index * 4;
    const auto code = [&](int row, int k) -> uint32_t {
        const uint8_t* block = raw.block(row, k / Q::kBlockK);
        return block ? Q::raw_code(block, k % Q::kBlockK) : 0u;
    };
    if constexpr (Q::kFiveBits || Q::kSixBits) {
        using Bits = std::conditional_t<Q::kFiveBits, FiveBits, SixBits>;
        if (offset < Q::kHighOffset) {
            const auto at = Plane<4>::place(offset);
            return Bits::gather(at.sub, at.lane, at.word, code);
        }
        if (offset < Q::kScaleOffset) {
            const auto at = Plane<Q::kHighBits>::place(offset - Q::kHighOffset);
            return Bits::gather(at.sub, at.lane, 4 + at.word, code);
        }
    }
    if (offset < Q::kHighOffset) {
        constexpr uint32_t kMask = Q::kLowBits == 32 ? ~0u : (1u << (Q::kLowBits % 32)) - 1u;
        const auto low = [&](int row, int k) -> uint32_t { return code(row, k) & kMask; };
        return Q::arrange(Plane<Q::kLowBits>::gather(Plane<Q::kLowBits>::place(offset), low));
    }
    if constexpr (Q::kHighBits > 0) {
        if (offset < Q::kScaleOffset) {
            const auto high = [&](int row, int k) -> uint32_t { return code(row, k) >> Q::kLowBits; };
            return Plane<Q::kHighBits>::gather(Plane<Q::kHighBits>::place(offset - Q::kHighOffset), high);
        }
    }
    return Q::scale_word(raw, (offset - Q::kScaleOffset) / 4);
}

// Sizes of a packed tile, from what the format defines: base of every type.
template <int kTileK_, int kBlockK_, int kBlockBytes_, int kLowBits_, int kHighBits_>
struct PackedTile {
    static constexpr int kTileK = kTileK_;
    static constexpr int kSubs = kTileK / kSubK;
    static constexpr int kBlockK = kBlockK_;
    static constexpr int kBlockBytes = kBlockBytes_;
    static constexpr int kLowBits = kLowBits_;
    static constexpr int kHighBits = kHighBits_;
    static constexpr bool kFiveBits = kLowBits == 4 && kHighBits == 1;
    static constexpr bool kSixBits = kLowBits == 4 && kHighBits == 2;
    static constexpr int kHighOffset = kSubs * kLowBits * 128;
    static constexpr int kScaleOffset = kHighOffset + kSubs * kHighBits * 128;
    static constexpr int kPackedTileBytes = kTileRows * (kTileK / kBlockK) * kBlockBytes;
    static_assert(kPackedTileBytes % 32 == 0, "packed tiles must keep the alignment of memory sectors");

    // What a word of the low plane becomes.
    static HOST_DEVICE uint32_t arrange(uint32_t codes) { return codes; }
};

// A lane's codes of one sub-tile.
template <int kLowBits, int kHighBits>
struct Codes {
    uint32_t low[kLowBits];
    uint32_t high[kHighBits];
};
template <int kLowBits>
struct Codes<kLowBits, 0> {
    uint32_t low[kLowBits];
};

template <class Q>
HOST_DEVICE Codes<Q::kLowBits, Q::kHighBits> load_codes(const uint8_t* packed_tile, int sub, int lane) {
    Codes<Q::kLowBits, Q::kHighBits> q;
    Plane<Q::kLowBits>::load(q.low, packed_tile, sub, lane);
    if constexpr (Q::kHighBits > 0) Plane<Q::kHighBits>::load(q.high, packed_tile + Q::kHighOffset, sub, lane);
    return q;
}

// ---- numbers -----------------------------------------------------------------------------------------------------

HOST_DEVICE float bits_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(bits);
#else
    float f;
    memcpy(&f, &bits, 4);
    return f;
#endif
}

HOST_DEVICE float half_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
#else
    const uint16_t low = static_cast<uint16_t>(bits);
    _Float16 h;
    memcpy(&h, &low, 2);
    return static_cast<float>(h);
#endif
}

// Byte i of `word`, unsigned. A byte below the exponent of 2^23 needs no conversion instruction, which runs at a
// quarter of the rate.
HOST_DEVICE float byte_float(uint32_t word, int i) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440u | static_cast<uint32_t>(i))) - 8388608.0f;
#else
    return static_cast<float>((word >> (8 * i)) & 0xff);
#endif
}

HOST_DEVICE uint32_t load_u32(const uint8_t* p) { return *reinterpret_cast<const uint32_t*>(p); }

struct Words2 {
    uint32_t x, y;
};
struct Words4 {
    uint32_t x, y, z, w;
};
HOST_DEVICE Words2 load_words2(const uint8_t* p) {
#ifdef __CUDA_ARCH__
    const uint2 v = *reinterpret_cast<const uint2*>(p);
    return {v.x, v.y};
#else
    Words2 v;
    memcpy(&v, p, 8);
    return v;
#endif
}
HOST_DEVICE Words4 load_words4(const uint8_t* p) {
#ifdef __CUDA_ARCH__
    const uint4 v = *reinterpret_cast<const uint4*>(p);
    return {v.x, v.y, v.z, v.w};
#else
    Words4 v;
    memcpy(&v, p, 16);
    return v;
#endif
}
