"""The launches of a step: what each lowered op becomes on the device.

One method per kind of op makes its nodes (`_nodes`, `_expert_nodes`) from addresses, strides and sizes, all fixed
once the memory is planned. Knows no file, no stream and no order of steps; the CUDA engine enqueues what is made here.
"""

from __future__ import annotations

from typing import Any

from worker_orcd._expert_nodes import ExpertProductNode, ExpertSumNode, RouteNode
from worker_orcd._nodes import (
    AttentionNode,
    EmbedNode,
    MatMulNode,
    NormNode,
    PointwiseNode,
    RopeKvNode,
    decode_max_splits,
)
from worker_orcd.cuda import expert_layout, layout, memory
from worker_orcd.cuda.lowering import RopeKv
from worker_orcd.engine.protocol import EngineConfig
from worker_orcd.errors import InternalError
from worker_orcd.models.ops import Op, View
from worker_orcd.models.plan import Plan

#: rotary frequency table -> its number in the weights arena
Tables = dict[tuple[float, ...], int]


class Launches:
    """Makes the launches of a plan's ops.

    Args:
        plan, config: the model and the engine's sizes.
        context: the device's `_driver.Context`.
        addresses: device address of every region of the three arenas, by name.
    """

    def __init__(self, plan: Plan, config: EngineConfig, context: Any, addresses: dict[str, int]) -> None:
        self.plan, self.config, self.context, self.addresses = plan, config, context, addresses
        self._libraries: dict[str, Any] = {}
        self._kernels: dict[str, tuple[Any, int]] = {}

    def image(self, name: str) -> Any:
        """The library of the fatbin `name`."""
        if name not in self._libraries:
            self._libraries[name] = self.context.load(name)
        return self._libraries[name]

    def kernel(self, image: str, name: str, smem: int = 0) -> Any:
        """The kernel `name` of the fatbin `image`, allowed at least `smem` bytes of dynamic shared memory."""
        known = self._kernels.get(name)
        if known is None or known[1] < smem:
            known = self._kernels[name] = (self.image(image).kernel(name, smem), smem)
        return known[0]

    def _view(self, view: View) -> tuple[int, int]:
        """(address, row stride in floats) of a plan view."""
        return self.addresses[f"buffer:{view.buf}"] + 4 * view.offset, self.plan.buffers[view.buf].width

    def nodes(self, ops: tuple[Op, ...]) -> list[tuple[str, list[Any]]]:
        """One or two launches per op, in order, as [(op name, [nodes])]."""
        tables = {inv_freq: key for key, inv_freq in memory.inv_freq_tables(self.plan).items()}
        return [(op.name, self._node(op, tables)) for op in ops]

    def _weight(self, name: str | None) -> int:
        return 0 if name is None else self.addresses[name]

    def _node(self, op: Op, tables: Tables) -> list[Any]:
        make = getattr(self, f"_make_{type(op).__name__.lower()}", None)
        if make is None:
            raise InternalError(f"no CUDA launch for op {op.name!r} ({type(op).__name__})")
        return make(op, tables)

    def is_output(self, view: View) -> bool:
        """Whether a view's buffer has one row per output row."""
        return self.plan.buffers[view.buf].rows == "outputs"

    def _make_embed(self, op: Any, tables: Tables) -> list[Any]:
        out, stride = self._view(op.out)
        nodes = []
        for weight, index in ((op.weight, "tokens"), (op.positions, "positions")):
            if weight is not None:
                w = self.plan.weights[weight]
                kernel = self.kernel("repack", f"rows_{layout.kernel_suffix(w.type_id)}")
                nodes.append(
                    EmbedNode(
                        op.name,
                        kernel,
                        self.addresses[weight],
                        self.addresses[index],
                        out,
                        stride,
                        op.scale if not nodes else 1.0,
                        w.shape[0],
                        w.shape[1],
                        bool(nodes),
                        128,
                    )
                )
        return nodes

    def _make_norm(self, op: Any, tables: Tables) -> list[Any]:
        x, x_stride = self._view(op.inp)
        out, out_stride = self._view(op.out)
        return [
            NormNode(
                op.name,
                self.image("norm"),
                op.kind,
                op.eps,
                x,
                x_stride,
                self._weight(op.weight),
                self._weight(op.bias),
                out,
                out_stride,
                op.inp.width,
                self.is_output(op.out),
                op.group,
            )
        ]

    def _make_matmulgroup(self, op: Any, tables: Tables) -> list[Any]:
        x, x_stride = self._view(op.inp)
        first = self.plan.weights[op.parts[0].weight]
        parts = []
        for part in op.parts:
            out, out_stride = self._view(part.out)
            parts.append((self.addresses[part.weight], self._weight(part.bias), out, out_stride, part.out.width))
        return [
            MatMulNode(
                op.name,
                self.kernel,
                layout,
                first.type_id,
                first.shape[0],
                parts,
                x,
                x_stride,
                op.residual,
                self.is_output(op.parts[0].out),
                self.addresses["x_split"],
                self.addresses["x_half"],
                self.addresses["x_half_scale"],
                self.context.sm_count,
                self.context.max_smem,
            )
        ]

    def _freqs(self, op: Any, tables: Tables) -> tuple[int, int]:
        """Addresses of an op's frequencies, and of the slots that take the long ones; 0 where there are none."""
        table = self.addresses[f"inv_freq:{tables[op.inv_freq + op.inv_freq_long]}"]
        return table, self.addresses["rope_tables"] if op.inv_freq_long else 0

    def _make_rope(self, op: Any, tables: Tables) -> list[Any]:
        x, stride = self._view(op.x)
        return [
            RopeKvNode(
                op.name,
                self.image("rope_kv"),
                0,
                0,
                x,
                stride,
                0,
                0,
                *self._freqs(op, tables),
                0,
                0,
                self.addresses["positions"],
                self.addresses["slots"],
                0,
                op.n_head,
                op.head_dim,
                op.n_rot,
                op.rope_type,
                0,
                op.mscale,
            )
        ]

    def _make_ropekv(self, op: Any, tables: Tables) -> list[Any]:
        k, k_stride = self._view(op.kv.k)
        v, v_stride = self._view(op.kv.v)
        q, q_stride, n_head, inv_freq, n_rot, rope_type, mscale = 0, 0, 0, (0, 0), 0, "", 1.0
        if op.rope_q is not None:
            r = op.rope_q
            q, q_stride = self._view(r.x)
            n_head, n_rot, rope_type, mscale = r.n_head, r.n_rot, r.rope_type, r.mscale
            inv_freq = self._freqs(r, tables)
        return [
            RopeKvNode(
                op.name,
                self.image("rope_kv"),
                q,
                q_stride,
                k,
                k_stride,
                v,
                v_stride,
                *inv_freq,
                self.addresses[f"layer:{op.kv.layer}"],
                self._table(op.kv.layer),
                self.addresses["positions"],
                self.addresses["slots"],
                n_head,
                op.kv.n_head_kv,
                op.kv.head_dim,
                n_rot,
                rope_type,
                self.config.max_blocks_per_seq,
                mscale,
            )
        ]

    def _make_kvwrite(self, op: Any, tables: Tables) -> list[Any]:
        return self._make_ropekv(RopeKv(op.name, None, None, op), tables)

    def _make_attention(self, op: Any, tables: Tables) -> list[Any]:
        q, q_stride = self._view(op.q)
        out, out_stride = self._view(op.out)
        return [
            AttentionNode(
                op.name,
                self.image("attention_decode"),
                self.image("attention_prefill"),
                q,
                q_stride,
                out,
                out_stride,
                self.addresses[f"layer:{op.layer}"],
                self._table(op.layer),
                self.addresses["positions"],
                self.addresses["slots"],
                self.addresses["tiles"],
                self._weight(op.sinks),
                self.addresses["attention_partial"],
                self.addresses["attention_counters"],
                op.n_head,
                op.n_head_kv,
                op.head_dim,
                self.config.max_blocks_per_seq,
                decode_max_splits(self.config.context_length, op.window),
                op.window,
                op.scale,
                self.context.sm_count,
            )
        ]

    def _make_route(self, op: Any, tables: Tables) -> list[Any]:
        x, x_stride = self._view(op.inp)
        ids, gates = self._view(op.ids)[0], self._view(op.gates)[0]
        w = self.plan.weights[op.weight]
        return [
            RouteNode(
                op.name,
                self.kernel,
                layout,
                expert_layout,
                w.type_id,
                w.shape[0],
                op.n_expert,
                op.n_used,
                self.addresses[op.weight],
                self._weight(op.bias),
                x,
                x_stride,
                self.addresses["route_partial"],
                ids,
                gates,
                *self._expert_lists(op),
            )
        ]

    def _make_expertgroup(self, op: Any, tables: Tables) -> list[Any]:
        first = op.parts[0]
        x, x_stride = self._view(first.inp)
        parts = []
        for part in op.parts:
            out, out_stride = self._view(part.out)
            parts.append((self.addresses[part.weight], self._weight(part.bias), out, out_stride))
        return [
            ExpertProductNode(
                op.name,
                self.kernel,
                layout,
                expert_layout,
                self.plan.weights[first.weight].type_id,
                first.n_in,
                first.n_out,
                first.n_expert,
                first.n_used,
                parts,
                x,
                x_stride,
                first.n_in if first.per_slot else 0,
                *self._expert_lists(first),
                self.addresses["x_split"],
                self.addresses["x_half"],
                self.addresses["x_half_scale"],
                self.context.sm_count,
                self.context.max_smem,
            )
        ]

    def _make_expertsum(self, op: Any, tables: Tables) -> list[Any]:
        x, x_stride = self._view(op.inp)
        out, out_stride = self._view(op.out)
        return [
            ExpertSumNode(
                op.name,
                self.kernel("route", "expert_sum"),
                x,
                x_stride,
                self._view(op.gates)[0],
                out,
                out_stride,
                op.out.width,
                op.n_used,
            )
        ]

    def _expert_lists(self, op: Any) -> Any:
        """Addresses of the parts of the lists that routing leaves for the products: decode rows, prompt rows."""
        n_rows = {"decode_list": memory.MAX_OUT, "prefill_list": -(-self.config.max_batch_tokens // 128) * 128}
        return [
            expert_layout.list_parts(self.addresses[name], n * op.n_used, op.n_expert) for name, n in n_rows.items()
        ]

    def _make_glu(self, op: Any, tables: Tables) -> list[Any]:
        gate, gate_stride = self._view(op.gate)
        up, up_stride = self._view(op.up)
        out, out_stride = self._view(op.out)
        return [
            PointwiseNode(
                op.name,
                self.image("pointwise"),
                "glu",
                gate,
                gate_stride,
                up,
                up_stride,
                out,
                out_stride,
                0,
                op.out.width,
                op.kind,
            )
        ]

    def _make_act(self, op: Any, tables: Tables) -> list[Any]:
        a, a_stride = self._view(op.inp)
        out, out_stride = self._view(op.out)
        return [
            PointwiseNode(
                op.name,
                self.image("pointwise"),
                f"act_{op.kind}",
                a,
                a_stride,
                0,
                0,
                out,
                out_stride,
                0,
                op.out.width,
            )
        ]

    def _make_add(self, op: Any, tables: Tables) -> list[Any]:
        a, a_stride = self._view(op.inp)
        out, out_stride = self._view(op.out)
        return [
            PointwiseNode(op.name, self.image("pointwise"), "add", a, a_stride, 0, 0, out, out_stride, 0, op.out.width)
        ]

    def _make_gather(self, op: Any, tables: Tables) -> list[Any]:
        a, a_stride = self._view(op.inp)
        out, out_stride = self._view(op.out)
        return [
            PointwiseNode(
                op.name,
                self.image("pointwise"),
                "gather_rows",
                a,
                a_stride,
                0,
                0,
                out,
                out_stride,
                self.addresses["output_indices"],
                op.out.width,
                "",
                True,
            )
        ]

    def _table(self, layer: int) -> int:
        """Address of the block table of a layer's KV group."""
        group = self.plan.kv_group_of[layer]
        return self.addresses["block_tables"] + 4 * group * self.config.max_seqs * self.config.max_blocks_per_seq
