"""The CPU engine's protocol: what it refuses, how a decode loop ends, closing, threads and forks."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
import types

import limits
import numpy as np
import pytest
from helpers.cpu_engines import make_engine, open_engine, rows, sampling
from helpers.synthetic_plan import N_POSITIONS, N_VOCAB, every_op

from worker_orcd._cpu import CpuEngine
from worker_orcd._ring import Control, TokenRing
from worker_orcd.engine.protocol import Batch, EngineConfig, StepAborted
from worker_orcd.errors import InsufficientMemory, InternalError, InvalidRequest, ModelLoadError, WorkerError
from worker_orcd.models.ops import Op, View


@pytest.fixture
def engine():
    e = make_engine(*every_op())
    yield e
    e.close()


def batch(tokens, positions, slots, output_indices, n_decode=0):
    return Batch(*(np.asarray(a) for a in (tokens, positions, slots)), n_decode, np.asarray(output_indices))


GOOD = ([1, 2], [0, 1], [0, 0], [1])


@pytest.mark.parametrize(("change", "kind", "field", "text"), [
    ({0: [1, N_VOCAB]}, InvalidRequest, "tokens", "row 1: token 77 is not in the vocabulary of 77"),
    ({0: [-1, 2]}, InvalidRequest, "tokens", "row 0: token -1"),
    ({0: [1, 2**40]}, InvalidRequest, "tokens", "no int32"),
    ({0: [1.0, 2.0]}, InvalidRequest, "tokens", "array of integers"),
    ({0: [[1, 2]]}, InvalidRequest, "tokens", "flat"),
    ({0: [], 1: [], 2: [], 3: []}, InvalidRequest, "tokens", "1 to 256 rows, not 0"),
    ({0: [1] * 257, 1: range(257), 2: [0] * 257}, InvalidRequest, "tokens", "1 to 256 rows"),
    ({1: [0, 192]}, InvalidRequest, "positions", "position 192 is not below the context length 192"),
    ({1: [0, 2**31 - 1]}, InvalidRequest, "positions", "context length"),
    ({1: [-1, 0]}, InvalidRequest, "positions", "row 0"),
    ({1: [1, 1]}, InvalidRequest, "positions", "does not follow"),
    ({1: [0]}, InvalidRequest, "positions", "1 entries, not 2"),
    ({2: [0, 4]}, InternalError, "slots", "slot 4 is not below 4"),
    ({2: [-1, 0]}, InternalError, "slots", "slot -1"),
    ({0: [1] * 3, 1: [0, 0, 1], 2: [0, 1, 0]}, InternalError, "slots", "slot 0 has rows in two places"),
    ({3: [2]}, InternalError, "output_indices", "row 2 is out of range"),
    ({3: [-1]}, InternalError, "output_indices", "row -1"),
    ({3: [1, 0]}, InternalError, "output_indices", "order"),
    ({3: [1, 1]}, InternalError, "output_indices", "order"),
    ({3: [0, 1, 2]}, InternalError, "output_indices", "out of range"),
    ({4: 3}, InternalError, "n_decode", "n_decode 3"),
    ({4: -1}, InternalError, "n_decode", "n_decode -1"),
])  # fmt: skip
def test_bad_batches(engine, change, kind, field, text):
    arguments = [*GOOD, 0]
    for i, value in change.items():
        arguments[i] = value
    bad = batch(*(list(a) if isinstance(a, range) else a for a in arguments[:4]), arguments[4])
    for call in (engine.step, engine.forward):
        with pytest.raises(WorkerError, match=text) as e:
            call(bad)
        assert type(e.value) is kind and e.value.fields["field"] == field
    assert engine.step(batch(*GOOD))[0].shape == (1,), "the next batch works"


def test_bad_block_tables(engine):
    long = rows((1, 0, np.arange(130) % N_VOCAB))
    good = engine.block_tables.copy()
    for group, entry, value in ((0, 0, -1), (0, 2, 12), (1, 1, -7), (1, 2, 2**31 - 1)):
        engine.block_tables[:] = good
        engine.block_tables[group, 1, entry] = value
        with pytest.raises(InternalError, match=f"slot 1, KV group {group}: entry {entry} is {value}") as e:
            engine.forward(long)
        assert e.value.fields["field"] == "block_tables"
    engine.block_tables[:] = good
    whole = engine.forward(long)
    engine.block_tables[:, 0] = engine.block_tables[:, 2] = engine.block_tables[:, 3] = -1  # other slots do not matter
    np.testing.assert_array_equal(engine.forward(long), whole)
    engine.block_tables[1, 1, 0] = -1  # position 140 with a window of 40 needs blocks 1 and 2 of that group
    engine.forward(rows((1, 130, np.arange(10))))
    with pytest.raises((ValueError, AttributeError, TypeError)):
        engine.block_tables = good
    with pytest.raises(ValueError):
        engine.block_tables.resize((1, 1, 1), refcheck=False)  # would free what the engine reads


def test_bad_rope_tables(engine):
    """An index outside the plan's frequency tables is refused before anything runs; of slots in the batch only."""
    good = engine.forward(rows((1, 0, [1, 2, 3])))
    for index in (2, -1, 2**31 - 1, -(2**31)):
        engine.rope_tables[1] = index
        for call in (engine.forward, engine.step):
            with pytest.raises(InternalError, match=f"slot 1: frequency table {index} is not below 2") as e:
                call(rows((0, 0, [1]), (1, 0, [1, 2, 3])))
            assert e.value.fields["field"] == "rope_tables"
        engine.forward(rows((0, 0, [1])))
    engine.rope_tables[1] = 0
    np.testing.assert_array_equal(engine.forward(rows((1, 0, [1, 2, 3]))), good)


