"""`bench --kernels` on the stand-in driver, where every launch does nothing and every time is one millisecond: what is
measured, that it adds up to a step, and that nothing is left."""

from __future__ import annotations

import ctypes
import json
import math
from pathlib import Path

import numpy as np
import pytest
from fake_driver.cases import NOTHING, leftovers
from fake_driver.launch_record import recorded

import worker_orcd
from worker_orcd import SamplingParams, _driver
from worker_orcd.cuda import lowering
from worker_orcd.diagnose import bench_kernels, cublas
from worker_orcd.diagnose.bench import Bench
from worker_orcd.errors import CudaError, InsufficientVram, InternalError, InvalidRequest
from worker_orcd.models import ops
from worker_orcd.runtime import devices

pytestmark = pytest.mark.skipif(
    not (Path(worker_orcd.__file__).parent / "fatbins" / "manifest.json").exists(),
    reason="no kernel images are installed",
)
MODELS = ["llama-Q4_K_M", "phi3-swa-Q8_0", "gpt2-Q8_0", "qwen2-Q4_K_M", "gpt-oss-MXFP4"]


class FakeCublas:
    """The calls of cuBLAS that are used; `shapes` of its products; each name in `fails` fails."""

    def __init__(self, *fails: str) -> None:
        self.fails, self.shapes, self.handles = fails, [], 0

    def __getattr__(self, name):
        assert name in ("cublasCreate_v2", "cublasDestroy_v2", "cublasSetStream_v2", "cublasSetWorkspace_v2",
                        "cublasGetVersion_v2", "cublasGemmEx")  # fmt: skip

        def call(*args):
            if name in self.fails:
                return 15
            if name == "cublasCreate_v2":
                self.handles += 1
                args[0]._obj.value = 77
            elif name == "cublasDestroy_v2":
                self.handles -= 1
            elif name == "cublasGetVersion_v2":
                args[1]._obj.value = 130102
            elif name == "cublasGemmEx":
                self.product(*args)
            return 0

        return call

    def product(self, handle, a_op, b_op, m, n, k, alpha, a, a_type, lda, b, b_type, ldb, beta, c, c_type, ldc, *rest):
        assert handle.value == 77 and (a_op, b_op) == (1, 0) and (lda, ldb, ldc) == (k, k, m)
        assert (a_type, b_type, c_type) == (14, 14, 0) and rest == (68, -1)
        for address, size in ((a, 2 * m * k), (b, 2 * n * k), (c, 4 * n * m)):  # all of it is device memory
            ctypes.string_at(address.value + size - 1, 1)
        self.shapes.append((n, m, k))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(bench_kernels, "EVICT_BYTES", 4096)
    monkeypatch.setattr(bench_kernels, "REPLAYS", 2)
    monkeypatch.setenv("FAKE_CUDA_DELAY_US", "0")
    yield
    _driver._fail_nth(0)


@pytest.fixture
def no_cublas(monkeypatch):
    def load():
        raise cublas.CublasError("cuBLAS is not installed")

    monkeypatch.setattr(cublas, "load", load)


def bytes_read(plan, regions, batch):
    """Weight bytes of a step by its ops: all of them once, less rows and experts that are not looked at."""
    total = 0.0
    for op in plan.ops:
        share = 1.0
        if isinstance(op, ops.ExpertMatMul):
            share = 1 - (1 - op.n_used / op.n_expert) ** batch
        elif isinstance(op, ops.Embed):
            share = batch / plan.n_vocab
        for name in vars(op).values():
            if isinstance(name, str) and name in plan.weights:
                rows = batch / plan.weights[name].shape[1] if isinstance(op, ops.Embed) else share
                total += min(1.0, rows) * regions[name].nbytes
    return total


