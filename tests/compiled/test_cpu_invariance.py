"""A row's bits never depend on the rows beside it, on whether its token was drawn or is one of a prompt, on how the
prompt was cut, on threads, or (AVX) on the processor."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers.cpu_engines import ISAS, make_engine, open_engine, prefill, rows, sampling
from helpers.synthetic_plan import N_VOCAB, every_op

from worker_orcd._ring import Control, TokenRing
from worker_orcd.engine.protocol import Batch
from worker_orcd.engine.token_edits import token_edits

#: tokens of bad words, and those that end a sequence
BAD_WORDS = [(i, j) for i in range(20) for j in range(1, N_VOCAB, 2)]
STOP_IDS = (3, 4)
MODELS = ["llama-Q4_K_M", "qwen2-Q4_0", "gpt-oss-MXFP4_MOE"]
ALL_MODELS = ["llama-Q4_0", "llama-Q4_K_M", "llama-F16", "qwen2-Q8_0", "qwen2-Q4_K_M", "qwen2-Q4_0", "phi3-Q8_0",
              "phi3-Q4_K_M", "phi3-swa-Q8_0", "gpt2-Q8_0", "gpt2-Q4_K_M", "gpt2-F16", "gpt-oss-MXFP4",
              "gpt-oss-MXFP4_MOE", "gpt-oss-Q4_K_M", "arch/qwen3-F16", "arch/mistral-F16", "arch/llama-linear-F16",
              "arch/llama-rope3-F16", "arch/qwen2-yarn-F16", "arch/phi3-su-long-F16"]  # fmt: skip


def bits(a: np.ndarray) -> np.ndarray:
    return a.view(np.uint32)


def check(make, n_vocab):
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, n_vocab, n) for n in (150, 67, 1)]
    whole = [make().forward(rows((0, 0, p))) for p in prompts]
    assert all(np.isfinite(w).all() for w in whole)
    for chunk in (1, 6, 64, 101):
        np.testing.assert_array_equal(bits(prefill(make(), 1, prompts[0], chunk)), bits(whole[0]), f"chunks of {chunk}")
    crowd = make().forward(rows(*((2 - i, 0, p) for i, p in enumerate(prompts))))
    np.testing.assert_array_equal(bits(crowd), bits(np.concatenate(whole)), "in a crowd")
    for n_threads in (1, 3, 5):
        alone = make(n_threads=n_threads).forward(rows((3, 0, prompts[0])))
        np.testing.assert_array_equal(bits(alone), bits(whole[0]), f"{n_threads} threads")
    return whole[0]


def test_synthetic():
    mf, plan = every_op()
    check(lambda **kw: make_engine(mf, plan, **kw), N_VOCAB)


@pytest.mark.parametrize("name", MODELS)
def test_golden_models(name, goldens_dir):
    check(lambda **kw: open_engine(goldens_dir / f"{name}.gguf", **kw), 512)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ALL_MODELS)
def test_a_text_has_the_same_bits_however_it_comes(name, isa, goldens_dir, monkeypatch):
    """As one prompt, in chunks, as decode rows alone and beside 1, 8 and 31 others, and as a prompt behind tokens that
    the decode loop has drawn. The prefix cache relies on it."""
    monkeypatch.setenv("WORKER_ORCD_CPU_ISA", isa)
    engine = open_engine(goldens_dir / f"{name}.gguf", max_seqs=32)
    assert engine.isa == isa
    rng = np.random.default_rng(7)
    n, first = 150, 70
    texts = rng.integers(0, engine.n_vocab, (32, n)).astype(np.int32)
    text = texts[0]
    want = bits(engine.forward(rows((0, 0, text))))
    for chunk in (17, 64, 100):
        np.testing.assert_array_equal(bits(prefill(engine, 0, text, chunk)), want, f"chunks of {chunk}")
    for others, place in ((0, 0), (1, 1), (8, 3), (31, 17)):
        slots = np.insert(rng.permutation(np.arange(1, 32))[:others], place, 0).astype(np.int32)
        for slot in slots.tolist():
            engine.forward(rows((slot, 0, texts[slot][:first]), out="none"))
        for at in range(first, first + 10 if others else n):
            row = np.arange(len(slots), dtype=np.int32)
            batch = Batch(texts[slots, at], np.full(len(slots), at, np.int32), slots, len(slots), row)
            got = bits(engine.forward(batch)[place])
            np.testing.assert_array_equal(got, want[at], f"decode row at {at} beside {others} others")
    set_slot(engine, 0, {"temperature": 2.0, "seed": 4, "repetition_penalty": 2.0, "frequency_penalty": 2.0})
    slot, seq, start = np.array([0], np.int32), np.array([9], np.int64), np.array([first], np.int32)
    ids = engine.step(rows((0, 0, text[:first]), out="last"))[0]
    drawn = engine.decode(slot, seq, ids, start, 60, [], np.zeros(2, np.int32), TokenRing(), Control())
    whole = np.concatenate([text[:first], ids, drawn[:, 0], text[:10]])
    behind = bits(engine.forward(rows((0, first + 60, whole[first + 60 :]))))
    want = bits(engine.forward(rows((1, 0, whole))))[first + 60 :]
    np.testing.assert_array_equal(behind, want, "behind drawn tokens")
    assert len(set(drawn[:, 0].tolist())) > 5, "the model says too little"
    engine.close()


@pytest.mark.skipif("avx512" not in ISAS, reason="needs a processor with AVX-512")
def test_avx512_and_avx2_give_the_same_bits(monkeypatch):
    results = []
    for isa in (i for i in ISAS if i != "baseline"):
        monkeypatch.setenv("WORKER_ORCD_CPU_ISA", isa)
        mf, plan = every_op()
        engine = make_engine(mf, plan)
        assert engine.isa == isa
        tokens = np.arange(140) % N_VOCAB
        results.append([engine.forward(rows((0, 0, tokens))), engine.forward(rows((1, 0, tokens[:1])))])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(bits(a), bits(b))


def set_slot(engine, slot, kw):
    params = sampling(**kw)
    engine.set_slot(slot, params, token_edits(params, BAD_WORDS if kw.get("bad_words") else (), STOP_IDS))


def generate_by_steps(engine, slot, prompt, n, **kw):
    set_slot(engine, slot, kw)
    out = [int(engine.step(rows((slot, 0, prompt), out="last"))[0][0])]
    for i in range(n - 1):
        out.append(int(engine.step(rows((slot, len(prompt) + i, out[-1:])))[0][0]))
    return out


@pytest.mark.parametrize("kw", [
    {}, {"temperature": 0.9, "seed": 3, "repetition_penalty": 1.3, "top_p": 0.95},
    {"presence_penalty": 0.4, "frequency_penalty": 0.2}, {"temperature": 0.9, "seed": 3, "frequency_penalty": -0.1},
    {"logit_bias": {i: (i % 7) / 2 - 1 for i in range(N_VOCAB)}, "bad_words": ("x",), "min_tokens": 25},
    {"logit_bias": {5: 3.0}, "bad_words": ("x",), "min_tokens": 40, "temperature": 1.2, "top_k": 20, "seed": 1,
     "presence_penalty": -0.2},
])  # fmt: skip
def test_decode_equals_steps_and_a_crowd_equals_each_alone(kw):
    mf, plan = every_op()
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, N_VOCAB, n) for n in (70, 3, 30)]
    n = 40
    alone = [generate_by_steps(make_engine(mf, plan), 0, p, n, **kw) for p in prompts]
    engine = make_engine(mf, plan)
    for s in range(3):
        set_slot(engine, s, kw)
    first, logits = engine.step(rows(*((s, 0, p) for s, p in enumerate(prompts)), out="last"), want_logits=True)
    assert logits.shape == (3, N_VOCAB)
    ring, control = TokenRing(), Control()
    slots, seqs = np.arange(3, dtype=np.int32), np.array([100, 101, 2**40], np.int64)
    positions = np.array([len(p) for p in prompts], np.int32)
    a = engine.decode(slots, seqs, first, positions, 20, [], np.zeros(4, np.int32), ring, control)
    b = engine.decode(slots, seqs, a[-1], positions + 20, n - 21, [], np.zeros(4, np.int32), ring, control)
    together = np.concatenate([first[None], a, b])
    assert together.T.tolist() == alone
    assert ring.pop(0) == [(int(seqs[j]), int(t)) for step in np.concatenate([a, b]) for j, t in enumerate(step)]
    assert len({t for tokens in alone for t in tokens}) > 5, "the test model says too little"
    for ids in alone:
        assert not set(ids[: kw.get("min_tokens", 0)]) & set(STOP_IDS)
        assert not kw.get("bad_words") or not set(itertools.pairwise(ids)) & set(BAD_WORDS)
