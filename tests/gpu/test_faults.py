"""What goes wrong around a GPU: calls that fail, kernels that fault, devices and kernel images that are not there.

Whatever it is: one clear error with its code, everything freed, the process alive - except after a fault that poisons
the CUDA context, which ends every job and a serving process with exit code 70.
"""

from __future__ import annotations

import base64
import gc
import json
import sys
import time
import zlib
from pathlib import Path

import limits
import pytest
from gpu.scripts import run_cli, run_script
from service.client import Worker
from service.test_app import App

import worker_orcd
from worker_orcd import LLM, SamplingParams, _driver
from worker_orcd.errors import CudaError

pytestmark = [pytest.mark.slow_gpu, pytest.mark.timeout(300)]
MODEL = "qwen2-Q4_K_M.gguf"
#: seconds of the sweep over failing calls; it leaves calls out to stay within
SWEEP_SECONDS = 60
#: a fatbin of an empty kernel for compute capability 7.5, which no supported GPU is; deflated
OTHER_IMAGE = zlib.decompress(
    base64.b64decode(
        "eNrtVr1v00AUf46d1P0ibRmoBIMHkFqpdVsa0jKRfgCqypcq6Jq6iVtHJLZlX6oGIeECI38AExMDIwMDYkCwMDP2D+hQISExMgDh"
        "7nxOLmeHCoGAgSdd3r3fvd+9d1/PufHx1isJhsDqByopkKQC1mPMjkQFCVY5exiS5d7FK5dSkrSgQjTfa8xsS9DHOj2hUlYhU4B5"
        "kKEAx4in7ls+8pCxiXuRbtQ4XfQtu7wLuu0gU7d3dHS7Ym85bbtUZ/aOHnaQuYvIqFWxt1twB+BbhmeWO6CSY/vIsNF0G/XMapeR"
        "srlZ3y5ueUbNDN1EwOhEyCxGtbrtGa5FLddzkIMabjhGZjBKqOLY/8Z2dF/4n96OKER3GcdNhnQMP0/xTAxfo/hgDH9C8YEY/oLi"
        "Sgw/oHhvPCGJ4H0xOIvxkaF23IDpJpbTXJ8IjneX6OzAXhCMgdrcC8ZU2g19cl32IppTUaKfcALlS7N5gY2RFT7C7T1+j9fWV5ZX"
        "FrQlx3Pxu22lT59qHrcNArho1/BhqV42tJJTcytVg5yMhhyn6k9o+KxMwze1mVl9ekJbJ0qfn4fFeqVa1kqYVKSQR36nQr7p6bP5"
        "3Nnc3EyuOA2ThleyNL9WnDunTda0fE4LcyT15FAWc1yF+2RpUyodp8scDvt03SNcP6/QtShzCuXIJ5sgF7F9SsHVr73fRH9j+ivT"
        "eLuaPlf6zkA6v9yqb9CK8V/+vqTu4FMmzy2L27ssXG20XoMMH7JwGduf6Kt6IMObLIw2OPJvsH9VJFpH4lLg6oboz0t/F/515nji"
        "CP5xdqdFsRi4L9z76O6PcvVRSsqfJeXCj+OPt/8adKTxnPGfCv5KQp3vSZj6JnPUmJ3uwl9JThMQc4xqs9yFv8H4BQF/LMQn/MEE"
        "/kGYeCz+ywQ+H1/lNrQ/gb/PHIdA/F/Xqd/i1svdt0gOBb7MYke8CH/INn5R4H9m/A3uVJLWv8b44pc6yHR+0+QwthIIfhl2tkFf"
        "8vt6JmiVu4dpLk9R1JSgBd7PxvsOQDhbbA=="
    )
)


@pytest.fixture(scope="module")
def swept(goldens_dir, gpu):
    result = run_script("sweep", goldens_dir / MODEL, gpu, SWEEP_SECONDS, WORKER_ORCD_FAULTS="1")
    print(json.dumps(result, indent=1))
    return result


def test_f1_every_failing_call_is_one_clean_error(swept):
    print(
        f"{swept['tried']} of {swept['n_calls']} calls of load, generation and close made to fail: "
        f"{sum(swept['calls'].values())} CUDA errors in {len(swept['calls'])} different calls"
    )
    assert swept["problems"] == []
    assert sum(swept["calls"].values()) >= 0.9 * swept["tried"] > 10 and "None" not in swept["calls"]
    assert swept["threads"] == []


