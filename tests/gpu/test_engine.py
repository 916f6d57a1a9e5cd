"""The CUDA engine against the oracle and itself: every op, batch invariance, determinism, memory, faults.

Limits are normalized mean squared errors. Needs a GPU and the tiny reference models.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import threading
import time

import limits
import numpy as np
import pytest
from helpers import long_rope
from oracle.numpy_engine import NumpyEngine

from worker_orcd import LLM, SamplingParams
from worker_orcd.cuda import lowering
from worker_orcd.engine.protocol import BLOCK_SIZE, Batch, EngineConfig
from worker_orcd.engine.token_edits import NO_EDITS, token_edits
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import ops, plan, registry

pytestmark = pytest.mark.gpu

MODELS = ["llama-Q4_0", "llama-Q4_K_M", "llama-F16", "qwen2-Q8_0", "qwen2-Q4_K_M", "qwen2-Q4_0", "phi3-Q8_0",
          "phi3-swa-Q8_0", "gpt2-Q8_0", "gpt-oss-MXFP4", "gpt-oss-MXFP4_MOE", "gpt-oss-Q4_K_M"]  # fmt: skip
#: seeds of prompts in which no two router logits that decide are nearer than 0.006 (they are of order 3): a nearer pair
#: may change places between two ways of rounding, and then whole rows differ
CLEAR_CHOICE = {"gpt-oss-MXFP4": 23, "gpt-oss-MXFP4_MOE": 32, "gpt-oss-Q4_K_M": 30}
GREEDY = SamplingParams(temperature=0.0, seed=0)
EDITED = SamplingParams(
    temperature=0.8, presence_penalty=0.5, frequency_penalty=0.3, logit_bias={5: 4.0, 9: -3.0}, min_tokens=15, seed=3
)
#: tokens of bad words, and those that end a sequence
BAD_WORDS, STOP_IDS = [(i, j) for i in range(20) for j in range(1, 400, 8)], (5, 11, 12)
FILTERED = SamplingParams(temperature=0.8, top_k=40, top_p=0.95, min_p=0.02, repetition_penalty=1.1, seed=7)


def open_engine(path, **changes):
    from worker_orcd._engine import CudaEngine

    mf = ModelFile(str(path))
    p = plan.build(mf)
    sizes = {
        "max_seqs": 4,
        "max_batch_tokens": 128,
        "context_length": 256,
        "n_blocks": (16,) * len(p.kv_groups),
    } | changes
    engine = CudaEngine(mf, p, EngineConfig(**sizes))
    per_seq = engine.config.n_blocks[0] // engine.config.max_seqs
    for g in range(len(p.kv_groups)):
        for s in range(engine.config.max_seqs):
            engine.block_tables[g, s, :per_seq] = np.arange(per_seq) + s * per_seq
    return mf, p, engine


def prompt_batch(tokens, start=0, slot=0, outputs=None):
    n = len(tokens)
    positions = np.arange(start, start + n, dtype=np.int32)
    out = np.arange(n, dtype=np.int32) if outputs is None else np.asarray(outputs, np.int32)
    return Batch(np.asarray(tokens, np.int32), positions, np.full(n, slot, np.int32), 0, out)


def nmse(a, b):
    return float(((a - b) ** 2).mean() / (b**2).mean())


@pytest.mark.parametrize("name", MODELS)
def test_every_op_agrees_with_the_oracle(name, goldens_dir):
    mf, p, engine = open_engine(goldens_dir / f"{name}.gguf")
    tokens = np.random.default_rng(CLEAR_CHOICE.get(name, 0)).integers(0, p.n_vocab, 70)
    n, worst = len(tokens), (0.0, "")
    outputs = np.arange(6, n)
    try:
        oracle = NumpyEngine(mf, p)
        for op in p.ops:
            engine.set_slot(0, GREEDY)
            got = engine.forward(prompt_batch(tokens, outputs=outputs), stop_after=op.name)
            want = oracle.run(tokens, np.arange(n), np.zeros(n, int), outputs, stop_after=op.name)
            view = ops.output_of(op)
            columns = slice(view.offset, view.offset + view.width)
            error = nmse(got[:, columns], want[:, columns])
            worst = max(worst, (error, op.name))
            assert error <= limits.CUDA_OP_NMSE, f"{op.name}: NMSE {error:.3g}, limit {limits.CUDA_OP_NMSE}"
    finally:
        engine.close()
    print(f"{name}: worst op {worst[1]} NMSE {worst[0]:.3g}, limit {limits.CUDA_OP_NMSE}")


@pytest.mark.parametrize("name", MODELS)
def test_both_lowerings_agree_after_each_op(name, goldens_dir, monkeypatch):
    """Prompt rows, one decode row and several: what a launch for several ops leaves is what these leave, one at a time.

    Up to there both run the same launches. The bits are the same but where a norm is folded into products: there its
    factor is applied to their sums, and elsewhere to each value before it is rounded to fp16.
    """
    path = goldens_dir / f"{name}.gguf"
    _, p, engine = open_engine(path)
    text = np.random.default_rng(CLEAR_CHOICE.get(name, 0)).integers(0, p.n_vocab, 70).astype(np.int32)
    slots = np.arange(3, dtype=np.int32)
    prompt, alone = prompt_batch(text, outputs=[3, 69]), Batch(text[:1], slots[:1] + 69, slots[:1], 1, slots[:1])
    several = Batch(text[:3], np.full(3, 69, np.int32), slots, 3, slots)
    fused, plain, at, worst, exact = lowering.lower(p), lowering.lower(p, fuse=False), 0, (0.0, ""), 0
    try:
        for slot in slots:
            engine.forward(prompt_batch(text[:69], slot=int(slot), outputs=[]))
        for i, span in enumerate(lowering.spans(p, fused)):
            op = fused[i]
            if isinstance(op, lowering.NormRoute):
                routed = (i, at)
            whole = isinstance(op, lowering.MatMulGroup) and op.glu is None and not op.residual
            views = [ops.output_of(part) for part in (op.parts if whole else span[-1:])]
            columns = np.r_[*(slice(v.offset, v.offset + v.width) for v in views if v.buf == views[-1].buf)]
            for batch in (prompt, alone, several):
                got = engine.forward_ops(batch, fused[: i + 1])[:, columns]
                # rows that the routing has converted stand nowhere as the op after its norm would read them
                is_converted = getattr(op, "is_converted", False)
                first, first_plain = routed if is_converted else (i, at)
                want = engine.forward_ops(batch, fused[:first] + plain[first_plain : at + len(span)])[:, columns]
                what = f"{op.name}, {len(batch.tokens)} rows"
                if getattr(op, "norm", None) is None and not is_converted:
                    assert np.array_equal(got, want), what
                    exact += len(span) > 1
                error = nmse(got, want)
                worst = max(worst, (error, what))
                assert error <= limits.CUDA_OP_NMSE, f"{what}: NMSE {error:.3g}, limit {limits.CUDA_OP_NMSE}"
            at += len(span)
        logits = [engine.forward(batch) for batch in (prompt, several)]
    finally:
        engine.close()
    assert exact > 0
    monkeypatch.setenv("WORKER_ORCD_LOWERING", "plain")
    _, p, engine = open_engine(path)
    try:
        for slot in slots:
            engine.forward(prompt_batch(text[:69], slot=int(slot), outputs=[]))
        for batch, want in zip((prompt, several), logits, strict=True):
            got = engine.forward(batch)
            assert nmse(got, want) <= limits.CUDA_OP_NMSE
            assert np.array_equal(got, engine.forward(batch, stop_after=p.ops[-1].name))
        for slot in slots:
            engine.set_slot(int(slot), GREEDY)
        drawn = run_decode(engine, slots, several.tokens, several.positions, 1)[0]
        assert np.array_equal(drawn, got.argmax(1))
    finally:
        engine.close()
    print(f"{name}: worst op {worst[1]} NMSE {worst[0]:.3g}, limit {limits.CUDA_OP_NMSE}")


@pytest.mark.parametrize("act", ops.GLU_ACTIVATIONS)
def test_a_row_of_another_activation_is_a_flag(act, goldens_dir, monkeypatch):
    """An activation has one name from the row to the kernel."""
    monkeypatch.setitem(registry.ROWS, "qwen2", dataclasses.replace(registry.ROWS["qwen2"], act=act))
    mf, p, engine = open_engine(goldens_dir / "qwen2-Q8_0.gguf")
    assert {op.kind for op in p.ops if isinstance(op, ops.Glu)} == {act}
    tokens = np.random.default_rng(0).integers(0, p.n_vocab, 40)
    try:
        got = engine.forward(prompt_batch(tokens))
        want = NumpyEngine(mf, p).run(tokens, np.arange(40), np.zeros(40, int), np.arange(40))
        assert nmse(got, want) <= limits.CUDA_OP_NMSE
    finally:
        engine.close()


@pytest.mark.parametrize("name", sorted(CLEAR_CHOICE))
def test_decode_rows_of_experts_agree_with_the_oracle(name, goldens_dir):
    """Each sequence's last token as a decode row: one, few and many of them, so every decode kernel."""
    mf, p, engine = open_engine(goldens_dir / f"{name}.gguf", max_seqs=32, n_blocks=(32,) * 2, context_length=64)
    tokens = np.random.default_rng(CLEAR_CHOICE[name]).integers(0, p.n_vocab, 70)
    try:
        oracle, lengths = NumpyEngine(mf, p), [20 + i for i in range(32)]
        logits = oracle.run(tokens[:52], np.arange(52), np.zeros(52, int), np.arange(52))
        for n in (1, 3, 9, 32):
            for slot in range(n):
                engine.forward(prompt_batch(tokens[: lengths[slot]], slot=slot, outputs=[]))
            at = np.array(lengths[:n], np.int32)
            rows = np.arange(n, dtype=np.int32)
            got = engine.forward(Batch(tokens[at].astype(np.int32), at, rows, n, rows))
            error = nmse(got, logits[at])
            print(f"{name}, {n} decode rows: NMSE {error:.3g}, limit {limits.CUDA_OP_NMSE}")
            assert error <= limits.CUDA_OP_NMSE
    finally:
        engine.close()


