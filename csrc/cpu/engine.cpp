// Making an engine, checking batches, sampling and the decode loop; the ops themselves run in run.cpp.
#include "engine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <new>

namespace worker_orcd {

Pages::Pages(size_t bytes) : bytes_(bytes ? bytes : 1) {
    void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    data_ = p;
}

Pages& Pages::operator=(Pages&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
}

Pages::~Pages() {
    if (data_) munmap(data_, bytes_);
}

Engine::Engine(const EngineSizes& sizes, int n_threads, const Kernels* kernels)
    : sizes_(sizes), kernels_(kernels), pool_(n_threads) {}

int32_t Engine::add_buffer(int64_t width, bool outputs) {
    buffers_.push_back(Buffer{width, outputs, nullptr, Pages()});
    return (int32_t)buffers_.size() - 1;
}

int32_t Engine::add_matrix(const uint8_t* data, int type, int64_t n_in, int64_t n_out, int64_t row_bytes) {
    const bool codes = kernels_->has_codes && n_in % 32 == 0 && n_out >= 16 && kernels_->has_codes(type);
    matrices_.push_back(Matrix{data, type, n_in, n_out, row_bytes, codes});
    return (int32_t)matrices_.size() - 1;
}

int32_t Engine::add_vector(const uint8_t* data, int type, int64_t n) {
    std::vector<float> v((size_t)n);
    kernels_->dequantize(type, data, v.data(), n);
    vectors_.push_back(std::move(v));
    return (int32_t)vectors_.size() - 1;
}

int32_t Engine::add_rope_table(const double* inv_freq, int32_t n, int32_t n_sets, double mscale) {
    n_rope_sets_ = std::max(n_rope_sets_, n_sets);
    const size_t total = (size_t)n * (size_t)n_sets;
    for (size_t i = 0; i < rope_tables_.size(); ++i) {
        const RopeTable& t = rope_tables_[i];
        if (t.mscale == mscale && t.inv_freq.size() == total &&
            std::equal(inv_freq, inv_freq + total, t.inv_freq.begin()))
            return (int32_t)i;
    }
    rope_tables_.push_back(RopeTable{std::vector<double>(inv_freq, inv_freq + total), (size_t)n, mscale, {}, {}});
    return (int32_t)rope_tables_.size() - 1;
}

void Engine::add_kv_group(const KvGroup& group) {
    groups_.push_back(Group{group, Pages(), {}});
    groups_.back().sizes.n_layers = 0;
}

void Engine::add_layer(int32_t kv_group) {
    layers_.push_back(Layer{kv_group, groups_[(size_t)kv_group].sizes.n_layers++});
}

void Engine::finish(int32_t logits_buffer) {
    logits_buffer_ = logits_buffer;
    const size_t max_batch_tokens = (size_t)sizes_.max_batch_tokens;
    for (Buffer& b : buffers_) {
        b.pages = allocate(max_batch_tokens * (size_t)b.width * sizeof(float));
        b.data = (float*)b.pages.data();
    }
    v_stride_ = (int32_t)round_up_16(sizes_.head_dim);
    block_elements_ = kv_block_elements(sizes_.n_head_kv, sizes_.head_dim, v_stride_);
    for (Group& g : groups_) {
        size_t bytes = (size_t)g.sizes.n_layers * (size_t)g.sizes.n_blocks * (size_t)block_elements_ * sizeof(uint16_t);
        g.pool = Pages(bytes);
        kv_bytes_ += (int64_t)bytes;
        g.tables.assign((size_t)sizes_.max_seqs * (size_t)sizes_.max_blocks_per_seq, -1);
    }
    for (RopeTable& t : rope_tables_) {
        t.cos.resize(max_batch_tokens * t.n);
        t.sin.resize(max_batch_tokens * t.n);
    }
    for (const Op& op : ops_)
        if (op.kind == OpKind::kAttention)
            thread_scratch_floats_ =
                std::max(thread_scratch_floats_, attention_scratch_floats(op.n_head, op.n_head_kv, op.head_dim));
    reserve_products();
    thread_scratch_floats_ = round_up_16(thread_scratch_floats_ + 16);
    thread_scratch_ = allocate((size_t)n_threads() * (size_t)thread_scratch_floats_ * sizeof(float));
    for (int i = 0; i < n_threads(); ++i) sample_scratch_.emplace_back(sizes_.n_vocab);
    slots_state_.reserve((size_t)sizes_.max_seqs);
    SlotSampling greedy = {};  // and nothing penalized, until `set_slot` says otherwise
    greedy.repetition_penalty = greedy.top_p = 1;
    for (int32_t i = 0; i < sizes_.max_seqs; ++i)
        slots_state_.push_back(Slot{greedy, SampledTokens(sizes_.n_vocab, sizes_.context_length), {}});
    for (Slot& slot : slots_state_) slot.edits.reserve(SAMPLING_EDIT_WORDS);
    slot_seen_.resize((size_t)sizes_.max_seqs);
    for (auto* v : {&tokens_, &positions_, &slots_, &output_indices_}) v->reserve(max_batch_tokens);
    tiles_.reserve(max_batch_tokens);
}

void Engine::set_slot(int32_t slot, const SlotSampling& params, const int32_t* edits, int32_t n_words) noexcept {
    Slot& s = slots_state_[(size_t)slot];
    s.params = params;
    s.edits.assign(edits, edits + n_words);
    s.sampled.clear();
}

static bool refuse(BatchError* error, const char* field, std::string message) {
    error->field = field;
    error->message = std::move(message);
    return false;
}

static std::string at_row(int64_t row, const char* what, int64_t value) {
    return "row " + std::to_string(row) + ": " + what + " " + std::to_string(value);
}

bool Engine::check_rows(const BatchView& b, BatchError* error) const {
    if (b.n_rows < 1 || b.n_rows > sizes_.max_batch_tokens)
        return refuse(
            error, "tokens",
            "a step has 1 to " + std::to_string(sizes_.max_batch_tokens) + " rows, not " + std::to_string(b.n_rows));
    for (int32_t r = 0; r < b.n_rows; ++r) {
        if (b.tokens[r] < 0 || b.tokens[r] >= sizes_.n_vocab)
            return refuse(
                error, "tokens",
                at_row(r, "token", b.tokens[r]) + " is not in the vocabulary of " + std::to_string(sizes_.n_vocab));
        if (b.positions[r] < 0 || (int64_t)b.positions[r] + b.n_steps > sizes_.context_length)
            return refuse(error, "positions",
                          at_row(r, "position", (int64_t)b.positions[r] + b.n_steps - 1) +
                              " is not below the context length " + std::to_string(sizes_.context_length));
        if (b.slots[r] < 0 || b.slots[r] >= sizes_.max_seqs)
            return refuse(error, "slots",
                          at_row(r, "slot", b.slots[r]) + " is not below " + std::to_string(sizes_.max_seqs));
        if (r > 0 && b.slots[r] == b.slots[r - 1] && (b.n_steps > 1 || b.positions[r] <= b.positions[r - 1]))
            return refuse(error, "positions",
                          at_row(r, "position", b.positions[r]) + " does not follow the one before it");
    }
    for (int32_t j = 0; j < b.n_out; ++j)
        if (b.output_indices[j] < 0 || b.output_indices[j] >= b.n_rows ||
            (j > 0 && b.output_indices[j] <= b.output_indices[j - 1]))
            return refuse(error, "output_indices",
                          "output " + std::to_string(j) + ": row " + std::to_string(b.output_indices[j]) +
                              " is out of range or order");
    return true;
}

// Checks and copies the entries that this batch reads, so that later writes to the caller's tables change nothing.
bool Engine::copy_blocks(const BatchView& b, const int32_t* tables, BatchError* error) {
    std::fill(slot_seen_.begin(), slot_seen_.end(), 0);
    for (int32_t r0 = 0, r1; r0 < b.n_rows; r0 = r1) {
        for (r1 = r0 + 1; r1 < b.n_rows && b.slots[r1] == b.slots[r0];) ++r1;
        const size_t slot = (size_t)b.slots[r0];
        if (slot_seen_[slot])
            return refuse(error, "slots", at_row(r0, "slot", (int64_t)slot) + " has rows in two places");
        slot_seen_[slot] = 1;
        for (size_t g = 0; g < groups_.size(); ++g) {
            Group& group = groups_[g];
            const int32_t window = group.sizes.window;
            const int32_t first = window > 0 ? std::max(0, b.positions[r0] - window + 1) / kBlockPositions : 0;
            const int32_t last = (b.positions[r1 - 1] + b.n_steps - 1) / kBlockPositions;
            const int32_t* from = tables + (g * (size_t)sizes_.max_seqs + slot) * (size_t)sizes_.max_blocks_per_seq;
            int32_t* to = group.tables.data() + slot * (size_t)sizes_.max_blocks_per_seq;
            for (int32_t i = first; i <= last; ++i) {
                const int32_t block = from[i];
                if (block < 0 || block >= group.sizes.n_blocks)
                    return refuse(error, "block_tables",
                                  "slot " + std::to_string(slot) + ", KV group " + std::to_string(g) + ": entry " +
                                      std::to_string(i) + " is " + std::to_string(block) +
                                      ", not a block of the pool of " + std::to_string(group.sizes.n_blocks));
                to[i] = block;
            }
        }
    }
    return true;
}

bool Engine::check_rope_tables(const BatchView& b, BatchError* error) const {
    for (int32_t r = 0; r < b.n_rows; ++r) {
        const int32_t slot = b.slots[r], index = b.rope_tables[slot];
        if (index < 0 || index >= n_rope_sets_)
            return refuse(error, "rope_tables",
                          "slot " + std::to_string(slot) + ": frequency table " + std::to_string(index) +
                              " is not below " + std::to_string(n_rope_sets_));
    }
    return true;
}

bool Engine::prepare(const BatchView& b, const int32_t* tables, BatchError* error) {
    tokens_.clear();  // a refused batch leaves nothing that could be run
    output_indices_.clear();
    if (!check_rows(b, error) || !check_rope_tables(b, error) || !copy_blocks(b, tables, error)) return false;
    tokens_.assign(b.tokens, b.tokens + b.n_rows);
    positions_.assign(b.positions, b.positions + b.n_rows);
    slots_.assign(b.slots, b.slots + b.n_rows);
    output_indices_.assign(b.output_indices, b.output_indices + b.n_out);
    slot_rope_tables_.assign(b.rope_tables, b.rope_tables + sizes_.max_seqs);
    make_tiles();
    return true;
}

void Engine::make_tiles() {
    tiles_.clear();
    for (int32_t r0 = 0, r1; r0 < n_rows(); r0 = r1) {
        for (r1 = r0 + 1; r1 < n_rows() && r1 - r0 < kAttentionRows && slots_[(size_t)r1] == slots_[(size_t)r0];) ++r1;
        tiles_.push_back(RowTile{r0, r1});
    }
}

void Engine::sample_rows(int32_t* tokens) noexcept {
    const float* logits = buffers_[(size_t)logits_buffer_].data;
    pool_.run(n_out(), [&](int64_t j, int thread) {
        const size_t row = (size_t)output_indices_[(size_t)j];
        const Slot& slot = slots_state_[(size_t)slots_[row]];
        tokens[j] = sample(logits + j * sizes_.n_vocab, sizes_.n_vocab, positions_[row], slot.params, slot.edits.data(),
                           slot.sampled, sample_scratch_[(size_t)thread]);
    });
    for (int32_t j = 0; j < n_out(); ++j)
        if (tokens[j] >= 0) slots_state_[(size_t)slots_[(size_t)output_indices_[(size_t)j]]].sampled.insert(tokens[j]);
}

// One push a step where every row has a token, so that the reader is woken once.
static void push_drawn(TokenQueue* queue, const int64_t* seq_ids, const int32_t* tokens, int32_t n) noexcept {
    for (int32_t first = 0, end; first < n; first = end + 1) {
        for (end = first; end < n && tokens[end] >= 0;) ++end;
        if (end > first) queue->push_many(seq_ids + first, tokens + first, (size_t)(end - first));
    }
}

int32_t Engine::decode(int32_t n_steps, const int64_t* seq_ids, const int32_t* stop_ids, const int32_t* stop_offsets,
                       TokenQueue* queue, ControlFlag* control, int32_t* out) noexcept {
    const int32_t n = n_rows();
    for (int32_t step = 0; step < n_steps; ++step, out += n) {
        if (!run(n_ops(), nullptr, control)) return step;
        sample_rows(out);
        if (files_.changed()) return step;
        bool stop = false;
        for (int32_t j = 0; j < n; ++j) {
            if (out[j] < 0) {
                stop = true;
                continue;
            }
            const int32_t* end = stop_ids + stop_offsets[j + 1];
            stop |= std::find(stop_ids + stop_offsets[j], end, out[j]) != end;
            tokens_[(size_t)j] = out[j];
            ++positions_[(size_t)j];
        }
        push_drawn(queue, seq_ids, out, n);
        control->step_done();
        if (stop || control->interrupted()) return step + 1;
    }
    return n_steps;
}

}  // namespace worker_orcd
