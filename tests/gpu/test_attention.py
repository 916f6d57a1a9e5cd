"""Paged attention, decode and prefill, against float64 over a cache rounded to float16; what surrounds a row is NaN."""

from __future__ import annotations

import itertools

import limits
import numpy as np
import pytest
from gpu.kernel_harness import available, params
from gpu.ops_host import KV_BLOCK, PagedCache, attention_reference, check_nmse, new_gpu, rule

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not available(), reason="no CUDA device")]


#: n_head, n_head_kv, head_dim, window, sinks
SHAPES = [
    (14, 2, 64, 0, False),
    (4, 4, 96, 40, False),
    (8, 2, 128, 0, True),
    (8, 1, 64, 24, True),
    (3, 3, 80, 0, False),
    (16, 1, 32, 0, False),
    (20, 2, 64, 128, True),
]


@pytest.fixture(scope="module")
def gpu():
    return new_gpu()


class Decode:
    """One set of decode rows: row r is the next token of sequence r, at its last position."""

    def __init__(self, gpu, shape, lengths, seed=0, scale=None, q_scale=1.0):
        self.gpu, self.shape = gpu, shape
        n_head, n_head_kv, head_dim, self.window, sinks = shape
        rng = np.random.default_rng(seed)
        self.cache = PagedCache(rng, lengths, n_head_kv, head_dim)
        self.scale = head_dim**-0.5 if scale is None else scale
        self.q = (rng.standard_normal((len(lengths), n_head, head_dim)) * q_scale).astype(np.float32)
        self.sinks = rng.standard_normal(n_head).astype(np.float32) * 2 if sinks else None
        self.lengths = lengths
        self.arena, self.table = gpu.buffer(self.cache.arena), gpu.buffer(self.cache.block_table)
        self.dsinks = gpu.buffer(self.sinks) if sinks else None

    def reference(self):
        return np.stack(
            [
                attention_reference(
                    self.q[s], self.cache.k[s], self.cache.v[s], n - 1, self.scale, self.window, self.sinks
                )
                for s, n in enumerate(self.lengths)
            ]
        )

    def run(self, seqs, grid_x=None, pdl=False, repeat=1):
        """Rows of `seqs` (a sequence, or -1 for a dead row). Returns [len(seqs), n_head, head_dim]."""
        gpu, (n_head, n_head_kv, head_dim, window, _) = self.gpu, self.shape
        n = len(seqs)
        q = np.full((n, n_head * head_dim + 4), np.nan, np.float32)
        q[:, : n_head * head_dim] = self.q[seqs].reshape(n, -1)
        positions = np.array([self.lengths[s] - 1 if s >= 0 else 10**6 for s in seqs], np.int32)
        dq, dp, ds = gpu.buffer(q), gpu.buffer(positions), gpu.buffer(np.array(seqs, np.int32))
        max_splits = rule("decode_max_splits", max(self.lengths), window)
        tiles = rule("decode_head_tiles", n_head, n_head_kv)
        partial = gpu.empty((n, n_head, max_splits, head_dim + 4))
        counters = gpu.buffer(np.zeros((n, n_head_kv * tiles), np.uint32))
        out = gpu.empty((n, n_head * head_dim + 4))
        p = params("AttentionDecodeParams", q=dq, kv=self.arena, block_table=self.table, positions=dp, slots=ds,
                   sinks=self.dsinks, out=out, partial=partial, counters=counters, q_stride=q.shape[1],
                   out_stride=q.shape[1], n_head=n_head, n_head_kv=n_head_kv, max_blocks=self.cache.max_blocks,
                   max_splits=max_splits, window=window, scale=self.scale)  # fmt: skip
        kernel = gpu.kernel("attention_decode", f"attention_decode_{head_dim}")
        smem = rule("decode_smem_bytes", head_dim)
        for _ in range(repeat):
            gpu.launch(kernel, (grid_x or max_splits, n_head_kv * tiles, n), 128, p, smem=smem, pdl=pdl)
        got = out.to_numpy()
        assert not counters.to_numpy().any(), "the counters must be left zero for the next launch"
        partial.check_guards()
        assert np.isnan(got[:, n_head * head_dim :]).all(), "columns outside the heads were written"
        return got[:, : n_head * head_dim].reshape(n, n_head, head_dim)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode(gpu, shape):
    lengths = [1, 31, 33, 64, 129, 300, 257]
    d = Decode(gpu, shape, lengths)
    check_nmse(d.run(range(len(lengths))), d.reference(), limits.ATTENTION_DECODE_NMSE, f"decode {shape}")


