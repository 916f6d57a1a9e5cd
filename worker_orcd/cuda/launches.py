"""The launches of a step: what each lowered op becomes on the device.

One method for each kind of op makes its nodes (`_nodes`) from addresses, strides and sizes, all fixed once the memory
is allocated, under the names of csrc/params. The CUDA engine enqueues what is made here.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

from worker_orcd._nodes import (
    CONVERT_KINDS,
    GLU_KINDS,
    NORM_KINDS,
    PRODUCT_MODES,
    ROPE_TYPES,
    AttentionNode,
    Bound,
    Conversion,
    DecodePair,
    DecodeProduct,
    ExpertProduct,
    ExpertProductNode,
    GluRows,
    MatMulNode,
    Node,
    RouteNode,
    RowNode,
    SampleNode,
    decode_max_splits,
    decode_shapes,
    norm_threads,
    prefill_smem,
    sample_groups,
)
from worker_orcd.cuda import expert_layout, images, layout, lowering, memory
from worker_orcd.cuda.lowering import ExpertGroup, ExpertSumAdd, MatMulGroup, NormRoute, RopeKv, RopeKvAttention
from worker_orcd.engine.protocol import EngineConfig
from worker_orcd.errors import InternalError
from worker_orcd.models.ops import (
    Act,
    Add,
    Attention,
    Embed,
    ExpertMatMul,
    ExpertSum,
    Gather,
    Glu,
    KvWrite,
    MatMul,
    Norm,
    Op,
    Rope,
    Route,
    View,
)
from worker_orcd.models.plan import Plan

#: parameters of a kernel, by the names of its struct in csrc/params
Fields = dict[str, Any]
#: launches that are remembered: a step of prompts asks for the same ones in every layer
MAX_BOUNDS = 4096
#: in the place of the second matrix of an expert
NO_MATRIX: Fields = {"w": 0, "bias": 0, "out": 0, "out_stride": 0}
#: of rope_kv where nothing is rotated
NO_ROTATION: Fields = {"inv_freq": 0, "rope_tables": 0, "n_rot": 0, "rope_type": 0, "mscale": 1.0}
#: of decode attention where q is rotated, and k and v are in the cache
ALREADY_ROTATED: Fields = {**NO_ROTATION, "k": 0, "v": 0, "k_stride": 0, "v_stride": 0}


class StepLaunch(NamedTuple):
    """A launch of a step as it is queued: the lowered op that it is part of (None: sampling), the kernel's name,
    blocks, threads of a block, dynamic shared memory bytes, and the parameters as 64-bit words."""

    op: Op | None
    kernel: str
    grid: tuple[int, int, int]
    block: int
    smem: int
    params: tuple[int, ...]


def _rope_node(name: str, kernel: Any, fields: Fields, blocks: int) -> RowNode:
    return RowNode(name, kernel, "RopeKvParams", fields, (0, blocks), 256)


class Launches:
    """Makes the launches of a plan's ops.

    Args:
        plan, config: the model and the engine's sizes.
        context: the device's `_driver.Context`.
        arenas: the allocated memory.
    """

    def __init__(self, plan: Plan, config: EngineConfig, context: Any, arenas: memory.Arenas) -> None:
        self.plan, self.config, self.context = plan, config, context
        self._weights, self._kv, self._workspace = arenas
        self._tables = memory.inv_freq_tables(plan)
        self._libraries: dict[str, Any] = {}
        self._kernels: dict[str, tuple[Any, int]] = {}
        self._bounds: dict[layout.Launch, Bound] = {}
        self._has_wgmma = (
            lowering.asked_for(lowering.MANY_ROWS_VARIABLE, lowering.MANY_ROWS) == "wgmma"
            and getattr(context, "capability", None) == layout.WGMMA_CAPABILITY
            and images.has_machine_code("wgmma", layout.WGMMA_ARCH)
        )
        #: of products of many rows: (type, columns, row tiles), of tokens and of output rows
        self._many_shapes: tuple[set[tuple[int, int, int]], ...] = (set(), set())
        #: (experts of a row, experts) of products of many rows
        self._expert_shapes: set[tuple[int, int]] = set()

    def kernel(self, image: str, name: str, smem: int = 0) -> Any:
        """The kernel `name` of the fatbin `image`, allowed at least `smem` bytes of dynamic shared memory."""
        known = self._kernels.get(name)
        if known is None or known[1] < smem:
            if image not in self._libraries:
                self._libraries[image] = self.context.load(image)
            known = self._kernels[name] = (self._libraries[image].kernel(name, smem), smem)
        return known[0]

    def nodes(self, ops: tuple[Op, ...]) -> list[tuple[str, list[Node]]]:
        """One or two launches per op, in order, as [(op name, [nodes])]."""
        made = [(op.name, self._nodes_of(op)) for op in ops]
        for (_, (*_, first)), (_, (second, *_)) in pairwise(made):
            if isinstance(first, ExpertProductNode) and isinstance(second, ExpertProductNode):
                first.precede(second)
        return made

    def _nodes_of(self, op: Op) -> list[Node]:
        make = MAKERS.get(type(op))
        if make is None:
            raise InternalError(f"no CUDA launch for op {op.name!r} ({type(op).__name__})")
        return make(self, op)

    def warm_rows(self, most: int, outputs: bool = False) -> tuple[int, ...]:
        """Numbers of rows, ascending, from one to `most`: products of these launch every kernel that those of any
        number between do. With `outputs` those whose results are output rows."""
        # up to 8 rows are those of decode steps; beyond, one choice goes on to the end of a tile at least
        sizes = [layout.DECODE_ROWS + 1, *range(16, most, 16), most] if most > layout.DECODE_ROWS else []
        n_sm = self.context.sm_count

        def kernels_of(n: int) -> set[str]:
            dense = {layout.many_rows_launch(*shape, n, n_sm).kernel for shape in self._many_shapes[outputs]}
            experts = set() if outputs else {expert_layout.many_rows(n, *shape) for shape in self._expert_shapes}
            return dense | {f"experts {rows}" for rows in experts}

        kernels = {n: kernels_of(n) for n in sizes}
        chosen = {1, most}
        missing = set().union(*kernels.values()) - kernels.get(most, set())
        while missing:
            best = max(sizes, key=lambda n: len(kernels[n] & missing))
            chosen.add(best)
            missing -= kernels[best]
        return tuple(sorted(chosen))

    def is_output(self, view: View) -> bool:
        """Whether a view's buffer has one row per output row."""
        return self.plan.buffers[view.buf].rows == "outputs"

    def _at(self, view: View | None) -> int:
        """Address of a plan view; 0 for none, as for its stride."""
        return 0 if view is None else self._workspace.buffers[view.buf].address + 4 * view.offset

    def _stride(self, view: View | None) -> int:
        """Floats from a row of a plan view to the next."""
        return 0 if view is None else self.plan.buffers[view.buf].width

    def _weight(self, name: str | None) -> int:
        """Address of a weight; 0 for none."""
        return 0 if name is None else self._weights.tensors[name].address

    def _block_table(self, layer: int) -> int:
        """Address of the block table of a layer's KV group."""
        group = self.plan.kv_group_of[layer]
        entries = self.config.max_seqs * self.config.max_blocks_per_seq
        return self._workspace.block_tables.address + 4 * group * entries

    # ---- embedding, norm, rotation, attention

    def _embed(self, op: Embed) -> list[Node]:
        nodes: list[Node] = []
        index, scale = self._workspace.tokens, op.scale
        for weight in (op.weight, op.positions):
            if weight is not None:
                w = self.plan.weights[weight]
                kernel = self.kernel("repack", f"rows_{layout.kernel_suffix(w.type_id)}")
                fields: Fields = {
                    "w": self._weight(weight), "index": index.address, "out": self._at(op.out),
                    "out_stride": self._stride(op.out), "scale": scale, "k": w.shape[0], "n_table": w.shape[1],
                    "add": bool(nodes),
                }  # fmt: skip
                nodes.append(RowNode(op.name, kernel, "RowsParams", fields, (0, 1), 128))
            index, scale = self._workspace.positions, 1.0
        return nodes

    def _norm(self, op: Norm) -> list[Node]:
        n, n_group = op.inp.width, op.inp.width // op.group if op.group else 0
        fields: Fields = {
            "x": self._at(op.inp), "weight": self._weight(op.weight), "bias": self._weight(op.bias),
            "out": self._at(op.out), "x_stride": self._stride(op.inp), "out_stride": self._stride(op.out),
            "n": op.group or n, "kind": NORM_KINDS[op.kind], "n_group": n_group, "eps": op.eps,
        }  # fmt: skip
        addresses = fields["x"] | fields["weight"] | fields["bias"] | fields["out"]
        aligned = addresses % 16 == 0 and (n | fields["x_stride"] | fields["out_stride"]) % 4 == 0
        if op.group:
            name, grid, block = "norm_group", (-(-n_group // 8), 0), 256
        else:
            name, grid, block = "norm_vec4" if aligned else "norm_scalar", (0, 1), norm_threads(n, not aligned)
        return [RowNode(op.name, self.kernel("norm", name), "NormParams", fields, grid, block, self.is_output(op.out))]

    def _rotation(self, op: Rope) -> Fields:
        """The fields of rope_kv that say how it turns."""
        table = self._weights.inv_freq[self._tables.index(op.inv_freq + op.inv_freq_long)]
        return {
            "inv_freq": table.address,
            "rope_tables": self._workspace.rope_tables.address if op.inv_freq_long else 0,
            "n_rot": op.n_rot, "rope_type": ROPE_TYPES[op.rope_type], "mscale": op.mscale,
        }  # fmt: skip

    def _rope_launch(self, q: View | None, k: View, v: View | None, rest: Fields) -> tuple[Any, Fields, int]:
        """The kernel rope_kv, its parameters and the blocks of a row."""
        fields = {
            "q": self._at(q), "k": self._at(k), "v": self._at(v),
            "q_stride": self._stride(q), "k_stride": self._stride(k), "v_stride": self._stride(v),
            "positions": self._workspace.positions.address, "slots": self._workspace.slots.address, **rest,
        }  # fmt: skip
        items = (fields["n_head"] + 2 * fields["n_head_kv"]) * fields["head_dim"] // 2
        return self.kernel("rope_kv", "rope_kv"), fields, max(1, min(8, -(-items // 512)))

    def _rope(self, op: Rope) -> list[Node]:
        heads = {"n_head": 0, "n_head_kv": op.n_head, "head_dim": op.head_dim}
        cache = {"kv": 0, "block_table": 0, "max_blocks": 0}
        launch = self._rope_launch(None, op.x, None, {**self._rotation(op), **heads, **cache})
        return [_rope_node(op.name, *launch)]

    def _rope_kv_launch(self, op: RopeKv) -> tuple[Any, Fields, int]:
        q, kv = op.rope_q, op.kv
        rotation = NO_ROTATION if q is None else self._rotation(q)
        heads = {"n_head": q.n_head if q else 0, "n_head_kv": kv.n_head_kv, "head_dim": kv.head_dim}
        cache = {
            "kv": self._kv.layers[kv.layer].address, "block_table": self._block_table(kv.layer),
            "max_blocks": self.config.max_blocks_per_seq,
        }  # fmt: skip
        return self._rope_launch(q.x if q else None, kv.k, kv.v, {**rotation, **heads, **cache})

    def _rope_kv(self, op: RopeKv) -> list[Node]:
        return [_rope_node(op.name, *self._rope_kv_launch(op))]

    def _kv_write(self, op: KvWrite) -> list[Node]:
        return self._rope_kv(RopeKv(op.name, None, None, op))

    def _attention(self, op: Attention, rope: RopeKv | None = None) -> list[Node]:
        """Attention; with `rope` also what it says, which decode rows do on the way."""
        w = self._workspace
        shapes = decode_shapes(op.head_dim, self.context.max_smem)
        decode_kernel = self.kernel("attention_decode", f"attention_decode_{op.head_dim}", shapes[-1][2])
        prefill_name = "attention_warpgroup" if self._has_wgmma else "attention_prefill"
        prefill_bytes = prefill_smem(op.head_dim, self._has_wgmma)
        prefill_kernel = self.kernel(prefill_name, f"{prefill_name}_{op.head_dim}", prefill_bytes)
        both = {
            "q": self._at(op.q), "kv": self._kv.layers[op.layer].address, "block_table": self._block_table(op.layer),
            "sinks": self._weight(op.sinks), "out": self._at(op.out), "q_stride": self._stride(op.q),
            "out_stride": self._stride(op.out), "n_head": op.n_head, "n_head_kv": op.n_head_kv,
            "max_blocks": self.config.max_blocks_per_seq, "window": op.window, "scale": op.scale,
        }  # fmt: skip
        launch = None if rope is None else self._rope_kv_launch(rope)
        own = ALREADY_ROTATED if launch is None else {name: launch[1][name] for name in ALREADY_ROTATED}
        decode = {
            **both, **own, "positions": w.positions.address, "slots": w.slots.address,
            "partial": w.attention_partial.address, "counters": w.attention_counters.address,
            "max_splits": decode_max_splits(self.config.context_length, op.window),
        }  # fmt: skip
        prefill, smem = {**both, "tiles": w.tiles.address}, (shapes, prefill_bytes)
        gpu = self.context.sm_count, self.context.max_smem
        return [AttentionNode(op.name, decode_kernel, prefill_kernel, decode, prefill, smem, *gpu, launch)]

    def _rope_kv_attention(self, op: RopeKvAttention) -> list[Node]:
        return self._attention(op.attention, op.rope)

    # ---- products

    def _bound(self, image: str, launch: layout.Launch) -> Bound:
        bound = self._bounds.get(launch)
        if bound is None:
            if len(self._bounds) >= MAX_BOUNDS:
                self._bounds.clear()
            bound = self._bounds[launch] = Bound(self.kernel(image, launch.kernel, launch.smem), launch)
        return bound

    def _conversion(self, k: int, inp: View, norm: Norm | None = None, n_inputs: int = 1, roots: int = 0) -> Conversion:
        """Of an input of products over `k` columns; `n_inputs` lie side by side in `inp`."""
        fields = {
            "x": self._at(inp), "x_stride": self._stride(inp), "input_stride": k if n_inputs > 1 else 0, "k": k,
            "out": self._workspace.converted.address, "out_bytes": layout.x_f16_bytes(k),
            "weight": self._weight(norm.weight if norm else None), "bias": self._weight(norm.bias if norm else None),
            "kind": CONVERT_KINDS[norm.kind if norm else None], "eps": norm.eps if norm else 0.0, "roots": roots,
        }  # fmt: skip
        kernel, to_places = (self.kernel("convert", name) for name in ("convert_rows", "convert_rows_to_places"))
        return Conversion(kernel, to_places, fields, n_inputs)

    def _matmul_group(self, op: MatMulGroup) -> list[Node]:
        conversion: Conversion | None = self._conversion(op.parts[0].inp.width, op.inp, op.norm)
        by_type: dict[int, list[MatMul]] = {}
        for part in op.parts:
            by_type.setdefault(self.plan.weights[part.weight].type_id, []).append(part)
        nodes: list[Node] = []
        decode: list[list[DecodeProduct]] = []
        for type_id, parts in by_type.items():
            node, few = self._products(op, type_id, parts, conversion)
            nodes.append(node)
            decode.append(few)
            conversion = None  # done for those that follow
        if [len(few) for few in decode] == [1, 1] and op.glu is None:
            self._join(op, by_type, nodes, decode)
        return nodes

    def _join(
        self, op: MatMulGroup, by_type: dict[int, list[MatMul]], nodes: list[Any], decode: list[list[DecodeProduct]]
    ) -> None:
        """Let the two nodes of a group, each with one launch of few rows, share that where there is a kernel for it."""
        n_outs = tuple(sum(part.out.width for part in parts) for parts in by_type.values())
        gpu = {"n_sm": self.context.sm_count, "max_smem": self.context.max_smem, **_how(op)}
        bounds: list[Any] = []
        for n in range(1, layout.DECODE_ROWS + 1):
            launches = layout.pair_launch(tuple(by_type), op.parts[0].inp.width, n_outs, n, **gpu)  # type: ignore[arg-type]
            bounds.append(launches and tuple(self._bound("decode", launch) for launch in launches))
        if any(bounds):
            nodes[0].join(nodes[1], DecodePair(decode[0][0], decode[1][0], bounds))

    def _products(
        self, op: MatMulGroup, type_id: int, parts: list[MatMul], conversion: Conversion | None
    ) -> tuple[Node, list[DecodeProduct]]:
        """The products of a group with matrices of one type, and those of few decode rows among them."""
        k, n_k_tiles = parts[0].inp.width, layout.n_k_tiles(type_id, parts[0].inp.width)
        matrices = [
            {
                "w": self._weight(part.weight), "bias": self._weight(part.bias), "out": self._at(part.out),
                "out_stride": self._stride(part.out), "n_out": part.out.width,
            } for part in parts
        ]  # fmt: skip
        input_ = {"k": k, "n_k_tiles": n_k_tiles, "x_bytes": layout.x_f16_bytes(k)}
        rows = {**input_, "rows": self._workspace.converted.address}
        starts = [sum(layout.n_row_tiles(part.out.width) for part in parts[:i]) for i in range(len(parts) + 1)]
        many = {
            **rows, "m": [{**m, "row_tile0": start} for m, start in zip(matrices, starts[:-1], strict=True)],
            "n_matrices": len(matrices), "n_row_tiles": starts[-1],
            "mode": PRODUCT_MODES["add" if op.residual else "store"],
        }  # fmt: skip
        inline = _can_convert(op)
        few = {
            **rows, "tile_bytes": n_k_tiles * layout.packed_tile_bytes(type_id), "n_chunks": layout.n_chunks(k),
            "mode": PRODUCT_MODES["glu" if op.glu else "add" if op.residual else "store"],
            "glu": GLU_KINDS[op.glu.kind] if op.glu else 0, "x": self._at(op.inp) if inline else 0,
            "norm_weight": self._weight(op.norm.weight) if op.norm and inline else 0,
            "eps": op.norm.eps if op.norm else 0.0, "inverse_k": layout.inverse(k),
        }  # fmt: skip
        spans = _gated(type_id, k, matrices) if op.glu else _adjacent(type_id, k, matrices)
        if op.glu is not None:
            spans[0].update(out=self._at(op.glu.out), out_stride=self._stride(op.glu.out))
        n_sm, max_smem = self.context.sm_count, self.context.max_smem
        decode = []
        for span in spans:
            n_out = span["n_out"]
            scales_at = layout.n_row_tiles(n_out) * few["tile_bytes"]
            bounds = [
                self._bound("decode", layout.decode_launch(
                    type_id, k, n_out, n, n_sm=n_sm, max_smem=max_smem, glu=op.glu is not None, **_how(op)))
                for n in range(1, layout.DECODE_ROWS + 1)
            ]  # fmt: skip
            decode.append(DecodeProduct({**few, **span, "scales_at": scales_at}, inline, bounds))
        n_outs = tuple(part.out.width for part in parts)
        matvecs = [
            self._bound("matvec", layout.matvec_launch(type_id, k, n_outs, n, n_sm=n_sm, max_smem=max_smem))
            for n in range(layout.DECODE_ROWS + 1, layout.MATVEC_ROWS + 1)
        ]

        def prefill(n_out: int, n_rows: int) -> Bound:
            return self._bound("matmul", layout.matmul_launch(type_id, k, n_out, n_rows, n_sm))

        outputs = self.is_output(parts[0].out)
        if (
            not outputs or self.config.max_seqs > layout.MATVEC_ROWS
        ):  # a name that the image lacks is an error now and not in a step
            for small in (False, True):
                name = f"matmul_{layout.kernel_suffix(type_id)}" + ("_small" if small else "")
                self.kernel("matmul", name, layout.matmul_stages(type_id, small)[2])
        matmuls = [{**m, **input_, "x": self._workspace.converted.address, "add": op.residual} for m in matrices]
        node = MatMulNode(op.name, conversion, inline, decode, many, matvecs, matmuls, prefill, outputs,
                          self._glu_rows(op.glu), *self._many_rows(op, type_id, k, spans, many))  # fmt: skip
        return node, decode

    def _many_rows(
        self, op: MatMulGroup, type_id: int, k: int, spans: list[Fields], matvec: Fields
    ) -> tuple[Callable[[int], Bound] | None, Fields | None]:
        """The products of many rows by warpgroups: `many` and `wgmma` of a `MatMulNode`.

        Args:
            spans: of `_gated`, with a gated activation.
            matvec: `MatvecParams` of the same matrices.
        """
        if not self._has_wgmma:
            return None, None
        matrices, n_tiles = matvec["m"], matvec["n_row_tiles"]
        if op.glu is not None:
            (span,) = spans
            one = layout.n_row_tiles(span["n_out"])
            result = {name: span[name] for name in ("out", "out_stride", "n_out")}
            matrices = [{**m, **result, "row_tile0": i * one} for i, m in enumerate(span["m"])]
            n_tiles = 2 * one
        fields = {
            "m": matrices, "x": self._workspace.converted.address, "n_matrices": len(matrices), "n_row_tiles": n_tiles,
            "k": k, "n_k_tiles": layout.n_k_tiles(type_id, k),
            "mode": PRODUCT_MODES["glu" if op.glu else "add" if op.residual else "store"],
            "glu": GLU_KINDS[op.glu.kind] if op.glu else 0,
        }  # fmt: skip
        self._many_shapes[self.is_output(op.parts[0].out)].add((type_id, k, n_tiles))
        for rows in layout.WGMMA_TILES:  # a name that the image lacks is an error now and not in a step
            launch = layout.many_rows_launch(type_id, k, n_tiles, 1, self.context.sm_count, rows)
            self.kernel("wgmma", launch.kernel, launch.smem)

        def many(n_rows: int) -> Bound:
            return self._bound("wgmma", layout.many_rows_launch(type_id, k, n_tiles, n_rows, self.context.sm_count))

        return many, fields

    def _glu_rows(self, op: Glu | None) -> GluRows | None:
        """The gated activation of rows whose products do not apply it."""
        if op is None:
            return None
        fields = self._pointwise_fields(op.out, op.gate, op.up, GLU_KINDS[op.kind])
        return GluRows(self.kernel("pointwise", "glu"), fields)

    # ---- experts

    def _expert_lists(self, op: Route | ExpertMatMul) -> tuple[Fields, Fields]:
        """The lists that routing leaves for the products: decode rows, prefill rows."""
        space = self._workspace.routing
        assert space is not None
        decode, prefill = (
            expert_layout.list_parts(region.address, n * op.n_used, op.n_expert)
            for region, n in (
                (space.decode_list, layout.MATVEC_ROWS),
                (space.prefill_list, memory.padded_batch_tokens(self.config)),
            )
        )
        names = ("n_items", "items", "pairs", "places")
        return {**dict(zip(names, decode, strict=True)), "places": 0}, dict(zip(names, prefill, strict=True))

    def _norm_route(self, op: NormRoute) -> list[Node]:
        return self._route(op.route, op)

    def _route(self, op: Route, group: NormRoute | None = None) -> list[Node]:
        """The router; with `group` also what it says, in one launch where there are few decode rows and none else."""
        w, space = self.plan.weights[op.weight], self._workspace.routing
        assert space is not None
        suffix, k = layout.kernel_suffix(w.type_id), w.shape[0]
        logits = self.kernel("route", f"route_logits_{suffix}")
        choose, make_list = self.kernel("route", "route_choose"), self.kernel("route", "route_list")
        decode_list, prefill_list = self._expert_lists(op)
        inp = group.inp if group else op.inp
        fields = {
            "x": self._at(inp), "w": self._weight(op.weight), "bias": self._weight(op.bias),
            "norm_weight": self._weight(group.norm.weight) if group else 0,
            "roots": space.roots.address if group else 0,
            "partial": space.partial.address, "ids": self._at(op.ids), "gates": self._at(op.gates),
            "x_stride": self._stride(inp), "k": k, "n_k_tiles": layout.n_k_tiles(w.type_id, k),
            "n_expert": op.n_expert, "n_used": op.n_used,
        }  # fmt: skip
        conversion = few = None
        if group is not None:
            conversion = self._conversion(k, inp, group.norm, roots=space.roots.address)
            smem = expert_layout.route_few_smem(w.type_id, k)
            if smem + expert_layout.ROUTE_FEW_STATIC_SMEM <= self.context.max_smem:
                kernel = self.kernel("route", f"route_few_{suffix}", smem)
                blocks = [expert_layout.route_few_blocks(n, op.n_expert) for n in range(1, layout.DECODE_ROWS + 1)]
                few = (kernel, blocks, smem, space.arrived.address)
        partial_floats = expert_layout.route_partial_bytes(1, op.n_expert) // 4

        def grid(n_rows: int) -> tuple[int, int, int]:
            return expert_layout.route_grid(n_rows, op.n_expert)

        def item_rows(n_rows: int) -> int:
            return expert_layout.prefill_rows(n_rows, op.n_used, op.n_expert)

        def many_rows(n_rows: int) -> tuple[int, int]:
            rows = expert_layout.many_rows(n_rows, op.n_used, op.n_expert)
            return rows, expert_layout.many_places(n_rows, op.n_used, op.n_expert, rows)

        return [
            RouteNode(op.name, logits, choose, make_list, fields, decode_list, prefill_list, partial_floats, grid,
                      item_rows, conversion, few, many_rows if self._has_wgmma else None)
        ]  # fmt: skip

    def _expert_group(self, op: ExpertGroup) -> list[Node]:
        first, space = op.parts[0], self._workspace.routing
        assert space is not None
        w = self.plan.weights[first.weight]
        type_id, k, n_out, n_expert, n_used = w.type_id, first.n_in, first.n_out, first.n_expert, first.n_used
        decode_list, prefill_list = self._expert_lists(first)
        both: Fields = {
            "m": [
                {
                    "w": self._weight(part.weight), "bias": self._weight(part.bias), "out": self._at(part.out),
                    "out_stride": self._stride(part.out),
                } for part in op.parts
            ],
            "matrix_bytes": layout.packed_bytes(type_id, n_out, k), "n_out": n_out, "n_used": n_used, "k": k,
            "n_k_tiles": layout.n_k_tiles(type_id, k), "x_bytes": layout.x_f16_bytes(k),
        }  # fmt: skip
        matvec = {
            **both, "list": decode_list, "rows": self._workspace.converted.address, "n_matrices": len(op.parts),
        }  # fmt: skip
        matmul = {**both, "list": prefill_list, "x": self._workspace.converted.address}
        n_sm, n_matrices = self.context.sm_count, len(op.parts)
        tile_bytes = layout.n_k_tiles(type_id, k) * layout.packed_tile_bytes(type_id)
        spans = [both["m"]] if op.glu else [[m] for m in both["m"]]
        few = []
        for m in spans:
            fields = {
                **both, "m": m + [NO_MATRIX] * (2 - len(m)), "list": decode_list,
                "rows": self._workspace.converted.address, "out": self._at(op.glu.out) if op.glu else m[0]["out"],
                "out_stride": self._stride(op.glu.out) if op.glu else m[0]["out_stride"], "tile_bytes": tile_bytes,
                "scales_at": layout.n_row_tiles(n_out) * tile_bytes, "n_chunks": layout.n_chunks(k),
                "mode": PRODUCT_MODES["glu" if op.glu else "mix" if op.sum else "store"],
                "glu": GLU_KINDS[op.glu.kind] if op.glu else 0, "x": 0 if op.is_converted else self._at(first.inp),
                "x_stride": self._stride(first.inp), "x_slot_stride": k if first.per_slot else 0,
                "gates": self._at(op.sum.sum.gates) if op.sum else 0,
                "sum": self._at(op.sum.out if op.sum else None),
                "sum_stride": self._stride(op.sum.out if op.sum else None),
                "arrived": space.mixed.address,
            }  # fmt: skip
            bounds = [
                self._bound("experts_few", expert_layout.few_launch(
                    type_id, k, n_out, n, n_used, n_expert, n_sm=n_sm, glu=op.glu is not None,
                    max_smem=self.context.max_smem))
                for n in range(1, layout.DECODE_ROWS + 1)
            ]  # fmt: skip
            few.append(ExpertProduct(fields, bounds))
        decode = [
            self._bound("experts_decode", expert_layout.decode_launch(
                type_id, k, n_out, n_matrices, n, n_used, n_expert, n_sm=n_sm))
            for n in range(layout.DECODE_ROWS + 1, layout.MATVEC_ROWS + 1)
        ]  # fmt: skip

        def prefill(n_rows: int, item_rows: int | None = None) -> Bound:
            launch = expert_layout.prefill_launch(type_id, k, n_out, n_matrices, n_rows, n_used, n_expert, item_rows)
            return self._bound("experts_prefill", launch)

        for item_rows in expert_layout.PREFILL_ROWS:  # a name that the image lacks is an error now and not in a step
            prefill(1, item_rows)
        conversion = None
        if not op.is_converted:
            conversion = self._conversion(k, first.inp, n_inputs=n_used if first.per_slot else 1)
        total = self._expert_sum_node(op.sum.sum, op.sum.out) if op.sum else None
        glu = self._glu_rows(op.glu)
        many = self._many_expert_rows(op, both, prefill_list)
        return [ExpertProductNode(op.name, conversion, few, matvec, matmul, decode, prefill, glu, total, *many)]

    def _many_expert_rows(
        self, op: ExpertGroup, both: Fields, expert_list: Fields
    ) -> tuple[Callable[[int], Bound] | None, Fields | None]:
        """The products of many rows by warpgroups: `many` and `wgmma` of an `ExpertProductNode`.

        Args:
            both: what the parameters of all products of the group have in common.
        """
        if not self._has_wgmma:
            return None, None
        first, n_matrices, n_sm = op.parts[0], len(op.parts), self.context.sm_count
        type_id = self.plan.weights[first.weight].type_id
        matrices = both["m"]
        if op.glu is not None:
            result = {"out": self._at(op.glu.out), "out_stride": self._stride(op.glu.out)}
            matrices = [{**m, **result} for m in matrices]
        fields = {
            **both, "m": matrices + [NO_MATRIX] * (2 - n_matrices), "list": expert_list,
            "x": self._workspace.converted.address, "n_matrices": n_matrices,
            "mode": PRODUCT_MODES["glu" if op.glu else "store"], "glu": GLU_KINDS[op.glu.kind] if op.glu else 0,
        }  # fmt: skip

        def many(n_rows: int, item_rows: int | None = None) -> Bound:
            sizes = (first.n_in, first.n_out, n_matrices, n_rows, first.n_used, first.n_expert, n_sm)
            return self._bound("wgmma_experts", expert_layout.many_launch(type_id, *sizes, item_rows))

        for item_rows in layout.WGMMA_EXPERT_TILES:  # a name that the image lacks is an error now and not in a step
            many(1, item_rows)
        self._expert_shapes.add((first.n_used, first.n_expert))
        return many, fields

    def _expert_sum(self, op: ExpertSum) -> list[Node]:
        return [self._expert_sum_node(op)]

    def _expert_sum_node(self, op: ExpertSum, into: View | None = None) -> RowNode:
        n, out = op.out.width, into or op.out
        fields = {
            "x": self._at(op.inp), "gates": self._at(op.gates), "out": self._at(out), "x_stride": self._stride(op.inp),
            "out_stride": self._stride(out), "n": n, "n_used": op.n_used, "add": into is not None,
        }  # fmt: skip
        return RowNode(op.name, self.kernel("route", "expert_sum"), "ExpertSumParams", fields, (-(-n // 1024), 0), 256)

    def _expert_sum_add(self, op: ExpertSumAdd) -> list[Node]:
        return [self._expert_sum_node(op.sum, op.out)]

    # ---- pointwise

    def _pointwise_fields(self, out: View, a: View, b: View | None, kind: int, rows: int = 0) -> Fields:
        return {
            "a": self._at(a), "b": self._at(b), "out": self._at(out), "rows": rows, "a_stride": self._stride(a),
            "b_stride": self._stride(b), "out_stride": self._stride(out), "n": out.width, "kind": kind,
        }  # fmt: skip

    def _pointwise(self, op: Op, kernel: str, out: View, a: View, b: View | None = None, kind: int = 0, rows: int = 0,
                   outputs: bool = False) -> list[Node]:  # fmt: skip
        fields = self._pointwise_fields(out, a, b, kind, rows)
        grid = (-(-out.width // 1024), 0)
        return [RowNode(op.name, self.kernel("pointwise", kernel), "PointwiseParams", fields, grid, 256, outputs)]

    def _glu(self, op: Glu) -> list[Node]:
        return self._pointwise(op, "glu", op.out, op.gate, op.up, GLU_KINDS[op.kind])

    def _act(self, op: Act) -> list[Node]:
        return self._pointwise(op, f"act_{op.kind}", op.out, op.inp)

    def _add(self, op: Add) -> list[Node]:
        return self._pointwise(op, "add", op.out, op.inp)

    def _gather(self, op: Gather) -> list[Node]:
        rows = self._workspace.output_indices.address
        return self._pointwise(op, "gather_rows", op.out, op.inp, rows=rows, outputs=True)

    # ---- sampling

    def sampler(self, ring: Fields, feed_back: bool, short: bool) -> SampleNode:
        """The draw of output rows from the plan's logits.

        Args:
            ring: where the tokens go: out, out_steps, out_stride and host_step of `SampleParams`.
            feed_back: the output rows are the step's rows, whose tokens and positions become those of the next step.
            short: every row is greedy or has a small top-k, `sample_is_short`.
        """
        w, s, n_vocab = self._workspace, self._workspace.sampling, self.plan.n_vocab
        fields = {
            **ring, "logits": w.buffers["logits"].address, "samples": s.samples.address,
            "slots": (w.slots if feed_back else s.slots).address,
            "positions": (w.positions if feed_back else s.positions).address, "edits": s.edits.address,
            "history": s.history.address, "seen": s.seen.address, "counts": s.counts.address,
            "best": s.best.address, "arrived": s.arrived.address, "group_keys": s.group_keys.address,
            "group_weights": s.group_weights.address,
            "bin_weights": s.bin_weights.address, "bin_counts": s.bin_counts.address, "done": s.done.address,
            "next_tokens": w.tokens.address if feed_back else 0, "step": s.step.address, "draw_follows": not short,
            "logits_stride": n_vocab, "n_vocab": n_vocab, "n_groups": sample_groups(n_vocab),
            "seen_words": -(-n_vocab // 32), "advance": feed_back,
        }  # fmt: skip
        largest, draw = self.kernel("sample", "sample_max"), self.kernel("sample", "sample_draw")
        return SampleNode("sample", largest, draw, fields, self.context.sm_count)


def _can_convert(op: MatMulGroup) -> bool:
    """Whether decode_* can do with one row what is to be done before the product."""
    return op.norm is None or op.norm.kind == "rms"


def _how(op: MatMulGroup) -> dict[str, int]:
    """Of `layout.decode_launch` and `layout.pair_launch` for a group."""
    return {} if _can_convert(op) else {"converts": 0}


def _adjacent(type_id: int, k: int, matrices: list[Fields]) -> list[Fields]:
    """`matrices` as decode_* takes them, those that lie as one, with their biases and results, as one."""
    spans: list[Fields] = []
    for m in matrices:
        last = spans[-1] if spans else None
        if last is not None and layout.can_split(type_id, last["n_out"]):
            n, first = last["n_out"], last["m"][0]
            follows = {
                "w": first["w"] + layout.packed_bytes(type_id, n, k), "bias": first["bias"] and first["bias"] + 4 * n,
                "out": last["out"] + 4 * n, "out_stride": last["out_stride"], "n_out": m["n_out"],
            }  # fmt: skip
            if m == follows:
                last["n_out"] += m["n_out"]
                continue
        spans.append(_span(m))
    return spans


def _gated(type_id: int, k: int, matrices: list[Fields]) -> list[Fields]:
    """Gate and up as decode_* takes them: two matrices, or the halves of one."""
    if len(matrices) == 2:
        return [_span(*matrices)]
    half = matrices[0]["n_out"] // 2
    gate = {**matrices[0], "n_out": half}
    up = {"w": gate["w"] + layout.packed_bytes(type_id, half, k), "bias": gate["bias"] and gate["bias"] + 4 * half}
    return [_span(gate, up)]


def _span(matrix: Fields, other: Fields | None = None) -> Fields:
    """Fields of `DecodeParams` for one matrix or two."""
    other = other or {"w": 0, "bias": 0}
    results = {name: matrix[name] for name in ("out", "out_stride", "n_out")}
    return {**results, "m": [{name: m[name] for name in ("w", "bias")} for m in (matrix, other)]}


#: op -> the method that makes its launches; `lower` makes no op that is not here
MAKERS: dict[type[Op], Callable[[Launches, Any], list[Node]]] = {
    Embed: Launches._embed,
    Norm: Launches._norm,
    MatMulGroup: Launches._matmul_group,
    Rope: Launches._rope,
    RopeKv: Launches._rope_kv,
    RopeKvAttention: Launches._rope_kv_attention,
    KvWrite: Launches._kv_write,
    Attention: Launches._attention,
    Route: Launches._route,
    NormRoute: Launches._norm_route,
    ExpertGroup: Launches._expert_group,
    ExpertSum: Launches._expert_sum,
    ExpertSumAdd: Launches._expert_sum_add,
    Glu: Launches._glu,
    Act: Launches._act,
    Add: Launches._add,
    Gather: Launches._gather,
}
