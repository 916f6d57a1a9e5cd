# cython: language_level=3
"""The CUDA engine: a lowered plan as launches, the ragged step, and the decode loop without the Python lock.

All device memory is in three arenas that are allocated before the weights are read; nothing is allocated afterwards.
A decode step is one CUDA graph per batch size, captured at start-up; between steps nothing but token ids crosses to
the host. Implements `worker_orcd.engine.protocol.Engine`.
"""

from contextlib import closing

import numpy as np

from cuda.bindings cimport cydriver as cu
from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memset
from libcpp.vector cimport vector

from worker_orcd cimport _params as c
from worker_orcd._driver cimport (
    Context, DeviceMemory, Graph, Kernel, LaunchList, PinnedMemory, Stream, launch_nogil,
)
from worker_orcd._nodes cimport Node, Shape
from worker_orcd._ring cimport Control, TokenRing
from worker_orcd._upload cimport Consumer

from worker_orcd._driver import device_copy_gbps
from worker_orcd._nodes import attention_heads, decode_max_splits, decode_partial_rows, sample_sizes
from worker_orcd._upload import FileRange, upload
from worker_orcd.cuda import layout
from worker_orcd.cuda import lowering as lowerings
from worker_orcd.cuda import memory as cuda_memory
from worker_orcd.cuda.launches import Launches, StepLaunch
from worker_orcd.cuda.lowering import ExpertGroup, MatMulGroup, NormRoute, RopeKv, RopeKvAttention, lower
from worker_orcd.cuda.slow_paths import slow_paths
from worker_orcd.cuda.vram import VramPlan
from worker_orcd.engine.protocol import BLOCK_SIZE, Batch, check_stop_offsets
from worker_orcd.engine.token_edits import NO_EDITS
from worker_orcd.errors import (
    CudaError, EngineGone, InsufficientVram, InternalError, InvalidRequest, ModelLoadError,
)
from worker_orcd.gguf import quants
from worker_orcd.models import ops as plan_ops

cdef extern from *:
    """
    #include <atomic>
    #include <immintrin.h>
    static inline void orcd_fence() { std::atomic_thread_fence(std::memory_order_acquire); }
    """
    void cpu_relax "_mm_pause"() nogil
    void fence "orcd_fence"() nogil

#: batch sizes for which a decode step is captured; a batch runs in the smallest that holds it
DECODE_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
#: steps whose tokens may be on their way to the host at once
cdef enum:
    IN_FLIGHT = 2
    SPINS = 64          # looks at work that takes microseconds before it is waited for without the GIL
    FIRST_LAUNCHES = 32  # of a step that are queued while the others are put together
    RING_STEPS = 64     # rows of the pinned token ring; more than IN_FLIGHT
    MAX_BATCH = 256


include "engine_load.pxi"


