"""Running: what is open is freed once, whatever of it there is and whoever closes it."""

from __future__ import annotations

import threading
import time

import pytest

from worker_orcd import LLM, SamplingParams
from worker_orcd.errors import CudaError, NotReady, WorkerError
from worker_orcd.runtime import loading, running
from worker_orcd.runtime.running import Running
from worker_orcd.serving.deputy import Deputy

OPTIONS = loading.LoadOptions(
    "cpu",
    None,
    None,
    None,
    None,
    0,
    None,
    True,
    False,
    None,
    None,
    None,
    gpu_memory_utilization=0.9,
    chunk_bytes=1 << 20,
    on_plan=None,
)


@pytest.fixture
def path(goldens_dir):
    return goldens_dir / "llama-Q4_0.gguf"


def names() -> list[str]:
    return sorted(t.name for t in threading.enumerate() if t.name.startswith("orcd-"))


def test_open_and_close(path, engines):
    it = Running()
    it.close()
    with pytest.raises(NotReady):
        it.parts()
    it.open(path, OPTIONS, 4, None, Deputy())
    loaded, loop = it.parts()
    assert loaded.engine is engines[0] and names() == ["orcd-engine", "orcd-output"] and not it.in_own_thread()
    it.close()
    it.close()
    assert engines[0].closed and not names() and loop.close()
    with pytest.raises(NotReady):
        it.parts()


def test_a_loop_that_cannot_be_made_leaves_a_model_to_free(path, engines, monkeypatch):
    def none(*_, **__):
        raise ValueError("planted")

    monkeypatch.setattr(running, "EngineLoop", none)
    it = Running()
    with pytest.raises(ValueError, match="planted"):
        it.open(path, OPTIONS, 4, None, Deputy())
    assert not engines[0].closed
    it.close()
    assert engines[0].closed
    with pytest.raises(ValueError, match="planted"):
        LLM(path, device="cpu", progress=False)
    assert engines[1].closed and not names()


def test_giving_up_ends_a_load(path, engines):
    it = Running()
    it.give_up()
    with pytest.raises(NotReady, match="interrupted"):
        it.open(path, OPTIONS, 4, None, Deputy())
    it.close()
    assert all(e.closed for e in engines) and not names()


def test_a_model_may_be_closed_by_who_is_told_that_it_died(path, engines):
    told: list[WorkerError] = []

    def on_fatal(error: WorkerError) -> None:
        model.close()
        told.append(error)

    model = LLM(path, device="cpu", progress=False, on_fatal=on_fatal)
    engines[0].fail_with = CudaError("an illegal address", call="cuLaunchKernel", sticky=True)
    job = model.submit([1], SamplingParams(max_tokens=3))
    with pytest.raises(CudaError):
        job.completion()
    until = time.monotonic() + 5
    while not told or names():
        assert time.monotonic() < until
        time.sleep(0.005)
    assert engines[0].closed
    model.close()


def test_two_threads_close_at_once(path, engines):
    model = LLM(path, device="cpu", progress=False)
    threads = [threading.Thread(target=model.close) for _ in range(4)]
    for thread in threads:
        thread.start()
    model.close()
    assert engines[0].closed
    for thread in threads:
        thread.join(5)
    assert not names()
