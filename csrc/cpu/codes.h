// One decoder per tensor type to integer codes: what the products with integer dot products read of a block.
//
// A weight is scale * (code - kOffset) + shift with small integer codes and one scale (and shift) for each kGroup
// columns. Everything is for 16 rows at once, whose blocks begin at b, b + s, ... b + 15 s. A decoder is a struct with
//   kType, kBytes    the ggml type id, and bytes of a block
//   kParts           parts of 32 columns in a block
//   kGroup           columns of one scale: 32, or 16 (then the two halves of a part have a scale each)
//   kOffset          what is to be subtracted from a code
//   kSigned          codes are int8, else uint8
//   kShift           whether there is a shift
//   open(b, s)                     what the parts share
//   codes<P>(h, b, s, i, low, high)  bytes of rows i, i + 4, i + 8, i + 12: columns 0-15 and 16-31 of part P
//   scale<P, half>(h), shift<P>(h)   one float per row
// Included inside the namespace of an instruction set, after its simd_codes header.
#pragma once

// Rows i, i + 4, i + 8, i + 12: 16 bytes from `b` of row 0.
WO_INLINE I groups_at(const uint8_t* b, int64_t s, int i) { return load_groups(b + i * s, 4 * s); }

// The k-th int32 of each of the 16 rows, from their 16 bytes in four registers.
template <int K>
WO_INLINE I column(const I* rows) {
    if constexpr (K < 2) {
        I a = interleave_low(rows[0], rows[1]), b = interleave_low(rows[2], rows[3]);
        return K == 0 ? join_low(a, b) : join_high(a, b);
    }
    I a = interleave_high(rows[0], rows[1]), b = interleave_high(rows[2], rows[3]);
    return K == 2 ? join_low(a, b) : join_high(a, b);
}
WO_INLINE F high_f16(I a) { return low_f16(shift_right(a, 16)); }

WO_INLINE I nibbles(I a) { return iand(a, iset1(0x0F0F0F0F)); }
WO_INLINE I high_nibbles(I a) { return nibbles(words_right(a, 4)); }

