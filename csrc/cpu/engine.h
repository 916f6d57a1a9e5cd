// The CPU engine: interprets the lowered plan over ragged batches with a paged float16 KV cache.
//
// Life: construct, add_* in plan order, finish() (allocates everything), then prepare() + run() or decode() any number
// of times from one thread. All memory is taken in finish(); steps allocate nothing and throw nothing. Every number
// that comes from outside is checked in prepare(). _cpu.pyx lowers the plan and turns errors into exceptions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "ops.h"
#include "sample.h"
#include "threads.h"
#include "host/file_watch.h"
#include "host/token_queue.h"

namespace worker_orcd {

// Zeroed pages from the system: they cost memory when they are first written.
class Pages {
  public:
    Pages() = default;
    explicit Pages(size_t bytes);  // throws std::bad_alloc
    Pages(Pages&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr; }
    Pages& operator=(Pages&& other) noexcept;
    ~Pages();
    void* data() const noexcept { return data_; }

  private:
    void* data_ = nullptr;
    size_t bytes_ = 0;
};

struct EngineSizes {
    int32_t max_seqs = 0, max_batch_tokens = 0, context_length = 0, max_blocks_per_seq = 0;
    int32_t n_vocab = 0, n_head_kv = 0, head_dim = 0;
};

struct KvGroup {
    int32_t window = 0, n_layers = 0, n_blocks = 0;
};

// The tokens of a step; arrays of the caller.
struct BatchView {
    const int32_t *tokens = nullptr, *positions = nullptr, *slots = nullptr, *output_indices = nullptr;
    const int32_t* rope_tables = nullptr;  // [max_seqs], which set of frequencies a slot turns by
    int32_t n_rows = 0, n_out = 0;
    int32_t n_steps = 1;  // steps that follow each other with positions one further each (decode)
};

// Why a batch was refused: the field of the batch and one line.
struct BatchError {
    std::string field, message;
};

class Engine {
  public:
    // Throws std::system_error when threads cannot be started.
    Engine(const EngineSizes& sizes, int n_threads, const Kernels* kernels);

    int32_t add_buffer(int64_t width, bool outputs);
    // `data` must outlive the engine.
    int32_t add_matrix(const uint8_t* data, int type, int64_t n_in, int64_t n_out, int64_t row_bytes);
    // Copied; F32, F16 or BF16 (type ids 0, 1, 30).
    int32_t add_vector(const uint8_t* data, int type, int64_t n);
    // `inv_freq` [n_sets][n]: one set for every sequence, or one for each index in BatchView::rope_tables.
    int32_t add_rope_table(const double* inv_freq, int32_t n, int32_t n_sets, double mscale);
    void add_kv_group(const KvGroup& group);
    void add_layer(int32_t kv_group);  // the layer's place in its group is the order of adding
    void add_op(const Op& op) { ops_.push_back(op); }
    // A file that matrices lie in.
    void watch(const WatchedFile& file) { files_.add(file); }
    void finish(int32_t logits_buffer);  // throws std::bad_alloc

    // Copies and checks a batch. `tables`: int32 [n_groups][max_seqs][max_blocks_per_seq]. False: `error` says why.
    bool prepare(const BatchView& batch, const int32_t* tables, BatchError* error);
    // Runs ops [0, n_ops) of the prepared batch. `logits`: where to put the logits [n_out][n_vocab], or null for
    // the engine's own buffer. `control`: may abort it, or null. False: it was aborted, and nothing that it wrote
    // counts.
    bool run(int32_t n_ops, float* logits, const ControlFlag* control = nullptr) noexcept;
    // One token of each output row into `tokens` [n_out] (-1: no distribution) and into its slot's history.
    void sample_rows(int32_t* tokens) noexcept;
    // Runs up to n_steps steps of a batch of n rows prepared with that n_steps; row j's sampled token is its next
    // input. Row j ends at stop_ids[stop_offsets[j]] .. stop_ids[stop_offsets[j + 1] - 1]. out [n_steps][n]. Returns
    // the steps done; see worker_orcd/engine/protocol.py for when it stops early. A step during which a watched file
    // changed, or that was aborted, does not count, and its tokens go nowhere.
    int32_t decode(int32_t n_steps, const int64_t* seq_ids, const int32_t* stop_ids, const int32_t* stop_offsets,
                   TokenQueue* queue, ControlFlag* control, int32_t* out) noexcept;

