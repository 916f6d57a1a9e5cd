# What happens before the first step: which models fit, the memory they take, their weights; included by _engine.pyx.

#: type id of vectors that need no widening
F32 = 0
#: head widths that the attention kernels are built for
HEAD_DIMS = (32, 64, 80, 96, 128)
#: columns of a row that the product kernels take at once
ROW_STEP = 32


def plan_memory(plan, config):
    """The three arenas, `cuda_memory.Arenas`, before anything is allocated."""
    for op in plan.ops:
        if isinstance(op, plan_ops.Route) and (op.n_expert > c.EXPERTS_MAX or op.n_used > c.EXPERTS_USED_MAX):
            raise ModelLoadError(f"{op.weight}: {op.n_used} of {op.n_expert} experts, a GPU takes at most "
                                 f"{c.EXPERTS_USED_MAX} of {c.EXPERTS_MAX}", field=op.weight)
    attention = [op for op in plan.ops if isinstance(op, plan_ops.Attention)]
    splits = {op.window: decode_max_splits(config.context_length, op.window) for op in attention}
    heads = attention_heads(attention[0].n_head, attention[0].n_head_kv)
    sample = cuda_memory.SampleScratch(*sample_sizes(plan.n_vocab))
    workspace = cuda_memory.workspace_arena(plan, config, splits, heads, decode_partial_rows(heads), sample)
    return cuda_memory.Arenas(cuda_memory.weights_arena(plan), cuda_memory.kv_arena(plan, config), workspace)


def check_supported(model_file, plan):
    """Refuse a model whose shapes no kernel is built for.

    Raises:
        ModelLoadError: names the head width, the vocabulary or the tensor.
    """
    def refuse(reason, field):
        raise ModelLoadError(f"{reason}; the CPU engine takes it (--device cpu)", model_file.path, field=field)

    if plan.head_dim not in HEAD_DIMS:
        widths = ", ".join(map(str, HEAD_DIMS))
        refuse(f"heads of width {plan.head_dim} are not supported on a GPU (supported: {widths})",
               "attention.key_length")
    if plan.n_vocab > c.SAMPLE_MAX_VOCAB:
        refuse(f"a vocabulary of {plan.n_vocab} is past the {c.SAMPLE_MAX_VOCAB} that a GPU samples", "vocab_size")
    for w in plan.weights.values():
        if w.kind in ("matrix", "embedding", "experts") and w.shape[0] % ROW_STEP:
            refuse(f"tensor {w.name!r}: rows of {w.shape[0]} are no multiple of {ROW_STEP}, which a GPU needs", w.name)


cdef struct RepackLaunch:
    cu.CUfunction kernel
    unsigned int gx, gy
    c.RepackParams p


cdef class _Repack(Consumer):
    """Turns the raw rows of a piece into row tiles at the tensor's place.

    Tags: (weight, row bytes, expert, row, rows).
    """

    cdef object launches, weights   # `Launches` and the allocated `cuda_memory.Weights`
    cdef vector[RepackLaunch] todo

    def __init__(self, launches, weights):
        self.launches, self.weights = launches, weights

    cdef int prepare(self, tag, uintptr_t address, size_t nbytes) except -1:
        cdef RepackLaunch launch
        w, row_bytes, expert, row0, n_rows = tag
        cdef Kernel kernel = self.launches.kernel("repack", f"repack_{layout.kernel_suffix(w.type_id)}")
        k, n_out = w.shape[:2]
        words = layout.n_k_tiles(w.type_id, k) * layout.packed_tile_bytes(w.type_id) // 4
        launch.kernel, launch.gx, launch.gy = kernel.handle, (n_rows + 15) // 16, max(1, min(16, words // 2048))
        c.fill_RepackParams(&launch.p, {
            "rows": address, "row_bytes": row_bytes, "k": k, "n_out": n_out, "row0": row0, "n_rows": n_rows,
            "w": self.weights.tensors[w.name].address + expert * layout.packed_bytes(w.type_id, n_out, k)}, ())
        self.todo.push_back(launch)
        return 0

    cdef int queue(self, size_t index, cu.CUstream stream) except -1 nogil:
        cdef RepackLaunch* launch = &self.todo[index]
        return launch_nogil(launch.kernel, stream, launch.gx, launch.gy, 1, 256, 0, &launch.p, False)


def _pieces(model_file, plan, weights, DeviceMemory memory, bint check):
    """What is to be loaded into the arena `weights`, `memory`; what the host converts is small and written at once."""
    pieces, tables = [], cuda_memory.inv_freq_tables(plan)
    multiplied = {op.weight for op in plan.ops if isinstance(op, plan_ops.MatMul | plan_ops.ExpertMatMul)}
    for w in plan.weights.values():
        region = weights.tensors[w.name]
        if w.kind not in ("vector", "expert_vectors"):
            type_ = quants.TYPES[w.type_id]
            rule = type_.gpu_check_rule if w.name in multiplied else type_.check_rule
            pieces += _matrix_pieces(model_file, w, rule if check else None)
        elif w.type_id == F32:
            info = model_file.tensors[w.name]
            pieces.append(FileRange(model_file.part_of(w.name), info.offset, info.nbytes, region.address, None,
                                    quants.TYPES[F32].check_rule if check else None, w.name))
        else:
            if check:
                model_file.check_tensors(names=[w.name])
            memory.copy_from(_widen(model_file.view(w.name), w.type_id).view(np.uint8), region.offset)
    for region, table in zip(weights.inv_freq, tables, strict=True):
        memory.copy_from(np.asarray(table, np.float32).view(np.uint8), region.offset)
    return pieces


def _matrix_pieces(model_file, w, rule):
    """The rows of a matrix (of each expert's) in pieces of whole row tiles that fit a quarter of the staging area, each
    checked by `rule`."""
    info, part = model_file.tensors[w.name], model_file.part_of(w.name)
    n_out, experts = w.shape[1], w.shape[2] if w.kind == "experts" else 1
    row_bytes = info.nbytes // (n_out * experts)
    most = cuda_memory.STAGING_BYTES // 4 // row_bytes // layout.TILE_ROWS * layout.TILE_ROWS
    if most == 0:
        raise InternalError(f"rows of {w.name} ({row_bytes} bytes) do not fit the staging area")
    for expert in range(experts):
        for row in range(0, n_out, most):
            n = min(most, n_out - row)
            yield FileRange(part, info.offset + (expert * n_out + row) * row_bytes, n * row_bytes, None,
                            (w, row_bytes, expert, row, n), rule, w.name)


def _widen(raw, int type_id):
    """A vector of F16 or BF16 as float32."""
    if type_id == 1:
        return np.frombuffer(raw, np.float16).astype(np.float32)
    return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
