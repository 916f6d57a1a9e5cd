# Lowering of a plan into the structs of csrc/cpu/ops.h: a part of _cpu.pyx, in a file of its own for its length.
#
# The kernels trust these structs, so every size they rely on is checked here: shapes against tensors, views against
# buffers, rows against rows. The ops are those of worker_orcd/models/ops.py.

cdef class _Lowering:
    """Turns the ops of a plan into the engine's flat structs, checking every size that the kernels rely on."""

    cdef CpuEngine owner
    cdef Engine* engine
    cdef object plan, model_file, matrices, vectors, routed

    def __init__(self, CpuEngine owner):
        self.owner, self.engine = owner, owner.engine
        self.plan, self.model_file = owner.plan, owner.model_file
        self.matrices, self.vectors, self.routed = {}, {}, set()

    cdef run(self):
        cdef KvGroup group
        cdef Op op
        plan, owner = self.plan, self.owner
        owner.views, owner.op_index, owner.op_buffer, owner.buffer_index = [], {}, {}, {}
        for b in plan.buffers.values():
            self.require(b.width > 0 and b.rows in ("tokens", "outputs"), f"buffer {b.name}")
            owner.buffer_index[b.name] = self.engine.add_buffer(b.width, b.rows == "outputs")
        logits = plan.buffers.get("logits")
        self.require(logits is not None and logits.rows == "outputs" and logits.width == plan.n_vocab, "buffer logits")
        for g, n_blocks in zip(plan.kv_groups, owner.config.n_blocks):
            group.window, group.n_layers, group.n_blocks = g.window, 0, n_blocks
            self.engine.add_kv_group(group)
        group_of = {layer: i for i, g in enumerate(plan.kv_groups) for layer in g.layers}
        for layer in range(plan.n_layer):
            self.require(layer in group_of, f"KV group of layer {layer}")
            self.engine.add_layer(group_of[layer])
        for plan_op in plan.ops:
            op = Op()
            self.lower(plan_op, &op)
            owner.op_index[plan_op.name] = self.engine.n_ops()
            owner.op_buffer[plan_op.name] = owner.buffer_index[output_of(plan_op).buf]
            self.engine.add_op(op)

    cdef require(self, condition, what):
        if not condition:
            raise InternalError(f"the plan is not consistent: {what}")

    cdef View view(self, v, width, name) except *:
        """A view that lies in its buffer and has the width the op needs."""
        cdef View out
        self.require(v.buf in self.plan.buffers, f"{name}: buffer {v.buf}")
        self.require(0 <= v.offset and v.width == width > 0 and v.offset + v.width <= self.plan.buffers[v.buf].width,
                     f"{name}: columns {v.offset} + {v.width} of {v.buf}, {width} wanted")
        out.buffer, out.offset, out.width = self.owner.buffer_index[v.buf], v.offset, v.width
        return out

    def data(self, name, type_id, n_bytes):
        """The tensor's bytes, kept alive by the engine."""
        view = memoryview(self.model_file.view(name)).cast("B")
        self.require(type_id in TYPES and view.nbytes == n_bytes, f"{name}: {view.nbytes} bytes, {n_bytes} wanted")
        self.owner.views.append(view)
        return view

    def matrix(self, name):
        """Index of a matrix [n_out][n_in]; of the first one for a tensor of experts."""
        if name in self.matrices:
            return self.matrices[name]
        w = self.plan.weights[name]
        self.require(w.type_id in TYPES and len(w.shape) in (2, 3) and all(n > 0 for n in w.shape)
                     and w.shape[0] % TYPES[w.type_id].block_size == 0, f"{name}: shape {w.shape}")
        n_in, n_out = w.shape[:2]
        n_expert = w.shape[2] if len(w.shape) == 3 else 1
        row_bytes = TYPES[w.type_id].row_bytes(n_in)
        cdef const uint8_t[::1] data = self.data(name, w.type_id, row_bytes * n_out * n_expert)
        cdef int64_t stride = row_bytes * n_out
        cdef int e, index, first = -1, count = n_expert
        for e in range(count):
            index = self.engine.add_matrix(&data[0] + e * stride, w.type_id, n_in, n_out, row_bytes)
            first = index if e == 0 else first
        self.matrices[name] = first
        return first

    def vec(self, name, size):
        """Index of a float vector of `size` elements; -1 for None."""
        if name is None:
            return -1
        self.require(name in self.plan.weights, f"{name}: no such weight")
        w = self.plan.weights[name]
        n = 1
        for k in w.shape:
            n *= k
        self.require(w.type_id in _FLOAT_TYPES and n == size,
                     f"{name}: {w.shape} of type {w.type_id}, {size} floats wanted")
        if name in self.vectors:
            return self.vectors[name]
        cdef const uint8_t[::1] data = self.data(name, w.type_id, TYPES[w.type_id].row_bytes(n))
        self.vectors[name] = self.engine.add_vector(&data[0], w.type_id, n)
        return self.vectors[name]

    def shape(self, name, *expected):
        """Require the GGUF shape of a weight."""
        self.require(name in self.plan.weights and tuple(self.plan.weights[name].shape) == expected,
                     f"{name}: shape {getattr(self.plan.weights.get(name), 'shape', None)}, {expected} wanted")

    cdef lower(self, r, Op* op):
        """Fill `op` from an op of the plan."""
        cdef double[::1] inv_freq
        kind, plan = type(r).__name__, self.plan

        def rows(v):
            return plan.buffers[v.buf].rows if v.buf in plan.buffers else None

        if kind == "Embed":
            op.kind = OpKind.kEmbed
            n_embd = plan.weights[r.weight].shape[0]
            self.shape(r.weight, n_embd, plan.n_vocab)
            op.out, op.weight, op.scale = self.view(r.out, n_embd, r.name), self.matrix(r.weight), r.scale
            if r.positions is not None:
                n_positions = plan.weights[r.positions].shape[1]
                self.shape(r.positions, n_embd, n_positions)
                self.require(plan.max_positions is not None and plan.max_positions <= n_positions,
                             f"{r.name}: max_positions")
                op.positions = self.matrix(r.positions)
            same = (r.out,)
        elif kind == "Norm":
            op.kind = OpKind.kNorm
            n = r.group or r.inp.width
            self.require(r.kind in ("rms", "layer") and n > 0 and r.inp.width % n == 0,
                         f"{r.name}: {r.kind}, group {r.group}")
            op.inp, op.out = self.view(r.inp, r.inp.width, r.name), self.view(r.out, r.inp.width, r.name)
            op.vector, op.bias = self.vec(r.weight, n), self.vec(r.bias, n)
            op.layer_norm, op.eps, op.group = r.kind == "layer", r.eps, r.group
            same = (r.inp, r.out)
        elif kind == "MatMul":
            op.kind = OpKind.kMatMul
            self.shape(r.weight, r.inp.width, r.out.width)
            op.inp, op.out = self.view(r.inp, r.inp.width, r.name), self.view(r.out, r.out.width, r.name)
            op.weight, op.bias = self.matrix(r.weight), self.vec(r.bias, r.out.width)
            same = (r.inp, r.out)
        elif kind == "Rope":
            op.kind = OpKind.kRope
            self.require(r.rope_type in ("interleaved", "neox") and r.n_rot == 2 * len(r.inv_freq)
                         and 0 < r.n_rot <= r.head_dim and len(r.inv_freq_long) in (0, len(r.inv_freq)),
                         f"{r.name}: {r.rope_type}, {r.n_rot} of {r.head_dim}")
            op.inp = self.view(r.x, r.n_head * r.head_dim, r.name)
            op.n_head, op.head_dim, op.n_rot = r.n_head, r.head_dim, r.n_rot
            op.interleaved = r.rope_type == "interleaved"
            inv_freq = np.array(r.inv_freq + r.inv_freq_long, np.float64)
            n_sets = 2 if r.inv_freq_long else 1
            op.rope_table = self.engine.add_rope_table(&inv_freq[0], r.n_rot // 2, n_sets, r.mscale)
            same = (r.x,)
        elif kind == "KvWrite" or kind == "Attention":
            self.require(0 <= r.layer < plan.n_layer and r.n_head_kv == plan.n_head_kv and r.head_dim == plan.head_dim,
                         f"{r.name}: layer or KV heads")
            op.layer, op.n_head_kv, op.head_dim = r.layer, r.n_head_kv, r.head_dim
            n_kv = r.n_head_kv * r.head_dim
            if kind == "KvWrite":
                op.kind = OpKind.kKvWrite
                op.inp, op.inp2 = self.view(r.k, n_kv, r.name), self.view(r.v, n_kv, r.name)
                same = (r.k, r.v)
            else:
                op.kind = OpKind.kAttention
                group = next(g for g in plan.kv_groups if r.layer in g.layers)
                self.require(r.n_head > 0 and r.n_head % r.n_head_kv == 0, f"{r.name}: heads")
                self.require(r.window >= 0 and (group.window == 0 or 0 < r.window <= group.window),
                             f"{r.name}: window {r.window}")
                n_q = r.n_head * r.head_dim
                op.inp, op.out = self.view(r.q, n_q, r.name), self.view(r.out, n_q, r.name)
                op.n_head, op.scale, op.window, op.vector = r.n_head, r.scale, r.window, self.vec(r.sinks, r.n_head)
                same = (r.q, r.out)
            self.require(all(rows(v) == "tokens" for v in same), f"{r.name}: rows")
        elif kind == "Glu":
            op.kind = OpKind.kGlu
            self.require(r.kind in GLU_ACTIVATIONS, f"{r.name}: {r.kind}")
            op.activation = _ACTIVATIONS[r.kind]
            op.inp, op.inp2 = self.view(r.gate, r.out.width, r.name), self.view(r.up, r.out.width, r.name)
            op.out = self.view(r.out, r.out.width, r.name)
            same = (r.gate, r.up, r.out)
        elif kind == "Act":
            op.kind = OpKind.kAct
            self.require(r.kind in ACT_ACTIVATIONS, f"{r.name}: {r.kind}")
            op.activation = _ACTIVATIONS[r.kind]
            op.inp, op.out = self.view(r.inp, r.out.width, r.name), self.view(r.out, r.out.width, r.name)
            same = (r.inp, r.out)
        elif kind == "Add":
            op.kind = OpKind.kAdd
            op.inp, op.out = self.view(r.inp, r.out.width, r.name), self.view(r.out, r.out.width, r.name)
            same = (r.inp, r.out)
        elif kind == "Route":
            op.kind = OpKind.kRoute
            self.require(0 < r.n_used <= r.n_expert <= 1 << 20, f"{r.name}: {r.n_used} of {r.n_expert} experts")
            self.shape(r.weight, r.inp.width, r.n_expert)
            op.inp = self.view(r.inp, r.inp.width, r.name)
            op.out, op.out2 = self.view(r.ids, r.n_used, r.name), self.view(r.gates, r.n_used, r.name)
            op.weight, op.bias = self.matrix(r.weight), self.vec(r.bias, r.n_expert)
            op.n_expert, op.n_used = r.n_expert, r.n_used
            self.routed.add((r.ids, r.n_expert, r.n_used))
            same = (r.inp, r.ids, r.gates)
        elif kind == "ExpertMatMul":
            op.kind = OpKind.kExpertMatMul
            self.shape(r.weight, r.n_in, r.n_out, r.n_expert)
            self.require((r.ids, r.n_expert, r.n_used) in self.routed, f"{r.name}: no router wrote its ids")
            op.inp = self.view(r.inp, r.n_in * (r.n_used if r.per_slot else 1), r.name)
            op.inp2, op.out = self.view(r.ids, r.n_used, r.name), self.view(r.out, r.n_out * r.n_used, r.name)
            op.weight, op.bias = self.matrix(r.weight), self.vec(r.bias, r.n_out * r.n_expert)
            op.n_expert, op.n_used, op.per_slot = r.n_expert, r.n_used, r.per_slot
            same = (r.inp, r.ids, r.out)
        elif kind == "ExpertSum":
            op.kind = OpKind.kExpertSum
            op.inp, op.inp2 = self.view(r.inp, r.out.width * r.n_used, r.name), self.view(r.gates, r.n_used, r.name)
            op.out, op.n_used = self.view(r.out, r.out.width, r.name), r.n_used
            same = (r.inp, r.gates, r.out)
        elif kind == "Gather":
            op.kind = OpKind.kGather
            op.inp, op.out = self.view(r.inp, r.out.width, r.name), self.view(r.out, r.out.width, r.name)
            self.require(rows(r.inp) == "tokens" and rows(r.out) == "outputs", f"{r.name}: rows")
            same = (r.out,)
        else:
            raise InternalError(f"the CPU engine has no op {kind}")
        self.require(len({rows(v) for v in same}) == 1, f"{r.name}: mixes rows of tokens and of outputs")
