// Running the ops of the plan: which rows and columns each reads, and how its work is cut into chunks for threads.
//
// A chunk boundary never changes a result: everything is cut by rows or heads (the products of products.cpp by
// outputs), and each kernel computes each of those by a formula in which the others do not occur.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine.h"

namespace worker_orcd {

bool Engine::run(int32_t n_ops, float* logits, const ControlFlag* control) noexcept {
    Buffer& last = buffers_[(size_t)logits_buffer_];
    last.data = logits ? logits : (float*)last.pages.data();
    pool_.heed(control);
    fill_rope_tables();
    for (int32_t i = 0; i < n_ops && !pool_.aborted();) {
        const int32_t together = i + ops_together_[(size_t)i] <= n_ops ? ops_together_[(size_t)i] : 1;
        if (together > 1)
            products(i, together);
        else
            run_op(i);
        i += together;
    }
    const bool done = !pool_.aborted();
    pool_.heed(nullptr);  // sampling is short, and must not end half-way: it changes what the slots remember
    return done;
}

void Engine::run_op(int32_t index) noexcept {
    const Op& op = ops_[(size_t)index];
    switch (op.kind) {
        case OpKind::kEmbed:
            embed(op);
            break;
        case OpKind::kNorm:
            norm(op);
            break;
        case OpKind::kMatMul:
            products(index, 1);
            break;
        case OpKind::kRope:
            rope(op);
            break;
        case OpKind::kKvWrite:
            kv_write(op);
            break;
        case OpKind::kAttention:
            attention(op);
            break;
        case OpKind::kGlu:
        case OpKind::kAct:
        case OpKind::kAdd:
            elementwise(op);
            break;
        case OpKind::kRoute:
            route(op);
            break;
        case OpKind::kExpertMatMul:
            expert_matmul(op);
            break;
        case OpKind::kExpertSum:
            expert_sum(op);
            break;
        case OpKind::kGather:
            gather(op);
            break;
    }
}

// Angles in double: at position 10^5 a float32 angle is off by 0.004.
void Engine::fill_rope_tables() noexcept {
    for (RopeTable& t : rope_tables_) {
        const int64_t n = (int64_t)t.n;
        for_rows(n_rows(), 64 * n, [&](int64_t r0, int64_t r1) {
            for (int64_t r = r0; r < r1; ++r) {
                const size_t set = t.inv_freq.size() > t.n ? (size_t)slot_rope_tables_[(size_t)slots_[(size_t)r]] : 0;
                const double* inv_freq = t.inv_freq.data() + set * t.n;
                for (int64_t i = 0; i < n; ++i) {
                    double angle = positions_[(size_t)r] * inv_freq[i];
                    t.cos[(size_t)(r * n + i)] = (float)(std::cos(angle) * t.mscale);
                    t.sin[(size_t)(r * n + i)] = (float)(std::sin(angle) * t.mscale);
                }
            }
        });
    }
}

void Engine::embed(const Op& op) noexcept {
    const Matrix& w = matrices_[(size_t)op.weight];
    for_rows(n_rows(), w.n_in, [&](int64_t r0, int64_t r1) {
        for (int64_t r = r0; r < r1; ++r) {
            float* out = at(op.out, r);
            kernels_->dequantize(w.type, w.data + tokens_[(size_t)r] * w.row_bytes, out, w.n_in);
            if (op.scale != 1) kernels_->scale(op.scale, out, out, w.n_in);
            if (op.positions < 0) continue;
            const Matrix& p = matrices_[(size_t)op.positions];
            const uint8_t* row = p.data + positions_[(size_t)r] * p.row_bytes;
            float chunk[256];  // the least common multiple of all block sizes
            for (int64_t i = 0; i < p.n_in; i += 256) {
                const int64_t n = std::min<int64_t>(256, p.n_in - i);
                kernels_->dequantize(p.type, row + p.row_bytes * i / p.n_in, chunk, n);
                kernels_->add(chunk, out + i, n);
            }
        }
    });
}

void Engine::norm(const Op& op) noexcept {
    const int64_t n = op.group > 0 ? op.group : op.inp.width;
    for_rows(buffer_rows(op.out.buffer), op.inp.width, [&](int64_t r0, int64_t r1) {
        for (int64_t r = r0; r < r1; ++r)
            for (int64_t i = 0; i < op.inp.width; i += n)
                kernels_->norm(at(op.inp, r) + i, vector(op.vector), vector(op.bias), op.eps, op.layer_norm, n,
                               at(op.out, r) + i);
    });
}

void Engine::rope(const Op& op) noexcept {
    const RopeTable& t = rope_tables_[(size_t)op.rope_table];
    const size_t n = t.n;
    for_rows(n_rows(), op.inp.width, [&](int64_t r0, int64_t r1) {
        for (int64_t r = r0; r < r1; ++r)
            kernels_->rope(at(op.inp, r), op.n_head, op.head_dim, op.n_rot, op.interleaved,
                           t.cos.data() + (size_t)r * n, t.sin.data() + (size_t)r * n);
    });
}

void Engine::kv_write(const Op& op) noexcept {
    const Layer layer = layers_[(size_t)op.layer];
    const Group& g = groups_[(size_t)layer.group];
    uint16_t* cache = (uint16_t*)g.pool.data() + (int64_t)layer.index * g.sizes.n_blocks * block_elements_;
    for_rows(n_rows(), 8 * op.inp.width, [&](int64_t r0, int64_t r1) {
        for (int64_t r = r0; r < r1; ++r) {
            const int32_t pos = positions_[(size_t)r];
            const int32_t* blocks = g.tables.data() + (int64_t)slots_[(size_t)r] * sizes_.max_blocks_per_seq;
            kernels_->kv_write(at(op.inp, r), at(op.inp2, r), op.n_head_kv, op.head_dim, v_stride_,
                               cache + blocks[pos / kBlockPositions] * block_elements_, pos % kBlockPositions);
        }
    });
}

bool Engine::copy_block(int64_t group, int64_t source, int64_t target) noexcept {
    if (group < 0 || group >= (int64_t)groups_.size()) return false;
    const Group& g = groups_[(size_t)group];
    const int64_t n_blocks = g.sizes.n_blocks;
    if (source < 0 || source >= n_blocks || target < 0 || target >= n_blocks) return false;
    for (int64_t layer = 0; source != target && layer < g.sizes.n_layers; ++layer) {
        uint16_t* cache = (uint16_t*)g.pool.data() + layer * n_blocks * block_elements_;
        std::memcpy(cache + target * block_elements_, cache + source * block_elements_,
                    (size_t)block_elements_ * sizeof(uint16_t));
    }
    return true;
}

void Engine::attention(const Op& op) noexcept {
    const Layer layer = layers_[(size_t)op.layer];
    const Group& g = groups_[(size_t)layer.group];
    AttentionTask task;
    task.q = at(op.inp, 0);
    task.out = at(op.out, 0);
    task.q_stride = buffers_[(size_t)op.inp.buffer].width;
    task.out_stride = buffers_[(size_t)op.out.buffer].width;
    task.cache = (const uint16_t*)g.pool.data() + (int64_t)layer.index * g.sizes.n_blocks * block_elements_;
    task.positions = positions_.data();
    task.sinks = vector(op.vector);
    task.n_head = op.n_head;
    task.n_head_kv = op.n_head_kv;
    task.head_dim = op.head_dim;
    task.v_stride = v_stride_;
    task.window = op.window;
    task.scale = op.scale;
    // Query heads of one KV head share the conversion of its keys; they part only where threads would be idle.
    const int32_t group = op.n_head / op.n_head_kv, n_tiles = (int32_t)tiles_.size();
    int32_t heads = group;
    while (heads > 1 && (int64_t)n_tiles * op.n_head_kv * ((group + heads - 1) / heads) < n_threads())
        heads = (heads + 1) / 2;
    const int32_t parts = (group + heads - 1) / heads;
    pool_.run((int64_t)n_tiles * op.n_head_kv * parts, [&](int64_t c, int thread) {
        const int32_t kv_head = (int32_t)(c / parts % op.n_head_kv), part = (int32_t)(c % parts);
        const RowTile tile = tiles_[(size_t)(n_tiles - 1 - c / parts / op.n_head_kv)];  // the longest sequences first
        AttentionTask mine = task;
        mine.blocks = g.tables.data() + (int64_t)slots_[(size_t)tile.r0] * sizes_.max_blocks_per_seq;
        const int32_t h0 = kv_head * group + part * heads, h1 = std::min(h0 + heads, (kv_head + 1) * group);
        float* scratch = (float*)thread_scratch_.data() + thread * thread_scratch_floats_;
        kernels_->attention(mine, tile.r0, tile.r1, h0, h1, scratch);
    });
}

void Engine::elementwise(const Op& op) noexcept {
    const Activation kind = (Activation)op.activation;
    const int64_t cost = op.kind == OpKind::kAdd ? op.out.width : 4 * op.out.width;
    for_rows(buffer_rows(op.out.buffer), cost, [&](int64_t r0, int64_t r1) {
        for (int64_t r = r0; r < r1; ++r) {
            if (op.kind == OpKind::kGlu)
                kernels_->glu(kind, at(op.inp, r), at(op.inp2, r), at(op.out, r), op.out.width);
            else if (op.kind == OpKind::kAct)
                kernels_->act(kind, at(op.inp, r), at(op.out, r), op.out.width);
            else
                kernels_->add(at(op.inp, r), at(op.out, r), op.out.width);
        }
    });
}

void Engine::gather(const Op& op) noexcept {
    for (int32_t j = 0; j < n_out(); ++j)
        std::memcpy(at(op.out, j), at(op.inp, output_indices_[(size_t)j]), (size_t)op.out.width * sizeof(float));
}

void Engine::expert_sum(const Op& op) noexcept {
    const int64_t n = op.out.width;
    for_rows(buffer_rows(op.out.buffer), n * op.n_used, [&](int64_t r0, int64_t r1) {
        for (int64_t r = r0; r < r1; ++r) {
            const float *gates = at(op.inp2, r), *x = at(op.inp, r);
            kernels_->scale(gates[0], x, at(op.out, r), n);
            for (int32_t s = 1; s < op.n_used; ++s) kernels_->axpy(gates[s], x + s * n, at(op.out, r), n);
        }
    });
}

}  // namespace worker_orcd