cdef class CudaEngine:
    """A model in the memory of one GPU.

    Args:
        model_file: the open `ModelFile`; not needed after construction.
        plan: its `Plan`.
        config: `EngineConfig`; max_seqs at most 64.
        device: index of the GPU.
        progress: called with (bytes done, bytes in all) while weights are loaded, first when that is under way; or
            None.
        check: refuse NaN and infinity in values and block scales, as `ModelFile.check_tensors`, and weights of K-quants
            that are too large to be multiplied in fp16.
        context: a `Context` to use instead of opening one (tests); not closed by the engine.
        on_plan: called with (`VramPlan`, free bytes) before anything is allocated, also where it does not fit.

    Attributes:
        lowering: "fused" or "plain", `lowering.asked_for` when the engine was made.
        ops: the lowered ops of a step, in order.
        slow_paths: the `SlowPath`s of the plan on this GPU.

    Raises:
        InvalidRequest: sizes out of range, an unknown WORKER_ORCD_LOWERING.
        InsufficientVram: weights, KV cache and workspace need more than is free, or the driver gives less than it said;
            carries both numbers.
        InsufficientMemory: the system gives no page-locked memory.
        CudaError: the driver refused something.
        ModelLoadError: a shape that no kernel is built for, or the file changed while it was read, or `check` found
            something.
    """

    cdef readonly object plan, config, block_tables, rope_tables, memory, vram_plan, warm_rows, warm_outputs, warm_seqs
    cdef readonly object lowering, ops, slow_paths
    cdef readonly Context context
    cdef readonly int n_vocab
    cdef int max_out    # output rows of a pass
    cdef DeviceMemory weights, kv, workspace
    cdef object launches    # `Launches`
    cdef list nodes, output_nodes, step_sampler, short
    cdef list node_ops      # the lowered op of each of `nodes`, then of `output_nodes`
    cdef dict op_nodes      # lowered op -> its nodes, of ops that `forward_ops` was asked for
    cdef Stream stream
    cdef LaunchList pending     # of the part of a step that is being queued
    cdef PinnedMemory staging, out_ring
    cdef dict graphs, decode_samplers
    cdef bint own_context, closed
    cdef size_t staged      # bytes of the staging area whose copies may still be under way
    cdef uint64_t steps     # steps sampled since the start, as the device counts them
    cdef readonly object load_stats     # `UploadStats` of the weights

    def __init__(self, model_file, plan, config, int device=0, size_t chunk_bytes=1 << 20, progress=None,
                 Context context=None, on_plan=None, bint check=False):
        if not 1 <= config.max_seqs <= MAX_BATCH:
            raise InvalidRequest(f"max_seqs must be 1 to {MAX_BATCH} on a GPU, not {config.max_seqs}", field="max_seqs")
        self.lowering = lowerings.asked_for()
        self.plan, self.config, self.n_vocab = plan, config, plan.n_vocab
        self.max_out = cuda_memory.output_rows(config)
        self.graphs, self.op_nodes, self.pending = {}, {}, LaunchList()
        check_supported(model_file, plan)
        self.ops = lower(plan, fuse=self.lowering == "fused")
        self.memory = plan_memory(plan, config)
        self.own_context = context is None
        self.context = Context(device) if context is None else context
        self.block_tables = np.full((len(plan.kv_groups), config.max_seqs, config.max_blocks_per_seq), -1, np.int32)
        self.rope_tables = np.zeros(config.max_seqs, np.int32)
        try:
            self.slow_paths = slow_paths(plan, self.context.max_smem, self.lowering == "fused")
            self._allocate(model_file, on_plan)
            self._load(model_file, check, chunk_bytes, progress)
            self._build()
            self._capture()
        except BaseException as error:
            short = self._short_of_memory(error, model_file)
            self.close()
            if short is not None:
                raise short from error
            raise

    def _short_of_memory(self, error, model_file):
        """What to raise in the place of a driver call's error that there is no memory, else None."""
        if not isinstance(error, CudaError) or error.fields.get("status_name") != "CUDA_ERROR_OUT_OF_MEMORY":
            return None
        try:
            free, _ = self.context.memory()
        except CudaError:
            return None     # the first error says more
        device, needed = f"cuda:{self.context.device}", self.vram_plan.required
        return InsufficientVram(
            f"{model_file.path} needs {needed:,} bytes of device memory; beside those that it has taken, {device} has "
            f"{free:,} free ({error.message})", needed, free, device=device, path=model_file.path)

    # ---- memory and weights

    def _allocate(self, model_file, on_plan):
        """The three arenas, checked against what is free before the first byte is taken."""
        self.vram_plan = VramPlan.of(self.memory)
        free, _ = self.context.memory()
        if on_plan is not None:
            on_plan(self.vram_plan, free)
        self.vram_plan.check(free, f"cuda:{self.context.device}", model_file.path)
        self.weights = self.context.allocate(self.memory.weights.nbytes, "weights")
        self.kv = self.context.allocate(self.memory.kv.nbytes, "kv")
        self.workspace = self.context.allocate(self.memory.workspace.nbytes, "workspace")
        self.kv.fill(0)
        self.workspace.fill(0)
        self.memory = cuda_memory.Arenas(*(
            arena.at(memory.pointer)
            for arena, memory in zip(self.memory, (self.weights, self.kv, self.workspace), strict=True)))
        self.stream = self.context.stream()
        self.launches = Launches(self.plan, self.config, self.context, self.memory)

    def _load(self, model_file, bint check, size_t chunk_bytes, progress):
        """All weights into their regions, matrices repacked on the device."""
        weights = self.memory.weights
        pieces = _pieces(model_file, self.plan, weights, self.weights, check)
        total = sum(piece.nbytes for piece in pieces)
        with closing(self.context.allocate(cuda_memory.STAGING_BYTES, "staging")) as staging:
            self.load_stats = upload(
                self.context, pieces, consume=_Repack(self.launches, weights), stream=self.stream,
                staging=staging, chunk_bytes=chunk_bytes,
                progress=None if progress is None else lambda done: progress(min(done, total), total))

    # ---- one step

    def _check_batch(self, batch):
        """Refuse rows that no kernel could survive. Returns int32 arrays (tokens, positions, slots, output_indices)."""
        tokens, positions, slots, output_indices = (
            np.ascontiguousarray(a, np.int32)
            for a in (batch.tokens, batch.positions, batch.slots, batch.output_indices))
        n = len(tokens)
        if not 1 <= n <= self.config.max_batch_tokens or len(positions) != n or len(slots) != n:
            raise InvalidRequest(f"a step takes 1 to {self.config.max_batch_tokens} rows, not {n}", field="rows")
        if not 0 <= batch.n_decode <= min(n, self.config.max_seqs):
            raise InvalidRequest(f"n_decode {batch.n_decode} of {n} rows", field="n_decode")
        self._check_rows(tokens, positions, positions, slots)
        if len(output_indices) and (output_indices.min() < 0 or output_indices.max() >= n):
            raise InvalidRequest(f"an output row lies outside 0..{n - 1}", field="output_indices")
        self._check_blocks(slots, positions, positions)
        return tokens, positions, slots, output_indices

    def _check_rows(self, tokens, first, last, slots):
        """Refuse tokens, positions from `first` to `last` and slots that are outside the model and the engine."""
        limit = self.config.context_length
        if self.plan.max_positions is not None:
            limit = min(limit, self.plan.max_positions)
        if tokens.min() < 0 or tokens.max() >= self.n_vocab:
            raise InvalidRequest(f"a token id lies outside 0..{self.n_vocab - 1}", field="token")
        if first.min() < 0 or last.max() >= limit:
            raise InvalidRequest(f"a position lies outside 0..{limit - 1}", field="position")
        if slots.min() < 0 or slots.max() >= self.config.max_seqs:
            raise InvalidRequest(f"a slot lies outside 0..{self.config.max_seqs - 1}", field="slot")
        tables = self.rope_tables[slots]
        if tables.min() < 0 or tables.max() > len(self.plan.rope_limits):
            slot = slots[(tables < 0) | (tables > len(self.plan.rope_limits))][0]
            raise InternalError(f"slot {slot}: frequency table {self.rope_tables[slot]} is not below "
                                f"{len(self.plan.rope_limits) + 1}", field="rope_tables")

    def _check_blocks(self, slots, first, last):
        """Every position a row reads or writes, from `first` to `last`, must have a block of its group's pool."""
        used, row_slot = np.unique(slots, return_inverse=True)
        low, high = np.full(len(used), np.iinfo(np.int32).max, np.int32), np.zeros(len(used), np.int32)
        np.minimum.at(low, row_slot, first)
        np.maximum.at(high, row_slot, last)
        high //= BLOCK_SIZE
        numbers = np.arange(high.max() + 1)
        for g, group in enumerate(self.plan.kv_groups):
            lowest = np.maximum(low - group.window + 1, 0) // BLOCK_SIZE if group.window else np.zeros_like(low)
            needed = (numbers >= lowest[:, np.newaxis]) & (numbers <= high[:, np.newaxis])
            blocks = self.block_tables[g, used, :len(numbers)]
            bad = needed & ((blocks < 0) | (blocks >= self.config.n_blocks[g]))
            if bad.any():
                raise InternalError(f"slot {used[bad.any(axis=1)][0]} has no KV block for a position of its rows "
                                    f"(group {g})", field="block")

    cdef int _send(self, region, array) except -1:
        """Queue a host array into a `Region` of the workspace, by way of the pinned staging area."""
        cdef const uint8_t[::1] view = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        cdef size_t n = view.shape[0]
        cdef uintptr_t address = region.address
        if n == 0:
            return 0
        if self.staged + n > self.staging.nbytes:
            raise InternalError("the staging area of a step is too small")
        memcpy(<char*>self.staging.host + self.staged, &view[0], n)
        self.stream.copy_in_nogil(<cu.CUdeviceptr>address, <char*>self.staging.host + self.staged, n)
        self.staged += (n + 255) // 256 * 256
        return 0

    cdef int _collect(self, list nodes, const Shape* shape) except -1:
        """Put the launches of `nodes` together in `pending`."""
        cdef Node node
        self.pending.clear()
        for node in nodes:
            node.enqueue(self.pending, shape)
        return 0

    cdef int _begin(self, list nodes, const Shape* shape) except -1:
        """As `_collect`, but the first launches are queued: the device works on them while the others are put
        together."""
        cdef Node node
        cdef bint begun = False
        self.pending.clear()
        for node in nodes:
            node.enqueue(self.pending, shape)
            if not begun and self.pending.records.size() >= FIRST_LAUNCHES:
                begun = True
                self.pending.queue(self.stream.handle)
                self.pending.clear()
        return 0

    cdef int _enqueue(self, list nodes, const Shape* shape) except -1:
        self._collect(nodes, shape)
        with nogil:
            self.pending.queue(self.stream.handle)
        return 0

    cdef int _run_step(self, list nodes, const Shape* shape) except -1:
        """Queue the launches of `nodes` and wait for the stream. The lock is let go once for both: while other threads
        want it, each time may cost milliseconds until it is back."""
        self._begin(nodes, shape)
        with nogil:
            self.pending.queue(self.stream.handle)
            self.stream.wait_nogil()
        self.staged = 0
        return 0

    cdef int _finish(self) except -1:
        """Wait for the stream; the lock is released."""
        with nogil:
            self.stream.wait_nogil()
        self.staged = 0
        return 0

    def _send_rows(self, tokens, positions, slots, output_indices, int n_decode):
        """Queue the row tables and block tables of a step.

        Returns:
            number of attention tiles.
        """
        w, tiles = self.memory.workspace, _tiles(positions, slots, n_decode)
        self._send(w.tokens, tokens)
        self._send(w.positions, positions)
        self._send(w.slots, slots)
        self._send(w.output_indices, output_indices)
        self._send(w.tiles, tiles)
        self._send(w.block_tables, self.block_tables)
        if self.plan.rope_limits:
            self._send(w.rope_tables, self.rope_tables)
        return len(tiles)

    def step(self, batch, want_logits=False, control=None):
        """See `engine.Engine.step`. Nothing aborts it: what was queued on the device cannot be taken back."""
        cdef Shape shape
        self._enter()
        tokens, positions, slots, output_indices = self._check_batch(batch)
        if len(output_indices) > self.max_out:
            raise InvalidRequest(f"a step samples at most {self.max_out} rows, not {len(output_indices)}",
                                 field="output_indices")
        shape.n_rows, shape.n_decode, shape.n_out = len(tokens), batch.n_decode, len(output_indices)
        shape.n_tiles = self._send_rows(tokens, positions, slots, output_indices, batch.n_decode)
        if shape.n_out:
            self._send(self.memory.workspace.sampling.slots, slots[output_indices])
            self._send(self.memory.workspace.sampling.positions, positions[output_indices])
        launches = [*self.nodes, *self.output_nodes]
        logits = None
        if want_logits:     # before the draw: it edits them
            self._run_step(launches, &shape)
            logits = self._logits(shape.n_out)
            launches = []
        sampled = np.empty(shape.n_out, np.int32)
        if shape.n_out:
            launches += self.step_sampler
            self.steps += 1
        self._run_step(launches, &shape)
        if shape.n_out:
            sampled[:] = np.frombuffer(self.out_ring.read(4 * shape.n_out, _ring_offset(self.steps - 1)), np.int32)
        return sampled, logits

    def _logits(self, int n):
        return self._read("logits", np.empty((n, self.n_vocab), np.float32))

    def _read(self, buffer, out):
        """`out`, filled from the start of a buffer of the plan."""
        if out.size:
            self.workspace.copy_to(out.reshape(-1).view(np.uint8), self.memory.workspace.buffers[buffer].offset)
        return out

    def set_slot(self, int slot, sampling, edits=NO_EDITS):
        """See `engine.Engine.set_slot`."""
        cdef c.SlotSampling* state
        cdef const int32_t[::1] edit_words = edits.words
        cdef size_t n_bytes = edit_words.shape[0] * sizeof(int32_t)
        self._enter()
        if not 0 <= slot < self.config.max_seqs:
            raise InvalidRequest(f"a slot lies outside 0..{self.config.max_seqs - 1}", field="slot")
        edits.check(self.n_vocab)
        words = (self.n_vocab + 31) // 32
        state = <c.SlotSampling*>self.staging.host
        self.staged = sizeof(c.SlotSampling)
        c.fill_SlotSampling(state, {**sampling.numbers(), **edits.counts()}, ())
        self.short[slot] = bool(c.sample_is_short(state.temperature, state.top_k, self.n_vocab))
        regions = self.memory.workspace.sampling
        cdef uintptr_t samples = regions.samples.address, seen = regions.seen.address
        cdef uintptr_t region
        self.stream.copy_in_nogil(<cu.CUdeviceptr>(samples + slot * sizeof(c.SlotSampling)), state,
                                  sizeof(c.SlotSampling))
        self.stream.fill_nogil(<cu.CUdeviceptr>(seen + slot * words * 4), 0, words * 4)
        if state.n_edits:
            region = regions.edits.address + slot * (c.SAMPLING_EDIT_WORDS * 4)
            memcpy(<char*>self.staging.host + 256, &edit_words[0], n_bytes)
            self.stream.copy_in_nogil(<cu.CUdeviceptr>region, <char*>self.staging.host + 256, n_bytes)
            region = regions.history.address + slot * (c.SAMPLING_HISTORY_WORDS * 4)
            self.stream.fill_nogil(<cu.CUdeviceptr>region, 0, c.SAMPLING_HISTORY_WORDS * 4)
        if state.frequency_penalty != 0:
            region = regions.counts.address + slot * self.n_vocab * 4
            self.stream.fill_nogil(<cu.CUdeviceptr>region, 0, <size_t>self.n_vocab * 4)
        for _ in range(SPINS):
            if self.stream.idle_nogil():
                self.staged = 0
                return
        self._finish()

    def copy_block(self, int group, int64_t source, int64_t target):
        """See `engine.Engine.copy_block`. Queued before what is asked for later, which waits for it."""
        self._enter()
        if not 0 <= group < len(self.plan.kv_groups) or not (
                0 <= source < self.config.n_blocks[group] and 0 <= target < self.config.n_blocks[group]):
            raise InternalError(f"KV group {group} has no block {source} or {target}", field="block")
        if source == target:
            return
        cdef int64_t nbytes = cuda_memory.kv_block_bytes(self.plan)
        for layer in self.plan.kv_groups[group].layers:
            start = self.memory.kv.layers[layer].address
            self.stream.copy(start + target * nbytes, start + source * nbytes, nbytes)

    def forward(self, batch, stop_after=None, control=None):
        """See `engine.Engine.forward`. With `stop_after` the plan runs op by op, nothing fused."""
        cdef Shape shape
        if stop_after is not None:
            names = [op.name for op in self.plan.ops]
            if stop_after not in names:
                raise InvalidRequest(f"the plan has no op {stop_after!r}", field="stop_after")
            return self.forward_ops(batch, lower(self.plan, fuse=False)[:names.index(stop_after) + 1])
        self._enter()
        tokens, positions, slots, output_indices = self._check_batch(batch)
        shape.n_rows, shape.n_decode, shape.n_out = len(tokens), batch.n_decode, 0
        shape.n_tiles = self._send_rows(tokens, positions, slots, output_indices, batch.n_decode)
        self._enqueue(self.nodes, &shape)
        self._finish()
        logits = np.empty((len(output_indices), self.n_vocab), np.float32)
        for start in range(0, len(output_indices), self.max_out):
            part = output_indices[start:start + self.max_out]
            shape.n_out = len(part)
            self._send(self.memory.workspace.output_indices, part)
            self._enqueue(self.output_nodes, &shape)
            self._finish()
            logits[start:start + len(part)] = self._logits(len(part))
        return logits

    def forward_ops(self, batch, ops):
        """Run lowered ops of the plan in order, of either lowering or of both in turns; nothing is sampled.

        Args:
            batch: as of `forward`; of more output rows than a pass takes, at least 64, the first count.
            ops: as `lower` makes them, from the first of a step on.

        Returns:
            float32 [rows or output rows, width], the whole buffer that the last of them writes.
        """
        cdef Shape shape
        self._enter()
        tokens, positions, slots, output_indices = self._check_batch(batch)
        output_indices = output_indices[:self.max_out]
        shape.n_rows, shape.n_decode, shape.n_out = len(tokens), batch.n_decode, len(output_indices)
        shape.n_tiles = self._send_rows(tokens, positions, slots, output_indices, batch.n_decode)
        for op in ops:
            if op not in self.op_nodes:
                (_, self.op_nodes[op]), = self.launches.nodes((op,))
            self._enqueue(self.op_nodes[op], &shape)
        self._finish()
        view = plan_ops.output_of(_last(ops[-1]))
        n_rows = shape.n_out if self.launches.is_output(view) else shape.n_rows
        return self._read(view.buf, np.empty((n_rows, self.plan.buffers[view.buf].width), np.float32))

    # ---- the decode loop

    def _build(self):
        """Everything a step needs: launches, sampling, the staging area and the token ring."""
        self.nodes, self.output_nodes, self.node_ops = [], [], []
        output_ops = []
        for (_, nodes), op in zip(self.launches.nodes(self.ops), self.ops, strict=True):
            is_output = self.launches.is_output(plan_ops.output_of(_last(op)))
            (self.output_nodes if is_output else self.nodes).extend(nodes)
            (output_ops if is_output else self.node_ops).extend([op] * len(nodes))
        self.node_ops += output_ops
        self.staging = self.context.pinned(cuda_memory.staging_bytes(self.memory.workspace))
        self.out_ring = self.context.pinned(_ring_offset(0) + RING_STEPS * MAX_BATCH * 4)
        memset(self.out_ring.host, 0, self.out_ring.nbytes)
        self.short = [True] * self.config.max_seqs
        ring = {"out": self.out_ring.pointer + _ring_offset(0), "out_steps": RING_STEPS, "out_stride": MAX_BATCH,
                "host_step": self.out_ring.pointer}
        self.step_sampler = [self.launches.sampler(ring, feed_back=False, short=False)]
        self.decode_samplers = {short: self.launches.sampler(ring, feed_back=True, short=short)
                                for short in (True, False)}

    def _capture(self):
        """Record one decode step for every batch size, of short rows (`sample_is_short`) and of any; the row tables are
        the graphs' only inputs."""
        cdef Shape shape
        sizes = [n for i, n in enumerate(DECODE_SIZES) if not i or DECODE_SIZES[i - 1] < self.config.max_seqs]
        self.warm_rows = self.launches.warm_rows(self.config.max_batch_tokens)
        self.warm_outputs = self.launches.warm_rows(min(self.max_out, self.config.max_batch_tokens), True)
        self.warm_seqs = tuple(min(n, self.config.max_seqs) for n in sizes)
        for n in sizes:
            shape.n_rows = shape.n_decode = shape.n_out = n
            shape.n_tiles = 0
            for short in (True, False):
                try:
                    self.stream.begin_capture()
                    self._enqueue(self.nodes, &shape)
                    self._enqueue(self.output_nodes, &shape)
                    self._enqueue([self.decode_samplers[short]], &shape)
                except BaseException:
                    self.stream.abandon_capture()
                    raise
                self.graphs[n, short] = self.stream.end_capture()

    def decode(self, slots, seq_ids, tokens, positions, int n_steps, stop_ids, stop_offsets, TokenRing ring,
               Control control):
        """See `engine.Engine.decode`. Up to one step more than needed may run past a stop id or an interrupt; its
        tokens are returned, and those of slots that have not stopped go to the ring."""
        cdef int n = len(slots), size
        cdef int32_t[::1] stops = np.ascontiguousarray(stop_ids, np.int32)
        cdef int32_t[::1] offsets = np.ascontiguousarray(stop_offsets, np.int32)
        cdef int64_t[::1] ids = np.ascontiguousarray(seq_ids, np.int64)
        slots, tokens, positions = (np.ascontiguousarray(a, np.int32) for a in (slots, tokens, positions))
        self._enter()
        if not 1 <= n <= self.config.max_seqs or len(np.unique(slots)) != n:
            raise InvalidRequest(f"decode takes 1 to {self.config.max_seqs} distinct slots, not {n}", field="slots")
        if not len(tokens) == len(positions) == len(ids) == n or n_steps < 1:
            raise InvalidRequest("arrays of one decode call must have one length, and n_steps be positive",
                                 field="slots")
        check_stop_offsets(np.asarray(offsets), n, len(stops))
        last = positions + n_steps - 1
        self._check_rows(tokens, positions, last, slots)
        self._check_blocks(slots, positions, last)
        size = next(k for k in DECODE_SIZES if k >= n)
        pad = np.zeros(size - n, np.int32)
        self._send_rows(np.append(tokens, pad), np.append(positions, pad), np.append(slots, pad - 1),
                        np.arange(size, dtype=np.int32), size)
        out = np.empty((n_steps, n), np.int32)
        cdef int32_t[:, ::1] result = out
        cdef uint8_t[::1] stopped = np.zeros(n, np.uint8)
        cdef int done
        cdef Graph graph = self.graphs[size, all(self.short[slot] for slot in slots)]
        with nogil:
            done = self._run(graph, n, n_steps, result, ids, stops, offsets, stopped, ring, control)
        self.staged = 0
        return out[:done]

    cdef int _await_step(self, uint64_t step) except -1 nogil:
        """Wait until the device has written the tokens of `step` steps (counted from the engine's start)."""
        cdef volatile uint64_t* arrived = <volatile uint64_t*>self.out_ring.host
        cdef int spins = 0
        while arrived[0] < step:
            cpu_relax()
            spins += 1
            if spins == 1 << 16:
                spins = 0
                if self.stream.idle_nogil() and arrived[0] < step:
                    with gil:
                        raise InternalError("the device finished a decode step without its tokens")
        fence()
        return 0

    cdef int _run(self, Graph graph, int n, int n_steps, int32_t[:, ::1] result, int64_t[::1] ids, int32_t[::1] stops,
                  int32_t[::1] offsets, uint8_t[::1] stopped, TokenRing ring, Control control) except -1 nogil:
        """The loop itself: keep IN_FLIGHT steps queued, hand out each step's tokens when they have arrived.

        Returns:
            number of steps done.
        """
        cdef int launched = 0, done = 0, j, k, token, m
        cdef bint ending = False
        cdef int64_t live_ids[MAX_BATCH]
        cdef int32_t live_tokens[MAX_BATCH]
        cdef const int32_t* row
        while True:
            while launched < n_steps and launched - done < IN_FLIGHT and not ending:
                graph.launch_nogil(self.stream.handle)
                launched += 1
            if done == launched:
                return done
            self._await_step(self.steps + 1)
            row = <const int32_t*>(<const char*>self.out_ring.host + 256
                                   + self.steps % RING_STEPS * (MAX_BATCH * sizeof(int32_t)))
            self.steps += 1
            m = 0
            for j in range(n):
                token = row[j]
                result[done, j] = token
                if stopped[j]:
                    continue
                if token < 0:
                    ending = True
                live_ids[m], live_tokens[m] = ids[j], token
                m += 1
                for k in range(offsets[j], offsets[j + 1]):
                    if stops[k] == token:
                        stopped[j] = 1
                        ending = True
            done += 1
            ring.push_many(live_ids, live_tokens, m)
            control.flag.step_done()
            if control.is_set():
                ending = True

    def decode_parts(self, slots, tokens, positions, int n_steps):
        """A decode step of these rows as a `DecodeParts`, for who measures; arguments and errors are its own."""
        return DecodeParts(self, slots, tokens, positions, n_steps)

    def prompt_parts(self, tokens):
        """A step of a prompt's first tokens as a `PromptParts`, for who measures; arguments and errors are its own."""
        return PromptParts(self, tokens)

    # ---- the rest of the protocol

    def _enter(self):
        """Begin a call that queues work: the engine is open, and nothing of a call that failed is still under way."""
        self._require_open()
        if self.staged:
            self._finish()
            self.steps = (<uint64_t*>self.out_ring.host)[0]

    def _require_open(self):
        if self.closed:
            raise EngineGone("the engine is closed")
        self.context.require_open()

    def check_residency(self):
        """Ask the driver about every allocation of the context.

        Returns:
            what is wrong, as lines; empty when everything is plain device memory.
        """
        faults = []
        self._require_open()
        for memory in self.context.allocations():
            facts = memory.residency()
            if facts["memory_type"] != "device" or facts["managed"] or facts["host_alias"]:
                faults.append(f"{memory.label or 'unnamed'} ({memory.nbytes:,} bytes): {facts}")
        return faults

    def copy_bandwidth(self):
        """GB/s of a device-to-device copy, bytes read and written both counted."""
        self._require_open()
        return device_copy_gbps(self.context)

    def close(self):
        """See `engine.Engine.close`."""
        if self.closed:
            return
        self.closed = True
        try:
            if self.stream is not None:
                self.stream.synchronize()
        except CudaError:
            pass        # the context is lost; freeing is all that is left
        for graph in self.graphs.values():
            graph.close()
        self.graphs, self.op_nodes, self.launches = {}, {}, None
        self.nodes = self.output_nodes = self.step_sampler = None
        self.decode_samplers = {}
        for memory in (self.weights, self.kv, self.workspace, self.staging, self.out_ring):
            if memory is not None:
                memory.close()
        if self.stream is not None:
            self.stream.close()
        if self.own_context:
            self.context.close()


