// Rows of activations as 16-bit codes, for the products of code_matmul_impl.h: a scale for every 32 columns.
//
// A row that this cannot say (not finite, too large or too small) is for the float products. Included inside the
// namespace of an instruction set.
#pragma once

// A tile of T encoded rows of n columns: row t of T in turns everywhere. A pair is two int16 codes of columns that
// stand two apart, in the order that the even and odd bytes of a block's 16 give.
template <class Byte>
struct EncodedTile {
    Byte *pairs, *scales, *scaled_sums, *sums;  // int16 [n/2][T][2], float [n/32][T], float [n/32][T], int32 [n/16][T]
    EncodedTile(Byte* base, int64_t n, int tokens)
        : pairs(base),
          scales(pairs + 2 * n * tokens),
          scaled_sums(scales + n / 8 * tokens),
          sums(scaled_sums + n / 8 * tokens) {}
};

// The largest magnitude of a block of 32 as the bits of a float, which order as integers do: NaN is the largest.
WO_INLINE int max_magnitude(F a, F b) {
    const I mask = iset1(0x7FFFFFFF);
    return max_int(imax(iand(bits_of(a), mask), iand(bits_of(b), mask)));
}

// Outside these bounds a product of scales could leave what float32 holds well.
static bool encodable(const float* x, int64_t n) {
    for (int64_t k = 0; k < n; k += 32) {
        const int m = max_magnitude(load(x + k), load(x + k + 16));
        if (m != 0 && (m < kLeastEncodable || m > kMostEncodable)) return false;
    }
    return true;
}

static void encode(const float* const* x, int tokens, int64_t n, uint8_t* out) {
    const EncodedTile<uint8_t> tile(out, n, tokens);
    for (int t = 0; t < tokens; ++t) {
        for (int64_t k = 0; k < n; k += 32) {
            const F a = load(x[t] + k), b = load(x[t] + k + 16);
            const int bits = max_magnitude(a, b);
            float most;
            __builtin_memcpy(&most, &bits, 4);
            const F inverse = set1(bits == 0 ? 0.0f : 32767.0f / most);
            const I low = round_to_int(mul(a, inverse)), high = round_to_int(mul(b, inverse));
            int16_t codes[32];
            store_even_odd(codes, low);
            store_even_odd(codes + 16, high);
            for (int i = 0; i < 16; ++i)
                __builtin_memcpy(tile.pairs + 4 * ((k / 2 + i) * tokens + t), codes + 2 * i, 4);
            const int32_t sums[2] = {sum_ints(low), sum_ints(high)};
            for (int i = 0; i < 2; ++i) __builtin_memcpy(tile.sums + 4 * ((k / 16 + i) * tokens + t), &sums[i], 4);
            const float scale = most / 32767.0f, scaled_sum = scale * (float)(sums[0] + sums[1]);
            __builtin_memcpy(tile.scales + 4 * (k / 32 * tokens + t), &scale, 4);
            __builtin_memcpy(tile.scaled_sums + 4 * (k / 32 * tokens + t), &scaled_sum, 4);
        }
    }
}

template <class T>
WO_INLINE T value_at(const uint8_t* p, int64_t i) {
    T v;
    __builtin_memcpy(&v, p + i * (int64_t)sizeof(T), sizeof(T));
    return v;
}