def test_a_plan_of_one_frequency_table_has_index_0_only(goldens_dir):
    for name in ("llama-Q4_0", "gpt2-Q8_0"):  # one table, and no rotation
        engine = open_engine(goldens_dir / f"{name}.gguf")
        engine.rope_tables[0] = 1
        with pytest.raises(InternalError, match="slot 0: frequency table 1 is not below 1"):
            engine.forward(rows((0, 0, [1])))
        engine.close()


def test_no_outputs_and_arrays_of_other_integers(engine):
    sampled, logits = engine.step(rows((0, 0, [1, 2, 3]), out="none"), want_logits=True)
    assert sampled.shape == (0,) and logits.shape == (0, N_VOCAB)
    a = engine.forward(rows((0, 3, [4, 5])))
    b = engine.forward(batch(np.array([4, 5], np.uint8), [3, 4], np.zeros(2, np.int64)[::1], np.arange(4)[::2] // 2))
    np.testing.assert_array_equal(a, b)
    assert engine.forward(rows((0, 5, [6]), out="none")).shape == (0, N_VOCAB)


def test_stop_after_names_records(engine):
    with pytest.raises(InternalError, match="no op 'nothing'"):
        engine.forward(rows((0, 0, [1])), stop_after="nothing")
    assert engine.forward(rows((0, 0, [1, 2])), stop_after="q").shape == (2, 200)
    assert engine.forward(rows((0, 0, [1, 2]), out="last"), stop_after="output_norm").shape == (1, 100)


@pytest.mark.parametrize(("field", "value"), [
    ("max_seqs", 0), ("max_batch_tokens", 3), ("context_length", 0), ("context_length", 2**40), ("n_blocks", (1,)),
    ("n_blocks", (1, 0)), ("n_blocks", (1, 2**40)),
])  # fmt: skip
def test_bad_configs(field, value):
    mf, plan = every_op()
    config = dataclasses.replace(EngineConfig(4, 16, 64, (4, 4)), **{field: value})
    with pytest.raises(InvalidRequest, match=field):
        CpuEngine(mf, plan, config)


def test_bad_surroundings(monkeypatch):
    mf, plan = every_op()
    with pytest.raises(InvalidRequest, match="n_threads"):
        make_engine(mf, plan, n_threads=-1)
    monkeypatch.setenv("WORKER_ORCD_CPU_ISA", "sse9")
    with pytest.raises(InvalidRequest, match="'sse9' is unknown"):
        make_engine(mf, plan)
    monkeypatch.delenv("WORKER_ORCD_CPU_ISA")
    with pytest.raises(InsufficientMemory, match=r"KV cache .* bytes are free") as e:
        make_engine(mf, plan, max_seqs=4096, max_batch_tokens=4096, context_length=1 << 20)
    assert e.value.fields["bytes_required"] > 1.3e12 > e.value.fields["bytes_available"] > 0


def test_plans_that_do_not_fit_are_refused():
    mf, plan = every_op()

    def broken(name, **changes):
        ops = tuple(dataclasses.replace(op, **changes) if op.name == name else op for op in plan.ops)
        with pytest.raises(InternalError, match="not consistent"):
            make_engine(mf, dataclasses.replace(plan, ops=ops))

    view = View("x", 50, 60)
    broken("q", out=view)
    broken("q", inp=view)
    broken("q", weight="kv.w")
    broken("q", bias="norm_rms.w")
    broken("q", out=View("nowhere", 0, 120))
    broken("embed", out=View("h", -1, 100))
    broken("rope_q", n_rot=14)
    broken("rope_q", n_head=7)
    broken("kv_write.0", layer=2)
    broken("attention.0", n_head=5)
    broken("attention.1", window=41)
    broken("route", n_used=6)
    broken("up_exps", n_expert=4)
    broken("down_exps", per_slot=False)
    broken("glu_silu", kind="relu")
    broken("gather", inp=View("x_out", 0, 100))
    broken("output_norm", out=View("h", 0, 100))
    data = mf.data["q.w"]
    mf.data["q.w"] = data[:-2]
    with pytest.raises(InternalError, match=r"q\.w: 23998 bytes, 24000 wanted"):
        make_engine(mf, plan)
    mf.data["q.w"] = data
    Strange = type("Strange", (Op,), {})
    with pytest.raises(InternalError, match="no op Strange"):
        make_engine(mf, dataclasses.replace(plan, ops=(*plan.ops, Strange("s"))))


def decode(engine, slots, tokens, positions, n_steps, stops=None, ring=None, control=None):
    """`stops`: a list of stop ids for each slot."""
    stops = [[]] * len(slots) if stops is None else stops
    return engine.decode(np.asarray(slots, np.int32), np.arange(len(slots), dtype=np.int64) + 10,
                         np.asarray(tokens, np.int32), np.asarray(positions, np.int32), n_steps,
                         np.array([i for ids in stops for i in ids], np.int32), np.cumsum([0, *map(len, stops)]),
                         TokenRing() if ring is None else ring, control or Control())  # fmt: skip


def test_decode_stops_where_a_sequence_draws_one_of_its_stop_ids(engine):
    for s in range(2):
        engine.set_slot(s, sampling(temperature=1.5, seed=s))
    free = decode(engine, [0, 1], [1, 2], [0, 0], 30)
    assert free.shape == (30, 2) and free.dtype == np.int32
    stop = int(free[12, 0])
    step = int(np.flatnonzero(free[:, 0] == stop)[0])

    def again(**kw):
        for s in range(2):
            engine.set_slot(s, sampling(temperature=1.5, seed=s))
        return decode(engine, [0, 1], [1, 2], [0, 0], 30, **kw)

    ring = TokenRing()
    got = again(stops=[[5000, stop], []], ring=ring)
    np.testing.assert_array_equal(got, free[: step + 1])
    assert len(ring) == 2 * (step + 1)
    other = next(int(t) for t in free[:, 1] if t not in free[:, 0])
    np.testing.assert_array_equal(again(stops=[[other], [5000]]), free)
    first = int(np.flatnonzero(free[:, 1] == other)[0])
    np.testing.assert_array_equal(again(stops=[[other], [5000, other, 6000]]), free[: first + 1])
    control = Control()
    control.interrupt()
    np.testing.assert_array_equal(again(control=control), free[:1])


def test_interrupt_ends_a_running_loop_and_the_gil_is_free():
    engine = make_engine(*every_op(), context_length=N_POSITIONS)
    control, ring, got = Control(), TokenRing(), []
    t = threading.Thread(target=lambda: got.append(decode(engine, [0], [1], [0], 150, ring=ring, control=control)))
    t.start()
    assert ring.pop(10)
    control.interrupt()
    t.join(10)
    assert not t.is_alive() and 1 <= len(got[0]) <= 150


def test_an_aborted_step_counts_for_nothing(engine):
    """Neither a token nor a drawn token's weight in the penalty; the same step afterwards gives what it would have."""
    control = Control()
    control.abort()
    good, ring, engine_op = batch(*GOOD), TokenRing(), every_op()[1].ops[0].name
    for s in range(2):
        engine.set_slot(s, sampling(temperature=1.0, seed=s, repetition_penalty=1.9))
    with pytest.raises(StepAborted):
        engine.step(good, control=control)
    with pytest.raises(StepAborted):
        engine.step(good, want_logits=True, control=control)
    with pytest.raises(StepAborted):
        engine.forward(good, control=control)
    with pytest.raises(StepAborted):
        engine.forward(good, engine_op, control=control)
    assert decode(engine, [0, 1], [1, 2], [0, 0], 30, ring=ring, control=control).shape == (0, 2)
    assert len(ring) == 0 and control.n_steps == 0
    control.clear()
    got = [engine.step(good, control=control)[0], decode(engine, [0, 1], [1, 2], [2, 0], 30, control=control)]
    assert control.n_steps == 30
    for s in range(2):
        engine.set_slot(s, sampling(temperature=1.0, seed=s, repetition_penalty=1.9))
    want = [engine.step(good)[0], decode(engine, [0, 1], [1, 2], [2, 0], 30)]
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("n_threads", [1, 3])
def test_a_step_aborted_at_any_moment_can_be_run_again(n_threads):
    """Another thread aborts while it runs, at moments spread over a step; results are those of a step left alone."""
    engine = make_engine(*every_op(), n_threads=n_threads)
    prompt = rows((0, 0, np.arange(128) % N_VOCAB), (2, 0, np.arange(100) % N_VOCAB), out="last")
    engine.step(prompt)
    began = time.perf_counter()
    want = engine.step(prompt, want_logits=True)
    usual = time.perf_counter() - began
    control, n_aborted = Control(), 0
    for i in range(2000):
        if i >= 40 and n_aborted >= 5:  # on a busy machine most come late
            break
        timer = threading.Timer(usual * (i % 40) / 40, control.abort)
        timer.start()
        try:
            got = engine.step(prompt, want_logits=True, control=control)
        except StepAborted:
            n_aborted += 1
            got = None
        timer.join()
        control.clear()
        if got is None:
            got = engine.step(prompt, want_logits=True, control=control)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])
    print(f"{n_aborted} of {i} steps were aborted")
    assert n_aborted >= 5
    engine.close()