@pytest.mark.parametrize("name", MODELS)
def test_a_text_has_the_same_bits_however_it_comes(name, goldens_dir):
    """As one prompt, in chunks, as decode rows alone and beside 1, 8 and 31 others, in any place among them, and as a
    prompt behind tokens that the decode loop has drawn. The prefix cache relies on it."""
    _, p, engine = open_engine(goldens_dir / f"{name}.gguf", max_seqs=32, context_length=192,
                               n_blocks=(96,) * len(_groups(goldens_dir / f"{name}.gguf")))  # fmt: skip
    rng = np.random.default_rng(7)
    n, first = 150, 70
    texts = rng.integers(0, p.n_vocab, (32, n)).astype(np.int32)
    text = texts[0]
    try:
        want = np.empty((n, p.n_vocab), np.float32)
        for start in range(0, n, 64):  # 64 rows of logits at a time, each time from the whole prompt
            rows = np.arange(start, min(start + 64, n))
            engine.forward(prompt_batch(text[:128], outputs=[]))
            if start < 128:
                want[rows[rows < 128]] = engine.forward(prompt_batch(text[:128], outputs=rows[rows < 128]))
        want[128:] = engine.forward(prompt_batch(text[128:], 128))
        for sizes in ([1, 63, 64, 22], [17, 50, 83], [100, 1, 1, 48]):
            at = 0
            for size in sizes:
                got = engine.forward(prompt_batch(text[at : at + size], at, outputs=np.arange(size)[-64:]))
                assert np.array_equal(got, want[at : at + size][-64:]), f"chunks {sizes}, at {at}"
                at += size
        for others, place in ((0, 0), (1, 1), (8, 3), (31, 17)):
            slots = rng.permutation(np.arange(1, 32))[:others].astype(np.int32)
            slots = np.insert(slots, place, 0).astype(np.int32)
            for slot in slots:
                engine.forward(prompt_batch(texts[slot][:first], slot=int(slot), outputs=[]))
            for at in range(first, n if others < 2 else first + 20):
                rows = np.arange(len(slots), dtype=np.int32)
                batch = Batch(texts[slots, at], np.full(len(slots), at, np.int32), slots, len(slots), rows)
                got = engine.forward(batch)
                assert np.array_equal(got[place], want[at]), f"decode row at {at} beside {others} others"
        # decode rows beside prompt rows of others, and a prompt that goes on behind what decode rows wrote
        mixed = np.concatenate([text[[120]], texts[1][:40]]).astype(np.int32)
        engine.forward(prompt_batch(text[:120], outputs=[]))
        slots = np.r_[0, np.ones(40)].astype(np.int32)
        positions = np.r_[120, np.arange(40)].astype(np.int32)
        got = engine.forward(Batch(mixed, positions, slots, 1, np.array([0], np.int32)))
        assert np.array_equal(got[0], want[120]), "decode row beside prompt rows"
        got = engine.forward(prompt_batch(text[121:], 121))
        assert np.array_equal(got, want[121:]), "prompt rows behind a decode row"
        engine.set_slot(0, dataclasses.replace(FILTERED, temperature=2.0, frequency_penalty=2.0))
        ids = engine.step(prompt_batch(text[:first], outputs=[first - 1]))[0]
        drawn = run_decode(engine, [0], ids, [first], 60)[:, 0]
        whole = np.concatenate([text[:first], ids, drawn, text[:10]])
        got = engine.forward(prompt_batch(whole[first + 60 :], first + 60))
        engine.forward(prompt_batch(whole[:128], outputs=[]))
        want = engine.forward(prompt_batch(whole[128:], 128))
        assert np.array_equal(got, want[first + 60 - 128 :]), "prompt rows behind drawn tokens"
    finally:
        engine.close()


