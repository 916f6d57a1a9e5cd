// Running the ops of the plan: which rows and columns each reads, and how its work is cut into chunks for threads.
//
// A chunk boundary never changes a result: products are cut by outputs, everything else by rows or heads, and each
// kernel computes each of those by a formula in which the others do not occur.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine.h"

namespace worker_orcd {

// Elements of a row-wise operation below which waking threads costs more than it saves.
static constexpr int64_t kSerialElements = 16384;
// Bytes of weights in one chunk of a one-token product.
static constexpr int64_t kMatvecBytes = 16 * 1024;

template <class Body>
void Engine::for_rows(int64_t n, int64_t elements_per_row, const Body& body) noexcept {
    if (n * elements_per_row <= kSerialElements) {
        body(0, n);
        return;
    }
    int64_t rows = std::max<int64_t>(1, kSerialElements / 2 / std::max<int64_t>(1, elements_per_row));
    pool_.run((n + rows - 1) / rows, [&](int64_t c, int) { body(c * rows, std::min(n, (c + 1) * rows)); });
}

bool Engine::run(int32_t n_ops, float* logits, const ControlFlag* control) noexcept {
    Buffer& last = buffers_[(size_t)logits_buffer_];
    last.data = logits ? logits : (float*)last.pages.data();
    pool_.heed(control);
    fill_rope_tables();
    for (int32_t i = 0; i < n_ops && !pool_.aborted(); ++i) run_op(ops_[(size_t)i]);
    const bool done = !pool_.aborted();
    pool_.heed(nullptr);  // sampling is short, and must not end half-way: it changes what the slots remember
    return done;
}

void Engine::run_op(const Op& op) noexcept {
    switch (op.kind) {
        case OpKind::kEmbed:
            embed(op);
            break;
        case OpKind::kNorm:
            norm(op);
            break;
        case OpKind::kMatMul:
            matmul(op);
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

const float* Engine::padded(const float* x, int64_t n, int64_t index) noexcept {
    float* p = (float*)padding_.data() + index * padding_stride_;
    std::memcpy(p, x, (size_t)n * sizeof(float));
    std::fill(p + n, p + round_up_16(n), 0.0f);
    return p;
}

void Engine::run_tasks(const MatmulTask* tasks, int32_t n_tasks) noexcept {
    const Matrix& w = tasks[0].w;
    int64_t rows = panel_rows(w.n_in);
    bool one_token = w.n_in % 16 == 0;
    for (int32_t i = 0; i < n_tasks; ++i) one_token &= tasks[i].n_tokens == 1;
    if (one_token) {
        rows = std::max<int64_t>(4, kMatvecBytes / w.row_bytes / 4 * 4);
        while (rows > 4 && n_tasks * (w.n_out / rows) < 4 * n_threads()) rows = rows / 8 * 4;
    }
    const int64_t per_task = (w.n_out + rows - 1) / rows;
    pool_.run(n_tasks * per_task, [&](int64_t c, int thread) {
        const MatmulTask& task = tasks[c / per_task];
        const int64_t o0 = c % per_task * rows, o1 = std::min(o0 + rows, w.n_out);
        if (task.n_tokens == 1 && w.n_in % 16 == 0)
            kernels_->matvec(task, o0, o1);
        else
            kernels_->matmul_panel(task, o0, o1, (float*)thread_scratch_.data() + thread * thread_scratch_floats_);
    });
}

void Engine::matmul(const Op& op) noexcept {
    const int32_t n = buffer_rows(op.out.buffer);
    if (n == 0) return;
    MatmulTask task;
    task.w = matrices_[(size_t)op.weight];
    for (int32_t r = 0; r < n; ++r) {
        const float* x = at(op.inp, r);
        x_pointers_[(size_t)r] = task.w.n_in % 16 ? padded(x, task.w.n_in, r) : x;
        y_pointers_[(size_t)r] = at(op.out, r);
    }
    task.bias = vector(op.bias);
    task.x = x_pointers_.data();
    task.y = y_pointers_.data();
    task.n_tokens = n;
    run_tasks(&task, 1);
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

void Engine::route(const Op& op) noexcept {
    const int32_t n = buffer_rows(op.out.buffer);
    if (n == 0) return;
    MatmulTask task;
    task.w = matrices_[(size_t)op.weight];
    float* logits = (float*)route_logits_.data();  // [rows][n_expert]
    for (int32_t r = 0; r < n; ++r) {
        const float* x = at(op.inp, r);
        x_pointers_[(size_t)r] = task.w.n_in % 16 ? padded(x, task.w.n_in, r) : x;
        y_pointers_[(size_t)r] = logits + (int64_t)r * op.n_expert;
    }
    task.bias = vector(op.bias);
    task.x = x_pointers_.data();
    task.y = y_pointers_.data();
    task.n_tokens = n;
    run_tasks(&task, 1);
    if (pool_.aborted()) return;
    for (int32_t r = 0; r < n; ++r) {
        float *l = logits + (int64_t)r * op.n_expert, *ids = at(op.out, r), *gates = at(op.out2, r);
        for (int32_t s = 0; s < op.n_used; ++s) {  // NaN never wins, so an id is always one of the experts
            int32_t best = -1;
            for (int32_t e = 0; e < op.n_expert; ++e) {
                bool taken = false;
                for (int32_t t = 0; t < s; ++t) taken |= (int32_t)ids[t] == e;
                if (!taken && (best < 0 || l[e] > l[best])) best = e;
            }
            ids[s] = (float)best;
            gates[s] = l[best] - l[(int32_t)ids[0]];
        }
        kernels_->exp(gates, gates, op.n_used);
        float total = 0;
        for (int32_t s = 0; s < op.n_used; ++s) total += gates[s];
        for (int32_t s = 0; s < op.n_used; ++s) gates[s] /= total;
    }
}

void Engine::expert_matmul(const Op& op) noexcept {
    const int32_t n = buffer_rows(op.out.buffer), pairs = n * op.n_used;
    if (n == 0) return;
    const int64_t n_in = matrices_[(size_t)op.weight].n_in, n_out = matrices_[(size_t)op.weight].n_out;
    auto expert_of = [&](int32_t i) { return (int32_t)at(op.inp2, i / op.n_used)[i % op.n_used]; };
    // Counting sort of the (row, slot) pairs by expert: each expert's weights are decoded once.
    std::fill(expert_counts_.begin(), expert_counts_.end(), 0);
    for (int32_t i = 0; i < pairs; ++i) ++expert_counts_[(size_t)expert_of(i) + 1];
    int32_t n_tasks = 0;
    for (int32_t e = 0; e < op.n_expert; ++e) {
        const int32_t first = expert_counts_[(size_t)e], count = expert_counts_[(size_t)e + 1];
        expert_counts_[(size_t)e + 1] += first;
        if (count == 0) continue;
        MatmulTask& task = expert_tasks_[(size_t)n_tasks++];
        task.w = matrices_[(size_t)(op.weight + e)];
        task.bias = op.bias < 0 ? nullptr : vector(op.bias) + e * n_out;
        task.x = x_pointers_.data() + first;
        task.y = y_pointers_.data() + first;
        task.n_tokens = count;
    }
    for (int32_t i = 0; i < pairs; ++i) {
        const int32_t row = i / op.n_used, slot = i % op.n_used;
        const size_t place = (size_t)expert_counts_[(size_t)expert_of(i)]++;
        const float* x = at(op.inp, row) + (op.per_slot ? slot * n_in : 0);
        x_pointers_[place] = n_in % 16 ? padded(x, n_in, (int64_t)place) : x;
        y_pointers_[place] = at(op.out, row) + slot * n_out;
    }
    run_tasks(expert_tasks_.data(), n_tasks);
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
