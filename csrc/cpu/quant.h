// One block decoder per ggml tensor type: exact float32 values of `gguf.quants.dequantize`, to the bit.
//
// A decoder is a struct with
//   kType      the ggml type id          kBytes  bytes of a block
//   kVectors   vectors of 16 values that one `decode` gives (1 or 2)
//   kParts     how often `decode` is called per block (a block holds kParts * kVectors * 16 values, in order)
//   decode<P>(block, w)  writes part P to w[0 .. kVectors).
// The order of operations is the reference's: scale products and the subtraction of the minimum each round once to
// float32 (never fused), so a value is the same in the matrix-vector kernel, the panel kernel and `dequantize`.
// A NaN scale gives NaN values (their payload is not defined); E8M0 255 is NaN.
//
// Included inside the namespace of an instruction set, after its simd header.
#pragma once

WO_INLINE uint16_t u16_at(const uint8_t* p) {
    uint16_t v;
    __builtin_memcpy(&v, p, 2);
    return v;
}
WO_INLINE uint32_t u32_at(const uint8_t* p) {
    uint32_t v;
    __builtin_memcpy(&v, p, 4);
    return v;
}
WO_INLINE float f16_at(const uint8_t* p) { return f16_to_float(u16_at(p)); }

struct QuantF32 {
    static constexpr int kType = 0, kBytes = 64, kVectors = 1, kParts = 1;
    template <int P>
    static WO_DECODE void decode(const uint8_t* b, F* w) {
        w[0] = load((const float*)b);
    }
};

struct QuantF16 {
    static constexpr int kType = 1, kBytes = 32, kVectors = 1, kParts = 1;
    template <int P>
    static WO_DECODE void decode(const uint8_t* b, F* w) {
        w[0] = load_f16((const uint16_t*)b);
    }
};

struct QuantBF16 {
    static constexpr int kType = 30, kBytes = 32, kVectors = 1, kParts = 1;
    template <int P>
    static WO_DECODE void decode(const uint8_t* b, F* w) {
        w[0] = load_bf16((const uint16_t*)b);
    }
};

// d f16 | 16 bytes: low nibbles are elements 0-15, high nibbles 16-31; value d * (q - 8)
struct QuantQ4_0 {
    static constexpr int kType = 2, kBytes = 18, kVectors = 2, kParts = 1;
    template <int P>
    static WO_DECODE void decode(const uint8_t* b, F* w) {
        auto c = codebook4(f16_at(b), 8);
        I q = load_u8(b + 2);
        w[0] = pick(c, q);
        w[1] = pick(c, shift_right(q, 4));
    }
};

// d f16 | m f16 | 16 bytes of nibbles; value d * q + m
struct QuantQ4_1 {
    static constexpr int kType = 3, kBytes = 20, kVectors = 2, kParts = 1;
    template <int P>
    static WO_DECODE void decode(const uint8_t* b, F* w) {
        auto c = codebook4(f16_at(b), -f16_at(b + 2));
        I q = load_u8(b + 4);
        w[0] = pick(c, q);
        w[1] = pick(c, shift_right(q, 4));
    }
};

// d f16 | 32 fifth bits | 16 bytes of nibbles; value d * (q - 16)
struct QuantQ5_0 {
    static constexpr int kType = 6, kBytes = 22, kVectors = 2, kParts = 1;
    template <int P>
    static WO_DECODE void decode(const uint8_t* b, F* w) {
        auto c = codebook5(f16_at(b), 16);
        uint32_t high = u32_at(b + 2);
        I q = load_u8(b + 6);
        w[0] = pick(c, q, high & 0xFFFF);
        w[1] = pick(c, shift_right(q, 4), high >> 16);
    }
};

