# A decode step in parts: what it launches, and graphs of some of that, for who measures; included by _engine.pyx.


cdef class DecodeParts:
    """The launches of a decode step of greedy rows, as the engine replays it.

    While it is used the engine does nothing else; what runs here draws tokens that nobody gets, and leaves in the KV
    cache what the rows wrote.

    Args:
        engine: a `CudaEngine`.
        slots: int32 [n], distinct, each set to a greedy sequence.
        tokens, positions: int32 [n], what the rows are at the first step.
        n_steps: steps that may follow one another before `reset`.

    Attributes:
        launches: a `StepLaunch` each, in order, as the step of the smallest captured size that holds n rows has them.

    Raises:
        InvalidRequest: rows out of range, or a slot that is not greedy.
        InternalError: a position without a KV block.
    """

    cdef CudaEngine engine
    cdef LaunchList step
    cdef tuple rows
    cdef int size
    cdef readonly list launches

    def __init__(self, CudaEngine engine, slots, tokens, positions, int n_steps):
        cdef Shape shape
        cdef Node node
        cdef size_t i, first
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
        self.engine, self.step, self.launches = engine, LaunchList(), []
        self.size = next(k for k in DECODE_SIZES if k >= n)
        pad = np.zeros(self.size - n, np.int32)
        self.rows = (np.append(tokens, pad), np.append(positions, pad), np.append(slots, pad - 1))
        shape.n_rows = shape.n_decode = shape.n_out = self.size
        shape.n_tiles = 0
        nodes = [*engine.nodes, *engine.output_nodes, engine.decode_samplers[True]]
        for node, op in zip(nodes, [*engine.node_ops, None], strict=True):
            first = self.step.records.size()
            node.enqueue(self.step, &shape)
            self.launches += [StepLaunch(op, *self.step.describe(i)) for i in range(first, self.step.records.size())]

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
        cdef CudaEngine engine = self.engine
        tokens, positions, slots = self.rows
        engine._enter()
        engine._send_rows(tokens, positions, slots, np.arange(self.size, dtype=np.int32), self.size)
        engine._finish()
        engine.steps = (<uint64_t*>engine.out_ring.host)[0]     # also of steps that were counted meanwhile