    // `edits`: at most SAMPLING_EDIT_WORDS words, of params.n_edits edits of tokens of the vocabulary.
    void set_slot(int32_t slot, const SlotSampling& params, const int32_t* edits, int32_t n_words) noexcept;
    // Copies a block of a KV group's pool in all layers of the group. False: there is no such group or block.
    bool copy_block(int64_t group, int64_t source, int64_t target) noexcept;
    int32_t n_ops() const { return (int32_t)ops_.size(); }
    // Rows of a buffer in the prepared batch, and its data [rows][width].
    int32_t buffer_rows(int32_t buffer) const { return buffers_[(size_t)buffer].outputs ? n_out() : n_rows(); }
    const float* buffer_data(int32_t buffer) const { return buffers_[(size_t)buffer].data; }
    int64_t kv_bytes() const { return kv_bytes_; }
    int64_t workspace_bytes() const { return workspace_bytes_; }
    int n_threads() const { return pool_.n_threads(); }
    // Whether a watched file has changed: then what was computed since the last look is void.
    bool files_changed() noexcept { return files_.changed(); }

  private:
    struct Buffer {
        int64_t width;
        bool outputs;
        float* data;
        Pages pages;
    };
    struct RopeTable {
        std::vector<double> inv_freq;  // [n_sets][n]
        size_t n;
        double mscale;
        std::vector<float> cos, sin;  // [max_batch_tokens][n]
    };
    struct Group {
        KvGroup sizes;
        Pages pool;                   // uint16 [n_layers][n_blocks][block_elements_]
        std::vector<int32_t> tables;  // [max_seqs][max_blocks_per_seq]
    };
    struct Layer {
        int32_t group, index;
    };
    // Consecutive rows of one sequence, at most kAttentionRows.
    struct RowTile {
        int32_t r0, r1;
    };
    // One product: its lists lie in the engine's.
    struct Task {
        MatmulTask product;
        bool one_token;
        int64_t rows, least_rows, first_chunk;  // outputs in a chunk; the first among the chunks of all tasks
    };
    // A row that is to be multiplied.
    struct Input {
        const float* x;
        bool encodable;
    };
    // Elements of a row-wise operation below which waking threads costs more than it saves.
    static constexpr int64_t kSerialElements = 16384;
    struct Slot {
        SlotSampling params;
        SampledTokens sampled;
        std::vector<int32_t> edits;  // [SAMPLING_EDIT_WORDS] at most
    };

    Pages allocate(size_t bytes) {
        workspace_bytes_ += (int64_t)bytes;
        return Pages(bytes);
    }
    int32_t n_rows() const { return (int32_t)tokens_.size(); }
    int32_t n_out() const { return (int32_t)output_indices_.size(); }
    float* at(const View& v, int64_t row) const {
        const Buffer& b = buffers_[(size_t)v.buffer];
        return b.data + row * b.width + v.offset;
    }
    const float* vector(int32_t index) const { return index < 0 ? nullptr : vectors_[(size_t)index].data(); }
    bool check_rows(const BatchView& batch, BatchError* error) const;
    bool copy_blocks(const BatchView& batch, const int32_t* tables, BatchError* error);
    bool check_rope_tables(const BatchView& batch, BatchError* error) const;
    void make_tiles();
    void fill_rope_tables() noexcept;
    void run_op(int32_t index) noexcept;
    // body(r0, r1) over ranges of rows, in parallel when there is work enough.
    template <class Body>
    void for_rows(int64_t n, int64_t elements_per_row, const Body& body) noexcept {
        if (n * elements_per_row <= kSerialElements) {
            body(0, n);
            return;
        }
        int64_t rows = std::max<int64_t>(1, kSerialElements / 2 / std::max<int64_t>(1, elements_per_row));
        pool_.run((n + rows - 1) / rows, [&](int64_t c, int) { body(c * rows, std::min(n, (c + 1) * rows)); });
    }