@pytest.mark.parametrize("n_keys", [4096, 4097, 5000, 16385, 40000])
def test_decode_long(gpu, n_keys):
    d = Decode(gpu, (7, 1, 64, 0, False), [n_keys])
    check_nmse(d.run([0]), d.reference(), limits.ATTENTION_DECODE_NMSE, f"decode of {n_keys} keys")


def test_decode_window_far_out(gpu):
    d = Decode(gpu, (8, 1, 64, 128, True), [4999, 5000])
    check_nmse(d.run([0, 1]), d.reference(), limits.ATTENTION_DECODE_NMSE, "decode, window far out")


def test_decode_large_logits(gpu):
    """Scores of hundreds, as real models have: q must not be rounded to one half."""
    d = Decode(gpu, (14, 2, 64, 0, False), [200, 77], scale=1.0, q_scale=20.0)
    check_nmse(d.run([0, 1]), d.reference(), 1e-8, "decode, large logits")


def test_decode_row_depends_on_nothing_else(gpu):
    lengths = [300, 5, 129, 700, 64]
    d = Decode(gpu, (14, 2, 64, 0, True), lengths)
    together = d.run([0, 1, 2, -1, 3, 4])
    assert not together[3].any(), "a dead row must give zeros"
    for row, seq in ((0, 0), (1, 1), (2, 2), (4, 3), (5, 4)):
        for grid_x in (None, 1, 2, 3, 50):
            alone = d.run([seq], grid_x=grid_x)
            assert np.array_equal(alone[0], together[row]), f"sequence {seq} with grid_x {grid_x} differs"
    assert np.array_equal(d.run([4, -1, 3, 1, 0], pdl=True, repeat=5)[4], together[0])


def tiles_of(row, n_rows, position, slot):
    """Tiles of a run of rows, cut at multiples of 64 positions."""
    tiles = []
    while n_rows > 0:
        n = min(n_rows, KV_BLOCK - position % KV_BLOCK)
        tiles.append((row, n, position, slot))
        row, n_rows, position = row + n, n_rows - n, position + n
    return tiles


