"""A model file that changes while the CPU engine reads it: what was computed is void. Other names of it are nothing."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.cpu_engines import make_engine, rows, sampling
from helpers.synthetic_plan import every_op
from service.client import Worker

from worker_orcd import LLM, SamplingParams
from worker_orcd._ring import Control, TokenRing
from worker_orcd.errors import ModelLoadError, NotReady
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import plan

PARAMS = SamplingParams(max_tokens=40, seed=3, ignore_eos=True)
#: well before now: a change within the tick of the clock that made the file would not move its time
LONG_AGO = 1_700_000_000


@pytest.fixture
def path(goldens_dir, tmp_path):
    copy = tmp_path / "model.gguf"
    shutil.copy(goldens_dir / "llama-Q4_0.gguf", copy)
    os.utime(copy, (LONG_AGO, LONG_AGO))
    return copy


def overwrite(path) -> None:
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(4096))


def cut(path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def grow(path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


CHANGES = [(overwrite, "was written to"), (cut, "was cut from"), (grow, "was written to")]


@pytest.mark.parametrize(("change", "says"), CHANGES)
@pytest.mark.parametrize("call", ["generate", "logits"])
def test_a_changed_file_ends_the_model(path, change, says, call):
    told = []
    with LLM(path, device="cpu", progress=False, n_threads=2, on_fatal=told.append) as model:
        model.generate([[1, 2, 3]], PARAMS)
        change(path)
        with pytest.raises(ModelLoadError, match=says) as caught:
            model.generate([[1, 2, 3]], PARAMS) if call == "generate" else model.logits([1, 2, 3])
        assert str(path) in caught.value.message and caught.value.code == "MODEL_LOAD_FAILED"
        until = time.monotonic() + 5
        while not told:
            assert time.monotonic() < until
            time.sleep(0.002)
        assert told == [model.error] and isinstance(model.error, ModelLoadError)
        with pytest.raises(NotReady, match=says):
            model.submit([1])
        with pytest.raises(ModelLoadError):
            model.digest()


def engine_of(path):
    model_file = ModelFile(str(path))
    return make_engine(model_file, plan.build(model_file))


def run_paced(engine, n_steps, between=lambda n: None):
    """Tokens of a decode run that waits for its reader after each token, and what the run raised.

    `between` is called with the number of tokens before the next one is taken.
    """
    ring, raised = TokenRing(1), []

    def run() -> None:
        one = [np.array([n]) for n in (0, 7, 1, 0)]
        try:
            engine.decode(*one, n_steps, np.array([], np.int32), np.zeros(2, np.int32), ring, Control())
        except ModelLoadError as error:
            raised.append(error)
        ring.close()

    engine.set_slot(0, sampling(temperature=1.0, seed=5))
    thread = threading.Thread(target=run)
    thread.start()
    tokens = []
    while not (ring.closed and len(ring) == 0):
        between(len(tokens))
        tokens += [token for _, token in ring.pop(10)]
    thread.join()
    return tokens, raised


@pytest.mark.parametrize(("change", "says"), CHANGES)
def test_no_token_of_changed_weights_comes_out_of_a_run(path, change, says):
    engine = engine_of(path)
    good, raised = run_paced(engine, 60)
    assert len(good) == 60 and not raised

    tokens, raised = run_paced(engine, 60, lambda n: change(path) if n == 10 else None)
    # those that were computed before: one in the ring, one that waits for room in it
    assert 10 <= len(tokens) <= 12 and tokens == good[: len(tokens)]
    assert len(raised) == 1 and says in raised[0].message


@pytest.mark.parametrize("call", ["step", "forward"])
def test_what_one_step_gave_is_void(path, call):
    engine = engine_of(path)
    batch = rows((0, 0, [1, 2, 3]))
    getattr(engine, call)(batch)
    overwrite(path)
    with pytest.raises(ModelLoadError, match="was written to"):
        getattr(engine, call)(batch)


def test_a_change_that_was_undone_is_remembered(path):
    """Tools that copy in place set the time back when they are done."""
    engine = engine_of(path)
    _, raised = run_paced(engine, 60, lambda n: grow(path) if n == 10 else None)
    assert raised
    os.truncate(path, path.stat().st_size - 4)
    os.utime(path, (LONG_AGO, LONG_AGO))
    with pytest.raises(ModelLoadError, match="was written to while a step read it"):
        engine.step(rows((0, 0, [1])))


def test_every_part_of_a_model_is_watched(tmp_path):
    parts = []
    for i in range(3):
        part = tmp_path / f"{i}.gguf"
        part.write_bytes(b"x" * 100)
        os.utime(part, (LONG_AGO, LONG_AGO))
        fd = os.open(part, os.O_RDONLY)
        parts.append(SimpleNamespace(fileno=lambda fd=fd: fd, size=100, stat=os.fstat(fd), path=part))
    for i in range(3):
        model_file, the_plan = every_op()
        model_file.parts, model_file.path = parts, "m.gguf"
        engine = make_engine(model_file, the_plan)
        engine.step(rows((0, 0, [1])))
        os.utime(parts[i].path, (LONG_AGO + 1, LONG_AGO + 1))
        with pytest.raises(ModelLoadError, match=r"m\.gguf: was written to while a step read it"):
            engine.step(rows((0, 1, [1])))
        os.utime(parts[i].path, (LONG_AGO, LONG_AGO))
    for part in parts:
        os.close(part.fileno())


def rename(path) -> None:
    path.rename(path.with_name("moved.gguf"))


def replace(path) -> None:
    other = path.with_name("other.gguf")
    other.write_bytes(b"GGUF, another one")
    os.replace(other, path)


def link(path) -> None:
    os.link(path, f"{path}2")


@pytest.mark.parametrize("change", [rename, os.unlink, replace, link, lambda path: os.chmod(path, 0o400)])
def test_another_name_or_none_changes_nothing(path, change):
    with LLM(path, device="cpu", progress=False, n_threads=2) as model:
        before, logits = model.generate([[1, 2, 3]], PARAMS)[0].token_ids, model.logits([1, 2, 3])
        change(path)
        assert model.generate([[1, 2, 3]], PARAMS)[0].token_ids == before
        assert np.array_equal(model.logits([1, 2, 3]), logits)
        assert len(model.digest()) == 64 and model.error is None


def test_the_worker_goes_unhealthy_and_ends_with_70(path):
    worker = Worker(
        [sys.executable, "-m", "worker_orcd", "serve", "--device", "cpu", "--port", "0", "--model", str(path)]
    )
    try:
        assert worker.execute("hello", job_id="a", max_tokens=4).all()[-1][0] == "end"
        overwrite(path)
        name, data = worker.execute("hello", job_id="b", max_tokens=4).all()[-1]
        assert name == "error" and data["code"] == "MODEL_LOAD_FAILED" and "was written to" in data["message"]
        assert worker.process.wait(10) == 70
        assert worker.event("error")["code"] == "MODEL_LOAD_FAILED"
    finally:
        worker.kill()
