"""Sampling on the device against the rule of csrc/params/sampling.h in NumPy, and the feedback that it leaves."""

from __future__ import annotations

import limits
import numpy as np
import pytest
from gpu.kernel_harness import CONSTANTS, STRUCTS, available, params
from gpu.ops_host import new_gpu, rule
from helpers.sampling_reference import edited, penalized

from worker_orcd import SamplingParams
from worker_orcd.engine.token_edits import token_edits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not available(), reason="no CUDA device")]

ONE = 1 << 40
THREADS, GROUP, BINS, TOP_K = (CONSTANTS[f"SAMPLE_{name}"] for name in ("THREADS", "GROUP", "BINS", "TOP_K"))

GREEDY = {"temperature": 0.0}
#: what a slot may have beside the numbers of `SlotSampling`: arguments of `edited`
EDITS = ("logit_bias", "bad_words", "stop_ids", "min_tokens")
OFF = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
       "frequency_penalty": 0.0, "top_k": 0, "seed": 0}  # fmt: skip


@pytest.fixture(scope="module")
def gpu():
    return new_gpu()


def philox(seed: int, position: int) -> int:
    mask = 0xFFFFFFFF
    c, k = [position, 0, 0, 0], [seed & mask, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & mask, (a >> 32) ^ c[3] ^ k[1], a & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c[1] << 32 | c[0]


def test_philox_known_answer():
    assert philox(0, 0) == 0xE169C58D6627E8D5  # words 1 and 0 of the published vector


def is_short(slot, n_vocab):
    """Whether one launch draws the slot's token, as `sample_is_short`."""
    s = OFF | slot
    return s["temperature"] < 1e-5 or 0 < s["top_k"] <= min(TOP_K, n_vocab - 1)


def edits_of(slot):
    return {name: slot[name] for name in EDITS if name in slot}


def reference(logits, position, slot, sampled=()):
    """(token, margin): margin is how near the nearest limit came, relative to the sum it belongs to. `sampled`: the
    tokens of the slot so far, in order."""
    s = OFF | slot
    f = np.float32
    bad = lambda v: not (v < np.inf).all() or v.max() == -np.inf  # noqa: E731
    with np.errstate(all="ignore"):
        if bad(logits):
            return -1, 1.0
        x = edited(logits, sampled, **edits_of(slot))
        greedy = s["temperature"] < 1e-5
        temper = lambda v, t: np.minimum(v / f(t), np.finfo(f).max)  # noqa: E731
        if not greedy:
            x = temper(x, s["temperature"])
        x = penalized(
            x,
            sampled,
            0.0 if greedy else s["temperature"],
            s["repetition_penalty"],
            s["presence_penalty"],
            s["frequency_penalty"],
        )
        if bad(x):
            return -1, 1.0
        best = int(np.argmax(x))
        if greedy:
            return best, 1.0
        d = x - x.max()
        w = np.where(d > -28, np.floor(np.exp(d.astype(np.float64)).astype(f) * f(ONE)), 0).astype(np.uint64)
    order = np.argsort(-x, kind="stable")
    order = order[w[order] > 0]
    margin = 1.0
    if 0 < s["top_k"] < len(order):
        order = order[: s["top_k"]]
    if s["top_p"] < 1:
        running = np.cumsum(w[order])
        target = float(f(s["top_p"])) * float(running[-1])
        target = min(max(int(np.ceil(target)), 1), int(running[-1]))
        # ends of the prefix, the last one aside, that lie next to the target
        margin = min(
            margin, float(np.abs(running[:-1].astype(float) - target).min(initial=np.inf)) / float(running[-1])
        )
        order = order[: int(np.searchsorted(running, target)) + 1]
    if s["min_p"] > 0:
        limit = np.ceil(float(f(s["min_p"])) * ONE)
        margin = min(margin, float(np.abs(w[order[1:]].astype(float) - limit).min(initial=np.inf)) / limit)
        order = order[w[order] >= limit]
    ids = np.sort(order)
    running = np.cumsum(w[ids])
    t = philox(s["seed"], position + 1) * int(running[-1]) >> 64
    if (w[w > 0] == ONE).all():  # nothing was rounded
        return int(ids[np.searchsorted(running, t, side="right")]), 1.0
    margin = min(margin, float(np.abs(running[:-1].astype(float) - t).min(initial=np.inf)) / float(running[-1]))
    return int(ids[np.searchsorted(running, t, side="right")]), margin


class Sampler:
    """Workspace and state of both kernels for rows of `n_vocab`; slot i samples by slots[i]."""

    def __init__(self, gpu, n_rows, n_vocab, slots, out_steps=4):
        self.gpu, self.n_rows, self.n_vocab = gpu, n_rows, n_vocab
        kind = STRUCTS["SlotSampling"]
        table = (kind * len(slots))()
        words = np.zeros((len(slots), CONSTANTS["SAMPLING_EDIT_WORDS"]), np.int32)
        for entry, slot, row in zip(table, slots, words, strict=True):
            params = SamplingParams(logit_bias=slot.get("logit_bias"), min_tokens=slot.get("min_tokens", 0))
            edits = token_edits(params, slot.get("bad_words", ()), slot.get("stop_ids", ()))
            edits.check(n_vocab)
            row[: len(edits.words)] = edits.words
            values = OFF | edits.counts() | {name: value for name, value in slot.items() if name not in EDITS}
            for key, value in values.items():
                setattr(entry, key, value)
        self.seen_words = -(-n_vocab // 32)
        self.n_groups, self.n_blocks = rule("sample_groups", n_vocab), rule("sample_blocks", n_vocab, n_rows, gpu.n_sm)
        self.samples = gpu.buffer(np.frombuffer(bytes(table), np.uint8))
        self.edits = gpu.buffer(words)
        self.history = gpu.buffer(np.zeros((len(slots), CONSTANTS["SAMPLING_HISTORY_WORDS"]), np.int32))
        self.seen = gpu.buffer(np.zeros((len(slots), self.seen_words), np.uint32))
        self.counts = gpu.buffer(np.zeros((len(slots), n_vocab), np.uint32))
        self.group_keys = gpu.empty((n_rows, self.n_groups), np.uint64)
        self.group_weights = gpu.empty((n_rows, self.n_groups), np.uint64)
        self.best, self.arrived = gpu.buffer(np.zeros(n_rows, np.uint64)), gpu.buffer(np.zeros(n_rows, np.uint32))
        self.bin_weights = gpu.buffer(np.zeros((n_rows, BINS), np.uint64))
        self.bin_counts = gpu.buffer(np.zeros((n_rows, BINS), np.uint32))
        self.done = gpu.buffer(np.zeros(1, np.uint32))
        self.step, self.host_step = gpu.buffer(np.zeros(1, np.uint64)), gpu.buffer(np.zeros(1, np.uint64))
        self.out_steps = out_steps
        self.out = gpu.empty((out_steps, n_rows + 2), np.int32)
        self.next_tokens = gpu.empty(n_rows, np.int32)

    def set_logits(self, logits, rows_slots, positions, stride=None):
        stride = stride or self.n_vocab
        padded = np.full((self.n_rows, stride), np.nan, np.float32)
        padded[:, : self.n_vocab] = logits
        self.stride = stride
        self.logits = self.gpu.buffer(padded)
        self.slots = self.gpu.buffer(np.asarray(rows_slots, np.int32))
        self.positions = self.gpu.buffer(np.asarray(positions, np.int32))

    def launch(self, advance=1, draw=True, pdl=True):
        """Queue the launches of one step."""
        p = params("SampleParams", logits=self.logits, samples=self.samples, slots=self.slots,
                   positions=self.positions, edits=self.edits, history=self.history, seen=self.seen,
                   counts=self.counts, best=self.best, arrived=self.arrived, group_keys=self.group_keys,
                   group_weights=self.group_weights, bin_weights=self.bin_weights, bin_counts=self.bin_counts,
                   done=self.done, next_tokens=self.next_tokens, out=self.out, step=self.step,
                   host_step=self.host_step, draw_follows=draw, logits_stride=self.stride, n_vocab=self.n_vocab,
                   n_groups=self.n_groups, seen_words=self.seen_words, out_steps=self.out_steps,
                   out_stride=self.n_rows + 2, advance=advance)  # fmt: skip
        for name in ("sample_max", "sample_draw")[: 1 + draw]:
            self.gpu.launch(self.gpu.kernel("sample", name), (self.n_blocks, self.n_rows), THREADS, p, pdl=pdl)

    def check_workspace(self):
        """What is to be left zero is, and nothing was written beside a buffer."""
        for name in ("best", "arrived", "bin_weights", "bin_counts", "done"):
            assert not getattr(self, name).to_numpy().any(), name
        for name in ("group_keys", "group_weights", "logits", "samples", "edits", "history", "seen", "counts"):
            getattr(self, name).check_guards()

    def run(self, advance=1, draw=True):
        """One step. Returns the tokens of its row of `out`."""
        step = int(self.step.to_numpy()[0])
        self.launch(advance, draw)
        out = self.out.to_numpy()
        self.check_workspace()
        assert int(self.step.to_numpy()[0]) == int(self.host_step.to_numpy()[0]) == step + 1
        return out[step % self.out_steps, : self.n_rows]


SLOTS = [
    GREEDY,
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.7, "seed": 2**64 - 1},
    {"temperature": 1.0, "top_k": 40, "seed": 3},
    {"temperature": 1.3, "top_p": 0.9, "seed": 4},
    {"temperature": 1.0, "min_p": 0.05, "seed": 5},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.02, "seed": 6},
    {"temperature": 2.0, "top_k": 1, "seed": 7},
    {"temperature": 1.0, "top_p": 0.0, "seed": 8},
    {"temperature": 1.0, "top_p": 0.999, "top_k": 5000, "seed": 9},
    {"temperature": 1.0, "repetition_penalty": 1.3, "top_p": 0.8, "seed": 10},
    {"temperature": 0.0, "repetition_penalty": 1.5},
    {"temperature": 1.0, "repetition_penalty": 0.5, "seed": 11},
    {"temperature": 9e-6, "top_k": 3, "seed": 12},
    {"temperature": 2e-5, "seed": 14},
    {"temperature": 1.0, "min_p": 1.0, "seed": 13},
]