    void embed(const Op& op) noexcept;
    void norm(const Op& op) noexcept;
    void rope(const Op& op) noexcept;
    void kv_write(const Op& op) noexcept;
    void attention(const Op& op) noexcept;
    void elementwise(const Op& op) noexcept;
    void expert_sum(const Op& op) noexcept;
    void gather(const Op& op) noexcept;

    // products.cpp
    void find_ops_together();
    void reserve_products();
    const float* padded(const float* x, int64_t n, int64_t index) noexcept;
    uint8_t* encoded_row(int64_t place, int64_t n_in) const;
    void encode_rows(int32_t first, int32_t n, int64_t n_in) noexcept;
    template <class Row>
    void look_at_inputs(const Matrix& w, int32_t n, const Row& row) noexcept;
    void place_input(int32_t index, int32_t place, int64_t n_in) noexcept;
    int32_t place_rows(const View& inp, int32_t n, const Matrix& w) noexcept;
    void add_task(const Matrix& w, const float* bias, int32_t first, int32_t n, bool encoded, size_t y) noexcept;
    int64_t cut_tasks() noexcept;
    void run_chunk(const Task& task, int64_t chunk, int thread) noexcept;
    void run_tasks() noexcept;
    void run_gated(const Op& glu) noexcept;
    // `n` products with one input from op `index`; the last may be the GLU of the two others' outputs.
    void products(int32_t index, int32_t n) noexcept;
    void route(const Op& op) noexcept;
    void expert_matmul(const Op& op) noexcept;

    const EngineSizes sizes_;
    const Kernels* const kernels_;
    ThreadPool pool_;
    FileWatch files_;

    std::vector<Buffer> buffers_;
    std::vector<Matrix> matrices_;
    std::vector<std::vector<float>> vectors_;
    std::vector<RopeTable> rope_tables_;
    int32_t n_rope_sets_ = 1;  // of the table with the most
    std::vector<Group> groups_;
    std::vector<Layer> layers_;
    std::vector<Op> ops_;
    std::vector<Slot> slots_state_;
    int32_t logits_buffer_ = -1;
    int64_t kv_bytes_ = 0, workspace_bytes_ = 0, block_elements_ = 0;
    int32_t v_stride_ = 0;

    // The prepared batch.
    std::vector<int32_t> tokens_, positions_, slots_, output_indices_, slot_rope_tables_;
    std::vector<RowTile> tiles_;
    std::vector<uint8_t> slot_seen_;  // [max_seqs]

    // Scratch of the ops.
    int64_t thread_scratch_floats_ = 0;
    Pages thread_scratch_;                       // [n_threads][thread_scratch_floats_]
    std::vector<SampleScratch> sample_scratch_;  // [n_threads]
    std::vector<Input> inputs_;                  // [max_batch_tokens * n_used], in the order of the rows
    std::vector<const float*> x_pointers_;       // likewise, in the order of the tasks
    std::vector<int32_t> row_order_;             // likewise: index of the input
    std::vector<float*> y_pointers_;             // [max_batch_tokens * n_used * products that run together]
    std::vector<Task> tasks_;
    int32_t n_tasks_ = 0;
    std::vector<int32_t> expert_counts_;  // [2 n_expert + 1]
    std::vector<int32_t> ops_together_;   // [ops], how many run in one call from each
    Pages padding_, route_logits_, encoded_;
    int64_t padding_stride_ = 0;
};

}  // namespace worker_orcd