def test_kinds_of_one_launch_are_recorded_several_times_over(goldens_dir, monkeypatch, no_cublas):
    """Where they read so little, or so much, that the cache does not help: the start of a graph must not count."""
    monkeypatch.setattr(bench_kernels, "LARGE_BYTES", 100_000)
    seen = set()
    with Bench(str(goldens_dir / "qwen2-Q4_K_M.gguf"), "cuda:0", 48, 1) as bench:
        for kind in bench_kernels.measure(bench, (1,), 48, 1000.0).steps[0].kinds:
            n_bytes = kind.weight_bytes + kind.kv_bytes
            least = 16 if n_bytes <= 65536 else 4 if n_bytes >= 100_000 else 1
            assert math.isclose(kind.us, 1000 / (kind.launches * max(1, -(-least // kind.launches))))
            seen.add(least)
    assert {16, 4} <= seen


@pytest.mark.parametrize("how", lowering.LOWERINGS)
@pytest.mark.parametrize("name", MODELS)
def test_kinds_are_the_launches_of_a_step(name, how, goldens_dir, monkeypatch, no_cublas):
    """Each launch once, each weight once, as the engine's own graph has them."""
    monkeypatch.setenv("WORKER_ORCD_LOWERING", how)
    with Bench(str(goldens_dir / f"{name}.gguf"), "cuda:0", 48, 12) as bench:
        report = bench_kernels.measure(bench, (3, 12, 3), 48, 1000.0)
        plan, regions = bench.plan, bench.engine.memory.weights.tensors
        assert [step.batch for step in report.steps] == [1, 3, 12]
        assert (report.lowering, report.cublas, report.cublas_absent) == (how, None, "cuBLAS is not installed")
        for step in report.steps:
            parts = bench.decode_parts(step.batch, 5, 1)
            assert step.position == 24 and step.launches == len(parts.launches) == sum(k.launches for k in step.kinds)
            found = sum(kind.launches * kind.weight_bytes for kind in step.kinds)
            assert math.isclose(found, bytes_read(plan, regions, step.batch), rel_tol=1e-3), step.batch
            # what a stand-in's millisecond makes of a graph
            for kind in step.kinds:
                n_bytes = kind.weight_bytes + kind.kv_bytes
                again = -(-16 // kind.launches) if kind.launches < 16 and n_bytes <= 65536 else 1
                assert math.isclose(kind.us, 1000 / (kind.launches * again)) and kind.cublas_us is None
                assert (kind.gb_per_s is None) == (n_bytes == 0)
                if n_bytes:
                    assert math.isclose(kind.gb_per_s, 1e-3 * n_bytes / kind.us)
                    assert math.isclose(kind.percent_of_copy, kind.gb_per_s / 10)
            assert math.isclose(step.us, 1000 / 24) and math.isclose(step.us - step.kinds_us, step.between_us)
            attention = [kind for kind in step.kinds if kind.kernel.startswith("attention_decode")]
            heads = 4 * plan.n_head_kv * plan.head_dim
            windows = [min(25, group.window) if group.window else 25 for group in plan.kv_groups]
            assert sum(kind.launches for kind in attention) == plan.n_layer
            assert {kind.kv_bytes for kind in attention} == {step.batch * heads * n for n in windows}
            assert step.kinds[-1].ops == ("sample",) and step.kinds[0].ops == ("embed",)
        names = {op for step in report.steps for kind in step.kinds for op in kind.ops}
        assert names == {bench_kernels._short(op.name) for op in plan.ops} | {"sample"}
        text = bench_kernels.as_text(report)
        assert "no cuBLAS (cuBLAS is not installed)" in text and "cuBLAS us" not in text
        assert text.count("between them") == text.count("the step ") == 3 and max(map(len, text.splitlines())) < 200
    assert leftovers() == NOTHING


@pytest.mark.parametrize("name", MODELS)
def test_kinds_of_a_prompt_are_the_launches_of_its_step(name, goldens_dir, monkeypatch, no_cublas):
    """Each launch once, and every product of a matrix and every visible key counted once."""
    monkeypatch.setattr(devices, "default_batch_tokens", lambda device, max_batch: 44)
    with Bench(str(goldens_dir / f"{name}.gguf"), "cuda:0", 48, 2) as bench:
        report = bench_kernels.measure(bench, (), 48, 1000.0, prompts=(40, 48, 40))
        plan = bench.plan
        assert [(step.batch, step.n_prompt) for step in report.steps] == [(1, 0), (1, 40), (1, 44)]
        step = report.steps[1]
        with recorded() as launched:
            parts = bench.prompt_parts(40)
            parts.graph(range(len(parts.launches))).close()
        assert [launch.kernel for launch in launched if launch.captured] == [launch.kernel for launch in parts.launches]
        assert step.launches == len(parts.launches) == sum(kind.launches for kind in step.kinds)
    attention = sum(
        4 * op.n_head * op.head_dim * min(i + 1, op.window or 40)
        for op in plan.ops if isinstance(op, ops.Attention) for i in range(40)
    )  # fmt: skip
    products = 0
    for op in plan.ops:
        if isinstance(op, ops.MatMul | ops.ExpertMatMul):
            k, n_out = plan.weights[op.weight].shape[:2]
            rows = 1 if plan.buffers[op.out.buf].rows == "outputs" else 40
            products += 2 * k * n_out * rows * (op.n_used if isinstance(op, ops.ExpertMatMul) else 1)
    found = sum(1e6 * kind.tflops * kind.us * kind.launches for kind in step.kinds if kind.tflops is not None)
    assert math.isclose(found, attention + products, rel_tol=1e-9)
    assert {kind.kernel.split("_")[0] for kind in step.kinds if kind.tflops is None}.isdisjoint({"wgmma", "matmul"})
    text = bench_kernels.as_text(report)
    assert "prompt of 40\n" in text and "decode of 1 at position 24\n" in text and "TFLOP/s" in text
    assert leftovers() == NOTHING


def test_parts_of_a_prompt_that_no_step_takes_are_refused(goldens_dir):
    with Bench(str(goldens_dir / "llama-Q4_0.gguf"), "cuda:0", 48, 3) as bench:
        bench.engine.set_slot(0, SamplingParams(temperature=0.0, seed=1))
        for tokens in ([], [0] * (bench.engine.config.max_batch_tokens + 1), [-1], [bench.plan.n_vocab]):
            with pytest.raises(InvalidRequest):
                bench.engine.prompt_parts(np.array(tokens, np.int32))


def test_graphs_launch_what_the_step_does(goldens_dir):
    """Of a batch that is padded, with all parameters and dependencies; and the engine goes on afterwards."""
    with Bench(str(goldens_dir / "llama-Q4_K_M.gguf"), "cuda:0", 48, 5) as bench:
        with recorded() as whole:
            parts = bench.decode_parts(5, 7, 4)
            step = parts.graph(range(len(parts.launches)))
        assert [launch.kernel for launch in whole if launch.captured] == [launch.kernel for launch in parts.launches]
        chosen = [i for i, launch in enumerate(parts.launches) if launch.kernel.startswith("decode_")][2:6]
        with recorded() as some:
            graph = parts.graph(chosen * 2)
        assert all(launch.pdl and launch.captured for launch in some)
        assert [launch.fields for launch in some] == 2 * [whole[i].fields for i in chosen]
        assert [launch.grid for launch in some] == 2 * [parts.launches[i].grid for i in chosen]
        assert graph.n_nodes == 8 and whole[0].fields["index"]
        assert {launch.fields["n_rows"] for launch in some} == {6}
        with pytest.raises(InternalError, match="no launch 99999"):
            parts.graph([0, 99999])
        stream = bench.engine.context.stream()
        for _ in range(3):
            step.launch(stream)
        stream.synchronize()
        parts.reset()
        seconds, fed = bench.decode(8, 5)  # counts its own steps
        assert seconds > 0 and fed.shape == (8, 5)
        for closed in (step, graph, stream):
            closed.close()
    assert leftovers() == NOTHING


def test_products_stand_beside_cublas(goldens_dir, monkeypatch):
    fake = FakeCublas()
    monkeypatch.setattr(cublas, "load", lambda: fake)
    with Bench(str(goldens_dir / "llama-Q4_K_M.gguf"), "cuda:0", 48, 12) as bench:
        report = bench_kernels.measure(bench, (12,), 48, 1000.0)
        weights = bench.plan.weights
    assert report.cublas == "13.1.2" and report.cublas_absent is None and fake.handles == 0
    shapes = set()
    for step in report.steps:
        for kind in step.kinds:
            is_product = kind.kernel.startswith(("decode_", "matvec_", "wgmma_"))
            assert (kind.cublas_us is not None) == is_product
            if is_product:
                assert math.isclose(kind.cublas_us, 1000 / 32)
                names = [f"{layer}{op}.weight" for op in kind.ops for layer in ("", "blk.0.")]
                matrices = [weights[name].shape for name in names if name in weights and len(weights[name].shape) == 2]
                if matrices:  # the output matrix may be the embedding's
                    shapes.add((step.batch, sum(shape[1] for shape in matrices), matrices[0][0]))
    assert len(shapes) >= 6 and shapes <= set(fake.shapes)
    assert "cuBLAS us" in bench_kernels.as_text(report) and "cuBLAS 13.1.2" in bench_kernels.as_text(report)
    assert leftovers() == NOTHING


@pytest.mark.parametrize("fails", ["cublasCreate_v2", "cublasSetWorkspace_v2", "cublasGetVersion_v2", "cublasGemmEx"])
def test_cublas_that_fails_is_left_out_and_told(fails, goldens_dir, monkeypatch):
    fake = FakeCublas(fails)
    monkeypatch.setattr(cublas, "load", lambda: fake)
    with Bench(str(goldens_dir / "llama-Q4_0.gguf"), "cuda:0", 48, 1) as bench:
        report = bench_kernels.measure(bench, (), 48, 1000.0)
    assert report.cublas_absent == f"{fails} failed: status 15" and fake.handles == 0
    assert all(kind.cublas_us is None for kind in report.steps[0].kinds)
    assert f"({fails} failed: status 15)" in bench_kernels.as_text(report)
    assert leftovers() == NOTHING


def test_any_call_may_fail_and_nothing_is_left(goldens_dir, no_cublas):
    n, refused = 1, 0
    while True:
        with Bench(str(goldens_dir / "llama-Q4_0.gguf"), "cuda:0", 48, 1) as bench:
            _driver._fail_nth(n)
            try:
                bench_kernels.measure(bench, (), 48, 1000.0)
            except CudaError as e:
                refused += 1
                assert e.fields["call"].startswith("cu")
            unused = _driver._fail_nth(0)
        assert leftovers() == NOTHING, f"call {n}"
        if unused:
            break
        n += 1 if n < 20 else n // 3
    assert refused > 20


def test_where_there_is_no_room_to_empty_the_cache(goldens_dir, monkeypatch, no_cublas):
    monkeypatch.setattr(bench_kernels, "EVICT_BYTES", 1 << 40)
    with Bench(str(goldens_dir / "llama-Q4_0.gguf"), "cuda:0", 48, 1) as bench, pytest.raises(InsufficientVram):
        bench_kernels.measure(bench, (), 48, 1000.0)
    assert leftovers() == NOTHING


def test_parts_of_rows_that_no_step_can_have_are_refused(goldens_dir):
    with Bench(str(goldens_dir / "llama-Q4_0.gguf"), "cuda:0", 48, 3) as bench:
        one = np.zeros(1, np.int32)
        bad = (([0, 0], 1, 1), ([3], 1, 1), ([0], 48, 1), ([0], 40, 9), ([0], 1, 0), ([], 1, 1))
        for slots, position, n_steps in bad:
            at = np.full(len(slots), position, np.int32)
            with pytest.raises(InvalidRequest):
                bench.engine.decode_parts(np.array(slots, np.int32), np.zeros(len(slots), np.int32), at, n_steps)
        bench.engine.set_slot(0, SamplingParams(seed=1))
        with pytest.raises(InvalidRequest, match="greedy"):
            bench.engine.decode_parts(one, one, one, 1)
        bench.engine.set_slot(0, SamplingParams(temperature=0.0, seed=1))
        bench.engine.block_tables[:, 0, 0] = -1
        with pytest.raises(InternalError, match="has no KV block"):
            bench.engine.decode_parts(one, one, one, 1)


def test_the_command_tells_and_writes_it(goldens_dir, call, no_cublas):
    args = ["bench", "--model", str(goldens_dir / "llama-Q4_K_M.gguf"), "--device", "cuda:0", "-p", "", "-n", "32",
            "--batch", "2", "--repeat", "1", "--kernels"]  # fmt: skip
    code, out, err = call(*args, "--json")
    assert code == 0, err
    steps = json.loads(out)["kernels"]["steps"]
    assert [(step["batch"], step["n_prompt"]) for step in steps] == [(1, 0), (2, 0)] and len(steps[0]["kinds"]) > 6
    assert {"kernel", "ops", "launches", "grid", "us", "percent_of_copy"} < set(steps[0]["kinds"][0])
    code, out, err = call(*args)
    assert code == 0 and "decode of 2 at position 16" in out and "attn_norm attn_q attn_k" in out
    code, out, _ = call(*[arg for arg in args if arg != "--kernels"], "--json")
    assert code == 0 and json.loads(out)["kernels"] is None