def make_logits(rng, n_rows, n_vocab, kind):
    if kind == "normal":
        return (rng.standard_normal((n_rows, n_vocab)) * 3).astype(np.float32)
    if kind == "ties":  # few distinct values, thousands of equals
        return rng.integers(-3, 3, (n_rows, n_vocab)).astype(np.float32)
    if kind == "flat":  # 0 and -0 are equal
        x = np.zeros((n_rows, n_vocab), np.float32)
        x[:, ::3] = -0.0
        return x
    x = (rng.standard_normal((n_rows, n_vocab)) * 2 - 20).astype(np.float32)  # peaked
    x[:, rng.integers(n_vocab)] = 3.0
    x[:, ::7] = -np.inf
    return x


@pytest.mark.parametrize(
    ("n_vocab", "stride", "kind"),
    [
        (1, None, "normal"), (3, None, "normal"), (512, None, "normal"), (5000, 5003, "normal"), (4096, None, "flat"),
        (8192, None, "ties"), (49152, None, "peaked"), (151936, None, "normal"), (32064, None, "ties"),
        (201088, None, "flat"),
    ],
)  # fmt: skip
def test_tokens_follow_the_rule(gpu, n_vocab, stride, kind):
    rng = np.random.default_rng(n_vocab)
    n = len(SLOTS)
    sampler = Sampler(gpu, n, n_vocab, SLOTS)
    sampled = [[] for _ in SLOTS]
    skipped = 0
    for step in range(3):
        logits = make_logits(rng, n, n_vocab, kind)
        order = rng.permutation(n)
        positions = rng.integers(0, 5000, n)
        sampler.set_logits(logits, order, positions, stride)
        tokens = sampler.run()
        for row, slot in enumerate(order):
            want, margin = reference(logits[row], int(positions[row]), SLOTS[slot], sampled[slot])
            skipped += margin < limits.SAMPLE_MARGIN
            assert tokens[row] == want or margin < limits.SAMPLE_MARGIN, (
                f"step {step}, {SLOTS[slot]}: {tokens[row]} != {want} (margin {margin:.1e})"
            )
            sampled[slot].append(int(tokens[row]))
        assert np.array_equal(sampler.positions.to_numpy(), positions + 1)
        assert np.array_equal(sampler.next_tokens.to_numpy(), tokens)
        bits = np.unpackbits(sampler.seen.to_numpy().view(np.uint8), axis=1, bitorder="little")
        for slot in range(n):
            assert set(np.flatnonzero(bits[slot])) == set(sampled[slot])
    print(f"{skipped} of {3 * n} draws within {limits.SAMPLE_MARGIN} of a limit")