include "engine_parts.pxi"


def _ring_offset(step):
    """Byte offset of a step's row in the pinned token ring; its first 256 bytes hold the step number."""
    return 256 + step % RING_STEPS * (MAX_BATCH * 4)


def _last(op):
    """The plan op whose output a lowered op writes."""
    if isinstance(op, ExpertGroup) and op.sum is not None:
        return op.sum
    if isinstance(op, MatMulGroup | ExpertGroup):
        return op.glu or op.parts[-1]
    if isinstance(op, NormRoute):
        return op.route
    if isinstance(op, RopeKvAttention):
        return op.attention
    return op.kv if isinstance(op, RopeKv) else op


def _tiles(positions, slots, int n_decode):
    """Attention tiles of the prompt rows, int32 [n, 4] (row, rows, position, slot), longest context first.

    A tile is up to 64 consecutive rows of one sequence that end at a multiple of 64 positions or at the chunk's end.
    """
    positions, slots = positions[n_decode:], slots[n_decode:]
    n = len(positions)
    begins = np.ones(n, bool)
    begins[1:] = (slots[1:] != slots[:-1]) | (positions[1:] != positions[:-1] + 1) | (positions[1:] % BLOCK_SIZE == 0)
    first = np.flatnonzero(begins)
    rows = np.diff(first, append=n)
    tiles = np.stack([first + n_decode, rows, positions[first], slots[first]], axis=1).astype(np.int32)
    return tiles[np.argsort(-(positions[first] + rows), kind="stable")]