def _groups(path):
    """The KV groups of a model."""
    with ModelFile(str(path)) as mf:
        return plan.build(mf).kv_groups


@pytest.mark.parametrize("name", ["llama-Q4_K_M", "qwen2-Q8_0", "phi3-swa-Q8_0", "gpt-oss-MXFP4", "gpt-oss-Q4_K_M"])
def test_prefill_does_not_depend_on_the_chunking(name, goldens_dir):
    _, p, engine = open_engine(goldens_dir / f"{name}.gguf")
    tokens = np.random.default_rng(1).integers(0, p.n_vocab, 100)
    try:
        whole = engine.forward(prompt_batch(tokens))
        for cut in (1, 37, 64, 99):
            first = engine.forward(prompt_batch(tokens[:cut], slot=1))
            second = engine.forward(prompt_batch(tokens[cut:], start=cut, slot=1))
            assert np.array_equal(whole, np.concatenate([first, second])), f"cut at {cut}"
    finally:
        engine.close()


def run_decode(engine, slots, first, start, n_steps):
    from worker_orcd._ring import Control, TokenRing

    ring, n = TokenRing(), len(slots)
    out = engine.decode(np.asarray(slots, np.int32), np.arange(n, dtype=np.int64) + 100, np.asarray(first, np.int32),
                        np.asarray(start, np.int32), n_steps, np.zeros(0, np.int32), np.zeros(n + 1, np.int32), ring,
                        Control())  # fmt: skip
    pushed = []
    while chunk := ring.pop(0.0):
        pushed += chunk
    assert pushed == [(100 + j, int(t)) for row in out for j, t in enumerate(row)]
    return out