def edited_slots(rng, n_vocab, hot):
    """Slots with all that changes logits of single tokens. `hot`: tokens that are drawn again and again."""
    any_ids = lambda n: rng.integers(0, n_vocab, n).tolist()  # noqa: E731
    bias = {i: float(rng.uniform(-6, 6)) for i in [*any_ids(20), *hot]}
    pairs = [(a, b) for a in hot for b in hot if (a + b) % 2]
    many = {"logit_bias": dict.fromkeys(any_ids(1024), -1.5), "bad_words": [(i,) for i in any_ids(900) if i not in hot]}
    end = {"stop_ids": [*hot[:2], *any_ids(10)], "min_tokens": 4}
    drawn = {"temperature": 0.9, "top_k": 50, "top_p": 0.95}
    return [
        {"presence_penalty": 0.7, "seed": 1}, {"frequency_penalty": 1.1, "seed": 2},
        {"frequency_penalty": -0.3, "seed": 3},
        GREEDY | {"frequency_penalty": 0.9, "presence_penalty": 0.4},
        GREEDY | {"logit_bias": bias}, GREEDY | {"bad_words": [*pairs, (*hot[:1], *hot[:1])]}, GREEDY | end,
        drawn | {"logit_bias": bias, "seed": 4}, drawn | {"bad_words": pairs, "seed": 5}, drawn | end | {"seed": 6},
        drawn | end | {"bad_words": pairs, "logit_bias": bias, "repetition_penalty": 1.2, "presence_penalty": -0.5,
                       "frequency_penalty": 0.25, "seed": 7},
        {"temperature": 0.5, "seed": 8} | end | many, GREEDY | many, GREEDY, {"seed": 9},
        {"min_p": 0.05, "seed": 10, "bad_words": [(*hot, *hot, *hot)[:k] for k in (1, 3, 5)]},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("n_vocab", "stride", "kind"),
    [(5, None, "normal"), (512, 515, "normal"), (4097, None, "ties"), (49152, None, "peaked"),
     (151936, None, "normal")],
)  # fmt: skip
def test_edits_and_penalties_follow_the_rule(gpu, n_vocab, stride, kind):
    rng = np.random.default_rng(n_vocab)
    hot = rng.permutation(n_vocab)[:5].tolist()
    slots = edited_slots(rng, n_vocab, hot)
    n = len(slots)
    sampler = Sampler(gpu, n, n_vocab, slots)
    sampled, skipped, failed = [[] for _ in slots], 0, 0
    for step in range(8):
        logits = make_logits(rng, n, n_vocab, kind)
        logits[:, hot] = 15 + rng.standard_normal((n, 5))
        order = rng.permutation(n)
        positions = rng.integers(0, 5000, n)
        sampler.set_logits(logits, order, positions, stride)
        tokens = sampler.run()
        left = sampler.logits.to_numpy()[:, :n_vocab]
        for row, slot in enumerate(order):
            assert np.array_equal(left[row], edited(logits[row], sampled[slot], **edits_of(slots[slot])))
            want, margin = reference(logits[row], int(positions[row]), slots[slot], sampled[slot])
            skipped += margin < limits.SAMPLE_MARGIN
            failed += want == -1
            assert tokens[row] == want or margin < limits.SAMPLE_MARGIN, (
                f"step {step}, slot {slot}: {tokens[row]} != {want} (margin {margin:.1e})"
            )
            if tokens[row] >= 0:
                sampled[slot].append(int(tokens[row]))
    history, counts = sampler.history.to_numpy(), sampler.counts.to_numpy()
    for slot, ids in zip(slots, sampled, strict=True):
        i = slots.index(slot)
        kept = ids if any(slot.get(name) for name in ("logit_bias", "bad_words", "min_tokens")) else []
        assert history[i, : 1 + len(kept)].tolist() == [len(kept), *kept]
        counted = ids if slot.get("frequency_penalty") else []
        assert np.array_equal(counts[i], np.bincount(counted, minlength=n_vocab))
    print(f"{skipped} of {8 * n} draws within {limits.SAMPLE_MARGIN} of a limit; {failed} had no token")
    assert max(max(np.bincount(ids)) for ids in sampled if ids) > 2, "no token was drawn often"
    assert failed == 0 or n_vocab == 5