def test_bad_decodes(engine):
    for kw, kind, text in (
        ({"slots": [0, 0]}, WorkerError, "does not follow"), ({"slots": [0, 9]}, InternalError, "slot 9"),
        ({"tokens": [1, 77]}, InvalidRequest, "token 77"), ({"positions": [0, 190]}, InvalidRequest, "position 194"),
        ({"positions": [0]}, InvalidRequest, "1 entries"), ({"n_steps": 0}, InternalError, "n_steps"),
        ({"n_steps": 10**9}, InternalError, "n_steps"), ({"stops": [[1]]}, InvalidRequest, "stop_offsets"),
        ({"slots": [], "tokens": [], "positions": []}, InvalidRequest, "not 0"),
    ):  # fmt: skip
        arguments = {"slots": [0, 1], "tokens": [1, 2], "positions": [0, 0], "n_steps": 5} | kw
        with pytest.raises(kind, match=text):
            decode(engine, **arguments)
    engine.block_tables[0, 1, 1] = -1
    with pytest.raises(InternalError, match="entry 1 is -1"):
        decode(engine, [0, 1], [1, 2], [0, 60], 5)
    assert decode(engine, [0, 1], [1, 2], [0, 59], 5).shape == (5, 2)
    for ids, offsets in (([2**35], [0, 0, 1]), ([1], [0, 0, 2]), ([1], [0, 2, 1]), ([1], [1, 1, 1]), ([1], [0, -1, 1]),
                         ([1], [0, 0, 0]), ([1], [0, 1]), ([1], [0, 0, 1, 1])):  # fmt: skip
        with pytest.raises(InvalidRequest, match="stop_"):
            engine.decode([0, 1], [1, 2], [1, 2], [0, 0], 5, ids, offsets, TokenRing(), Control())
    for ring, control in ((None, Control()), (TokenRing(), None), (object(), Control())):
        with pytest.raises((InternalError, TypeError)):
            engine.decode([0], [1], [1], [0], 5, [], [0, 0], ring, control)