@pytest.mark.parametrize("name", ["qwen2-Q4_K_M", "gpt-oss-MXFP4_MOE"])
@pytest.mark.parametrize("sampling", [GREEDY, FILTERED, EDITED, dataclasses.replace(EDITED, temperature=0.0)])
def test_decode_loop_equals_single_steps_and_does_not_depend_on_neighbours(sampling, name, goldens_dir):
    _, p, engine = open_engine(goldens_dir / f"{name}.gguf")
    is_edited = sampling.logit_bias is not None
    edits = token_edits(sampling, BAD_WORDS, STOP_IDS) if is_edited else NO_EDITS
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, p.n_vocab, n) for n in (5, 33, 64, 90)]
    try:
        alone = []
        for s, prompt in enumerate(prompts):
            engine.set_slot(s, sampling, edits)
            first, _ = engine.step(prompt_batch(prompt, slot=s, outputs=[len(prompt) - 1]))
            alone.append([int(first[0]), *run_decode(engine, [s], first, [len(prompt)], 20)[:, 0].tolist()])
        firsts = []
        for s, prompt in enumerate(prompts):
            engine.set_slot(s, sampling, edits)
            firsts.append(int(engine.step(prompt_batch(prompt, slot=s, outputs=[len(prompt) - 1]))[0][0]))
        crowd = run_decode(engine, range(4), firsts, [len(q) for q in prompts], 20)
        for s in range(4):
            assert [firsts[s], *crowd[:, s].tolist()] == alone[s]
        engine.set_slot(3, sampling, edits)
        token = int(engine.step(prompt_batch(prompts[3], slot=3, outputs=[89]))[0][0])
        singles = [token]
        for i in range(20):
            batch = Batch(np.array([token], np.int32), np.array([90 + i], np.int32), np.array([3], np.int32), 1,
                          np.array([0], np.int32))  # fmt: skip
            token = int(engine.step(batch)[0][0])
            singles.append(token)
        assert singles == alone[3]
        for ids in alone if is_edited else ():
            assert not set(ids[:15]) & set(STOP_IDS) and not set(itertools.pairwise(ids)) & set(BAD_WORDS)
    finally:
        engine.close()