def test_a_history_goes_round(gpu):
    """A bad word of 32 tokens, 31 of which were drawn last, wherever in the ring they lie."""
    cycle = [3, 1, 4, 1, 5, 9, 2, 6]
    word = [*(cycle * 4)[:31], 7]
    sampler = Sampler(gpu, 1, 10, [GREEDY | {"bad_words": [word]}])
    sampled = []
    for step in range(150):
        logits = np.zeros((1, 10), np.float32)
        if step % 50 < 31:
            logits[0, cycle[step % 50 % 8]] = 5
        logits[0, 7] = 4 if step % 50 < 31 else 6
        sampler.set_logits(logits, [0], [step])
        sampled.append(int(sampler.run()[0]))
        assert sampled[-1] == edited(logits[0], sampled[:-1], bad_words=[word]).argmax()
        assert (sampled[-1] == 7) == (step % 50 > 31), "banned right after the others, and only there"


def test_a_ban_does_not_hide_what_is_no_number(gpu):
    logits = np.tile(np.arange(5, dtype=np.float32), (4, 1))
    logits[[0, 1], 2] = np.nan, np.inf
    sampler = Sampler(gpu, 4, 5, [GREEDY | {"bad_words": [(2,)]}, GREEDY | {"bad_words": [(i,) for i in range(5)]}])
    sampler.set_logits(logits, [0, 0, 0, 1], [0] * 4)
    assert sampler.run().tolist() == [-1, -1, 4, -1]