def test_a_closed_ring_does_not_hold_the_loop(engine):
    ring = TokenRing(1)
    ring.close()
    assert decode(engine, [0], [1], [0], 5, ring=ring).shape == (5, 1)


def poisoned():
    """A model whose logits are NaN for sequences that met token 7."""
    mf, plan = every_op()
    table = np.frombuffer(mf.data["token_embd"], np.uint16).copy().reshape(N_VOCAB, 100)
    table[7, 3] = 0x7FC0
    mf.data["token_embd"] = table.tobytes()
    ops = tuple(dataclasses.replace(op, weight="q.w", out=View("logits", 0, N_VOCAB)) if op.name == "logits" else op
                for op in plan.ops)  # fmt: skip
    head = mf.add("head", "F32", 100, N_VOCAB)
    ops = tuple(dataclasses.replace(op, weight="head") if op.name == "logits" else op for op in ops)
    return mf, dataclasses.replace(plan, ops=ops, weights=plan.weights | {"head": head})


def test_a_row_with_nan_logits_draws_minus_one_and_hurts_nobody():
    mf, plan = poisoned()
    engine = make_engine(mf, plan)
    for kw in ({}, {"temperature": 1.0, "top_k": 3, "top_p": 0.5}):
        for s in range(2):
            engine.set_slot(s, sampling(**kw))
        sampled, logits = engine.step(rows((0, 0, [1, 7]), (1, 0, [1, 2]), out="last"), want_logits=True)
        assert sampled[0] == -1 and np.isnan(logits[0]).all()
        assert sampled[1] >= 0 and np.isfinite(logits[1]).all()
        ring = TokenRing()
        got = decode(engine, [0, 1], [3, int(sampled[1])], [2, 2], 5, ring=ring)
        assert got.shape == (1, 2) and got[0, 0] == -1 and got[0, 1] >= 0
        assert ring.pop(0) == [(11, got[0, 1])]