def test_logits_that_are_wanted_are_those_before_the_draw(goldens_dir):
    _, p, engine = open_engine(goldens_dir / "llama-Q4_0.gguf")
    try:
        batch = prompt_batch([1, 2, 3], outputs=[2])
        raw = engine.forward(batch)
        best = int(raw[0].argmax())
        bias = SamplingParams(temperature=0.0, seed=0, logit_bias={best: -100.0})
        engine.set_slot(0, bias, token_edits(bias))
        sampled, logits = engine.step(batch, want_logits=True)
        assert np.array_equal(logits, raw) and sampled[0] == np.where(np.arange(p.n_vocab) == best, -9e9, raw).argmax()
        engine.set_slot(0, GREEDY)
        assert engine.step(batch)[0][0] == best, "a new sequence has no edits"
    finally:
        engine.close()


@pytest.mark.parametrize("name", ["llama-Q4_K_M", "gpt-oss-MXFP4", "gpt-oss-Q4_K_M"])
def test_a_mixed_step_gives_each_row_what_it_gets_alone(name, goldens_dir):
    _, p, engine = open_engine(goldens_dir / f"{name}.gguf")
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, p.n_vocab, 20), rng.integers(0, p.n_vocab, 50)
    try:
        prompt_alone = engine.forward(prompt_batch(b, slot=2))
        engine.forward(prompt_batch(a, slot=0))
        row = Batch(np.array([9], np.int32), np.array([20], np.int32), np.array([0], np.int32), 1,
                    np.array([0], np.int32))  # fmt: skip
        decode_alone = engine.forward(row)
        engine.forward(prompt_batch(a, slot=1))
        tokens, positions, slots = np.append([9], b), np.append([20], np.arange(50)), np.append([1], np.full(50, 3))
        mixed = Batch(*(a.astype(np.int32) for a in (tokens, positions, slots)), 1, np.arange(51, dtype=np.int32))
        both = engine.forward(mixed)
        assert np.array_equal(both[:1], decode_alone)
        assert np.array_equal(both[1:], prompt_alone)
    finally:
        engine.close()