// d f16 | m f16 | 32 fifth bits | 16 bytes of nibbles; value d * q + m
struct QuantQ5_1 {
    static constexpr int kType = 7, kBytes = 24, kVectors = 2, kParts = 1;
    template <int P>
    static WO_DECODE void decode(const uint8_t* b, F* w) {
        auto c = codebook5(f16_at(b), -f16_at(b + 2));
        uint32_t high = u32_at(b + 4);
        I q = load_u8(b + 8);
        w[0] = pick(c, q, high & 0xFFFF);
        w[1] = pick(c, shift_right(q, 4), high >> 16);
    }
};

// d f16 | 32 int8
struct QuantQ8_0 {
    static constexpr int kType = 8, kBytes = 34, kVectors = 2, kParts = 1;
    template <int P>
    static WO_DECODE void decode(const uint8_t* b, F* w) {
        F d = set1(f16_at(b));
        w[0] = mul(d, to_float(load_i8(b + 2)));
        w[1] = mul(d, to_float(load_i8(b + 18)));
    }
};

// 16 bytes (scale | min << 4) of 16 values each | 64 bytes of 2-bit codes | d f16 | dmin f16; (d * sc) * q - (dmin *
// m). Part P: half P/4 of the block, bits 2 (P%4) of its 32 bytes.
struct QuantQ2_K {
    static constexpr int kType = 10, kBytes = 84, kVectors = 2, kParts = 8;
    template <int P>
    static WO_DECODE void decode(const uint8_t* b, F* w) {
        float d = f16_at(b + 80), dmin = f16_at(b + 82);
        const uint8_t* qs = b + 16 + (P / 4) * 32;
        for (int v = 0; v < 2; ++v) {
            uint8_t sc = b[2 * P + v];
            auto c = codebook2(d * (float)(sc & 15), dmin * (float)(sc >> 4));
            w[v] = pick(c, shift_right(load_u8(qs + 16 * v), 2 * (P % 4)));
        }
    }
};

// 32 bytes of third bits | 64 bytes of low two bits | 12 bytes of 6-bit scales | d f16; (d * (sc - 32)) * (q - 4)
struct QuantQ3_K {
    static constexpr int kType = 11, kBytes = 110, kVectors = 2, kParts = 8;
    template <int P>
    static WO_DECODE void decode(const uint8_t* b, F* w) {
        float d = f16_at(b + 108);
        const uint8_t *qs = b + 32 + (P / 4) * 32, *packed = b + 96;
        for (int v = 0; v < 2; ++v) {
            int i = 2 * P + v;
            int low = i < 8 ? packed[i] & 15 : packed[i - 8] >> 4;
            int high = (packed[8 + i % 4] >> (2 * (i / 4))) & 3;
            float scale = d * (float)((low | (high << 4)) - 32);
            I q = iand(shift_right(load_u8(qs + 16 * v), 2 * (P % 4)), iset1(3));
            I third = iand(shift_right(load_u8(b + 16 * v), P), iset1(1));
            w[v] = mul(set1(scale), to_float(iadd(ior(q, shift_left(third, 2)), iset1(-4))));
        }
    }
};

// The 6-bit scale and minimum of part j (0-7) in 12 bytes.
WO_INLINE void scale_min(const uint8_t* s, int j, float* scale, float* minimum) {
    if (j < 4) {
        *scale = (float)(s[j] & 63);
        *minimum = (float)(s[j + 4] & 63);
    } else {
        *scale = (float)((s[j + 4] & 15) | ((s[j - 4] >> 6) << 4));
        *minimum = (float)((s[j + 4] >> 4) | ((s[j] >> 6) << 4));
    }
}

// d f16 | dmin f16 | 12 bytes of scales and minima | 128 bytes of nibbles; (d * sc) * q - (dmin * m)
struct QuantQ4_K {
    static constexpr int kType = 12, kBytes = 144, kVectors = 2, kParts = 8;
    template <int P>
    static WO_DECODE void decode(const uint8_t* b, F* w) {
        float scale, minimum;
        scale_min(b + 4, P, &scale, &minimum);
        auto c = codebook4(f16_at(b) * scale, f16_at(b + 2) * minimum);
        const uint8_t* qs = b + 16 + (P / 2) * 32;
        w[0] = pick(c, shift_right(load_u8(qs), 4 * (P % 2)));
        w[1] = pick(c, shift_right(load_u8(qs + 16), 4 * (P % 2)));
    }
};