def test_set_slot_refusals(engine):
    for slot in (-1, 4):
        with pytest.raises(InternalError, match="slot"):
            engine.set_slot(slot, sampling())
    with pytest.raises(InvalidRequest, match="temperature"):
        engine.set_slot(0, sampling(temperature=float("nan")))


def test_repetition_penalty_forgets_with_the_slot(engine):
    kw = {"repetition_penalty": 1.9}
    engine.set_slot(0, sampling(**kw))
    first = decode(engine, [0], [1], [0], 20)
    engine.set_slot(0, sampling(**kw))
    np.testing.assert_array_equal(decode(engine, [0], [1], [0], 20), first)
    again = decode(engine, [0], [1], [0], 20)
    assert (again != first).any(), "without set_slot the tokens drawn before still count"


def test_close():
    mf, plan = every_op()
    engine = make_engine(mf, plan)
    assert engine.n_threads == 2 and engine.kv_bytes == 2 * 12 * 2 * 64 * (20 + 32) * 2 and engine.workspace_bytes > 0
    engine.close()
    engine.close()
    assert engine.n_threads == 0 and engine.kv_bytes == 0
    for call in (lambda: engine.step(batch(*GOOD)), lambda: engine.forward(batch(*GOOD)),
                 lambda: engine.set_slot(0, sampling()), lambda: decode(engine, [0], [1], [0], 1)):  # fmt: skip
        with pytest.raises(InternalError, match="closed"):
            call()


