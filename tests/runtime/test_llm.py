"""LLM on a fake engine: arguments, prompts, results, loading, token_stream and ending. Files, plans and tokenizers are
real."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from worker_orcd import LLM, SamplingParams, Tokenizer
from worker_orcd.diagnose import doctor
from worker_orcd.errors import (
    Cancelled,
    CudaError,
    DuplicateJob,
    InsufficientVram,
    InternalError,
    InvalidRequest,
    ModelLoadError,
    NotReady,
    VramOom,
    WorkerError,
)
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.gguf.trusted_models import entry_of
from worker_orcd.runtime import loading
from worker_orcd.serving.job import Finished

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture
def path(goldens_dir, engines):
    return goldens_dir / "llama-Q4_0.gguf"


@pytest.fixture
def model(path):
    with LLM(path, device="cpu", progress=False) as loaded:
        yield loaded


# -- results


def test_results_come_in_the_order_of_the_prompts(model):
    prompts = ["one", [1, 2, 3], "a longer prompt than the others", np.array([5], np.int32)]
    params = SamplingParams(max_tokens=12, seed=3)
    together = model.generate(prompts, params)
    for prompt, result in zip(prompts, together, strict=True):
        (alone,) = model.generate([prompt], params)
        assert alone.token_ids == result.token_ids and alone.text == result.text and result.seed == 3
        n = len(model.tokenizer.encode(prompt)) if isinstance(prompt, str) else len(prompt)
        assert result.tokens_in == n
        assert result.text == model.tokenizer.decode(result.token_ids, continues=True)
    assert model.generate("one", params)[0].token_ids == together[0].token_ids


def test_a_seed_is_made_up_and_reported(model):
    first, second = model.generate([[1, 2], [1, 2]], SamplingParams(max_tokens=8))
    assert first.token_ids == second.token_ids and first.seed == second.seed
    assert model.generate([[1, 2]], SamplingParams(max_tokens=8, seed=first.seed))[0].token_ids == first.token_ids
    assert model.generate([[1, 2]], SamplingParams(max_tokens=8))[0].seed != first.seed


def test_params_for_each(model):
    short, long = model.generate(["a", "a"], [SamplingParams(max_tokens=n, seed=1, ignore_eos=True) for n in (3, 9)])
    assert len(short.token_ids) == 3 and long.token_ids[:3] == short.token_ids and len(long.token_ids) == 9
    assert short.finish_reason == "length"


def test_max_tokens_left_out_fills_the_context(model):
    (result,) = model.generate([[1] * 250], SamplingParams(ignore_eos=True))
    assert len(result.token_ids) == 6 and result.finish_reason == "length"


def test_stop_string(model):
    params = SamplingParams(max_tokens=60, seed=5, ignore_eos=True)
    (whole,) = model.generate(["x"], params)
    stop = whole.text[10:13]
    at = whole.text.find(stop)
    (cut,) = model.generate(["x"], SamplingParams(max_tokens=60, seed=5, ignore_eos=True, stop=stop))
    assert cut.text == whole.text[:at] and cut.finish_reason == "stop"
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)] and len(cut.token_ids) < 60


@pytest.mark.parametrize(
    ("prompts", "field"),
    [
        ([], "prompts"),
        ([1, 2, 3], "prompts"),
        (np.array([1, 2, 3]), "prompts"),
        (None, "prompts"),
        (5, "prompts"),
        (np.array(5), "prompts"),
        (b"ab", "prompts"),
        ({"prompt": "a"}, "prompts"),
        ({"a"}, "prompts"),
        ([""], "prompt"),
        ([[]], "prompt"),
        ([[-1]], "prompt"),
        ([[512]], "prompt"),
        ([[1.5]], "prompt"),
        ([[True]], "prompt"),
        ([None], "prompt"),
        ([5, "a"], "prompt"),
        ([b"ab"], "prompt"),
        ([[1] * 300], "prompt"),
        ([["a"]], "prompt"),
        ([[10**30]], "prompt"),
    ],
)
def test_bad_prompts_are_refused_before_anything_runs(model, engines, prompts, field):
    with pytest.raises(InvalidRequest) as caught:
        model.generate(["good", *prompts] if field == "prompt" else prompts)
    assert caught.value.fields["field"] == field and len(caught.value.message) < 160
    assert engines[0].calls == []


@pytest.mark.parametrize(
    ("params", "field"),
    [
        (SamplingParams(max_tokens=0), "max_tokens"),
        (SamplingParams(max_tokens=256), "max_tokens"),
        (SamplingParams(top_k=513), "top_k"),
        (SamplingParams(stop="x" * 40), "stop"),
        ({"max_tokens": 3}, "params"),
        ([{"max_tokens": 3}], "params"),
        ([SamplingParams()] * 2, "params"),
        ([], "params"),
        ([None], "params"),
        ({}, "params"),
        (0, "params"),
        ("greedy", "params"),
    ],
)
def test_bad_params_are_refused(model, params, field):
    calls = [lambda: model.generate(["good"], params)]
    if not isinstance(params, list):
        calls += [lambda: model.stream("good", params), lambda: model.submit("good", params)]
    if not isinstance(params, SamplingParams | list):  # this file has no chat template
        calls += [lambda: model.chat([{"role": "user", "content": "a"}], params)]
    for call in calls:
        with pytest.raises(InvalidRequest) as caught:
            call()
        assert caught.value.fields["field"] == field


def test_prompts_and_params_may_come_from_any_iterable(model):
    params = SamplingParams(max_tokens=3, seed=1)
    expected = [r.token_ids for r in model.generate(["a", [1, 2]], params)]
    for prompts in (("a", [1, 2]), iter(["a", np.array([1, 2])]), (p for p in ("a", (1, 2)))):
        assert [r.token_ids for r in model.generate(prompts, iter([params, params]))] == expected
    rows = np.array([[1, 2], [3, 4]])
    assert [r.tokens_in for r in model.generate(rows, params)] == [2, 2]


def test_numbers_of_numpy_do_what_plain_ones_do_and_results_are_plain(path):
    sizes = {"context_length": 128, "kv_cache_bytes": 1 << 20, "max_seqs": 4, "max_batch_tokens": 64, "max_queue": 8}
    sizes |= {"n_threads": 1, "chunk_bytes": 4096}
    numbers = {name: np.int64(value) for name, value in sizes.items()}
    given = {"max_tokens": np.int64(4), "temperature": np.float32(0.5), "seed": np.uint32(3), "logprobs": np.int8(2)}
    with LLM(path, device="cpu", progress=False, **numbers) as model:
        assert json.loads(json.dumps(model.info.to_dict()))["context_length"] == 128
        results = model.generate(["a", np.array([1, 2, 3])], SamplingParams(**given))
        plain = model.generate(["a", [1, 2, 3]], SamplingParams(max_tokens=4, temperature=0.5, seed=3, logprobs=2))
        for result, expected in zip(results, plain, strict=True):
            assert result.token_ids == expected.token_ids and result.logprobs == expected.logprobs
            assert json.loads(json.dumps(dataclasses.asdict(result)))["seed"] == 3
        deadline = np.float32(time.monotonic() + 1000)
        job = model.submit(np.array([1, 2]), SamplingParams(**given), deadline=deadline)
        assert len(job.completion().token_ids) <= 4
    for name in sizes:
        with pytest.raises(InvalidRequest, match=f"{name} must be a whole number"):
            LLM(path, device="cpu", progress=False, **{name: np.float64(8)})


def test_without_a_tokenizer_ids_still_work(path, monkeypatch):
    monkeypatch.setattr(loading.Tokenizer, "from_model", lambda *_: None)
    with LLM(path, device="cpu", progress=False) as model:
        assert model.tokenizer is None and model.info.tokenizer_kind is None
        (result,) = model.generate([[1, 2, 3]], SamplingParams(max_tokens=5, seed=1))
        assert result.text == "" and len(result.token_ids) == 5
        assert [p.token_ids for p in model.stream([1, 2, 3], SamplingParams(max_tokens=5, seed=1))] == [
            (t,) for t in result.token_ids
        ]
        assert model.logits([1, 2]).shape == (2, 512)
        for call in (
            lambda: model.generate(["text"]),
            lambda: model.chat([{"role": "user", "content": "hi"}]),
            lambda: model.generate([[1]], SamplingParams(stop="x")),
        ):
            with pytest.raises(InvalidRequest, match="no tokenizer"):
                call()


def test_logits(model):
    logits = model.logits(range(1, 201))
    assert logits.shape == (200, 512) and logits.dtype == np.float32
    assert np.array_equal(logits[:3], model.logits([1, 2, 3]))
    with pytest.raises(InvalidRequest):
        model.logits([])
    with pytest.raises(InvalidRequest, match="the context has 256"):
        model.logits([1] * 257)


def test_chat_needs_a_template(model):
    with pytest.raises(InvalidRequest, match="chat template"):
        model.chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("messages", [None, [], "hi", [1]])
def test_a_conversation_that_is_none(model, messages):
    with pytest.raises(InvalidRequest) as caught:
        model.chat(messages)
    assert caught.value.fields["field"] == "messages"


# -- streams and jobs


def test_stream_is_the_same_as_generate(model):
    params = SamplingParams(max_tokens=30, seed=9)
    (whole,) = model.generate(["abc"], params)
    stream = model.stream("abc", params)
    pieces = list(stream)
    assert "".join(p.text for p in pieces) == whole.text and all(p.text for p in pieces)
    assert [p.index for p in pieces] == list(range(len(pieces)))
    assert stream.job.completion().token_ids == whole.token_ids
    assert list(stream) == []


def test_leaving_a_stream_cancels(model, engines):
    engines[0].step_seconds = 0.005
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    left = model.stream([1], params)
    next(left)
    left.close()
    with pytest.raises(Cancelled):
        list(left)
    with model.stream([1], params) as managed:
        next(managed)
    dropped = model.stream([1], params)
    job = dropped.job
    del dropped
    gc.collect()
    assert managed.job.finished and job.finished
    time.sleep(0.05)
    n_calls = len(engines[0].calls)
    time.sleep(0.05)
    assert len(engines[0].calls) == n_calls


def test_submit(model, engines):
    engines[0].step_seconds = 0.005
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    job = model.submit([1, 2], params, job_id="j")
    assert model.job("j") is job and job.tokens_in == 2
    with pytest.raises(DuplicateJob):
        model.submit([1], params, job_id="j")
    for bad in ("", "x" * 257, 5):
        with pytest.raises(InvalidRequest):
            model.submit([1], params, job_id=bad)
    assert model.cancel("j") == "cancelling" and model.cancel("j") == "finished" and model.cancel("k") == "unknown"
    assert model.job("j") is None
    with pytest.raises(Cancelled):
        job.completion()


# -- loading


def test_info(model, path):
    info = model.info.to_dict()
    assert info["arch"] == "llama" and info["quant_kind"] == "Q4_0" and info["device"] == "cpu"
    assert info["n_vocab"] == 512 and info["context_length"] == info["trained_context_length"] == 256
    assert info["model_bytes"] == path.stat().st_size and info["kv_bytes"] == 64 * 4 * 64 * 2 * 2 * 2 * 64 * 2
    assert info["tokenizer_kind"] == "gguf-bpe" and info["max_seqs"] == 64 and info["vram_bytes"] == 0
    assert info["kv_positions"] == 64 * 256 and info["default_seqs"] == info["full_context_seqs"] == 64


BLOCK = 64 * 2 * 2 * 2 * 64 * 2  # bytes of 64 positions of the tiny model


def test_the_context_is_what_fits(path):
    with LLM(path, device="cpu", progress=False, kv_cache_bytes=3 * BLOCK - 1) as model:
        assert model.info.context_length == 128 and model.info.kv_bytes == 2 * BLOCK
        assert len(model.generate([[1] * 100], SamplingParams(ignore_eos=True))[0].token_ids) == 28
    # 7 blocks hold three sequences of 128 positions, and seven of 64
    with LLM(path, device="cpu", progress=False, kv_cache_bytes=7 * BLOCK, context_length=128, max_seqs=8) as model:
        info = model.info
        assert (info.kv_positions, info.full_context_seqs, info.default_seqs) == (7 * 64, 3, 3)
    with LLM(path, device="cpu", progress=False, context_length=70) as model:
        assert model.info.context_length == 70


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"kv_cache_bytes": BLOCK - 1}, InsufficientVram, f"one block of 64 positions needs {BLOCK}"),
        ({"kv_cache_bytes": BLOCK, "context_length": 100}, InsufficientVram, "a context of 100 positions needs"),
        ({"context_length": 257}, InvalidRequest, "past the 256 positions"),
        ({"context_length": 0}, InvalidRequest, "context_length must be"),
        ({"max_seqs": 0}, InvalidRequest, "max_seqs must be"),
        ({"vram_limit_bytes": 0}, InvalidRequest, "vram_limit_bytes must be"),
        ({"vram_limit_bytes": 1 << 30}, InvalidRequest, "is for a GPU"),
        ({"gpu_memory_utilization": 0}, InvalidRequest, "gpu_memory_utilization must be 0.01 to 1"),
        ({"gpu_memory_utilization": 1.01}, InvalidRequest, "gpu_memory_utilization must be 0.01 to 1"),
        ({"gpu_memory_utilization": 10**5000}, InvalidRequest, "not a number of more than 30 digits"),
        ({"gpu_memory_utilization": float("nan")}, InvalidRequest, "gpu_memory_utilization must be 0.01 to 1"),
        ({"gpu_memory_utilization": "0.5"}, InvalidRequest, "gpu_memory_utilization must be a number"),
        ({"gpu_memory_utilization": True}, InvalidRequest, "gpu_memory_utilization must be a number"),
        ({"trusted_models": "/nowhere/trusted.json"}, ModelLoadError, "/nowhere/trusted.json: cannot be read"),
        ({"max_seqs": 8, "max_batch_tokens": 7}, InvalidRequest, "max_batch_tokens must be"),
        ({"n_threads": -1}, InvalidRequest, "n_threads must be"),
        ({"device": "tpu"}, InvalidRequest, "device must be"),
        ({"expect_sha256": "12"}, InvalidRequest, "expect_sha256 must be"),
        ({"expect_sha256": "0" * 64}, ModelLoadError, "SHA-256 is "),
        ({"tokenizer": "/nowhere/tokenizer.json"}, ModelLoadError, "/nowhere/tokenizer.json"),
        ({"tokenizer": 5}, InvalidRequest, "tokenizer must be a path, not int"),
        ({"trusted_models": ["a"]}, InvalidRequest, "trusted_models must be a path, not list"),
        ({"tokenizer": "a\0b.json"}, InvalidRequest, "tokenizer holds a NUL"),
        ({"device": None}, InvalidRequest, "device must be auto, cpu or cuda:N, not NoneType"),
        ({"device": 0}, InvalidRequest, "device must be auto, cpu or cuda:N, not int"),
    ],
)
def test_bad_arguments(path, engines, arguments, error, text):
    with pytest.raises(error) as caught:
        LLM(path, **{"device": "cpu", "progress": False, **arguments})
    assert text in caught.value.message and "\n" not in caught.value.message
    if error is InsufficientVram:
        assert caught.value.fields["bytes_required"] > caught.value.fields["bytes_available"]
    assert all(e.closed for e in engines)


@pytest.mark.parametrize("model", [None, 5, ["m.gguf"], b"m\0.gguf", "\ud800"])
def test_a_model_is_a_path(engines, model):
    with pytest.raises(InvalidRequest) as caught:
        LLM(model, device="cpu")
    assert caught.value.fields["field"] == "model"


@pytest.mark.parametrize("kind", [str, Path, os.fsencode, np.str_, type("Name", (str,), {})])
def test_paths_may_begin_with_the_home(path, tmp_path, monkeypatch, kind):
    home = tmp_path / "home"
    home.mkdir()
    (home / "m.gguf").symlink_to(path)
    (home / "vocabulary.gguf").symlink_to(path)
    with ModelFile(path) as model_file:
        (home / "trusted.json").write_text(json.dumps(entry_of(model_file, "tiny", "")))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    files = {"tokenizer": kind("~/vocabulary.gguf"), "trusted_models": kind("~/trusted.json")}
    with LLM(kind("~/m.gguf"), device="cpu", progress=False, **files) as model:
        assert model.info.path == str(home / "m.gguf") and model.info.trusted_name == "tiny"
        assert model.tokenizer.path == str(home / "vocabulary.gguf")
    assert Tokenizer.from_file(kind("~/m.gguf")).n_vocab == 512
    with pytest.raises(InvalidRequest, match="tokenizer must be a path"):
        Tokenizer.from_file(None)


def test_a_job_that_fits_the_context_but_not_the_cache(goldens_dir, engines, monkeypatch):
    with LLM(
        goldens_dir / "llama-Q4_0.gguf", device="cpu", progress=False, context_length=256, kv_cache_bytes=4 * BLOCK
    ) as model:
        monkeypatch.setattr(model._scheduler.pools[0], "n_blocks", 3)
        with pytest.raises(VramOom, match="need 4 KV blocks"):
            model.generate([[1] * 200], SamplingParams(max_tokens=50))
        assert len(model.generate([[1]], SamplingParams(max_tokens=5, ignore_eos=True))[0].token_ids) == 5


def test_expected_digest(path):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    LLM(path, device="cpu", progress=False, expect_sha256=digest).close()


@pytest.mark.parametrize("arguments", [{}, {"check_tensors": False}, {"expect_sha256": "right"}])
def test_progress(path, arguments):
    if arguments.get("expect_sha256"):
        arguments = {"expect_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    seen = []
    LLM(path, device="cpu", progress=lambda done, total: seen.append((done, total)), **arguments).close()
    size = path.stat().st_size
    assert seen[0] == (0, size) and seen[-1] == (size, size) and seen == sorted(seen)


def test_a_progress_that_raises_ends_the_load(path, engines):
    def progress(done, total):
        if done == total:
            raise Cancelled("stop")

    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Cancelled):
        LLM(path, device="cpu", progress=progress)
    gc.collect()
    assert all(e.closed for e in engines) and len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("which", ["orcd-engine", "orcd-output"])
def test_no_thread_to_be_had(path, engines, monkeypatch, which):
    start = threading.Thread.start

    def failing(thread):
        if thread.name == which:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", failing)
    with pytest.raises(InternalError, match="no thread"):
        LLM(path, device="cpu", progress=False)
    assert engines[0].closed and not any(t.name.startswith("orcd-") for t in threading.enumerate())


def test_no_gpu_is_said_with_advice(path):
    if doctor.has_gpu():
        pytest.skip("there is a GPU")
    for device in ("auto", "cuda:0", "cuda"):
        with pytest.raises(CudaError, match='choose device "cpu"'):
            LLM(path, device=device, progress=False)


@pytest.mark.parametrize("kind", ["missing", "directory", "text"])
def test_what_is_no_model(tmp_path, engines, kind):
    where = tmp_path if kind == "directory" else tmp_path / "m.gguf"
    if kind == "text":
        where.write_text("hello")
    with pytest.raises(ModelLoadError) as caught:
        LLM(where, device="cpu", progress=False)
    assert str(where) in caught.value.message


def _set(**values):
    params = SamplingParams()
    for name, value in values.items():
        object.__setattr__(params, name, value)
    return params


def test_wrong_arguments_hurt_nobody_else(model, engines):
    """Whatever is wrong with a call is refused before another thread sees it."""
    engines[0].step_seconds = 0.002
    going = model.submit([1, 2], SamplingParams(max_tokens=150, seed=1, ignore_eos=True))
    wrong = [
        *(lambda d=d: model.submit([1], deadline=d) for d in ("a", float("nan"), [], True)),
        *(lambda j=j: model.submit([1], job_id=j) for j in (5, b"a", ["a"], "", "x" * 257)),
        *(
            lambda v=v: model.submit([1], _set(**v))
            for v in ({"max_tokens": "a"}, {"seed": 1.5}, {"stop": [1]}, {"logprobs": "x"}, {"temperature": None})
        ),
        *(lambda i=i: model.submit(i) for i in (np.array([1.5]), np.array([[1, 2]]), [2**70], [None], 5)),
        *(lambda r=r: model.submit_request(r) for r in (None, "text", {"prompt": "x"})),
        *(lambda s=s: model.submit([1], special=s) for s in (None, "a", 1, [])),
        *(lambda i=i, call=call: call(i) for i in (None, [], 5, np.array(1)) for call in (model.cancel, model.job)),
        lambda: model.submit([1], SamplingParams(max_tokens=10**5000)),
        *(lambda g=g: model.shutdown(g) for g in ("a", float("nan"), None)),
    ]
    for call in wrong:
        with pytest.raises(InvalidRequest):
            call()
    assert len(going.completion().token_ids) == 150 and model.error is None
    assert model.generate([[1]], SamplingParams(max_tokens=3))


@pytest.mark.parametrize("name", ["progress", "on_fatal", "on_plan"])
def test_what_is_called_must_be_callable(path, name):
    with pytest.raises(InvalidRequest, match=f"{name} must be callable, not int") as caught:
        LLM(path, device="cpu", **{"progress": False, name: 5})
    assert caught.value.fields["field"] == name


# -- ending


def test_close(path, engines):
    model = LLM(path, device="cpu", progress=False)
    engines[0].step_seconds = 0.005
    job = model.submit([1], SamplingParams(max_tokens=200, ignore_eos=True))
    model.close()
    model.close()
    assert engines[0].closed
    with pytest.raises(NotReady):
        job.completion()
    for call in (lambda: model.generate(["a"]), lambda: model.logits([1])):
        with pytest.raises(NotReady):
            call()
    assert model.cancel("x") == "unknown"


def test_shutdown_lets_running_jobs_end(path, engines):
    with LLM(path, device="cpu", progress=False) as model:
        engines[0].step_seconds = 0.002
        job = model.submit([1], SamplingParams(max_tokens=50, ignore_eos=True))
        model.shutdown(5)
        assert job.completion().finish_reason == "length"
        with pytest.raises(NotReady):
            model.submit([1])


def test_an_error_in_one_of_many_cancels_the_rest(path, engines):
    with LLM(path, device="cpu", progress=False, max_seqs=2) as model:
        engines[0].fail_with = ValueError("planted")
        with pytest.raises(WorkerError, match="planted"):
            model.generate([[1]] * 6, SamplingParams(max_tokens=200, ignore_eos=True))
        assert isinstance(_last_event(model.submit([1], SamplingParams(max_tokens=2))), Finished)


def _last_event(job):
    while not isinstance(event := job.next_event(5), Finished):
        assert event is not None
    return event


def test_a_forgotten_model_is_closed(path, engines):
    model = LLM(path, device="cpu", progress=False)
    model.generate(["a"], SamplingParams(max_tokens=3))
    del model
    gc.collect()
    assert engines[0].closed


def test_the_process_ends_while_a_model_is_open(path):
    script = f"""
        import sys, time
        sys.path.insert(0, {str(TESTS)!r})
        from helpers.fake_engine import FakeEngine
        from worker_orcd import LLM, SamplingParams
        from worker_orcd.runtime import devices
        devices.open_engine = lambda d, m, plan, config, **_: FakeEngine(config, plan.kv_groups, plan.n_vocab, 0.01)
        llm = LLM({str(path)!r}, device="cpu", progress=False)
        stream = llm.stream([1], SamplingParams(max_tokens=200, ignore_eos=True))
        next(stream)
        print("leaving", flush=True)
    """
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")
    assert time.monotonic() - began < 10
