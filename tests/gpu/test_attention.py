"""Paged attention: decode rows and prompt rows against each other bit by bit, and against float64 over a cache rounded
to float16; what surrounds a row is NaN."""

from __future__ import annotations

import limits
import numpy as np
import pytest
from gpu.attention_host import INTERLEAVED, NEOX, Rotation, Sequences, same_bits
from gpu.kernel_harness import CONSTANTS, available
from gpu.ops_host import check_nmse, new_gpu, rule

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not available(), reason="no CUDA device")]

SPLIT = CONSTANTS["ATTENTION_SPLIT"]

#: n_head, n_head_kv, head_dim, window, sinks: groups of 1, 4, 7, 8, 16, 20 and all head widths
SHAPES = [
    (14, 2, 64, 0, False),
    (4, 4, 96, 40, False),
    (8, 2, 128, 0, True),
    (8, 1, 64, 24, True),
    (3, 3, 80, 0, False),
    (16, 1, 32, 0, False),
    (20, 1, 80, 0, False),
    (40, 2, 64, 128, True),
    (16, 1, 128, 200, False),
    (7, 1, 96, 0, True),
]
LENGTHS = [1, 63, 64, 65, 127, 128, 129, 130, 31, 300, 257]


@pytest.fixture(scope="module")
def gpu():
    return new_gpu()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode(gpu, shape):
    s = Sequences(gpu, shape, LENGTHS)
    rows = [(seq, n - 1) for seq, n in enumerate(LENGTHS)]
    want = np.stack([s.reference(*row) for row in rows])
    check_nmse(s.decode(rows), want, limits.ATTENTION_NMSE, f"decode {shape}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill(gpu, shape):
    lengths = [1, 17, 64, 130, 65]
    s = Sequences(gpu, shape, lengths)
    for seq, got in enumerate(s.prefill([(s, 0, n) for s, n in enumerate(lengths)])):
        want = np.stack([s.reference(seq, t) for t in range(lengths[seq])])
        check_nmse(got, want, limits.ATTENTION_NMSE, f"prefill {shape}, {lengths[seq]} rows")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_is_the_same_decoded_and_in_a_prompt(gpu, shape):
    s = Sequences(gpu, shape, LENGTHS)
    chunks = [(seq, max(0, n - 70), min(n, 70)) for seq, n in enumerate(LENGTHS)]
    for chunk, prompt in zip(chunks, s.prefill(chunks), strict=True):
        seq, start, n = chunk
        at = sorted({0, n // 2, n - 2, n - 1} & set(range(n)))
        for block in s.block_shapes():
            decoded = s.decode([(seq, start + i) for i in at], shape=block)
            where = f"sequence of {LENGTHS[seq]}, positions {[start + i for i in at]}"
            assert same_bits(decoded, prompt[at]), f"{where}, groups and depth {block}"


@pytest.mark.parametrize(
    ("shape", "n"),
    [((14, 2, 64, 0, False), 1000), ((8, 2, 128, 0, True), 1000), ((7, 1, 64, 0, False), 5000),
     ((8, 1, 64, 128, True), 5000), ((32, 1, 96, 1000, False), 5000)],
    ids=str,
)  # fmt: skip
def test_a_long_row_is_the_same_decoded_and_in_a_prompt(gpu, shape, n):
    """Whatever the blocks that share its splits, and with nothing left of blocks that its window has passed."""
    s = Sequences(gpu, shape, [n])
    rows = [(0, n - 66), (0, n - 2), (0, n - 1)]
    if s.window:
        s.forget_passed_blocks(n - 130)
    (prompt,) = s.prefill([(0, n - 130, 130)])
    want = prompt[[position - (n - 130) for _, position in rows]]
    check_nmse(want, np.stack([s.reference(*row) for row in rows]), limits.ATTENTION_NMSE, f"{shape}, {n} keys")
    for grid_x in (None, 1, 2, 3, 7, 64):
        for block in s.block_shapes():
            decoded = s.decode(rows, grid_x=grid_x, shape=block)
            assert same_bits(decoded, want), f"grid_x {grid_x}, groups and depth {block}"


def test_decode_of_131072_keys(gpu):
    n = 131072
    s = Sequences(gpu, (7, 1, 64, 0, True), [n])
    got = s.decode([(0, n - 1)])
    check_nmse(got[0], s.reference(0, n - 1), limits.ATTENTION_NMSE, f"decode of {n} keys")
    assert same_bits(s.decode([(0, n - 1)], grid_x=1), got)


def test_large_logits(gpu):
    """Scores of hundreds, as real models have: q must not be rounded to one half."""
    s = Sequences(gpu, (14, 2, 64, 0, False), [200, 77], scale=1.0, q_scale=20.0)
    want = np.stack([s.reference(0, 199), s.reference(1, 76)])
    check_nmse(s.decode([(0, 199), (1, 76)]), want, 1e-8, "decode, large logits")
    s = Sequences(gpu, (4, 2, 64, 0, False), [150], scale=1.0, q_scale=20.0)
    want = np.stack([s.reference(0, t) for t in range(150)])
    check_nmse(s.prefill([(0, 0, 150)])[0], want, 1e-8, "prefill, large logits")


def test_decode_row_depends_on_nothing_else(gpu):
    lengths = [300, 5, 129, 700, 64]
    s = Sequences(gpu, (14, 2, 64, 0, True), lengths)
    row = {seq: (seq, n - 1) for seq, n in enumerate(lengths)} | {-1: (-1, 0)}
    together = s.decode([row[i] for i in (0, 1, 2, -1, 3, 4)])
    assert not together[3].any(), "a dead row must give zeros"
    for at, seq in ((0, 0), (1, 1), (2, 2), (4, 3), (5, 4)):
        for grid_x in (None, 1, 2, 3, 50):
            for block in s.block_shapes():
                alone = s.decode([row[seq]], grid_x=grid_x, shape=block)
                assert same_bits(alone[0], together[at]), f"sequence {seq}, grid_x {grid_x}, groups and depth {block}"
    assert same_bits(s.decode([row[i] for i in (4, -1, 3, 1, 0)], pdl=True, repeat=5)[4], together[0])


@pytest.mark.parametrize("window", [0, 40, 150])
def test_prefill_does_not_depend_on_chunks(gpu, window):
    n = 300
    s = Sequences(gpu, (4, 2, 64, window, True), [n, 70])
    whole = s.prefill([(0, 0, n), (1, 0, 70)])[0]
    for size in (1, 13, 64, 96):
        chunks = [(0, a, min(size, n - a)) for a in range(0, n, size)]
        for group in (1, 3):
            # chunks of a launch; the keys of later chunks are in the cache already, and must not count
            parts = [part for i in range(0, len(chunks), group) for part in s.prefill(chunks[i : i + group])]
            assert same_bits(np.concatenate(parts), whole), f"chunks of {size} differ"

    def unaligned(row, n_rows, position, slot):
        return [(row + a, min(50, n_rows - a), position + a, slot) for a in range(0, n_rows, 50)]

    assert same_bits(s.prefill([(0, 0, n)], tiles=unaligned)[0], whole), "tiles across block borders differ"


# ---- with the rotation before it


ROTATIONS = {
    "none": Rotation(0),
    "neox": Rotation(64),
    "interleaved": Rotation(64, INTERLEAVED),
    "partial": Rotation(24, NEOX, 1.19),
    "partial interleaved": Rotation(48, INTERLEAVED, 0.7),
    "tables": Rotation(32, NEOX, 1.0, 2),
}


def qkv_rows(s, n, scale=1.0):
    """Rows as a product leaves them, with columns of NaN after them."""
    n_head, n_head_kv, head_dim, _, _ = s.shape
    width = (n_head + 2 * n_head_kv) * head_dim
    x = np.full((n, width + 4), np.nan, np.float32)
    x[:, :width] = s.rng.standard_normal((n, width)) * scale
    return x


@pytest.mark.parametrize("rotation", ROTATIONS.values(), ids=ROTATIONS)
@pytest.mark.parametrize("shape", [(14, 2, 64, 0, True), (20, 1, 80, 100, False), (8, 8, 128, 0, False)], ids=str)
def test_rotation_within_attention(gpu, shape, rotation):
    """The same bits as rope_kv and attention one after the other: the rows and all of the cache."""
    lengths = [1, 64, 65, 128, 129, 300, 257]
    s = Sequences(gpu, shape, lengths)
    rows = [(seq, n - 1) for seq, n in enumerate(lengths)]
    rows.insert(2, (-1, 0))
    qkv = qkv_rows(s, len(rows))
    qkv[0, shape[0] * shape[2]] = 1e6  # a key that float16 cannot hold
    want, cache = s.rope_then_attend(qkv, rotation, rows, fused=False)
    assert np.isfinite(want).all() and not want[2].any()
    least, most = s.block_shapes()[0], s.block_shapes()[-1]
    for grid_x, block, pdl in ((None, most, False), (None, least, False), (1, most, False), (2, least, True)):
        got, after = s.rope_then_attend(qkv, rotation, rows, fused=True, grid_x=grid_x, shape=block, pdl=pdl)
        assert same_bits(got, want), f"grid_x {grid_x}, groups and depth {block}"
        assert same_bits(after, cache), "the cache differs"


@pytest.mark.parametrize("head_dim", [32, 96, 128])
def test_rotation_within_attention_of_other_widths(gpu, head_dim):
    s = Sequences(gpu, (16, 2, head_dim, 0, False), [70, 1200])
    qkv, rows = qkv_rows(s, 2), [(0, 69), (1, 1199)]
    for rotation in (Rotation(head_dim), Rotation(head_dim, INTERLEAVED)):
        want, cache = s.rope_then_attend(qkv, rotation, rows, fused=False)
        got, after = s.rope_then_attend(qkv, rotation, rows, fused=True)
        assert same_bits(got, want) and same_bits(after, cache)


def test_a_row_of_nan_stays_its_own(gpu):
    s = Sequences(gpu, (4, 2, 64, 0, False), [70, 70])
    qkv = qkv_rows(s, 2)
    qkv[0] = np.nan
    got, _ = s.rope_then_attend(qkv, Rotation(64), [(0, 69), (1, 69)], fused=True)
    assert np.isnan(got[0]).all() and np.isfinite(got[1]).all()


def test_rules_of_shape():
    """The workspace holds every split of every position, whatever the window."""
    for window in (0, 1, 2, 24, 128, 129, 130, 5000):
        for context in (1, 64, 4096, 4097, 20000, 131072, 1 << 20):
            room = rule("decode_max_splits", context, window)
            most = 0
            for position in {0, 1, 127, 128, 129, 4095, 4096, 16384, 65535, 65536, context // 2, context - 1}:
                if position >= context:
                    continue
                first = max(0, position - window + 1) if window else 0
                most = max(most, position // SPLIT - first // SPLIT + 1)
            assert most <= room <= most + 1
