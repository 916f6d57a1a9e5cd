"""Sequences with a paged cache, and attention over them as decode rows, as prompt rows and with the rotation before."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gpu.kernel_harness import CONSTANTS, params
from gpu.ops_host import KV_BLOCK, PagedCache, attention_reference, rule, view

from worker_orcd.cuda import layout

INTERLEAVED, NEOX = CONSTANTS["ROPE_INTERLEAVED"], CONSTANTS["ROPE_NEOX"]


@dataclass
class Rotation:
    """How rows turn; `inv_freq` [n tables, n_rot / 2], `rope_tables` the table of each sequence."""

    n_rot: int
    rope_type: int = NEOX
    mscale: float = 1.0
    n_tables: int = 1
    inv_freq: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        half = max(self.n_rot // 2, 1)
        first = 10000.0 ** (-np.arange(half) / half)
        self.inv_freq = np.stack([first / 3**i for i in range(self.n_tables)]).astype(np.float32)

    def fields(self, gpu: Any, n_seqs: int) -> dict[str, Any]:
        """The parameters that say so."""
        tables = gpu.buffer(np.arange(n_seqs, dtype=np.int32) % self.n_tables) if self.n_tables > 1 else None
        return {"inv_freq": gpu.buffer(self.inv_freq), "rope_tables": tables, "n_rot": self.n_rot,
                "rope_type": self.rope_type, "mscale": self.mscale}  # fmt: skip


def decode_grid(n_head: int, n_head_kv: int) -> int:
    """Blocks in y of a decode launch."""
    return n_head_kv * rule("decode_head_tiles", n_head, n_head_kv)


class Sequences:
    """Sequences of the given lengths whose keys are in a cache; what surrounds them there is NaN.

    `shape`: n_head, n_head_kv, head_dim, window, whether there are sinks.
    """

    def __init__(self, gpu, shape, lengths, seed=0, scale=None, q_scale=1.0):
        self.gpu, self.shape, self.lengths = gpu, shape, lengths
        n_head, n_head_kv, head_dim, self.window, sinks = shape
        rng = np.random.default_rng(seed)
        self.cache = PagedCache(rng, lengths, n_head_kv, head_dim)
        self.scale = head_dim**-0.5 if scale is None else scale
        self.q = [(rng.standard_normal((n, n_head, head_dim)) * q_scale).astype(np.float32) for n in lengths]
        self.sinks = rng.standard_normal(n_head).astype(np.float32) * 2 if sinks else None
        self.dsinks = gpu.buffer(self.sinks) if sinks else None
        self.rng = rng
        self.upload()

    def upload(self) -> None:
        """The cache to the device, as it is now."""
        self.arena, self.table = self.gpu.buffer(self.cache.arena), self.gpu.buffer(self.cache.block_table)

    def forget_passed_blocks(self, position: int) -> None:
        """Blocks that the window of every row from `position` on has passed become another's: no entry, NaN."""
        for seq in range(len(self.lengths)):
            for block in range(max(0, position - self.window + 1) // KV_BLOCK):
                self.cache.arena[self.cache.block_table[seq, block]] = np.nan
                self.cache.block_table[seq, block] = -1
        self.upload()

    def reference(self, seq: int, position: int) -> np.ndarray:
        """float64 [n_head, head_dim]."""
        k, v = self.cache.k[seq], self.cache.v[seq]
        return attention_reference(self.q[seq][position], k, v, position, self.scale, self.window, self.sinks)

    def _both(self, q, out, **more):
        n_head, n_head_kv, _, window, _ = self.shape
        return {"q": q, "kv": self.arena, "block_table": self.table, "sinks": self.dsinks, "out": out,
                "q_stride": q.shape[1], "out_stride": out.shape[1], "n_head": n_head, "n_head_kv": n_head_kv,
                "max_blocks": self.cache.max_blocks, "window": window, "scale": self.scale, **more}  # fmt: skip

    def _rows(self, rows):
        positions = np.array([p if s >= 0 else 10**6 for s, p in rows], np.int32)
        return {"positions": self.gpu.buffer(positions), "slots": self.gpu.buffer(np.array(rows, np.int32)[:, 0])}

    def launch_decode(self, fields, rows, grid_x=None, shape=None, pdl=False, repeat=1):
        """attention_decode of `rows` (seq, position); a seq of -1 is a dead row. `shape`: of a block, one of
        `block_shapes`; else the largest. Returns [n rows, n_head, head_dim]."""
        gpu, (n_head, n_head_kv, head_dim, window, _) = self.gpu, self.shape
        n, heads = len(rows), decode_grid(n_head, n_head_kv)
        groups, depth = shape or self.block_shapes()[-1]
        max_splits = rule("decode_max_splits", max(self.lengths), window)
        partial = gpu.empty((n, n_head, max_splits, head_dim + 4))
        counters = gpu.buffer(np.zeros((n, heads), np.uint32))
        out = gpu.empty((n, n_head * head_dim + 4))
        p = params("AttentionDecodeParams", **self._both(out=out, **fields), **self._rows(rows), partial=partial,
                   counters=counters, max_splits=max_splits, groups=groups, depth=depth, kv_group=n_head // n_head_kv,
                   head_tiles=rule("decode_head_tiles", n_head, n_head_kv))  # fmt: skip
        kernel, smem = (
            gpu.kernel("attention_decode", f"attention_decode_{head_dim}"),
            rule("decode_smem_bytes", head_dim, groups, depth),
        )
        for _ in range(repeat):
            grid = (grid_x or max_splits, heads, n)
            gpu.launch(kernel, grid, groups * CONSTANTS["DECODE_THREADS"], p, smem=smem, pdl=pdl)
        got = out.to_numpy()
        assert not counters.to_numpy().any(), "the counters must be left zero for the next launch"
        partial.check_guards()
        assert np.isnan(got[:, n_head * head_dim :]).all(), "columns outside the heads were written"
        return got[:, : n_head * head_dim].reshape(n, n_head, head_dim)

    def block_shapes(self) -> list[tuple[int, int]]:
        """(groups, depth) of all blocks that there is shared memory for."""
        head_dim, static = self.shape[2], 4096
        every = [(g + 1, d + 1) for g in range(CONSTANTS["DECODE_GROUPS"]) for d in range(CONSTANTS["DECODE_DEPTH"])]
        sizes = [rule("decode_smem_bytes", head_dim, *shape) + static for shape in every]
        return [shape for shape, size in zip(every, sizes, strict=True) if shape == (1, 1) or size <= self.gpu.max_smem]

    def decode(self, rows, **how):
        """Decode rows (seq, position) whose keys are all in the cache."""
        width = self.shape[0] * self.shape[2]
        q = np.full((len(rows), width + 4), np.nan, np.float32)
        for r, (seq, position) in enumerate(rows):
            if seq >= 0:
                q[r, :width] = self.q[seq][position].reshape(-1)
        return self.launch_decode({"q": self.gpu.buffer(q)}, rows, **how)

    def prefill(self, chunks, tiles=None, n_spare=1):
        """Chunks (seq, first position, n rows), in one launch of each kernel that the GPU has for them. Returns an
        array [n rows, n_head, head_dim] of each."""
        gpu, (n_head, _, head_dim, _, _) = self.gpu, self.shape
        width = n_head * head_dim + 4
        n_rows = sum(n for _, _, n in chunks) + 2  # a row before and one after belong to no tile
        q = np.full((n_rows, width), np.nan, np.float32)
        entries, row = [], 1
        for seq, position, n in chunks:
            q[row : row + n, : n_head * head_dim] = self.q[seq][position : position + n].reshape(n, -1)
            entries += tiles_of(row, n, position, seq) if tiles is None else tiles(row, n, position, seq)
            row += n
        entries = sorted(entries, key=lambda e: -e[2]) + [(0, 0, 0, 0)] * n_spare
        dq, tiles = gpu.buffer(q), gpu.buffer(np.array(entries, np.int32))
        results = []
        for how in ("prefill", *(["warpgroup"] if gpu.arch == layout.WGMMA_ARCH else [])):
            out = gpu.empty((n_rows, width))
            p = params("AttentionPrefillParams", **self._both(dq, out), tiles=tiles)
            kernel = gpu.kernel(f"attention_{how}", f"attention_{how}_{head_dim}")
            gpu.launch(kernel, (len(entries), n_head), 128, p, smem=rule(f"{how}_smem_bytes", head_dim))
            results.append(out.to_numpy())
        got = results[0]
        assert all(same_bits(other, got) for other in results), "not the bits of attention_prefill"
        assert np.isnan(got[:, n_head * head_dim :]).all() and np.isnan(got[[0, -1]]).all(), "written outside the tiles"
        bounds = np.cumsum([1] + [n for _, _, n in chunks])
        return [got[a:b, : n_head * head_dim].reshape(b - a, n_head, head_dim) for a, b in itertools.pairwise(bounds)]

    def rope_then_attend(self, qkv, rotation: Rotation, rows, fused: bool, **how):
        """Decode rows from q, k and v as a product leaves them: [n rows, (n_head + 2 n_head_kv) head_dim + 4].

        The rows' own positions are not in the cache before. Returns (out, the cache after it); `qkv` must stay as it is
        where `fused`.
        """
        gpu, (n_head, n_head_kv, head_dim, _, _) = self.gpu, self.shape
        arena = self.cache.arena.copy()
        saved, self.cache.arena = self.cache.arena, arena
        for seq, position in rows:
            if seq >= 0:
                self.cache.put(seq, position, np.nan, np.nan)
        self.cache.arena = saved
        self.arena = gpu.buffer(arena)
        x, width = gpu.buffer(qkv), qkv.shape[1]
        k, v = view(x, n_head * head_dim), view(x, (n_head + n_head_kv) * head_dim)
        own = {"k": k, "v": v, "k_stride": width, "v_stride": width, **rotation.fields(gpu, len(self.lengths))}
        if not fused:
            heads = {"n_head": n_head, "n_head_kv": n_head_kv, "head_dim": head_dim}
            places = {"kv": self.arena, "block_table": self.table, "max_blocks": self.cache.max_blocks}
            p = params("RopeKvParams", **own, **heads, **places, q=x, q_stride=width, **self._rows(rows))
            gpu.launch(gpu.kernel("rope_kv", "rope_kv"), (len(rows), 3), 256, p)
            own = {}
        out = self.launch_decode({"q": x, **own}, rows, **how)
        if fused:
            assert same_bits(x.to_numpy(), qkv), "q, k and v are read only"
        return out, self.arena.to_numpy()


def tiles_of(row, n_rows, position, slot):
    """Tiles of a run of rows, cut at multiples of 64 positions."""
    tiles = []
    while n_rows > 0:
        n = min(n_rows, KV_BLOCK - position % KV_BLOCK)
        tiles.append((row, n, position, slot))
        row, n_rows, position = row + n, n_rows - n, position + n
    return tiles


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays hold the same bytes."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