// d f16 | dmin f16 | 12 bytes of scales and minima | 32 bytes of fifth bits | 128 bytes of nibbles
struct QuantQ5_K {
    static constexpr int kType = 13, kBytes = 176, kVectors = 2, kParts = 8;
    template <int P>
    static WO_DECODE void decode(const uint8_t* b, F* w) {
        float scale, minimum;
        scale_min(b + 4, P, &scale, &minimum);
        auto c = codebook5(f16_at(b) * scale, f16_at(b + 2) * minimum);
        const uint8_t* qs = b + 48 + (P / 2) * 32;
        w[0] = pick(c, shift_right(load_u8(qs), 4 * (P % 2)), load_u8(b + 16), P);
        w[1] = pick(c, shift_right(load_u8(qs + 16), 4 * (P % 2)), load_u8(b + 32), P);
    }
};

// 128 bytes of low nibbles | 64 bytes of high two bits | 16 int8 scales | d f16; (d * sc) * (q - 32)
struct QuantQ6_K {
    static constexpr int kType = 14, kBytes = 210, kVectors = 2, kParts = 8;
    template <int P>
    static WO_DECODE void decode(const uint8_t* b, F* w) {
        constexpr int half = P / 4, j = P % 4;
        float d = f16_at(b + 208);
        const uint8_t *low = b + half * 64 + (j % 2) * 32, *high = b + 128 + half * 32;
        for (int v = 0; v < 2; ++v) {
            float scale = d * (float)(int8_t)b[192 + 2 * P + v];
            I l = iand(shift_right(load_u8(low + 16 * v), 4 * (j / 2)), iset1(15));
            I h = iand(shift_right(load_u8(high + 16 * v), 2 * j), iset1(3));
            w[v] = mul(set1(scale), to_float(iadd(ior(l, shift_left(h, 4)), iset1(-32))));
        }
    }
};

// scale byte e (2^(e-127)) | 16 bytes of E2M1 nibbles. The table holds twice the code's value, so the scale is halved:
// 2^(e-128), a denormal for e < 2.
struct QuantMXFP4 {
    static constexpr int kType = 39, kBytes = 17, kVectors = 2, kParts = 1;
    template <int P>
    static WO_DECODE void decode(const uint8_t* b, F* w) {
        static const float kTwice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
        uint32_t e = b[0], bits = e < 2 ? 0x00200000u << e : e == 255 ? 0x7FC00000u : (e - 1) << 23;
        float half_scale;
        __builtin_memcpy(&half_scale, &bits, 4);
        auto c = codebook_table(half_scale, kTwice);
        I q = load_u8(b + 1);
        w[0] = pick(c, q);
        w[1] = pick(c, shift_right(q, 4));
    }
};

// Every decoder, by its name without Quant.
#define FOR_EACH_DECODER(X) \
    X(F32)                  \
    X(F16)                  \
    X(BF16)                 \
    X(Q4_0)                 \
    X(Q4_1)                 \
    X(Q5_0)                 \
    X(Q5_1)                 \
    X(Q8_0)                 \
    X(Q2_K)                 \
    X(Q3_K)                 \
    X(Q4_K)                 \
    X(Q5_K)                 \
    X(Q6_K)                 \
    X(MXFP4)

// Calls action.run<Decoder>() for a type id; false where there is none.
template <class Action>
WO_INLINE bool with_decoder(int type, Action& action) {
    switch (type) {
#define CASE(Name)                          \
    case Quant##Name::kType:                \
        action.template run<Quant##Name>(); \
        return true;
        FOR_EACH_DECODER(CASE)
#undef CASE
    }
    return false;
}
