// The elementwise and per-row operations between the products, and the exponential they share.
//
// A tail of fewer than 16 elements goes through a padded copy, so every element sees the same arithmetic wherever it
// stands. Included inside the namespace of an instruction set.
#pragma once

WO_INLINE int64_t round_up16(int64_t n) { return (n + 15) / 16 * 16; }

// n < 16 floats, the rest `fill`.
WO_INLINE F load_tail(const float* p, int64_t n, float fill) {
    float v[16];
    for (int i = 0; i < 16; ++i) v[i] = fill;
    for (int64_t i = 0; i < n; ++i) v[i] = p[i];
    return load(v);
}
WO_INLINE void store_tail(float* p, F a, int64_t n) {
    float v[16];
    store(v, a);
    for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}

// e^x by Cody-Waite reduction (x = n ln 2 + r, |r| <= ln 2 / 2) and a polynomial of degree 7 in r; below 2 ulp.
// 0 below -87.3, 2^127 * 1.7 from 88.3 up (never infinity); NaN stays NaN.
WO_INLINE F exp16(F x) {
    F c = max(set1(-87.3f), min(set1(88.3f), x));
    I n = round_to_int(mul(c, set1(1.44269504f)));
    F nf = to_float(n);
    F r = fma(nf, set1(-0.693145752f), c);
    r = fma(nf, set1(-1.42860677e-6f), r);
    F p = set1(1.98412698e-4f);
    p = fma(p, r, set1(1.38888889e-3f));
    p = fma(p, r, set1(8.33333333e-3f));
    p = fma(p, r, set1(4.16666667e-2f));
    p = fma(p, r, set1(1.66666667e-1f));
    p = fma(p, r, set1(0.5f));
    p = fma(mul(r, r), p, r);
    p = add(p, set1(1.0f));
    return zero_below(x, -87.3f, mul(p, as_float(shift_left(iadd(n, iset1(127)), 23))));
}
WO_INLINE float exp1(float x) {
    float v[16];
    store(v, exp16(set1(x)));
    return v[0];
}

static void exp_n(const float* x, float* out, int64_t n) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store(out + i, exp16(load(x + i)));
    if (i < n) store_tail(out + i, exp16(load_tail(x + i, n - i, 0)), n - i);
}

// x * sigmoid(b x)
WO_INLINE F swish(F x, F bx) { return div(x, add(set1(1.0f), exp16(sub(zero(), bx)))); }

// tanh-GELU: 0.5 x (1 + tanh u) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
WO_INLINE F gelu(F x) {
    F cube = mul(mul(x, x), x);
    F twice_u = mul(set1(1.59576912f), fma(set1(0.044715f), cube, x));
    return swish(x, twice_u);
}

WO_INLINE F glu1(Activation kind, F g, F u) {
    switch (kind) {
        case Activation::kSilu:
            return mul(swish(g, g), u);
        case Activation::kGeluTanh:
            return mul(gelu(g), u);
        case Activation::kSwigluOai:
            break;
    }
    g = min(set1(7.0f), g);
    u = max(set1(-7.0f), min(set1(7.0f), u));
    return mul(swish(g, mul(set1(1.702f), g)), add(u, set1(1.0f)));
}

static void glu(Activation kind, const float* gate, const float* up, float* out, int64_t n) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store(out + i, glu1(kind, load(gate + i), load(up + i)));
    if (i < n) store_tail(out + i, glu1(kind, load_tail(gate + i, n - i, 0), load_tail(up + i, n - i, 0)), n - i);
}

static void act(Activation, const float* x, float* out, int64_t n) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store(out + i, gelu(load(x + i)));
    if (i < n) store_tail(out + i, gelu(load_tail(x + i, n - i, 0)), n - i);
}

static void add_n(const float* x, float* out, int64_t n) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store(out + i, add(load(out + i), load(x + i)));
    for (; i < n; ++i) out[i] += x[i];
}

static void scale_n(float s, const float* x, float* out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = s * x[i];
}

static void axpy(float s, const float* x, float* out, int64_t n) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store(out + i, fma(set1(s), load(x + i), load(out + i)));
    if (i < n) store_tail(out + i, fma(set1(s), load_tail(x + i, n - i, 0), load_tail(out + i, n - i, 0)), n - i);
}

// Sum over lanes of (x - mean)^2; the tail is filled with the mean so that it adds nothing.
static float sum_squares(const float* x, float mean, int64_t n) {
    F acc = zero(), m = set1(mean);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        F d = sub(load(x + i), m);
        acc = fma(d, d, acc);
    }
    if (i < n) {
        F d = sub(load_tail(x + i, n - i, mean), m);
        acc = fma(d, d, acc);
    }
    return sum(acc);
}

static void norm(const float* x, const float* weight, const float* bias, float eps, bool layer, int64_t n, float* out) {
    float mean = 0;
    if (layer) {
        F acc = zero();
        int64_t i = 0;
        for (; i + 16 <= n; i += 16) acc = add(acc, load(x + i));
        if (i < n) acc = add(acc, load_tail(x + i, n - i, 0));
        mean = sum(acc) / (float)n;
    }
    F m = set1(mean), inv = set1(1.0f / __builtin_sqrtf(sum_squares(x, mean, n) / (float)n + eps));
    for (int64_t i = 0; i < n; i += 16) {
        int64_t left = n - i;
        bool whole = left >= 16;
        F v = whole ? load(x + i) : load_tail(x + i, left, 0);
        F w = whole ? load(weight + i) : load_tail(weight + i, left, 0);
        v = mul(mul(sub(v, m), inv), w);
        if (bias) v = add(v, whole ? load(bias + i) : load_tail(bias + i, left, 0));
        if (whole)
            store(out + i, v);
        else
            store_tail(out + i, v, left);
    }
}

static void rope(float* x, int n_head, int head_dim, int n_rot, bool interleaved, const float* cos, const float* sin) {
    const int half = n_rot / 2;
    for (int h = 0; h < n_head; ++h, x += head_dim) {
        if (interleaved) {
            for (int p = 0; p < half; ++p) {
                float a = x[2 * p], b = x[2 * p + 1];
                x[2 * p] = a * cos[p] - b * sin[p];
                x[2 * p + 1] = a * sin[p] + b * cos[p];
            }
        } else {
            for (int p = 0; p < half; ++p) {
                float a = x[p], b = x[p + half];
                x[p] = a * cos[p] - b * sin[p];
                x[p + half] = a * sin[p] + b * cos[p];
            }
        }
    }
}