def test_a_stop_id_and_an_interrupt_end_the_loop(goldens_dir):
    from worker_orcd._ring import Control, TokenRing

    _, _, engine = open_engine(goldens_dir / "llama-Q4_0.gguf")
    try:
        engine.set_slot(0, GREEDY)
        first, _ = engine.step(prompt_batch([1, 2, 3], outputs=[2]))
        free = run_decode(engine, [0], first, [3], 30)[:, 0]
        stop = int(free[7])
        at = int(np.flatnonzero(free == stop)[0])
        args = (np.zeros(1, np.int32), np.zeros(1, np.int64), first, np.full(1, 3, np.int32), 30)
        ring = TokenRing()
        out = engine.decode(*args, np.array([stop], np.int32), np.array([0, 1], np.int32), ring, Control())
        assert out[: at + 1, 0].tolist() == free[: at + 1].tolist() and len(out) <= at + 3
        assert [t for _, t in ring.pop(0.0)] == free[: at + 1].tolist(), "nothing is pushed after the stop id"
        control = Control()
        control.interrupt()
        assert len(engine.decode(*args, np.zeros(0, np.int32), np.zeros(2, np.int32), TokenRing(), control)) <= 3
    finally:
        engine.close()


@pytest.mark.parametrize("bad", ["token", "position", "slot", "block", "frequency table"])
def test_rows_out_of_range_are_refused(bad, goldens_dir):
    from worker_orcd.errors import WorkerError

    _, p, engine = open_engine(goldens_dir / "llama-Q4_0.gguf")
    batch = prompt_batch([1, 2, 3])
    if bad == "token":
        batch.tokens[1] = p.n_vocab
    elif bad == "position":
        batch.positions[:] += 256
    elif bad == "slot":
        batch.slots[:] = 4
    elif bad == "frequency table":
        engine.rope_tables[0] = 1
    else:
        engine.block_tables[0, 0, 0] = -1
    try:
        with pytest.raises((WorkerError, ValueError), match=bad):
            engine.forward(batch)
    finally:
        engine.close()


def test_memory_is_as_planned_and_comes_back(goldens_dir):
    from worker_orcd._driver import Context

    context = Context(0)
    before, _ = context.memory()
    path = goldens_dir / "qwen2-Q8_0.gguf"
    for _ in range(2):
        with LLM(str(path), device="cuda:0", progress=False) as llm:
            for _ in range(3):
                llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, temperature=0.0))
            free = context.memory()[0]
            for _ in range(100):
                llm.generate([[1, 2, 3, 4]], SamplingParams(max_tokens=4, temperature=0.0))
            assert context.memory()[0] == free, "generating allocates nothing"
        gc.collect()
    after, _ = context.memory()
    print(f"free before {before}, after {after}")
    assert after >= before - (8 << 20)
    context.close()


def test_the_residency_check_finds_managed_memory(goldens_dir):
    from worker_orcd._driver import DeviceMemory

    _, _, engine = open_engine(goldens_dir / "llama-Q4_0.gguf")
    try:
        assert engine.check_residency() == []
        planted = DeviceMemory(engine.context, 1 << 16, "planted", True)
        assert any("planted" in fault for fault in engine.check_residency())
        planted.close()
        assert engine.check_residency() == []
    finally:
        engine.close()