def test_a_second_thread_is_refused_and_close_waits_for_nobody(monkeypatch):
    engine = make_engine(*every_op())
    ring, control = TokenRing(1), Control()  # nobody pops: the loop stands in its second push
    t = threading.Thread(target=lambda: decode(engine, [0], [1], [0], 3, ring=ring, control=control))
    t.start()
    deadline = time.monotonic() + 20
    while len(ring) == 0 and time.monotonic() < deadline:
        time.sleep(0.001)
    for call in (lambda: engine.step(batch(*GOOD)), lambda: engine.set_slot(0, sampling()), engine.close):
        with pytest.raises(InternalError, match="in use by another thread"):
            call()
    ring.close()
    t.join(10)
    assert not t.is_alive()
    engine.close()


def test_a_forked_child_is_refused():
    engine = make_engine(*every_op())
    pid = os.fork()
    if pid == 0:
        try:
            engine.step(batch(*GOOD))
        except InternalError as e:
            del engine
            os._exit(0 if "forked" in e.message else 2)
        os._exit(3)
    deadline = time.monotonic() + 20
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    assert os.waitstatus_to_exitcode(status) == 0
    assert engine.step(batch(*GOOD))[0].shape == (1,)


def test_the_file_is_watched():
    mf, plan = every_op()
    engine = make_engine(mf, plan)
    engine.step(batch(*GOOD))
    before = mf.checks
    engine.step(batch(*GOOD))
    assert mf.checks == before + 1

    def changed(same_path):
        assert not same_path, "a file that was moved is still mapped"
        raise ModelLoadError("changed while open", "m.gguf")

    mf.check_unchanged = changed
    for call in (lambda: engine.step(batch(*GOOD)), lambda: decode(engine, [0], [1], [0], 1)):
        with pytest.raises(ModelLoadError, match="changed"):
            call()


def test_making_and_dropping_engines_leaves_little_memory():
    def count():
        with open("/proc/self/statm") as f:
            mapped = int(f.read().split()[0]) * os.sysconf("SC_PAGESIZE")
        return mapped, threading.active_count(), len(os.listdir("/proc/self/task"))

    mf, plan = every_op()
    for i in range(12):
        engine = make_engine(mf, plan, n_threads=4)
        engine.step(batch(*GOOD))
        if i % 2:
            engine.close()
        del engine
        if i == 3:
            before = count()
    after = count()
    assert after[1:] == before[1:] and after[0] - before[0] < 8 << 20, (before, after)


def test_wrong_arguments_never_crash(engine):
    for bad in (None, 3, "x", types.SimpleNamespace(tokens=None), types.SimpleNamespace()):
        for call in (engine.step, engine.forward, lambda b: engine.set_slot(0, b)):
            with pytest.raises((WorkerError, TypeError, AttributeError)):
                call(bad)
    with pytest.raises(TypeError):
        CpuEngine()
    blank = CpuEngine.__new__(CpuEngine)
    with pytest.raises(InternalError, match="closed"):
        blank.step(batch(*GOOD))
    with pytest.raises(InternalError, match="made once"):
        engine.__init__(*every_op(), engine.config)


def test_real_weights_stay_in_the_mapping_and_take_little_memory(model_path):
    """Beyond the KV cache the engine keeps vectors and scratch, no copy of a matrix."""

    def anonymous():
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))

    before = anonymous()
    engine = open_engine(model_path("qwen"), max_batch_tokens=128)
    engine.step(rows((0, 0, np.arange(100, 200)), out="last"))
    grown = anonymous() - before
    limit = limits.CPU_ENGINE_BYTES
    print(f"anonymous memory {grown / 1e6:.1f} MB, limit {limit / 1e6:.1f} MB, KV pools {engine.kv_bytes / 1e6:.1f} MB")
    assert grown <= limit
