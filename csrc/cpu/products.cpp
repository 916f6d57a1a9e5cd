// The products of the plan: which rows can be multiplied as codes, how outputs are cut into chunks for threads, and
// which ops share one call.
//
// Rows of activations that can be encoded are multiplied as integer codes where the matrix has them, all others as
// floats; which it is depends on the row and the matrix alone.
#include <cstring>

#include "engine.h"

namespace worker_orcd {

// Bytes of weights in one chunk of a one-token product.
static constexpr int64_t kMatvecBytes = 32 * 1024;

static bool overlap(const View& a, const View& b) {
    return a.buffer == b.buffer && a.offset < b.offset + b.width && b.offset < a.offset + a.width;
}
static bool same(const View& a, const View& b) {
    return a.buffer == b.buffer && a.offset == b.offset && a.width == b.width;
}

// Consecutive products of one input, and the GLU of just two of them, run in one call each.
void Engine::find_ops_together() {
    ops_together_.assign(ops_.size(), 1);
    auto has_codes = [&](const Op& op) {
        return op.kind == OpKind::kMatMul && matrices_[(size_t)op.weight].codes && !overlap(op.inp, op.out);
    };
    for (size_t first = 0, end; first < ops_.size(); first = end) {
        end = first + 1;
        if (!has_codes(ops_[first])) continue;
        auto joins = [&](const Op& op) {
            bool free = has_codes(op) && same(op.inp, ops_[first].inp);
            for (size_t i = first; i < end; ++i) free = free && !overlap(op.out, ops_[i].out);
            return free;
        };
        while (end < ops_.size() && joins(ops_[end])) ++end;
        if (end - first == 2 && end < ops_.size() && ops_[end].kind == OpKind::kGlu) {
            const Op &glu = ops_[end], &gate = ops_[first], &up = ops_[first + 1];
            bool fits = same(glu.inp, gate.out) && same(glu.inp2, up.out) && !overlap(glu.out, gate.inp);
            for (const View& v : {gate.out, up.out}) fits = fits && (same(glu.out, v) || !overlap(glu.out, v));
            if (fits) ++end;
        }
        ops_together_[first] = (int32_t)(end - first);
    }
}

// Takes the memory of the products; called when all ops are known.
void Engine::reserve_products() {
    find_ops_together();
    size_t pointers = (size_t)sizes_.max_batch_tokens, outputs = pointers, experts = 0, padding_rows = 0;
    int64_t encoded_bytes = 0;
    for (size_t i = 0; i < ops_.size(); ++i) {
        const Op& op = ops_[i];
        if (op.kind == OpKind::kRoute) {
            route_logits_ = allocate((size_t)sizes_.max_batch_tokens * (size_t)op.n_expert * sizeof(float));
            experts = std::max(experts, (size_t)op.n_expert);
        }
        if (op.kind != OpKind::kMatMul && op.kind != OpKind::kRoute && op.kind != OpKind::kExpertMatMul) continue;
        const Matrix& w = matrices_[(size_t)op.weight];
        const size_t rows = (size_t)sizes_.max_batch_tokens * (size_t)std::max(op.n_used, 1);
        pointers = std::max(pointers, rows);
        outputs = std::max(outputs, rows * (size_t)ops_together_[i]);
        thread_scratch_floats_ = std::max(thread_scratch_floats_, panel_floats(panel_rows(w.n_in), w.n_in));
        if (w.codes) {
            thread_scratch_floats_ = std::max(thread_scratch_floats_, code_panel_floats(w.n_in));
            encoded_bytes = std::max(encoded_bytes, (int64_t)rows * encoded_row_bytes(w.n_in));
        }
        if (w.n_in % 16) {
            padding_stride_ = std::max(padding_stride_, round_up_16(w.n_in));
            padding_rows = std::max(padding_rows, rows);
        }
    }
    if (padding_rows) padding_ = allocate(padding_rows * (size_t)padding_stride_ * sizeof(float));
    if (encoded_bytes) encoded_ = allocate((size_t)encoded_bytes);
    x_pointers_.resize(pointers);
    y_pointers_.resize(outputs);
    inputs_.resize(pointers);
    row_order_.resize(pointers);
    expert_counts_.resize(2 * experts + 1);
    size_t most_tasks = 2 * experts;
    for (int32_t n : ops_together_) most_tasks = std::max(most_tasks, 2 * (size_t)n);
    tasks_.resize(most_tasks);
}

const float* Engine::padded(const float* x, int64_t n, int64_t index) noexcept {
    float* p = (float*)padding_.data() + index * padding_stride_;
    std::memcpy(p, x, (size_t)n * sizeof(float));
    std::fill(p + n, p + round_up_16(n), 0.0f);
    return p;
}

uint8_t* Engine::encoded_row(int64_t place, int64_t n_in) const {
    return (uint8_t*)encoded_.data() + place * encoded_row_bytes(n_in);
}

// Encodes inputs [first, first + n) of x_pointers_ in tiles.
void Engine::encode_rows(int32_t first, int32_t n, int64_t n_in) noexcept {
    const int32_t most = kernels_->encoded_tokens;
    auto encode = [&](int32_t t, int32_t tokens) {
        kernels_->encode(x_pointers_.data() + first + t, tokens, n_in, encoded_row(first + t, n_in));
    };
    for_rows(n / most, most * n_in, [&](int64_t t0, int64_t t1) {
        for (int64_t t = t0; t < t1; ++t) encode((int32_t)t * most, most);
    });
    for (int32_t t = n / most * most, tokens; t < n; t += tokens) encode(t, tokens = encoded_tile(n - t, most));
}

// Fills inputs_[0 .. n): which of the rows that `row` gives can be encoded for `w`.
template <class Row>
void Engine::look_at_inputs(const Matrix& w, int32_t n, const Row& row) noexcept {
    for_rows(n, w.n_in, [&](int64_t r0, int64_t r1) {
        for (int64_t r = r0; r < r1; ++r) {
            const float* x = row((int32_t)r);
            inputs_[(size_t)r] = Input{x, w.codes && kernels_->encodable(x, w.n_in)};
        }
    });
}

// Puts input `index` at `place` of the lists that tasks point into.
void Engine::place_input(int32_t index, int32_t place, int64_t n_in) noexcept {
    const float* x = inputs_[(size_t)index].x;
    x_pointers_[(size_t)place] = n_in % 16 ? padded(x, n_in, place) : x;
    row_order_[(size_t)place] = index;
}

// A product for inputs [first, first + n), whose outputs are y_pointers_[y ..].
void Engine::add_task(const Matrix& w, const float* bias, int32_t first, int32_t n, bool encoded, size_t y) noexcept {
    if (n == 0) return;
    Task& task = tasks_[(size_t)n_tasks_++];
    task.product.w = w;
    task.product.bias = bias;
    task.product.x = x_pointers_.data() + first;
    task.product.y = y_pointers_.data() + y;
    task.product.n_tokens = n;
    task.product.encoded = encoded ? encoded_row(first, w.n_in) : nullptr;
    task.least_rows = encoded ? 16 : 4;
    task.one_token = n == 1 && w.n_in % 16 == 0;
    if (task.one_token)
        task.rows = std::max(task.least_rows, kMatvecBytes / w.row_bytes / task.least_rows * task.least_rows);
    else
        task.rows = encoded ? 16 : panel_rows(w.n_in);
}

void Engine::run_chunk(const Task& task, int64_t chunk, int thread) noexcept {
    const MatmulTask& product = task.product;
    const int64_t o0 = chunk * task.rows, o1 = std::min(o0 + task.rows, product.w.n_out);
    float* scratch = (float*)thread_scratch_.data() + thread * thread_scratch_floats_;
    if (product.encoded && task.one_token)
        kernels_->code_matvec(product, o0, o1);
    else if (product.encoded)
        kernels_->code_panel(product, o0, o1, (uint8_t*)scratch);
    else if (task.one_token)
        kernels_->matvec(product, o0, o1);
    else
        kernels_->matmul_panel(product, o0, o1, scratch);
}

// Cuts the tasks into chunks: enough of them that no thread is left without.
int64_t Engine::cut_tasks() noexcept {
    for (;;) {
        int64_t n_chunks = 0;
        bool can_halve = false;
        for (int32_t i = 0; i < n_tasks_; ++i) {
            Task& task = tasks_[(size_t)i];
            task.first_chunk = n_chunks;
            n_chunks += (task.product.w.n_out + task.rows - 1) / task.rows;
            can_halve |= task.one_token && task.rows > task.least_rows;
        }
        if (!can_halve || n_chunks >= 4 * n_threads()) return n_chunks;
        for (int32_t i = 0; i < n_tasks_; ++i) {
            Task& task = tasks_[(size_t)i];
            const int64_t half = task.rows / (2 * task.least_rows) * task.least_rows;
            if (task.one_token) task.rows = std::max(task.least_rows, half);
        }
    }
}

void Engine::run_tasks() noexcept {
    pool_.run(cut_tasks(), [&](int64_t c, int thread) {
        auto after = std::upper_bound(tasks_.begin(), tasks_.begin() + n_tasks_, c,
                                      [](int64_t chunk, const Task& task) { return chunk < task.first_chunk; });
        const Task& task = *(after - 1);
        run_chunk(task, c - task.first_chunk, thread);
    });
}

// The two tasks of a GLU, gate and up, and the GLU of the outputs of each chunk.
void Engine::run_gated(const Op& glu) noexcept {
    const int32_t n = buffer_rows(glu.out.buffer);
    const int64_t n_chunks = cut_tasks() / 2, width = glu.out.width;
    pool_.run(n_chunks, [&](int64_t c, int thread) {
        for (int i = 0; i < 2; ++i) run_chunk(tasks_[(size_t)i], c, thread);
        const int64_t o0 = c * tasks_[0].rows, o1 = std::min(o0 + tasks_[0].rows, width);
        for (int32_t r = 0; r < n; ++r)
            kernels_->glu((Activation)glu.activation, at(glu.inp, r) + o0, at(glu.inp2, r) + o0, at(glu.out, r) + o0,
                          o1 - o0);
    });
}

// Lists the n rows of an op's input for `w`, those that can be encoded first; returns how many those are.
int32_t Engine::place_rows(const View& inp, int32_t n, const Matrix& w) noexcept {
    look_at_inputs(w, n, [&](int32_t r) { return at(inp, r); });
    int32_t place = 0, n_encoded = 0;
    for (bool encodable : {true, false}) {
        for (int32_t r = 0; r < n; ++r)
            if (inputs_[(size_t)r].encodable == encodable) place_input(r, place++, w.n_in);
        if (encodable) n_encoded = place;
    }
    encode_rows(0, n_encoded, w.n_in);
    return n_encoded;
}

void Engine::products(int32_t index, int32_t n_ops) noexcept {
    const Op* ops = ops_.data() + index;
    const int32_t n = buffer_rows(ops->out.buffer);
    if (n == 0) return;
    const bool gated = ops[n_ops - 1].kind == OpKind::kGlu;
    const int32_t n_encoded = place_rows(ops->inp, n, matrices_[(size_t)ops->weight]);
    n_tasks_ = 0;
    for (int32_t i = 0; i < n_ops - gated; ++i) {
        const size_t y = (size_t)i * (size_t)n;
        for (int32_t j = 0; j < n; ++j) y_pointers_[y + (size_t)j] = at(ops[i].out, row_order_[(size_t)j]);
        const Matrix& w = matrices_[(size_t)ops[i].weight];
        add_task(w, vector(ops[i].bias), 0, n_encoded, true, y);
        add_task(w, vector(ops[i].bias), n_encoded, n - n_encoded, false, y + (size_t)n_encoded);
    }
    if (gated && n_encoded == n) {
        run_gated(ops[n_ops - 1]);
        return;
    }
    run_tasks();
    if (gated) elementwise(ops[n_ops - 1]);
}

void Engine::route(const Op& op) noexcept {
    const int32_t n = buffer_rows(op.out.buffer);
    if (n == 0) return;
    const Matrix& w = matrices_[(size_t)op.weight];
    float* logits = (float*)route_logits_.data();  // [rows][n_expert]
    const int32_t n_encoded = place_rows(op.inp, n, w);
    for (int32_t j = 0; j < n; ++j) y_pointers_[(size_t)j] = logits + (int64_t)row_order_[(size_t)j] * op.n_expert;
    n_tasks_ = 0;
    add_task(w, vector(op.bias), 0, n_encoded, true, 0);
    add_task(w, vector(op.bias), n_encoded, n - n_encoded, false, (size_t)n_encoded);
    run_tasks();
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
    const Matrix& w = matrices_[(size_t)op.weight];
    look_at_inputs(w, pairs,
                   [&](int32_t i) { return at(op.inp, i / op.n_used) + (op.per_slot ? i % op.n_used * w.n_in : 0); });
    // Counting sort of the (row, slot) pairs by expert, its encodable inputs first: weights are decoded once.
    auto bucket_of = [&](int32_t i) {
        return 2 * (size_t)at(op.inp2, i / op.n_used)[i % op.n_used] + !inputs_[(size_t)i].encodable;
    };
    std::fill(expert_counts_.begin(), expert_counts_.end(), 0);
    for (int32_t i = 0; i < pairs; ++i) ++expert_counts_[bucket_of(i) + 1];
    n_tasks_ = 0;
    for (int32_t b = 0; b < 2 * op.n_expert; ++b) {
        const int32_t e = b / 2, first = expert_counts_[(size_t)b], count = expert_counts_[(size_t)b + 1];
        expert_counts_[(size_t)b + 1] += first;
        add_task(matrices_[(size_t)(op.weight + e)], op.bias < 0 ? nullptr : vector(op.bias) + e * w.n_out, first,
                 count, b % 2 == 0, (size_t)first);
    }
    for (int32_t i = 0; i < pairs; ++i) {
        const int32_t place = expert_counts_[bucket_of(i)]++;
        place_input(i, place, w.n_in);
        y_pointers_[(size_t)place] = at(op.out, i / op.n_used) + i % op.n_used * w.n_out;
    }
    for (int32_t i = 0; i < n_tasks_; ++i) {
        const MatmulTask& product = tasks_[(size_t)i].product;
        if (product.encoded) encode_rows((int32_t)(product.x - x_pointers_.data()), product.n_tokens, w.n_in);
    }
    run_tasks();
}

}  // namespace worker_orcd
