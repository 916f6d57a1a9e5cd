// The kernels of one instruction set, as a table of functions: what the engine sees of csrc/cpu/*_avx512.cpp and its
// siblings.
//
// Every kernel computes a row (or a part of one) with the same formula whatever else is computed beside it: sums over k
// run in 16 lanes (element k in lane k mod 16, one fused multiply-add per element in ascending order), then one fixed
// tree over the lanes; or, for the quantized types of codes.h, over exact integer sums of 32 columns. AVX-512 (with
// VNNI or not) and AVX2 give the same bits; the baseline multiplies everything as floats and rounds products.
#pragma once

#include <cstddef>
#include <cstdint>

namespace worker_orcd {

// A weight matrix in its file's blocks: row o holds the n_in weights of output o.
struct Matrix {
    const uint8_t* data = nullptr;  // [n_out][row_bytes], of no particular alignment
    int type = 0;                   // ggml type id
    int64_t n_in = 0, n_out = 0, row_bytes = 0;
    bool codes = false;  // whether the products of codes can be had of it
};

// y[t][o] = sum_i x[t][i] * W[o][i] + bias[o] for the tokens of a step.
struct MatmulTask {
    Matrix w;
    const float* bias = nullptr;  // [n_out] or null
    const float* const* x =
        nullptr;                // [n_tokens] pointers to [n_in] floats; n_in a multiple of 16 or zero-padded to it
    float* const* y = nullptr;  // [n_tokens] pointers to [n_out] floats
    int n_tokens = 0;
    const uint8_t* encoded = nullptr;  // for the products of codes: `encode`'s tiles of the tokens, in order; null else
};

// Magnitudes of which a block of 32 activations (or else zeros) can be encoded, as the bits of a float: 2^-100, 2^110.
constexpr int kLeastEncodable = 27 << 23, kMostEncodable = 237 << 23;
// Bytes of one encoded row of n columns: int16 codes, two floats for 32 columns, an int32 for 16.
static inline int64_t encoded_row_bytes(int64_t n) { return n * 5 / 2; }
// Tokens of the next tile of `left` more, where a tile holds at most `most`.
static inline int encoded_tile(int left, int most) {
    const int n = left < most ? left : most;
    return n >= 12 ? 12 : n >= 6 ? 6 : n >= 4 ? 4 : n >= 2 ? 2 : 1;
}
// Bytes of the panel of 16 decoded rows, as float32s.
static inline int64_t code_panel_floats(int64_t n_in) { return 9 * n_in; }

// Shape and place of one layer's attention in a step. A block of the layer's cache holds K as [n_head_kv][head_dim][64]
// and V as [n_head_kv][64][v_stride] float16 (v_stride: head_dim rounded up to 16, the rest zero).
struct AttentionTask {
    const float* q = nullptr;  // row r at q + r * q_stride, [n_head][head_dim]
    float* out = nullptr;      // row r at out + r * out_stride, [n_head][head_dim]
    ptrdiff_t q_stride = 0, out_stride = 0;
    const uint16_t* cache = nullptr;     // [n_blocks][block_size()] of the layer
    const int32_t* blocks = nullptr;     // block table of the rows' sequence
    const int32_t* positions = nullptr;  // [tokens of the step]
    const float* sinks = nullptr;        // [n_head] or null
    int n_head = 0, n_head_kv = 0, head_dim = 0, v_stride = 0, window = 0;
    float scale = 1;
};

constexpr int kBlockPositions = 64;

static inline int64_t kv_k_elements(int n_head_kv, int head_dim) {
    return (int64_t)n_head_kv * head_dim * kBlockPositions;
}
static inline int64_t kv_block_elements(int n_head_kv, int head_dim, int v_stride) {
    return kv_k_elements(n_head_kv, head_dim) + (int64_t)n_head_kv * v_stride * kBlockPositions;
}

// Rows of one attention call that share the conversion of a key block.
constexpr int kAttentionRows = 8;

enum class Activation { kSilu, kGeluTanh, kSwigluOai };

struct Kernels {
    const char* name;

