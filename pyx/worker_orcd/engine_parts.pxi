# A step in parts: what it launches, and graphs of some of that, for who measures; included by _engine.pyx.


cdef class StepParts:
    """The launches of a step as the engine runs it, and graphs of some of them: of a `DecodeParts` or a `PromptParts`.

    While it is used the engine does nothing else; what runs here draws tokens that nobody gets, and leaves in the KV
    cache what the rows wrote.

    Attributes:
        launches: a `StepLaunch` each, in order.
    """

    cdef CudaEngine engine
    cdef LaunchList step
    cdef tuple rows
    cdef readonly list launches

    cdef int _collect(self, list nodes, list ops, const Shape* shape) except -1:
        """Take the launches of `nodes`, which are those of `ops`."""
        cdef Node node
        cdef size_t i, first
        self.step, self.launches = LaunchList(), []
        for node, op in zip(nodes, ops, strict=True):
            first = self.step.records.size()
            node.enqueue(self.step, shape)
            self.launches += [StepLaunch(op, *self.step.describe(i)) for i in range(first, self.step.records.size())]
        return 0

    def graph(self, chosen):
        """The launches of the indices `chosen`, recorded in that order and launched as in the step; see `Graph`.

        Launches of one kind, or all: another selection may part a launch from one that it does not wait for because
        one between them has (`holds_next` of experts).
        """
        cdef size_t i
        cdef CudaEngine engine = self.engine
        engine._require_open()
        for index in chosen:
            if not 0 <= index < len(self.launches):
                raise InternalError(f"the step has no launch {index}")
        engine.stream.begin_capture()
        try:
            for index in chosen:
                i = index
                self.step.queue_one(i, engine.stream.handle)
        except BaseException:
            engine.stream.abandon_capture()
            raise
        return engine.stream.end_capture()

    def reset(self):
        """The rows are again those of the first step. Waits; nothing of the step may be running."""
        raise NotImplementedError

    def _reset(self, tokens, positions, slots, outputs, int n_decode):
        cdef CudaEngine engine = self.engine
        engine._enter()
        engine._send_rows(tokens, positions, slots, outputs, n_decode)
        engine._send(engine.memory.workspace.sampling.slots, slots[outputs])
        engine._send(engine.memory.workspace.sampling.positions, positions[outputs])
        engine._finish()
        engine.steps = (<uint64_t*>engine.out_ring.host)[0]     # also of steps that were counted meanwhile


cdef class DecodeParts(StepParts):
    """The parts of a decode step of greedy rows: the step of the smallest captured size that holds them.

    Args:
        engine: a `CudaEngine`.
        slots: int32 [n], distinct, each set to a greedy sequence.
        tokens, positions: int32 [n], what the rows are at the first step.
        n_steps: steps that may follow one another before `reset`.

    Raises:
        InvalidRequest: rows out of range, or a slot that is not greedy.
        InternalError: a position without a KV block.
    """

    cdef int size

    def __init__(self, CudaEngine engine, slots, tokens, positions, int n_steps):
        cdef Shape shape
        slots, tokens, positions = (np.ascontiguousarray(a, np.int32) for a in (slots, tokens, positions))
        cdef int n = len(slots)
        engine._enter()
        if not 1 <= n <= engine.config.max_seqs or len(np.unique(slots)) != n or n_steps < 1 or not (
                len(tokens) == len(positions) == n):
            raise InvalidRequest(f"a step takes 1 to {engine.config.max_seqs} distinct slots, not {n}", field="slots")
        engine._check_rows(tokens, positions, positions + (n_steps - 1), slots)
        engine._check_blocks(slots, positions, positions + (n_steps - 1))
        if not all(engine.short[slot] for slot in slots):
            raise InvalidRequest("the parts of a step are those of greedy rows", field="slots")
        self.engine = engine
        self.size = next(k for k in DECODE_SIZES if k >= n)
        pad = np.zeros(self.size - n, np.int32)
        self.rows = (np.append(tokens, pad), np.append(positions, pad), np.append(slots, pad - 1))
        shape.n_rows = shape.n_decode = shape.n_out = self.size
        shape.n_tiles = 0
        self._collect([*engine.nodes, *engine.output_nodes, engine.decode_samplers[True]], [*engine.node_ops, None],
                      &shape)

    def reset(self):
        """See `StepParts`."""
        self._reset(*self.rows, np.arange(self.size, dtype=np.int32), self.size)


cdef class PromptParts(StepParts):
    """The parts of a step of a greedy prompt's first tokens, of which the last has a row of logits.

    Args:
        engine: a `CudaEngine`; its slot 0 is set to a greedy sequence.
        tokens: int32 [n].

    Raises:
        InvalidRequest: more tokens than a step takes.
        InternalError: a position without a KV block.
    """

    def __init__(self, CudaEngine engine, tokens):
        cdef Shape shape
        tokens = np.ascontiguousarray(tokens, np.int32)
        cdef int n = len(tokens)
        engine._enter()
        self.engine = engine
        positions, slots, last = np.arange(n, dtype=np.int32), np.zeros(n, np.int32), np.array([n - 1], np.int32)
        self.rows = engine._check_batch(Batch(tokens, positions, slots, 0, last))
        shape.n_rows, shape.n_decode, shape.n_out = n, 0, 1
        shape.n_tiles = engine._send_rows(*self.rows, 0)
        self._collect([*engine.nodes, *engine.output_nodes, *engine.step_sampler], [*engine.node_ops, None], &shape)
        engine._finish()

    def reset(self):
        """See `StepParts`."""
        self._reset(*self.rows, 0)
