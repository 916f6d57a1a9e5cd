"""Experts on the device: matrices, routing and products, launched as csrc/params and expert_layout.py say.

Shared by the tests of the expert kernels and benches of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from gpu.kernel_harness import CONSTANTS, Buffer, Gpu, params
from gpu.matmul_host import Converted

from worker_orcd.cuda import expert_layout, layout


@dataclass
class Experts:
    """Repacked matrices [n_out, k] of every expert, one after the other."""

    type_id: int
    n_expert: int
    n_out: int
    k: int
    w: Buffer
    bias: Buffer | None = None


def repack_experts(gpu: Gpu, type_id: int, raw: np.ndarray, k: int, bias: np.ndarray | None = None) -> Experts:
    """Upload GGUF rows uint8 [n_expert, n_out, row bytes] and repack them; `bias` float32 [n_expert, n_out]."""
    n_expert, n_out, row_bytes = raw.shape
    size = layout.packed_bytes(type_id, n_out, k)
    w = gpu.empty(n_expert * size, np.uint8)
    kernel = gpu.kernel("repack", f"repack_{layout.kernel_suffix(type_id)}")
    for e in range(n_expert):
        rows = gpu.buffer(raw[e])
        p = params("RepackParams", rows=rows, w=w.ptr + e * size, row_bytes=row_bytes, k=k, n_out=n_out,
                   row0=0, n_rows=n_out)  # fmt: skip
        gpu.launch(kernel, (layout.n_row_tiles(n_out), 2), 256, p)
        gpu.sync()
    return Experts(type_id, n_expert, n_out, k, w, None if bias is None else gpu.buffer(bias))


# ---- lists -----------------------------------------------------------------------------------------------------------


class List:
    """A list of pairs on the device; empty until `route` or `set` fills it."""

    def __init__(self, gpu: Gpu, n_pairs: int, n_expert: int) -> None:
        self.n_pairs = n_pairs
        self.buffer = gpu.empty(expert_layout.list_bytes(n_pairs, n_expert) // 4, np.int32)
        n_items, items, pairs, places = expert_layout.list_parts(self.buffer.ptr, n_pairs, n_expert)
        self.fields = {"n_items": n_items, "items": items, "pairs": pairs, "places": 0}
        self.places, self._pairs_at = places, (pairs - self.buffer.ptr) // 4

    def set(self, ids: np.ndarray, n_expert: int, item_rows: int) -> List:
        """The list of `ids`, made on the host."""
        items, pairs, places = host_list(ids, n_expert, item_rows)
        whole, at = np.full(self.buffer.shape, -1, np.int32), self._pairs_at
        whole[0], whole[4 : 4 + items.size], whole[at : at + pairs.size] = len(items), items.ravel(), pairs
        whole[at - places.size : at] = places
        self.buffer.set(whole)
        return self

    def get(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(items [n, 4], the pair at each place [n_places], the place of each pair [n_pairs]) on the device."""
        whole, at = self.buffer.to_numpy(), self._pairs_at
        return whole[4 : 4 + 4 * whole[0]].reshape(-1, 4), whole[at:], whole[at - self.n_pairs : at]

    def with_places(self) -> List:
        """The same, where the device is to leave the place of each pair."""
        self.fields["places"] = self.places
        return self


