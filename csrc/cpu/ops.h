// The plan as flat structs: what the ops of worker_orcd/models/ops.py become when an engine is made.
//
// Field meanings are those of the ops of the same name there. Buffers, matrices, vectors and rotation tables are
// indices into the engine's lists; -1 is none.
#pragma once

#include <cstdint>

namespace worker_orcd {

enum class OpKind : int32_t {
    kEmbed,
    kNorm,
    kMatMul,
    kRope,
    kKvWrite,
    kAttention,
    kGlu,
    kAct,
    kAdd,
    kRoute,
    kExpertMatMul,
    kExpertSum,
    kGather,
};

// Columns [offset, offset + width) of a buffer.
struct View {
    int32_t buffer = -1;
    int64_t offset = 0, width = 0;
};

struct Op {
    OpKind kind = OpKind::kEmbed;
    View inp;                // rope: x (in place), kv_write: k, attention: q, glu: gate
    View inp2;               // kv_write: v, glu: up, expert_matmul: ids, expert_sum: gates
    View out;                // route: ids
    View out2;               // route: gates
    int32_t weight = -1;     // matrix; expert_matmul: the first expert's, the others follow
    int32_t positions = -1;  // embed: matrix of learned positions
    int32_t vector = -1;     // norm: weight, attention: sinks
    int32_t bias = -1;       // vector; expert_matmul: [n_expert][n_out]
    int32_t rope_table = -1;
    int32_t layer = 0;
    int32_t n_head = 0, n_head_kv = 0, head_dim = 0, n_rot = 0, window = 0;
    int32_t n_expert = 0, n_used = 0;
    int32_t activation = 0;  // of kernels.h
    int64_t group = 0;       // norm
    float scale = 1, eps = 0;
    bool interleaved = false, layer_norm = false, per_slot = false;
};

}  // namespace worker_orcd