def test_f1_memory_is_back_after_the_failing_calls(swept):
    print(
        f"{swept['lost']:,} bytes missing after {swept['tried']} failures and a whole run "
        f"(limit {limits.FAULT_SWEEP_BYTES:,}); "
        f"at most {swept['most']:,} right after one"
    )
    assert swept["lost"] <= limits.FAULT_SWEEP_BYTES


def test_f1_an_engine_goes_on_after_a_generation_failed(swept):
    print(f"{swept['refused']} of {swept['n_generate']} failing calls of a generation refused it; all next ones right")
    assert 0 < swept["refused"] <= swept["n_generate"]


def test_f2_a_poisoned_context_ends_every_job(goldens_dir, gpu):
    result = run_script("poison", goldens_dir / MODEL, gpu)
    print(result)
    assert result["hanging"] == 0 and len(result["ends"]) == 8 and result["jobs_before"] >= 8
    assert set(result["ends"]) <= {"CUDA_ERROR sticky", "NOT_READY"} and "CUDA_ERROR sticky" in result["ends"]
    assert result["fatal"] == ["CUDA_ERROR"] and result["refused"] == "NOT_READY"
    assert result["residency"] in ("CUDA_ERROR", "[]"), "answered or refused, as the driver likes"
    assert result["seconds"] < 5


def serve(model: Path, gpu: int, *args: object, wait: bool = True) -> Worker:
    return Worker(
        [
            sys.executable,
            "-m",
            "worker_orcd",
            "serve",
            "--model",
            str(model),
            "--device",
            f"cuda:{gpu}",
            "--port",
            "0",
            "--log-format",
            "json",
            *map(str, args),
        ],
        wait,
        timeout=90,
    )


def test_f2_a_server_whose_context_is_lost_ends_with_70(goldens_dir, gpu, monkeypatch):
    """The 60th graph launch, and with it every later call, says that the context is lost."""
    monkeypatch.setenv("WORKER_ORCD_FAULTS", "1")
    monkeypatch.setenv("WORKER_ORCD_FAIL_CALL", "cuGraphLaunch:60:700")
    worker = serve(goldens_dir / MODEL, gpu, "--max-seqs", 4)
    try:
        streams = [worker.execute("a b c", job_id=f"j{i}", max_tokens=200, seed=i) for i in range(4)]
        ends = [stream.all()[-1] for stream in streams]
        began = time.monotonic()
        try:
            status, health = worker.json("GET", "/health")
            assert status == 503 and health["status"] == "unhealthy"
        except OSError:
            pass  # gone already
        assert worker.process.wait(10) == 70
        print(f"exit {time.monotonic() - began:.2f} s after the last stream; ends {[e[1].get('code') for e in ends]}")
    finally:
        worker.kill()
    assert any(name == "error" and data["code"] == "CUDA_ERROR" for name, data in ends)
    assert all(name == "end" or data["code"] == "CUDA_ERROR" for name, data in ends)
    errors = worker.events("error")
    assert any(e["code"] == "CUDA_ERROR" and e["call"] == "cuGraphLaunch" for e in errors)


def test_a_healthy_server_checks_hashes_and_stops(goldens_dir, gpu):
    worker = serve(goldens_dir / MODEL, gpu, "--residency-check-sec", 0.2)
    try:
        plan = worker.event("vram_plan")
        assert plan["bytes_required"] < plan["bytes_free"]
        worker.event("provenance")
        end = time.monotonic() + 10
        while len(worker.events("residency_check")) < 3 and time.monotonic() < end:
            time.sleep(0.05)
        checks = worker.events("residency_check")
        assert len(checks) >= 3 and all(e["resident"] for e in checks)
        print(f"a residency check takes {1e3 * max(e['seconds'] for e in checks):.2f} ms")
        health = worker.json("GET", "/health")[1]
        assert health["resident"] and health["sm"].startswith("sm_") and len(health["sha256"]) == 64
        assert health["vram_bytes_used"] == plan["weights_bytes"] + plan["kv_bytes"] + plan["workspace_bytes"]
        events = worker.execute("a b c", job_id="j", max_tokens=20).all()
        assert events[-1][0] == "end"
        assert worker.stop()[0] == 0
    finally:
        worker.kill()


