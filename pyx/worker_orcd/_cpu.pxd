# C view of the CPU engine (csrc/cpu/engine.h) and its kernels, for _cpu.pyx alone.
from libc.stdint cimport int32_t, int64_t, uint8_t
from libcpp cimport bool as cbool
from libcpp.string cimport string

from worker_orcd._params cimport SlotSampling
from worker_orcd._ring cimport ControlFlag, TokenQueue


cdef extern from "cpu/kernels.h" namespace "worker_orcd" nogil:
    cdef enum:
        kBlockPositions

    cdef struct Kernels:
        const char* name
        cbool (*dequantize)(int type, const uint8_t* src, float* dst, int64_t n) noexcept nogil

    const Kernels* choose_kernels() noexcept
    const Kernels* kernels_by_name(const char* name) noexcept

    cdef enum class Activation:
        kSilu
        kGeluTanh
        kSwigluOai


cdef extern from "cpu/ops.h" namespace "worker_orcd" nogil:
    cdef enum class OpKind:
        kEmbed
        kNorm
        kMatMul
        kRope
        kKvWrite
        kAttention
        kGlu
        kAct
        kAdd
        kRoute
        kExpertMatMul
        kExpertSum
        kGather

    cdef cppclass View:
        View()
        int32_t buffer
        int64_t offset, width

    cdef cppclass Op:
        Op()
        OpKind kind
        View inp, inp2, out, out2
        int32_t weight, positions, vector, bias, rope_table, layer
        int32_t n_head, n_head_kv, head_dim, n_rot, window, n_expert, n_used, activation
        int64_t group
        float scale, eps
        cbool interleaved, layer_norm, per_slot


cdef extern from "cpu/sample.h" namespace "worker_orcd" nogil:
    cdef cppclass SampledTokens:
        SampledTokens(int64_t n_vocab, int64_t context_length) except +
        void insert(int32_t token) except +

    cdef cppclass SampleScratch:
        SampleScratch(int64_t n_vocab) except +

    int32_t draw_token "worker_orcd::sample"(const float* logits, int64_t n_vocab, int32_t position,
                                             const SlotSampling& params, const int32_t* edits,
                                             const SampledTokens& sampled, SampleScratch& scratch) except +


cdef extern from "host/file_watch.h" namespace "worker_orcd" nogil:
    cdef struct WatchedFile:
        int fd
        int64_t size, mtime_ns


cdef extern from "cpu/engine.h" namespace "worker_orcd" nogil:
    cdef cppclass EngineSizes:
        int32_t max_seqs, max_batch_tokens, context_length, max_blocks_per_seq, n_vocab, n_head_kv, head_dim

    cdef cppclass KvGroup:
        int32_t window, n_layers, n_blocks

    cdef cppclass BatchView:
        const int32_t* tokens
        const int32_t* positions
        const int32_t* slots
        const int32_t* output_indices
        const int32_t* rope_tables
        int32_t n_rows, n_out, n_steps

    cdef cppclass BatchError:
        string field, message

    cdef cppclass Engine:
        Engine(const EngineSizes& sizes, int n_threads, const Kernels* kernels) except +
        int32_t add_buffer(int64_t width, cbool outputs) except +
        int32_t add_matrix(const uint8_t* data, int type, int64_t n_in, int64_t n_out, int64_t row_bytes) except +
        int32_t add_vector(const uint8_t* data, int type, int64_t n) except +
        int32_t add_rope_table(const double* inv_freq, int32_t n, int32_t n_sets, double mscale) except +
        void add_kv_group(const KvGroup& group) except +
        void add_layer(int32_t kv_group) except +
        void add_op(const Op& op) except +
        void watch(const WatchedFile& file) except +
        void finish(int32_t logits_buffer) except +
        cbool prepare(const BatchView& batch, const int32_t* tables, BatchError* error) except +
        cbool run(int32_t n_ops, float* logits, const ControlFlag* control) noexcept
        void sample_rows(int32_t* tokens) noexcept
        int32_t decode(int32_t n_steps, const int64_t* seq_ids, const int32_t* stop_ids, const int32_t* stop_offsets,
                       TokenQueue* queue, ControlFlag* control, int32_t* out) noexcept
        void set_slot(int32_t slot, const SlotSampling& params, const int32_t* edits, int32_t n_words) noexcept
        int32_t n_ops() noexcept
        int32_t buffer_rows(int32_t buffer) noexcept
        const float* buffer_data(int32_t buffer) noexcept
        int64_t kv_bytes() noexcept
        int64_t workspace_bytes() noexcept
        int n_threads() noexcept
        cbool files_changed() noexcept
