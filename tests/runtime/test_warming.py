"""A warm-up changes no result, leaves nothing behind, and fails as a load does."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from helpers.cpu_engines import make_engine
from helpers.gguf_forge import STR, tiny_llama
from helpers.synthetic_plan import every_op

from worker_orcd import LLM, SamplingParams
from worker_orcd._cpu import CpuEngine
from worker_orcd.errors import CudaError, ModelLoadError, NotReady, WorkerError
from worker_orcd.runtime import devices, warming
from worker_orcd.serving.pace import FIRST_PREFILL_TOKENS, MIN_PREFILL_TOKENS

MODELS = ["llama-Q4_0", "gpt-oss-MXFP4", "phi3-swa-Q8_0", "gpt2-Q8_0"]


def answers(llm):
    params = [
        SamplingParams(temperature=t, seed=n, max_tokens=12, repetition_penalty=1.3, logprobs=2)
        for n, t in enumerate((0.0, 1.0, 1.5))
    ]
    prompts = [[n + 1 for n in range(length)] for length in (1, 40, 70)]
    return llm.generate(prompts, params), llm.logits([1, 2, 3])


@pytest.mark.parametrize("name", MODELS)
def test_results_are_the_same_bits_with_and_without(name, goldens_dir):
    got = []
    for warm_up in (False, True):
        with LLM(goldens_dir / f"{name}.gguf", device="cpu", progress=False, max_seqs=3, warm_up=warm_up) as llm:
            assert (llm.warm_up_seconds > 0) == warm_up
            got.append(answers(llm))
    (cold, cold_logits), (warm, warm_logits) = got
    assert [(c.text, c.token_ids, c.finish_reason, c.logprobs) for c in cold] == [
        (w.text, w.token_ids, w.finish_reason, w.logprobs) for w in warm
    ]
    np.testing.assert_array_equal(cold_logits, warm_logits)


@pytest.mark.parametrize(
    "sizes", [{"context_length": 1}, {"context_length": 2}, {"max_seqs": 1, "max_batch_tokens": 1}]
)
def test_the_smallest_engines_are_warmed_too(sizes, goldens_dir):
    with LLM(goldens_dir / "llama-Q4_0.gguf", device="cpu", progress=False, warm_up=True, **sizes) as llm:
        assert llm.warm_up_seconds > 0
        if llm.info.context_length > 1:
            assert len(llm.generate([[1]], SamplingParams(max_tokens=1))) == 1


def test_no_thread_and_no_sequence_is_left(goldens_dir):
    before = threading.active_count()
    with LLM(goldens_dir / "llama-Q4_0.gguf", device="cpu", progress=False, warm_up=True, max_seqs=2) as llm:
        names = sorted(t.name for t in threading.enumerate() if t.name.startswith("orcd-"))
        assert names == ["orcd-deputy", "orcd-engine", "orcd-output"], names
        scheduler, engine = llm._scheduler, llm._running._loaded.engine
        assert not scheduler.running and scheduler.n_free_slots == 2
        assert (engine.block_tables == -1).all() and (engine.rope_tables == 0).all()
    assert threading.active_count() == before


def with_template(folder, template):
    path = folder / "model.gguf"
    path.write_bytes(tiny_llama().put("tokenizer.chat_template", STR, template).build())
    return path


def test_the_process_of_the_chat_template_is_there_before_the_first_chat(tmp_path):
    def process(llm):
        return llm.tokenizer._chat._process

    path = with_template(tmp_path, "{% for m in messages %}{{ m.content }}{% endfor %}")
    with LLM(path, device="cpu", progress=False) as llm:
        assert process(llm) is None
    with LLM(path, device="cpu", progress=False, warm_up=True) as llm:
        started = process(llm)
        assert started is not None and started.alive
        llm.chat([{"role": "user", "content": "a"}], SamplingParams(max_tokens=2))
        assert process(llm) is started


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% if %}", "{{ 1 // 0 }}"])
def test_a_template_that_refuses_or_breaks_is_no_failed_load(template, tmp_path):
    path = with_template(tmp_path, template)
    with LLM(path, device="cpu", progress=False, warm_up=True) as llm:
        assert len(llm.generate([[1]], SamplingParams(max_tokens=1))) == 1
        with pytest.raises(WorkerError):
            llm.chat([{"role": "user", "content": "hi"}])


def failing(error):
    """An `open_engine` whose engine fails at its second call."""
    open_engine = devices.open_engine

    class Fails:
        def __init__(self, engine):
            self.engine, self.calls, self.closed = engine, 0, False

        def __getattr__(self, name):
            return getattr(self.engine, name)

        def step(self, *args, **kwargs):
            self.calls += 1
            if self.calls == 2:
                raise error
            return self.engine.step(*args, **kwargs)

        def close(self):
            self.closed = True
            self.engine.close()

    made = []

    def make(*args, **kwargs):
        made.append(Fails(open_engine(*args, **kwargs)))
        return made[-1]

    return make, made


@pytest.mark.parametrize(
    "error", [CudaError("an illegal address", sticky=True), CudaError("no"), ModelLoadError("was written to", "m.gguf")]
)
def test_an_engine_that_fails_fails_the_load(error, goldens_dir, monkeypatch):
    make, made = failing(error)
    monkeypatch.setattr(devices, "open_engine", make)
    with pytest.raises(type(error)) as e:
        LLM(goldens_dir / "llama-Q4_0.gguf", device="cpu", progress=False, warm_up=True)
    assert e.value is error and made[0].closed
    assert not [t.name for t in threading.enumerate() if t.name.startswith("orcd-")]


def test_a_stop_ends_the_warm_up(goldens_dir, monkeypatch):
    """What `go_on` raises comes through, from each place where it is asked."""
    for n in range(1, 4):
        engine = make_engine(*every_op())
        asked = []

        def go_on(n=n, asked=asked):
            asked.append(1)
            if len(asked) == n:
                raise NotReady("the load was interrupted")

        with pytest.raises(NotReady):
            while True:
                warming._steps(engine, 192, go_on)
        engine.close()


def test_a_model_whose_numbers_are_none_loads_all_the_same(goldens_dir, monkeypatch):
    """The tokens of a warm-up are nobody's: what they lead to is no reason to refuse a model."""

    class Nan(CpuEngine):
        def step(self, batch, want_logits=False, control=None):
            sampled, logits = super().step(batch, want_logits, control)
            return np.full_like(sampled, -1), logits

    monkeypatch.setattr("worker_orcd._cpu.CpuEngine", Nan)
    LLM(goldens_dir / "llama-Q4_0.gguf", device="cpu", progress=False, warm_up=True).close()


def test_steps_begin_as_long_as_the_device_is_fast(goldens_dir, monkeypatch):
    class Slow(CpuEngine):
        def step(self, batch, want_logits=False, control=None):
            time.sleep(0.3)
            return super().step(batch, want_logits, control)

    def first(**options):
        with LLM(goldens_dir / "llama-Q4_0.gguf", device="cpu", progress=False, **options) as llm:
            return llm._scheduler.pace.prompt_tokens(0)

    assert first() == FIRST_PREFILL_TOKENS
    monkeypatch.setattr("worker_orcd._cpu.CpuEngine", Slow)
    assert first(warm_up=True) == MIN_PREFILL_TOKENS