@pytest.mark.parametrize("seconds", [0.2, 0.4, 0.7, 1.0, 1.5, 2.5])
def test_f4_a_server_told_to_stop_while_it_loads(seconds, goldens_dir, gpu):
    gc.collect()
    with _driver.Context(gpu) as context:
        before = context.memory()[0]
        worker = serve(goldens_dir / MODEL, gpu, wait=False)
        try:
            time.sleep(seconds)
            code, took = worker.stop()
        finally:
            worker.kill()
        print(f"after {seconds} s, last event {worker.log[-1]['event']}: exit {code} in {took:.2f} s")
        assert code == 0 and took < 5
        assert not worker.events("error")
        assert context.memory()[0] >= before - (2 << 20)


def test_managed_memory_turns_health_unhealthy(goldens_dir, gpu):
    planted = []

    def load(config, progress, on_fatal, on_plan):
        llm = LLM(config.model, device=config.device, max_seqs=2, progress=False, on_fatal=on_fatal, on_plan=on_plan)
        planted.append(llm._loop._engine.context)
        return llm

    app = App(load, model=str(goldens_dir / MODEL), device=f"cuda:{gpu}", residency_check_sec=0.1)
    app.service.start()
    end = time.monotonic() + 60
    while app.service.state == "loading" and time.monotonic() < end:
        time.sleep(0.01)
    try:
        assert app.client.simulate_get("/health").json["resident"] is True
        managed = _driver.DeviceMemory(planted[0], 1 << 16, "planted", True)
        end = time.monotonic() + 10
        while app.service.state == "ready" and time.monotonic() < end:
            time.sleep(0.01)
        health = app.client.simulate_get("/health")
        assert health.status_code == 503 and health.json["status"] == "unhealthy" and not health.json["resident"]
        managed.close()
    finally:
        app.service.stop(0)
    failed = [e for e in app.log if e["event"] == "residency_check" and e["level"] == "error"]
    assert len(failed) == 1 and "planted" in failed[0]["faults"][0]


@pytest.mark.parametrize("command", ["generate", "bench", "serve"])
def test_a_gpu_that_is_not_there(command, goldens_dir):
    args = ["--prompt", "a"] if command == "generate" else []
    done = run_cli(command, "--model", goldens_dir / MODEL, "--device", "cuda:99", *args)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "CUDA_ERROR" in done.stderr and "99" in done.stderr


def test_no_kernel_image_for_the_gpu(goldens_dir, gpu, tmp_path, monkeypatch):
    installed = Path(worker_orcd.__file__).parent / "fatbins"
    (tmp_path / "fatbins").mkdir()
    for image in installed.glob("*.fatbin"):
        (tmp_path / "fatbins" / image.name).write_bytes(OTHER_IMAGE)
    gc.collect()
    with _driver.Context(gpu) as context:
        before = context.memory()[0]
        monkeypatch.setattr(_driver, "__file__", str(tmp_path / "_driver.so"))
        major, minor = context.capability
        with pytest.raises(CudaError, match=rf"no code for compute capability {major}\.{minor}") as e:
            LLM(str(goldens_dir / MODEL), device=f"cuda:{gpu}", progress=False)
        print(e.value.message)
        assert "WORKER_ORCD_CUDA_ARCHS" in e.value.message and not e.value.sticky
        del e
        gc.collect()
        assert context.memory()[0] >= before - (2 << 20)
        monkeypatch.undo()
        with LLM(str(goldens_dir / MODEL), device=f"cuda:{gpu}", progress=False) as llm:
            assert llm.generate([[1, 2]], SamplingParams(max_tokens=2))


def test_the_wrong_digest_is_refused_before_anything_is_loaded(goldens_dir, gpu):
    done = run_cli(
        "generate",
        "--model",
        goldens_dir / MODEL,
        "--device",
        f"cuda:{gpu}",
        "--prompt",
        "a",
        "--expect-sha256",
        "0" * 64,
    )
    assert done.returncode == 1 and "MODEL_LOAD_FAILED" in done.stderr and "0" * 64 in done.stderr