@pytest.mark.parametrize("many_rows", lowering.MANY_ROWS)
@pytest.mark.parametrize("name", ["qwen2-Q4_K_M", "phi3-swa-Q8_0", "gpt-oss-MXFP4_MOE"])
def test_a_crowd_of_256_equals_each_alone(name, many_rows, goldens_dir, monkeypatch):
    """Ids and log-probabilities, greedy and drawn, on warpgroup products and without: whatever else is in the steps."""
    rng = np.random.default_rng(0)
    path = goldens_dir / f"{name}.gguf"
    with LLM(path, device="cuda:0", max_seqs=1, context_length=128, progress=False, prefix_cache=False) as llm:
        prompts = [rng.integers(3, llm.info.n_vocab, int(rng.integers(1, 60))).tolist() for _ in range(256)]
        params = [
            SamplingParams(max_tokens=int(rng.integers(1, 40)), temperature=(0.0, 0.9)[i % 2], seed=i, ignore_eos=True,
                           logprobs=(None, 2)[i % 3 == 0])
            for i in range(256)
        ]  # fmt: skip
        some = range(0, 256, 17)
        alone = [llm.generate([prompts[i]], params[i])[0] for i in some]
    monkeypatch.setenv(lowering.MANY_ROWS_VARIABLE, many_rows)
    with LLM(path, device="cuda:0", max_seqs=256, context_length=128, progress=False) as llm:
        for _ in range(2):  # the second finds the prompts in the cache
            crowd = llm.generate(prompts, params)
            for i, right in zip(some, alone, strict=True):
                assert (crowd[i].token_ids, crowd[i].logprobs) == (right.token_ids, right.logprobs), f"prompt {i}"


@pytest.mark.parametrize("name", ["qwen2-Q4_K_M", "gpt-oss-MXFP4"])
def test_many_requests_together_equal_each_alone(name, goldens_dir):
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 512, int(n)).tolist() for n in rng.integers(1, 120, 32)]
    params = [SamplingParams(max_tokens=24, temperature=0.8 if i % 2 else 0.0, seed=i, ignore_eos=True)
              for i in range(32)]  # fmt: skip
    with LLM(str(goldens_dir / f"{name}.gguf"), device="cuda:0", progress=False, max_seqs=32) as llm:
        together = [c.token_ids for c in llm.generate(prompts, params)]
        alone = [llm.generate([q], p)[0].token_ids for q, p in zip(prompts, params, strict=True)]
        assert together == alone
        for _ in range(9):
            assert llm.generate(prompts[:2], params[:2])[1].token_ids == alone[1]


def test_a_counting_thread_keeps_half_its_speed(goldens_dir):
    """The decode loop runs without the Python lock."""

    def count(until):
        n = 0
        while time.perf_counter() < until:
            n += 1
        return n

    with LLM(str(goldens_dir / "llama-Q4_K_M.gguf"), device="cuda:0", progress=False) as llm:
        params = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
        llm.generate([[1, 2, 3]], params)
        free = count(time.perf_counter() + 0.5)
        stop = threading.Event()

        def generate():
            while not stop.is_set():
                llm.generate([[1, 2, 3]], params)

        thread = threading.Thread(target=generate)
        thread.start()
        time.sleep(0.1)
        busy = count(time.perf_counter() + 0.5)
        stop.set()
        thread.join()
    print(f"counted {busy} while generating, {free} alone")
    assert busy >= free / 2


def test_long_rope_across_the_limit(goldens_dir, tmp_path):
    """Teacher-forced and generated sequences turn by the frequencies of their length."""
    long_rope.check(long_rope.write(goldens_dir / "phi3-Q8_0.gguf", tmp_path / "long.gguf"), "cuda:0")


def test_block_size_is_that_of_the_kernels():
    assert BLOCK_SIZE == 64