def crowded(rng, n_rows, n_vocab):
    """Rows that are hard to filter, each of another kind."""
    f, rows = np.float32, np.empty((n_rows, n_vocab), np.float32)
    ramp = np.arange(n_vocab, dtype=f)
    kinds = [
        lambda x: np.zeros(n_vocab, f),  # all equal
        lambda x: np.where(x > 0, f(2), f(1)),  # two values
        lambda x: np.where(x > 0, f(0), f(-40)),  # two values, one without weight
        lambda x: np.where(x > 1.5, x.round(), f(-5)),  # ties wherever a top-k ends
        lambda x: np.where(rng.random(n_vocab) < 3 / n_vocab, x, f(-np.inf)),
        lambda x: x * f(10) ** rng.integers(-30, 30, n_vocab).astype(f),  # huge and tiny
        lambda x: x * f(1e-39),  # no normal number
        lambda x: -ramp * f(1e-3),  # the largest are neighbours
        lambda x: ramp * f(1e-7) + f(7),
        lambda x: np.where(ramp // 200 % 7 == 3, x + f(9), x),
        lambda x: np.full(n_vocab, f(3.4e38)),
        lambda x: x,
    ]
    for i in range(n_rows):
        rows[i] = kinds[(i + rng.integers(len(kinds))) % len(kinds)](rng.standard_normal(n_vocab).astype(f) * 3)
        if not np.isfinite(rows[i]).any():
            rows[i, rng.integers(n_vocab)] = 1
    return rows


def many_slots(rng, n, n_vocab):
    """Slots with filters at their ends and of all kinds in one batch; the first are greedy."""
    below_one = float(np.nextafter(np.float32(1), np.float32(0)))
    top_ks = [1, 2, 40, 40, TOP_K - 1, TOP_K, TOP_K + 1, 1000, n_vocab - 1, n_vocab, 2 * n_vocab]
    top_ps = [1e-30, 0.05, 0.5, 0.9, 0.95, 0.95, 0.999, below_one]
    slots = [GREEDY]
    while len(slots) < n:
        slot = {"temperature": float(rng.choice([1.0, 1.0, 0.7, 0.05, 1.9])), "seed": int(rng.integers(2**63))}
        if rng.random() < 0.65:
            slot["top_k"] = int(rng.choice(top_ks))
        if rng.random() < 0.6:
            slot["top_p"] = float(rng.choice(top_ps))
        if rng.random() < 0.3:
            slot["min_p"] = float(rng.choice([1e-9, 0.05, 0.5, 1.0]))
        slots.append(GREEDY if rng.random() < 0.1 else slot)
    return slots


@pytest.mark.parametrize("n_rows", [1, 8, 64, 256])
@pytest.mark.parametrize("n_vocab", [300, 32064, 151936, 201088])
def test_filters_on_rows_of_all_kinds(gpu, n_vocab, n_rows):
    rng = np.random.default_rng(n_vocab + n_rows)
    skipped = 0
    for _ in range(max(1, 4 // n_rows)):
        slots = many_slots(rng, n_rows + 1, n_vocab)[n_rows == 1 :][:n_rows]
        sampler = Sampler(gpu, n_rows, n_vocab, slots)
        logits = crowded(rng, n_rows, n_vocab)
        if n_rows > 8:  # few, or they take long to make
            more = n_rows - 8
            logits[8:] = logits[rng.integers(0, 8, more)] * rng.choice([1, 0.5, 0.9], (more, 1)).astype(np.float32)
        positions = rng.integers(0, 5000, n_rows)
        order = rng.permutation(n_rows)
        order[rng.random(n_rows) < 0.1 * (n_rows > 1)] = -1
        sampler.set_logits(logits, order, positions)
        tokens = sampler.run()
        for row, slot in enumerate(order):
            if slot < 0:
                assert tokens[row] == -1, "poison of a dead row must stay"
                continue
            want, margin = reference(logits[row], int(positions[row]), slots[slot])
            skipped += margin < limits.SAMPLE_MARGIN
            assert tokens[row] == want or margin < limits.SAMPLE_MARGIN, (
                f"row {row}, {slots[slot]}: {tokens[row]} != {want} (margin {margin:.1e})"
            )
    print(f"{skipped} draws within {limits.SAMPLE_MARGIN} of a limit")


@pytest.mark.parametrize("top_k", [1, 7, 40, TOP_K])
def test_more_tokens_than_the_list_holds(gpu, top_k):
    """Rows whose largest tokens are neighbours, in few groups or in all, alike or all different."""
    rng = np.random.default_rng(top_k)
    n_vocab = 40000
    ramp = np.arange(n_vocab, dtype=np.float32)
    rows = np.stack([
        -ramp * np.float32(1e-4), ramp * np.float32(1e-4), np.where(ramp < 9000, ramp % 600, ramp % 5),
        5 - (ramp % 128 > 100) * ramp * np.float32(1e-5), -(ramp // 128) * np.float32(1e-6), np.zeros(n_vocab),
        np.nextafter(np.float32(1), ramp - 20000), np.sort(rng.standard_normal(n_vocab)),
    ]).astype(np.float32)  # fmt: skip
    slots = [{"top_k": top_k, "seed": i} for i in range(4)] + [{"top_k": top_k, "top_p": 0.7, "seed": 9}]
    for slot in range(len(slots)):
        sampler = Sampler(gpu, len(rows), n_vocab, slots)
        sampler.set_logits(rows, [slot] * len(rows), range(len(rows)))
        tokens = sampler.run(draw=False)
        for row, token in enumerate(tokens):
            want, margin = reference(rows[row], row, slots[slot])
            assert token == want or margin < limits.SAMPLE_MARGIN, f"row {row}, slot {slot}"


@pytest.mark.parametrize("replayed", [False, True])
def test_steps_follow_each_other_without_a_wait(gpu, replayed):
    """A hundred steps as launches or as a graph: each finds counters, positions and seen tokens in order."""
    rng = np.random.default_rng(11)
    n_vocab, steps = 6000, 100
    slots = [
        GREEDY, {"top_k": 40, "top_p": 0.95, "seed": 1}, {"top_p": 0.9, "seed": 2}, {"seed": 3},
        GREEDY | {"repetition_penalty": 1.5, "bad_words": [(3,)]},
        {"top_k": 20, "repetition_penalty": 1.2, "frequency_penalty": 0.2, "seed": 4},
        {"top_k": 300, "min_p": 0.01, "seed": 5},
    ]  # fmt: skip
    logits = make_logits(rng, len(slots) + 1, n_vocab, "normal")
    sampler = Sampler(gpu, len(slots) + 1, n_vocab, slots, out_steps=steps)
    sampler.set_logits(logits, [*range(len(slots)), -1], [10] * (len(slots) + 1))
    if replayed:
        gpu.replay(sampler.launch, 4, steps // 4)
    else:
        for _ in range(steps):
            sampler.launch()
    tokens = sampler.out.to_numpy()
    sampler.check_workspace()
    assert int(sampler.step.to_numpy()[0]) == int(sampler.host_step.to_numpy()[0]) == steps
    assert sampler.positions.to_numpy().tolist() == [10 + steps] * len(slots) + [10]
    assert (tokens[:, len(slots) :] == -1).all()
    for i, slot in enumerate(slots):
        sampled = []
        for step in range(steps):
            want, margin = reference(logits[i], 10 + step, slot, sampled)
            assert tokens[step, i] == want or margin < limits.SAMPLE_MARGIN, f"step {step}, {slot}"
            sampled.append(int(tokens[step, i]))


@pytest.mark.parametrize("n_rows", [6, 256])
def test_row_depends_on_nothing_else(gpu, n_rows):
    """But on its own seed and position, which differ here; rows are in another order than slots."""
    rng = np.random.default_rng(5)
    n_vocab, slots = 9000, [{"temperature": 0.8, "top_p": 0.9, "seed": i} for i in range(n_rows)]
    logits = make_logits(rng, 6, n_vocab, "normal")[np.arange(n_rows) % 6]
    order, positions = rng.permutation(n_rows), rng.integers(0, 5000, n_rows)
    together = Sampler(gpu, n_rows, n_vocab, slots)
    together.set_logits(logits, order, positions)
    tokens = together.run()
    assert len(set(tokens.tolist())) > n_rows // 3, "rows of the same logits draw by the same number"
    for row in range(0, n_rows, max(n_rows // 16, 1)):
        alone = Sampler(gpu, 1, n_vocab, slots)
        alone.set_logits(logits[row], [order[row]], [positions[row]])
        assert alone.run()[0] == tokens[row]


def test_short_rows_need_one_launch(gpu):
    rng = np.random.default_rng(6)
    slots = [GREEDY, {"top_k": 40, "top_p": 0.95, "seed": 5}, GREEDY, {"top_k": TOP_K, "seed": 6}]
    sampler = Sampler(gpu, 4, 10000, slots)
    logits = make_logits(rng, 4, 10000, "ties")
    sampler.set_logits(logits, range(4), range(4))
    want = [reference(row, i, slot)[0] for i, (row, slot) in enumerate(zip(logits, slots, strict=True))]
    assert sampler.run(draw=False).tolist() == want


def test_a_row_that_needs_the_second_launch_fails_without_it(gpu):
    slots = [GREEDY, {"seed": 1}, {"top_k": TOP_K + 1}, {"top_p": 0.9}]
    sampler = Sampler(gpu, 4, 5000, slots)
    sampler.set_logits(make_logits(np.random.default_rng(6), 4, 5000, "normal"), range(4), range(4))
    assert sampler.run(draw=False).tolist()[1:] == [-1] * 3
    assert sampler.run()[1:].min() >= 0


def test_temperature_that_overflows(gpu):
    """The tokens that overflow share the top; nothing becomes a failure."""
    logits = np.array([[1e34, -1e34, 2e34, 1.0, -np.inf]] * 8, np.float32)
    slots = [{"temperature": 2e-5, "seed": s} for s in range(8)]
    sampler = Sampler(gpu, 8, 5, slots)
    sampler.set_logits(logits, range(8), [3] * 8)
    assert list(sampler.run()) == [reference(logits[0], 3, slot)[0] for slot in slots]


def test_dead_rows_and_failed_rows(gpu):
    rng = np.random.default_rng(7)
    slots = [GREEDY, {"seed": 1}, {"seed": 2, "top_k": 5}, {"seed": 3}, {"seed": 4}, GREEDY]
    logits = make_logits(rng, 6, 5000, "normal")
    logits[1, 4321] = np.nan
    logits[2, 17] = np.inf
    logits[4] = -np.inf
    sampler = Sampler(gpu, 6, 5000, slots)
    sampler.set_logits(logits, [0, 1, 2, -1, 4, 5], [10] * 6)
    for step in range(5):  # the ring of four steps wraps
        tokens = sampler.run(advance=0)
        assert (
            tokens[0] == logits[0].argmax()
            and list(tokens[[1, 2, 4]]) == [-1, -1, -1]
            and tokens[5] == logits[5].argmax()
        )
        assert tokens[3] == -1, "poison of a dead row must stay"
        assert int(sampler.step.to_numpy()[0]) == step + 1
    assert list(sampler.positions.to_numpy()) == [10] * 6
    assert list(sampler.next_tokens.to_numpy()[[1, 2, 3, 4]]) == [0, 0, -1, 0]
    assert (sampler.out.to_numpy()[:, 6:] == -1).all(), "written beyond the rows"


@pytest.mark.parametrize("slot", [{}, {"top_p": 0.7}, {"top_k": 5}, {"min_p": 0.3}], ids=str)
def test_frequencies(gpu, slot):
    """Chi-square of 2000 draws against the distribution the filters leave; one seed, many positions."""
    n, n_vocab = 2000, 40
    rng = np.random.default_rng(8)
    row = rng.standard_normal(n_vocab).astype(np.float32)
    p = np.exp(row.astype(np.float64) - row.max())
    order = np.argsort(-p)
    if "top_k" in slot:
        p[order[slot["top_k"] :]] = 0
    if "top_p" in slot:
        running = np.cumsum(p[order]) / p.sum()
        p[order[np.searchsorted(running, slot["top_p"]) + 1 :]] = 0
    if "min_p" in slot:
        p[p < slot["min_p"] * p.max()] = 0
    p /= p.sum()
    sampler = Sampler(gpu, n, n_vocab, [{"seed": 99} | slot])
    sampler.set_logits(np.tile(row, (n, 1)), np.zeros(n), np.arange(n))
    counts = np.bincount(sampler.run(), minlength=n_vocab)
    assert counts[p == 0].sum() == 0
    live = p > 0
    chi2 = float((((counts - n * p) ** 2)[live] / (n * p)[live]).sum())
    dof = int(live.sum()) - 1
    limit = dof + 5 * np.sqrt(2 * dof) + 10  # beyond one in ten thousand
    print(f"chi-square {chi2:.1f} of {dof} degrees of freedom (limit {limit:.1f})")
    assert chi2 < limit