    // n values (a multiple of the type's block; of 1 for F32, F16, BF16). False: no such type.
    bool (*dequantize)(int type, const uint8_t* src, float* dst, int64_t n);

    // Outputs [o0, o1) of a task with one token.
    void (*matvec)(const MatmulTask& task, int64_t o0, int64_t o1);
    // Outputs [o0, o1) for all tokens; `panel` holds panel_floats(o1 - o0, n_in).
    void (*matmul_panel)(const MatmulTask& task, int64_t o0, int64_t o1, float* panel);

    // Products of integer codes (code_matmul_impl.h): all null where the instruction set has none.
    // Whether there are codes for a tensor type; its matrices need 16 rows at least.
    bool (*has_codes)(int type);
    // Whether a row of n activations (a multiple of 32) can be encoded.
    bool (*encodable)(const float* x, int64_t n);
    // One tile of rows into encoded_row_bytes(n) bytes each.
    void (*encode)(const float* const* x, int tokens, int64_t n, uint8_t* out);
    // As matvec and matmul_panel, from task.encoded; o0 a multiple of 16. `panel` holds code_panel_floats(n_in).
    void (*code_matvec)(const MatmulTask& task, int64_t o0, int64_t o1);
    void (*code_panel)(const MatmulTask& task, int64_t o0, int64_t o1, uint8_t* panel);
    int encoded_tokens;  // of a tile, at most

    // One row of n; x and out may be the same. rms: bias null and layer false.
    void (*norm)(const float* x, const float* weight, const float* bias, float eps, bool layer, int64_t n, float* out);
    // n_head heads of x in place; cos and sin [n_rot / 2].
    void (*rope)(float* x, int n_head, int head_dim, int n_rot, bool interleaved, const float* cos, const float* sin);
    // k, v [n_head_kv][head_dim] of one position into a block.
    void (*kv_write)(const float* k, const float* v, int n_head_kv, int head_dim, int v_stride, uint16_t* block,
                     int position_in_block);
    // Rows [r0, r1) (same sequence, ascending positions, at most kAttentionRows) and query heads [h0, h1) of one KV
    // head.
    void (*attention)(const AttentionTask& task, int r0, int r1, int h0, int h1, float* scratch);
    void (*glu)(Activation kind, const float* gate, const float* up, float* out, int64_t n);
    void (*act)(Activation kind, const float* x, float* out, int64_t n);
    void (*add)(const float* x, float* out, int64_t n);
    // out = scale * x, and out += scale * x
    void (*scale)(float scale, const float* x, float* out, int64_t n);
    void (*axpy)(float scale, const float* x, float* out, int64_t n);
    // exp of n values, as the softmax of attention computes it
    void (*exp)(const float* x, float* out, int64_t n);
};

static inline int64_t round_up_16(int64_t n) { return (n + 15) / 16 * 16; }
// Floats of the dequantized panel of `rows` rows.
static inline int64_t panel_floats(int64_t rows, int64_t n_in) { return rows * round_up_16(n_in); }
// Rows of a panel: as many as leave half of a 1 MiB L2 cache to the tokens.
static inline int64_t panel_rows(int64_t n_in) {
    int64_t rows = 384 * 1024 / 4 / round_up_16(n_in) / 4 * 4;
    return rows < 4 ? 4 : rows > 16 ? 16 : rows;
}
// Floats of the scratch of one attention call.
static inline int64_t attention_scratch_floats(int n_head, int n_head_kv, int head_dim) {
    int64_t v_stride = round_up_16(head_dim), queries = (int64_t)kAttentionRows * (n_head / n_head_kv);
    return kBlockPositions * (head_dim + v_stride) + queries * (v_stride + 2) + kBlockPositions + 16;
}

const Kernels* kernels_avx512vnni();
const Kernels* kernels_avx512();
const Kernels* kernels_avx2();
const Kernels* kernels_baseline();

// The best table this processor runs, or the one that WORKER_ORCD_CPU_ISA names ("avx512vnni", "avx512", "avx2",
// "baseline").
// Null where the processor lacks what is named or the name is unknown.
const Kernels* choose_kernels();
// A table by name, null as above.
const Kernels* kernels_by_name(const char* name);

}  // namespace worker_orcd