def host_list(ids: np.ndarray, n_expert: int, item_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items (expert, first, n, 0), the pair at each place (-1: none) and the place of each pair of `ids` [n_rows,
    n_used]; with places at multiples of 8 where the rows of such items are not gathered."""
    flat = ids.ravel().astype(int)
    packed = item_rows > expert_layout.GATHERED_ROWS and item_rows in layout.WGMMA_EXPERT_TILES
    items, pairs = [], np.full(expert_layout.n_places(flat.size, n_expert), -1, np.int32)
    first = 0
    for e, n in enumerate(np.bincount(flat, minlength=n_expert)):
        size = item_rows
        if packed and n > item_rows:
            size = -(-n // -(-n // item_rows))
            size = -(-size // 8) * 8
        items += [(e, first + i, min(size, n - i), 0) for i in range(0, n, size)]
        pairs[first : first + n] = np.flatnonzero(flat == e)
        first += -(-n // 8) * 8 if packed else n
    places = np.empty(flat.size, np.int32)
    places[pairs[pairs >= 0]] = np.flatnonzero(pairs >= 0)
    return np.array(items, np.int32).reshape(-1, 4), pairs, places


class Route:
    """Routing of `n_rows` rows x with the router `m` (an `Experts` of one); `run` queues it."""

    def __init__(self, gpu: Gpu, router: Experts, x: Buffer, n_rows: int, n_used: int, item_rows: int) -> None:
        n_expert = router.n_out
        self.gpu, self.n_rows, self.n_expert, self.item_rows = gpu, n_rows, n_expert, item_rows
        self.x, self.type_id = x, router.type_id
        self.ids, self.gates = gpu.empty((n_rows, n_used)), gpu.empty((n_rows, n_used))
        self.partial = gpu.empty(expert_layout.route_partial_bytes(n_rows, n_expert) // 4)
        self.list = List(gpu, n_rows * n_used, n_expert)
        self.logits = gpu.kernel("route", f"route_logits_{layout.kernel_suffix(router.type_id)}")
        self.params = params(
            "RouteParams", x=x, w=router.w, bias=router.bias, partial=self.partial, ids=self.ids,
            gates=self.gates, x_stride=x.shape[1], k=router.k, n_k_tiles=layout.n_k_tiles(router.type_id, router.k),
            n_expert=n_expert, n_used=n_used, n_rows=n_rows, item_rows=0, list=self.list.fields)  # fmt: skip

    def norm(self, weight: Buffer, eps: float) -> None:
        """With the RMS norm of x before; its rows are `converted` then."""
        p, gpu = self.params, self.gpu
        self.roots, self.arrived = gpu.empty(self.n_rows), gpu.buffer(np.zeros(1, np.uint32))
        self.converted = Converted(gpu, p.k, self.x, self.n_rows, p.x_stride, norm=("rms", weight, None, eps))
        self.converted.params.roots = self.roots.ptr
        p.norm_weight, p.roots = weight.ptr, self.roots.ptr

    def run_few(self, pdl: bool = False) -> None:
        """All in one launch, of few rows."""
        p, gpu = self.params, self.gpu
        smem = expert_layout.route_few_smem(self.type_id, p.k)
        blocks = expert_layout.route_few_blocks(self.n_rows, self.n_expert)
        p.item_rows = self.item_rows
        few = params("RouteFewParams", arrived=self.arrived, n_logit_blocks=blocks, slice_bytes=smem // 8)
        few.route, few.convert = p, self.converted.params
        kernel = gpu.kernel("route", f"route_few_{layout.kernel_suffix(self.type_id)}")
        gpu.launch(kernel, blocks + self.n_rows, 256, few, smem, pdl)

    def run(self, one_block: bool, pdl: bool = False) -> None:
        """With `one_block` as for decode rows, else as for prefill rows."""
        p, gpu = self.params, self.gpu
        p.item_rows = self.item_rows if one_block else 0
        gpu.launch(self.logits, expert_layout.route_grid(self.n_rows, self.n_expert), 256, p, pdl=pdl)
        gpu.launch(gpu.kernel("route", "route_choose"), 1 if one_block else -(-self.n_rows // 32), 1024, p, pdl=pdl)
        if not one_block:
            p.item_rows = self.item_rows
            gpu.launch(gpu.kernel("route", "route_list"), 1, 1024, p, pdl=pdl)


# ---- products --------------------------------------------------------------------------------------------------------


class _Products:
    def __init__(self, gpu: Gpu, experts: Sequence[Experts], x: Buffer, outs: Sequence[tuple[int, int]], n_rows: int,
                 n_used: int, per_slot: bool, order: str = "fragments",
                 places: tuple[int, int, int] | None = None) -> None:  # fmt: skip
        m = experts[0]
        n_inputs = n_used if per_slot else 1
        self.gpu, self.m = gpu, m
        self.converted = Converted(gpu, m.k, x, n_rows, x.shape[1], n_inputs=n_inputs, order=order, places=places)
        self.common = {
            "m": [{"w": e.w, "bias": e.bias, "out": out, "out_stride": stride}
                  for e, (out, stride) in zip(experts, outs, strict=True)],
            "matrix_bytes": layout.packed_bytes(m.type_id, m.n_out, m.k), "n_out": m.n_out, "n_used": n_used,
            "n_k_tiles": layout.n_k_tiles(m.type_id, m.k), "k": m.k, "x_bytes": layout.x_f16_bytes(m.k),
            "x_slot_rows": n_rows if per_slot else 0,
        }  # fmt: skip


class Decode(_Products):
    """Products of decode rows. `outs`: (address, stride) of each matrix's result; `grid` None: as the layout says.

    Of few rows only: `glu`, GLU_* of the activation of two matrices, whose result goes to the first of `outs`;
    `floats`, the kernel takes x as it is; `mix`, (gates, sum, counters) of the sum of the slots; `follows`, the kernel
    that comes before lets this one begin when the list is there, as `leads` does.
    """

    def __init__(self, gpu, experts, x, outs, n_rows, n_used, per_slot, pairs: List, grid: int | None = None,
                 glu: int | None = None, floats: bool = False, mix: tuple[Buffer, Buffer, Buffer] | None = None,
                 leads: bool = False, follows: bool = False) -> None:  # fmt: skip
        super().__init__(gpu, experts, x, outs, n_rows, n_used, per_slot)
        m = self.m
        self.converts = False
        if n_rows > layout.DECODE_ROWS:
            launch = expert_layout.decode_launch(m.type_id, m.k, m.n_out, len(experts), n_rows, n_used, m.n_expert,
                                                 n_sm=gpu.n_sm)  # fmt: skip
            p = params("ExpertMatvecParams", **self.common, list=pairs.fields, rows=self.converted.rows,
                       n_matrices=len(experts), ring_bytes=launch.ring_bytes)  # fmt: skip
            self.launches = [(gpu.kernel("experts_decode", launch.kernel), grid or launch.grid, launch, p)]
            return
        launch = expert_layout.few_launch(m.type_id, m.k, m.n_out, n_rows, n_used, m.n_expert, n_sm=gpu.n_sm,
                                          glu=glu is not None, max_smem=gpu.max_smem)  # fmt: skip
        tile_bytes = layout.n_k_tiles(m.type_id, m.k) * layout.packed_tile_bytes(m.type_id)
        told = ("n_warps", "n_groups", "depth", "batch", "ring_bytes", "x_smem", "factors", "barriers")
        self.converts = floats and launch.x_smem > 0
        gates, total, arrived = mix or (None, None, None)
        extra = {
            "x": x if self.converts else None, "x_stride": x.shape[1],
            "x_slot_stride": m.k if per_slot else 0, "gates": gates, "sum": total,
            "sum_stride": total.shape[1] if total else 0, "arrived": arrived, "holds_next": leads,
            "has_list": follows and self.converts,
        }  # fmt: skip
        mode = "PRODUCT_MIX" if mix else "PRODUCT_STORE" if glu is None else "PRODUCT_GLU"
        matrices = self.common.pop("m")
        self.launches = []
        for some in [matrices] if glu is not None else [[one] for one in matrices]:
            p = params(
                "ExpertFewParams", **self.common, **{name: getattr(launch, name) for name in told}, m=some,
                list=pairs.fields, rows=self.converted.rows, out=some[0]["out"], out_stride=some[0]["out_stride"],
                tile_bytes=tile_bytes, scales_at=layout.n_row_tiles(m.n_out) * tile_bytes,
                n_chunks=layout.n_chunks(m.k), n_rows=n_rows, glu=glu or 0, mode=CONSTANTS[mode], **extra)  # fmt: skip
            self.launches.append((gpu.kernel("experts_few", launch.kernel), grid or launch.grid, launch, p))

    def run(self, pdl: bool = False) -> None:
        """Queue the conversion of x, unless the kernel does it, and the products."""
        if not self.converts:
            self.converted.run(pdl)
        for kernel, grid, launch, p in self.launches:
            self.gpu.launch(kernel, grid, launch.block, p, launch.smem, pdl)


class Prefill(_Products):
    """Products of prefill rows in items of at most `item_rows` pairs."""

    def __init__(self, gpu, experts, x, outs, n_rows, n_used, per_slot, pairs: List, item_rows: int) -> None:
        super().__init__(gpu, experts, x, outs, n_rows, n_used, per_slot)
        m = self.m
        self.launch = expert_layout.prefill_launch(m.type_id, m.k, m.n_out, len(experts), n_rows, n_used, m.n_expert,
                                                  item_rows)  # fmt: skip
        self.params = params("ExpertMatmulParams", **self.common, list=pairs.fields, x=self.converted.rows)
        self.kernel = gpu.kernel("experts_prefill", self.launch.kernel)

    def run(self, pdl: bool = False) -> None:
        """Queue the conversion of x and the products."""
        self.converted.run(pdl)
        self.gpu.launch(self.kernel, self.launch.grid, self.launch.block, self.params, self.launch.smem, pdl)


class Many(_Products):
    """Products of any number of rows by warpgroups, in items of at most `item_rows` pairs; `glu`, GLU_* of the
    activation of two matrices, whose result goes to the first of `outs`."""

    def __init__(self, gpu, experts, x, outs, n_rows, n_used, per_slot, pairs: List, item_rows: int,
                 grid: int | None = None, glu: int | None = None) -> None:  # fmt: skip
        m = experts[0]
        self.launch = expert_layout.many_launch(m.type_id, m.k, m.n_out, len(experts), n_rows, n_used, m.n_expert,
                                                grid or gpu.n_sm, item_rows)  # fmt: skip
        places = (pairs.places, n_used, self.launch.places) if self.launch.places else None
        super().__init__(gpu, experts, x, outs, n_rows, n_used, per_slot, "tiles" if places else "lines", places)
        self.params = params(
            "ManyExpertRowsParams", **self.common, list=pairs.fields, x=self.converted.rows, n_matrices=len(experts),
            n_tiles_m=self.launch.tiles_m, mode=CONSTANTS["PRODUCT_STORE" if glu is None else "PRODUCT_GLU"],
            glu=glu or 0, factors=self.converted.factors, factor_stride=self.launch.places)  # fmt: skip
        self.kernel = gpu.kernel("wgmma_experts", self.launch.kernel)

    def run(self, pdl: bool = False) -> None:
        """Queue the conversion of x and the products."""
        self.converted.run(pdl)
        self.gpu.launch(self.kernel, self.launch.grid, self.launch.block, self.params, self.launch.smem, pdl)