class Prefill:
    """Sequences whose rows are all asked for; chunks of them run in any grouping."""

    def __init__(self, gpu, shape, lengths, seed=0, scale=None, q_scale=1.0):
        self.gpu, self.shape, self.lengths = gpu, shape, lengths
        n_head, n_head_kv, head_dim, self.window, sinks = shape
        rng = np.random.default_rng(seed)
        self.cache = PagedCache(rng, lengths, n_head_kv, head_dim)
        self.scale = head_dim**-0.5 if scale is None else scale
        self.q = [(rng.standard_normal((n, n_head, head_dim)) * q_scale).astype(np.float32) for n in lengths]
        self.sinks = rng.standard_normal(n_head).astype(np.float32) * 2 if sinks else None
        self.arena, self.table = gpu.buffer(self.cache.arena), gpu.buffer(self.cache.block_table)
        self.dsinks = gpu.buffer(self.sinks) if sinks else None

    def reference(self, seq):
        return np.stack(
            [
                attention_reference(
                    self.q[seq][t], self.cache.k[seq], self.cache.v[seq], t, self.scale, self.window, self.sinks
                )
                for t in range(self.lengths[seq])
            ]
        )

    def run(self, chunks, tiles=None, n_spare=1):
        """Chunks (seq, first position, n rows), in one launch. Returns an array [n rows, n_head, head_dim] of each."""
        gpu, (n_head, n_head_kv, head_dim, window, _) = self.gpu, self.shape
        width = n_head * head_dim + 4
        n_rows = sum(n for _, _, n in chunks) + 2  # a row before and one after belong to no tile
        q = np.full((n_rows, width), np.nan, np.float32)
        entries, row = [], 1
        for seq, position, n in chunks:
            q[row : row + n, : n_head * head_dim] = self.q[seq][position : position + n].reshape(n, -1)
            entries += tiles_of(row, n, position, seq) if tiles is None else tiles(row, n, position, seq)
            row += n
        entries = sorted(entries, key=lambda e: -e[2]) + [(0, 0, 0, 0)] * n_spare
        dq, dtiles, out = gpu.buffer(q), gpu.buffer(np.array(entries, np.int32)), gpu.empty((n_rows, width))
        p = params("AttentionPrefillParams", q=dq, kv=self.arena, block_table=self.table, tiles=dtiles,
                   sinks=self.dsinks, out=out, q_stride=width, out_stride=width, n_head=n_head, n_head_kv=n_head_kv,
                   max_blocks=self.cache.max_blocks, window=window, scale=self.scale)  # fmt: skip
        kernel = gpu.kernel("attention_prefill", f"attention_prefill_{head_dim}")
        gpu.launch(kernel, (len(entries), n_head), 128, p, smem=rule("prefill_smem_bytes", head_dim))
        got = out.to_numpy()
        assert np.isnan(got[:, n_head * head_dim :]).all() and np.isnan(got[[0, -1]]).all(), "written outside the tiles"
        bounds = np.cumsum([1] + [n for _, _, n in chunks])
        return [got[a:b, : n_head * head_dim].reshape(b - a, n_head, head_dim) for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill(gpu, shape):
    lengths = [1, 17, 64, 130, 65]
    d = Prefill(gpu, shape, lengths)
    for seq, got in enumerate(d.run([(s, 0, n) for s, n in enumerate(lengths)])):
        check_nmse(got, d.reference(seq), limits.ATTENTION_PREFILL_NMSE, f"prefill {shape}, {lengths[seq]} rows")


def test_prefill_long(gpu):
    d = Prefill(gpu, (4, 2, 64, 0, False), [1000])
    check_nmse(d.run([(0, 0, 1000)])[0], d.reference(0), limits.ATTENTION_PREFILL_NMSE, "prefill 1000")


def test_prefill_large_logits(gpu):
    d = Prefill(gpu, (4, 2, 64, 0, False), [150], scale=1.0, q_scale=20.0)
    check_nmse(d.run([(0, 0, 150)])[0], d.reference(0), 2e-7, "prefill, large logits")


@pytest.mark.parametrize("window", [0, 40])
def test_prefill_does_not_depend_on_chunks(gpu, window):
    n = 200
    d = Prefill(gpu, (4, 2, 64, window, True), [n, 70])
    whole = d.run([(0, 0, n), (1, 0, 70)])[0]
    for size in (1, 13, 64, 96):
        chunks = [(0, a, min(size, n - a)) for a in range(0, n, size)]
        for group in (
            1,
            3,
        ):  # chunks of a launch; the keys of later chunks are in the cache already, and must not count
            parts = [part for i in range(0, len(chunks), group) for part in d.run(chunks[i : i + group])]
            assert np.array_equal(np.concatenate(parts), whole), f"chunks of {size} differ"

    def unaligned(row, n_rows, position, slot):
        return [(row + a, min(50, n_rows - a), position + a, slot) for a in range(0, n_rows, 50)]

    assert np.array_equal(d.run([(0, 0, n)], tiles=unaligned)[0], whole), "tiles across block borders differ"


def test_prefill_agrees_with_decode(gpu):
    shape, n = (8, 2, 128, 0, True), 100
    prefill = Prefill(gpu, shape, [n], seed=3)
    d = Decode(gpu, shape, [n], seed=3)
    d.cache, d.arena, d.table, d.sinks, d.dsinks = (
        prefill.cache,
        prefill.arena,
        prefill.table,
        prefill.sinks,
        prefill.dsinks,
    )
    d.q = prefill.q[0][-1:]
    check_nmse(d.run([0])[0], prefill.run([(0, 0, n)])[0][-1], limits.ATTENTION_PREFILL_NMSE, "decode against prefill")


def test_rules_of_shape():
    """The workspace holds every split of every position, whatever the window."""
    for window in (0, 1, 24, 128, 129, 5000):
        for context in (1, 64, 4096, 4097, 20000, 131072, 1 << 20):
            room = rule("decode_max_splits", context, window)
            for position in {0, 1, 127, 128, 4095, 4096, 16384, 65535, 65536, context // 2, context - 1}:
                if position >= context:
                    continue
                first = max(0, position - window + 1) if window else 0
                split = rule("decode_split", position - first + 1)
                assert split % 128 == 0 and position // split - first // split + 1 <= room <= 130