// Adds the fifth bits of columns 16 H .. 16 H + 15, which are the bits of bytes AT + 2 H and AT + 2 H + 1 of a row.
template <int AT, int H>
WO_INLINE I with_fifth_bits(I q, I rows) {
    alignas(16) static const uint8_t order[16] = {AT + 2 * H,     AT + 2 * H,     AT + 2 * H,     AT + 2 * H,
                                                  AT + 2 * H,     AT + 2 * H,     AT + 2 * H,     AT + 2 * H,
                                                  AT + 2 * H + 1, AT + 2 * H + 1, AT + 2 * H + 1, AT + 2 * H + 1,
                                                  AT + 2 * H + 1, AT + 2 * H + 1, AT + 2 * H + 1, AT + 2 * H + 1};
    alignas(16) static const uint8_t bit[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    return add_fifth_bit(q, shuffle_bytes(rows, load_everywhere(order)), load_everywhere(bit));
}

// The types of 32 columns that begin with a float16 scale, and a float16 shift where WITH_SHIFT.
template <bool WITH_SHIFT>
struct CodesSimple {
    static constexpr int kParts = 1, kGroup = 32;
    static constexpr bool kShift = WITH_SHIFT;
    struct Header {
        I rows[4];  // the first 16 bytes of each row
        I first;    // the first int32 of each row
    };
    static WO_INLINE Header open(const uint8_t* b, int64_t s) {
        Header h;
        for (int i = 0; i < 4; ++i) h.rows[i] = groups_at(b, s, i);
        h.first = column<0>(h.rows);
        return h;
    }
    template <int, int>
    static WO_INLINE F scale(const Header& h) {
        return low_f16(h.first);
    }
    template <int>
    static WO_INLINE F shift(const Header& h) {
        return high_f16(h.first);
    }
};

template <int TYPE, int BYTES, bool WITH_SHIFT>
struct CodesNibbles : CodesSimple<WITH_SHIFT> {
    static constexpr int kType = TYPE, kBytes = BYTES, kOffset = WITH_SHIFT ? 0 : 8;
    static constexpr bool kSigned = false;
    template <int>
    static WO_INLINE void codes(const typename CodesSimple<WITH_SHIFT>::Header&, const uint8_t* b, int64_t s, int i,
                                I* low, I* high) {
        I q = groups_at(b + (WITH_SHIFT ? 4 : 2), s, i);
        *low = nibbles(q);
        *high = high_nibbles(q);
    }
};
using CodesQ4_0 = CodesNibbles<2, 18, false>;
using CodesQ4_1 = CodesNibbles<3, 20, true>;

template <int TYPE, int BYTES, bool WITH_SHIFT>
struct CodesFiveBits : CodesSimple<WITH_SHIFT> {
    static constexpr int kType = TYPE, kBytes = BYTES, kOffset = WITH_SHIFT ? 0 : 16;
    static constexpr bool kSigned = false;
    template <int>
    static WO_INLINE void codes(const typename CodesSimple<WITH_SHIFT>::Header& h, const uint8_t* b, int64_t s, int i,
                                I* low, I* high) {
        constexpr int at = WITH_SHIFT ? 4 : 2;
        I q = groups_at(b + at + 4, s, i);
        *low = with_fifth_bits<at, 0>(nibbles(q), h.rows[i]);
        *high = with_fifth_bits<at, 1>(high_nibbles(q), h.rows[i]);
    }
};
using CodesQ5_0 = CodesFiveBits<6, 22, false>;
using CodesQ5_1 = CodesFiveBits<7, 24, true>;

struct CodesQ8_0 : CodesSimple<false> {
    static constexpr int kType = 8, kBytes = 34, kOffset = 0;
    static constexpr bool kSigned = true;
    template <int>
    static WO_INLINE void codes(const Header&, const uint8_t* b, int64_t s, int i, I* low, I* high) {
        *low = groups_at(b + 2, s, i);
        *high = groups_at(b + 18, s, i);
    }
};

// Scale byte e: 2^(e-128) times a code that is twice the value; 255 is NaN.
struct CodesMXFP4 : CodesSimple<false> {
    static constexpr int kType = 39, kBytes = 17, kOffset = 0;
    static constexpr bool kSigned = true;
    template <int, int>
    static WO_INLINE F scale(const Header& h) {
        I e = shift_left(iand(h.first, iset1(255)), 23);
        F half = mul(as_float(imax(e, iset1(0x00400000))), set1(0.5f));  // 2^-127, a denormal, where e is 0
        return add(half, sub(half, half));                               // infinity becomes NaN
    }
    template <int>
    static WO_INLINE void codes(const Header&, const uint8_t* b, int64_t s, int i, I* low, I* high) {
        alignas(16) static const int8_t twice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
        I q = groups_at(b + 1, s, i), values = load_everywhere(twice);
        *low = shuffle_bytes(values, nibbles(q));
        *high = shuffle_bytes(values, high_nibbles(q));
    }
};

// Q4_K and Q5_K: d, dmin, then 12 bytes that hold a scale and a minimum of 6 bits for each part.
struct CodesScaleMin {
    static constexpr int kParts = 8, kGroup = 32, kOffset = 0;
    static constexpr bool kShift = true, kSigned = false;
    struct Header {
        F d, minus_dmin;
        I packed[3];
    };
    static WO_INLINE Header open(const uint8_t* b, int64_t s) {
        I rows[4];
        for (int i = 0; i < 4; ++i) rows[i] = groups_at(b, s, i);
        I first = column<0>(rows);
        return {low_f16(first), sub(zero(), high_f16(first)), {column<1>(rows), column<2>(rows), column<3>(rows)}};
    }
    // Six bits: all of byte P of `whole`, or (P >= 4) a nibble of `low` and the top two bits of `whole`.
    template <int P>
    static WO_INLINE F six_bits(I whole, I low, int nibble) {
        constexpr int at = 8 * (P % 4);
        if constexpr (P < 4) return to_float(iand(shift_right(whole, at), iset1(63)));
        I high = shift_left(iand(shift_right(whole, at + 6), iset1(3)), 4);
        return to_float(ior(iand(shift_right(low, at + 4 * nibble), iset1(15)), high));
    }
    template <int P, int>
    static WO_INLINE F scale(const Header& h) {
        return mul(h.d, six_bits<P>(h.packed[0], h.packed[2], 0));
    }
    template <int P>
    static WO_INLINE F shift(const Header& h) {
        return mul(h.minus_dmin, six_bits<P>(h.packed[1], h.packed[2], 1));
    }
};

struct CodesQ4_K : CodesScaleMin {
    static constexpr int kType = 12, kBytes = 144;
    template <int P>
    static WO_INLINE void codes(const Header&, const uint8_t* b, int64_t s, int i, I* low, I* high) {
        const uint8_t* qs = b + 16 + (P / 2) * 32;
        *low = nibbles(words_right(groups_at(qs, s, i), 4 * (P % 2)));
        *high = nibbles(words_right(groups_at(qs + 16, s, i), 4 * (P % 2)));
    }
};

struct CodesQ5_K : CodesScaleMin {
    static constexpr int kType = 13, kBytes = 176;
    template <int P>
    static WO_INLINE I five(const uint8_t* qs, const uint8_t* fifth, int64_t s, int i) {
        I q = nibbles(words_right(groups_at(qs, s, i), 4 * (P % 2)));
        return add_fifth_bit(q, groups_at(fifth, s, i), iset1((int)(0x01010101u << P)));
    }
    template <int P>
    static WO_INLINE void codes(const Header&, const uint8_t* b, int64_t s, int i, I* low, I* high) {
        const uint8_t* qs = b + 48 + (P / 2) * 32;
        *low = five<P>(qs, b + 16, s, i);
        *high = five<P>(qs + 16, b + 32, s, i);
    }
};

struct CodesQ6_K {
    static constexpr int kType = 14, kBytes = 210, kParts = 8, kGroup = 16, kOffset = 32;
    static constexpr bool kShift = false, kSigned = false;
    struct Header {
        F d;
        I scales[4];  // int8 scales of halves 4 k .. 4 k + 3
    };
    static WO_INLINE Header open(const uint8_t* b, int64_t s) {
        I rows[4], end[4];
        for (int i = 0; i < 4; ++i) {
            rows[i] = groups_at(b + 192, s, i);
            end[i] = groups_at(b + 194, s, i);
        }
        return {high_f16(column<3>(end)), {column<0>(rows), column<1>(rows), column<2>(rows), column<3>(rows)}};
    }
    template <int P>
    static WO_INLINE I six(const uint8_t* low, const uint8_t* high, int64_t s, int i) {
        constexpr int j = P % 4;
        I h = groups_at(high, s, i);
        h = j < 2 ? words_left(h, 4 - 2 * j) : words_right(h, 2 * j - 4);
        return ior(nibbles(words_right(groups_at(low, s, i), 4 * (j / 2))), iand(h, iset1(0x30303030)));
    }
    template <int P>
    static WO_INLINE void codes(const Header&, const uint8_t* b, int64_t s, int i, I* first, I* second) {
        const uint8_t *low = b + P / 4 * 64 + (P % 2) * 32, *high = b + 128 + P / 4 * 32;
        *first = six<P>(low, high, s, i);
        *second = six<P>(low + 16, high + 16, s, i);
    }
    template <int P, int HALF>
    static WO_INLINE F scale(const Header& h) {
        constexpr int k = 2 * P + HALF;
        return mul(h.d, to_float(shift_right_signed(shift_left(h.scales[k / 4], 24 - 8 * (k % 4)), 24)));
    }
    template <int>
    static WO_INLINE F shift(const Header& h) {
        return h.d;  // kShift is false
    }
};

// Every type with codes; the others are multiplied as floats.
#define FOR_EACH_CODES(X) \
    X(Q4_0)               \
    X(Q4_1)               \
    X(Q5_0)               \
    X(Q5_1)               \
    X(Q8_0)               \
    X(Q4_K)               \
    X(Q5_K)               \
    X(Q6_K)               \
    X(MXFP4)

// Calls action.run<Decoder>() for a type id; false where the type has no codes.
template <class Action>
WO_INLINE bool with_codes(int type, Action& action) {
    switch (type) {
#define CASE(Name)                          \
    case Codes##Name::kType:                \
        action.template run<Codes##Name>(); \
        return true;
        FOR_EACH_CODES(CASE)
#undef CASE
    }
    return false;
}
