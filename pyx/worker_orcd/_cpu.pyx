# cython: language_level=3, boundscheck=True, wraparound=False
"""The CPU engine: lowers a plan to flat C structs once, then runs steps in C++ with the GIL released.

Implements `worker_orcd.engine.protocol.Engine`. Weights are read where they lie, in the mapping of the model file;
vectors are widened to float32. Everything that comes from Python is checked here or in the C++ `prepare`, so that no
call can take the process down.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t
from libc.string cimport memcpy
from libcpp cimport bool as cbool
from posix.unistd cimport getpid

from worker_orcd._params cimport SlotSampling, fill_SlotSampling
from worker_orcd._ring cimport Control, ControlFlag, TokenRing

import os

import numpy as np

from worker_orcd.engine.kv_blocks import block_bytes
from worker_orcd.engine.protocol import BLOCK_SIZE, StepAborted, check_stop_offsets
from worker_orcd.engine.token_edits import NO_EDITS
from worker_orcd.errors import EngineGone, InsufficientMemory, InternalError, InvalidRequest, ModelLoadError
from worker_orcd.machine import free_memory, usable_cores
from worker_orcd.models.ops import ACT_ACTIVATIONS, GLU_ACTIVATIONS, output_of
from worker_orcd.gguf.quants import TYPES

_ACTIVATIONS = {"silu": <int>Activation.kSilu, "gelu_tanh": <int>Activation.kGeluTanh,
                "swiglu_oai": <int>Activation.kSwigluOai}
_ISAS = ("avx512vnni", "avx512", "avx2", "baseline")
_FLOAT_TYPES = (0, 1, 30)  # F32, F16, BF16
#: prompt tokens of a warm-up: enough to tell how fast a step is
WARM_ROWS = 16


def cpu_features():
    """What decides the speed here: `isa` (the kernels in use: "avx512vnni", "avx512", "avx2" or "baseline"),
    `available` (those this processor runs) and `cores` (usable by this process)."""
    names = [n for n in _ISAS if kernels_by_name(n.encode()) is not NULL]
    cdef const Kernels* chosen = choose_kernels()
    return {"isa": chosen.name.decode() if chosen is not NULL else None, "available": names, "cores": usable_cores()}


cdef const Kernels* _kernels(object isa) except NULL:
    cdef const Kernels* k
    if isa is None:
        k = choose_kernels()
        isa = os.environ.get("WORKER_ORCD_CPU_ISA")
    else:
        k = kernels_by_name(isa.encode())
    if k is NULL:
        raise InvalidRequest(f"instruction set {isa!r} is unknown or this processor lacks it; "
                             f"it has {', '.join(cpu_features()['available'])}", field="WORKER_ORCD_CPU_ISA")
    return k


def dequantize(type_id, buffer, n_elements, isa=None):
    """Exact float32 values of quantized blocks.

    Args:
        type_id: ggml type id, one of `quants.TYPES`.
        buffer: the bytes, at least those of `n_elements`.
        n_elements: a multiple of the type's block size.
        isa: "avx512vnni", "avx512", "avx2" or "baseline"; by default the one in use. All give the same bits (NaN
            payloads excepted).

    Returns:
        float32 array [n_elements].

    Raises:
        InvalidRequest: unknown type or instruction set, a size that does not fit.
    """
    cdef const Kernels* k = _kernels(isa)
    if type_id not in TYPES:
        raise InvalidRequest(f"type id {type_id} is not supported", field="type_id")
    quant = TYPES[type_id]
    if n_elements < 0 or n_elements % quant.block_size:
        raise InvalidRequest(f"{n_elements} elements are no multiple of the block of {quant.block_size}",
                             field="n_elements")
    out = np.empty(n_elements, np.float32)
    if n_elements == 0:
        return out
    cdef const uint8_t[::1] src = memoryview(buffer).cast("B")
    if src.shape[0] < quant.row_bytes(n_elements):
        raise InvalidRequest(f"{src.shape[0]} bytes hold fewer than {n_elements} elements of {quant.name}",
                             field="buffer")
    cdef float[::1] dst = out
    cdef int type_c = type_id
    cdef int64_t n = n_elements
    with nogil:
        k.dequantize(type_c, &src[0], &dst[0], n)
    return out


cdef SlotSampling _slot_sampling(sampling, edits, n_vocab) except *:
    """The C struct of a `SamplingParams` and its edits, or InvalidRequest naming what is out of range."""
    cdef SlotSampling p
    edits.check(n_vocab)
    fill_SlotSampling(&p, {**sampling.numbers(), **edits.counts()}, ())
    return p


def sample_token(logits, position, sampling, sampled=(), edits=NO_EDITS):
    """Draw one token by the rule of `csrc/params/sampling.h`, as `step` does for each output row.

    Args:
        logits: float32 [n_vocab].
        position: of the row; the drawn token's is one further.
        sampling: `SamplingParams` with a seed.
        sampled: token ids drawn before in the slot, in order.
        edits: `TokenEdits` of the slot.

    Returns:
        The token id; -1 where the row has a NaN, a +infinity or nothing above -infinity.

    Raises:
        InvalidRequest: names the argument or sampling field that is out of range.
    """
    cdef float[::1] row = np.array(logits, np.float32).reshape(-1)
    cdef int64_t n_vocab = row.shape[0]
    if not 0 < n_vocab < 1 << 24:
        raise InvalidRequest(f"logits of {n_vocab} tokens", field="logits")
    cdef SlotSampling p = _slot_sampling(sampling, edits, n_vocab)
    cdef const int32_t* words = _int32s(edits.words)
    if not 0 <= position < (1 << 31) - 1:
        raise InvalidRequest(f"position {position} is out of range", field="position")
    cdef SampledTokens* history = new SampledTokens(n_vocab, n_vocab)
    cdef SampleScratch* scratch = NULL
    try:
        scratch = new SampleScratch(n_vocab)
        for token in sampled:
            if not 0 <= token < n_vocab:
                raise InvalidRequest(f"sampled token {token} is not in the vocabulary of {n_vocab}", field="sampled")
            history.insert(token)
        return draw_token(&row[0], n_vocab, position, p, words, history[0], scratch[0])
    finally:
        del history
        del scratch


def _int_array(values, dtype, field, size=None):
    """`values` as a contiguous array of the integer type, or InvalidRequest naming the field."""
    a = np.asarray(values)
    if a.ndim != 1 or (a.size and a.dtype.kind not in "iub"):
        raise InvalidRequest(f"{field} must be a flat array of integers", field=field)
    info = np.iinfo(dtype)
    if a.size and a.dtype != dtype and (int(a.min()) < info.min or int(a.max()) > info.max):
        raise InvalidRequest(f"{field} has a number that is no {np.dtype(dtype).name}", field=field)
    if size is not None and a.size != size:
        raise InvalidRequest(f"{field} has {a.size} entries, not {size}", field=field)
    return np.ascontiguousarray(a, dtype)


cdef const ControlFlag* _flag(Control control) noexcept:
    if control is None:
        return NULL
    return control.flag


cdef const int32_t* _int32s(const int32_t[::1] a) noexcept:
    return &a[0] if a.shape[0] > 0 else NULL


def _no_memory(plan, config):
    kv = sum(n * size for n, size in zip(config.n_blocks, block_bytes(plan), strict=True))
    buffers = 4 * config.max_batch_tokens * sum(buffer.width for buffer in plan.buffers.values())
    tables = 4 * len(plan.kv_groups) * config.max_seqs * config.max_blocks_per_seq
    free = free_memory()
    return InsufficientMemory(
        f"the CPU engine needs more than {kv + buffers + tables:,} bytes of memory (KV cache {kv:,}, activations "
        f"{buffers:,}), and the system does not give them"
        f"{'' if free is None else f'; {free:,} bytes are free'}", kv + buffers + tables, free)


cdef class CpuEngine:
    """A model on the CPU; see `worker_orcd.engine.protocol.Engine` for the protocol.

    Args:
        model_file: an open `ModelFile`; the engine keeps it alive and reads weights from its mapping.
        plan: of that file.
        config: sizes fixed at start-up; all memory is reserved here (pages cost memory when first used).
        n_threads: 0 takes the cores this process may use.

    Attributes:
        n_vocab, config, block_tables, rope_tables: of the protocol.
        n_threads: threads that work on a step, the caller's included.
        isa: the kernels in use.
        kv_bytes, workspace_bytes: reserved for the KV pools, and for activations and scratch.

    Raises:
        InvalidRequest: sizes out of range, an unknown WORKER_ORCD_CPU_ISA.
        InsufficientMemory: the system does not give the memory; both numbers.
        InternalError: a plan that does not fit its file or itself; fewer threads than asked for.
    """

    cdef Engine* engine
    cdef readonly object config, block_tables, rope_tables, n_vocab, isa, warm_rows, warm_outputs, warm_seqs
    cdef object model_file, plan, views, op_index, op_buffer, buffer_index
    cdef int32_t[:, :, ::1] tables
    cdef int32_t[::1] rope_tables_view
    cdef int pid
    cdef cbool busy

    def __cinit__(self, *args, **kwargs):
        self.engine = NULL

    def __init__(self, model_file, plan, config, n_threads=0):
        if self.engine is not NULL:
            raise InternalError("an engine is made once")
        for field, low, high in (("max_seqs", 1, 65536), ("max_batch_tokens", config.max_seqs, 1 << 20),
                                 ("context_length", 1, 1 << 26)):
            if not low <= getattr(config, field) <= high:
                raise InvalidRequest(f"{field} must be {low} to {high}, not {getattr(config, field)}", field=field)
        if not 0 <= n_threads <= 1024:
            raise InvalidRequest(f"n_threads must be 0 to 1024, not {n_threads}", field="n_threads")
        if len(config.n_blocks) != len(plan.kv_groups) or any(not 1 <= n < 1 << 31 for n in config.n_blocks):
            raise InvalidRequest(f"n_blocks must be one positive number for each of the {len(plan.kv_groups)} "
                                 "KV groups", field="n_blocks")
        if BLOCK_SIZE != kBlockPositions:
            raise InternalError(f"the kernels are built for blocks of {kBlockPositions} positions")
        self.pid = getpid()
        # every shape runs the same code; one small step brings pages of the file and of the workspace
        self.warm_rows, self.warm_outputs, self.warm_seqs = (min(WARM_ROWS, config.max_batch_tokens),), (), ()
        self.model_file, self.plan, self.config, self.n_vocab = model_file, plan, config, plan.n_vocab
        cdef const Kernels* kernels = _kernels(None)
        self.isa = kernels.name.decode()
        cdef EngineSizes sizes
        sizes.max_seqs, sizes.max_batch_tokens = config.max_seqs, config.max_batch_tokens
        sizes.context_length = min(config.context_length, plan.max_positions or config.context_length)
        sizes.max_blocks_per_seq = config.max_blocks_per_seq
        sizes.n_vocab, sizes.n_head_kv, sizes.head_dim = plan.n_vocab, plan.n_head_kv, plan.head_dim
        cdef int threads = n_threads or usable_cores()
        cdef WatchedFile file
        shape = (len(plan.kv_groups), config.max_seqs, config.max_blocks_per_seq)
        try:
            self.engine = new Engine(sizes, threads, kernels)
        except RuntimeError as e:
            raise InternalError(f"the system gives no {threads} threads for the CPU engine: {e}") from None
        except MemoryError:
            raise _no_memory(plan, config) from None
        try:
            for part in getattr(model_file, "parts", ()):
                file.fd, file.size, file.mtime_ns = part.fileno(), part.size, part.stat.st_mtime_ns
                self.engine.watch(file)
            _Lowering(self).run()
            self.engine.finish(self.buffer_index["logits"])
            # Backed by a bytearray, which cannot be resized while it is looked at; an array's own memory could be.
            self.block_tables = np.frombuffer(bytearray(4 * shape[0] * shape[1] * shape[2]), np.int32).reshape(shape)
        except MemoryError:
            raise _no_memory(plan, config) from None
        except RuntimeError as e:
            raise InternalError(f"the CPU engine could not be set up: {e}") from None
        self.block_tables[:] = -1
        self.tables = self.block_tables
        self.rope_tables = np.frombuffer(bytearray(4 * config.max_seqs), np.int32)
        self.rope_tables_view = self.rope_tables

    def __dealloc__(self):
        # A forked child has none of the pool's threads: joining them would wait for ever.
        if self.engine is not NULL and self.pid == getpid():
            with nogil:
                del self.engine

    @property
    def n_threads(self):
        return self.engine.n_threads() if self.engine is not NULL else 0

    @property
    def kv_bytes(self):
        return self.engine.kv_bytes() if self.engine is not NULL else 0

    @property
    def workspace_bytes(self):
        return self.engine.workspace_bytes() if self.engine is not NULL else 0

    cdef int _check_usable(self) except -1:
        if self.engine is NULL:
            raise EngineGone("the engine is closed")
        if self.busy:
            raise InternalError("the engine is in use by another thread")
        if self.pid != getpid():
            raise EngineGone("the engine was made before this process forked; it works in the parent only")
        return 0

    cdef int _check_files(self) except -1:
        """Void what was just computed where a weight may have changed under it. Other names of a file are nothing."""
        self.model_file.check_unchanged(same_path=False)
        if self.engine.files_changed():
            raise ModelLoadError("was written to while a step read it", self.model_file.path)
        return 0

    cdef int _prepare(self, tokens, positions, slots, output_indices, int32_t n_steps) except -1:
        """Check and copy a batch; arrays as `_int_array` gives them."""
        cdef BatchView batch
        cdef BatchError error
        batch.n_rows, batch.n_out, batch.n_steps = len(tokens), len(output_indices), n_steps
        batch.tokens, batch.positions = _int32s(tokens), _int32s(positions)
        batch.slots, batch.output_indices = _int32s(slots), _int32s(output_indices)
        batch.rope_tables = &self.rope_tables_view[0]
        if not self.engine.prepare(batch, &self.tables[0, 0, 0], &error):
            field, message = error.field.decode(), error.message.decode()
            if field in ("tokens", "positions"):
                raise InvalidRequest(message, field=field)
            raise InternalError(message, field=field)
        return 0

    cdef int _prepare_batch(self, batch) except -1:
        tokens = _int_array(batch.tokens, np.int32, "tokens")
        n = len(tokens)
        if not 0 <= batch.n_decode <= n:
            raise InternalError(f"n_decode {batch.n_decode} is not 0 to {n}", field="n_decode")
        return self._prepare(tokens, _int_array(batch.positions, np.int32, "positions", n),
                             _int_array(batch.slots, np.int32, "slots", n),
                             _int_array(batch.output_indices, np.int32, "output_indices"), 1)

    def set_slot(self, slot, sampling, edits=NO_EDITS):
        """Give a slot to a new sequence: how its tokens are drawn; those of the one before are forgotten.

        Args:
            slot: index of the slot.
            sampling: `SamplingParams` with a seed.
            edits: `TokenEdits`.

        Raises:
            InternalError: slot out of range, or the engine is closed or busy.
            InvalidRequest: a sampling number or an edit out of range.
        """
        self._check_usable()
        if not 0 <= slot < self.config.max_seqs:
            raise InternalError(f"slot {slot} is not below {self.config.max_seqs}", field="slot")
        cdef SlotSampling p = _slot_sampling(sampling, edits, self.n_vocab)
        self.engine.set_slot(slot, p, _int32s(edits.words), len(edits.words))

    def step(self, batch, want_logits=False, Control control=None):
        """Run one ragged step; releases the GIL while it works. An abort of `control` ends it soon.

        Returns:
            (sampled int32 [n_out], logits float32 [n_out, n_vocab] or None). A sampled -1 means that the row's logits
            hold a NaN or a +infinity or nothing else than -infinity: there is nothing to draw from.

        Raises:
            InvalidRequest: a token or position out of range; `fields["field"]` names the array.
            InternalError: slots, output_indices or block tables that cannot be, or the engine is busy.
            ModelLoadError: the model file was cut or written to; nothing that was computed counts.
            StepAborted: `control` was aborted.
            EngineGone: the engine is closed, or was made before this process forked.
        """
        self._check_usable()
        self._prepare_batch(batch)
        cdef Py_ssize_t n_out = len(batch.output_indices)
        sampled = np.empty(n_out, np.int32)
        logits = np.empty((n_out, self.n_vocab), np.float32) if want_logits else None
        cdef int32_t[::1] sampled_view = sampled
        cdef float[:, ::1] logits_view = logits
        cdef float* logits_data = &logits_view[0, 0] if logits is not None and n_out > 0 else NULL
        cdef int32_t* sampled_data = &sampled_view[0] if n_out > 0 else NULL
        cdef const ControlFlag* flag = _flag(control)
        cdef cbool done
        self.busy = True
        try:
            with nogil:
                done = self.engine.run(self.engine.n_ops(), logits_data, flag)
                if done and n_out > 0:
                    self.engine.sample_rows(sampled_data)
        finally:
            self.busy = False
        self._check_files()
        if not done:
            raise StepAborted
        return sampled, logits

    def forward(self, batch, stop_after=None, Control control=None):
        """Run one step without sampling.

        Args:
            batch: the rows.
            stop_after: name of an op of the plan.
            control: an abort ends it, as in `step`.

        Returns:
            float32 logits [n_out, n_vocab]; with `stop_after` the whole buffer that op writes, [rows, width]
            (`KvWrite`: the buffer of the keys it stored).

        Raises:
            as `step`; InternalError: no op has that name.
        """
        self._check_usable()
        if stop_after is not None and stop_after not in self.op_index:
            raise InternalError(f"the plan has no op {stop_after!r}", field="stop_after")
        self._prepare_batch(batch)
        cdef int32_t n_ops = self.engine.n_ops() if stop_after is None else self.op_index[stop_after] + 1
        cdef int32_t buffer = self.buffer_index["logits"] if stop_after is None else self.op_buffer[stop_after]
        cdef Py_ssize_t rows = self.engine.buffer_rows(buffer)
        out = np.empty((rows, self.plan.buffers[list(self.buffer_index)[buffer]].width), np.float32)
        cdef float[:, ::1] view = out
        cdef size_t n_bytes = out.nbytes
        cdef float* data = &view[0, 0] if n_bytes > 0 else NULL
        cdef cbool is_logits = buffer == self.buffer_index["logits"]
        cdef const ControlFlag* flag = _flag(control)
        cdef cbool done
        self.busy = True
        try:
            with nogil:
                done = self.engine.run(n_ops, data if is_logits else NULL, flag)
                if not is_logits and n_bytes > 0:
                    memcpy(data, self.engine.buffer_data(buffer), n_bytes)
        finally:
            self.busy = False
        self._check_files()
        if not done:
            raise StepAborted
        return out

    def copy_block(self, int64_t group, int64_t source, int64_t target):
        """Copy a block of a KV group to another one, in all its layers.

        Raises:
            InternalError: there is no such group or block, or the engine is busy.
            EngineGone: as `step`.
        """
        self._check_usable()
        cdef cbool there
        self.busy = True
        try:
            with nogil:
                there = self.engine.copy_block(group, source, target)
        finally:
            self.busy = False
        if not there:
            raise InternalError(f"KV group {group} has no block {source} or {target}", field="block")

    def decode(self, slots, seq_ids, tokens, positions, n_steps, stop_ids, stop_offsets, ring, control):
        """Run up to `n_steps` steps of all `slots` together, each feeding its sampled token to its next step.

        See `worker_orcd.engine.protocol.Engine.decode`. At least one step runs, unless it is aborted. A token
        of -1 (nothing to draw from, see `step`) also ends the call at that step; it goes into the result and not into
        the ring.

        Raises:
            as `step`; the positions and blocks of all `n_steps` steps are checked before the first.
        """
        self._check_usable()
        slots_a = _int_array(slots, np.int32, "slots")
        n = len(slots_a)
        if not 1 <= n_steps < 1 << 26:
            raise InternalError(f"n_steps must be at least 1, not {n_steps}", field="n_steps")
        output_indices = np.arange(n, dtype=np.int32)
        cdef int64_t[::1] seq_view = _int_array(seq_ids, np.int64, "seq_ids", n)
        cdef int32_t[::1] stop_view = _int_array(stop_ids, np.int32, "stop_ids")
        offsets = _int_array(stop_offsets, np.int32, "stop_offsets", n + 1)
        check_stop_offsets(offsets, n, stop_view.shape[0])
        cdef int32_t[::1] offsets_view = offsets
        cdef TokenRing ring_c = ring
        cdef Control control_c = control
        if ring_c is None or control_c is None:
            raise InternalError("decode needs a ring and a control")
        self._prepare(_int_array(tokens, np.int32, "tokens", n), _int_array(positions, np.int32, "positions", n),
                      slots_a, output_indices, n_steps)
        out = np.empty((n_steps, n), np.int32)
        cdef int32_t[:, ::1] out_view = out
        cdef int32_t n_steps_c = n_steps, done
        cdef const int32_t* stop_data = _int32s(stop_view)
        self.busy = True
        try:
            with nogil:
                done = self.engine.decode(n_steps_c, &seq_view[0], stop_data, &offsets_view[0],
                                          ring_c.queue, control_c.flag, &out_view[0, 0])
        finally:
            self.busy = False
        self._check_files()
        return out[:done]

    def close(self):
        """Free everything; the engine is dead afterwards. Idempotent.

        Raises:
            InternalError: another thread is in a call.
        """
        if self.engine is NULL:
            return
        self._check_usable()
        cdef Engine* engine = self.engine
        self.engine = NULL
        with nogil:
            del engine
        self.views = self.model_file = None


include "_cpu_lowering.pxi"
