"""Parts of `bench --kernels` that need no driver; tests/fake_driver/bench_cases.py has the measuring itself."""

from __future__ import annotations

import pytest

from worker_orcd.diagnose import bench_kernels
from worker_orcd.diagnose.bench_kernels import KernelReport, Kind, Step
from worker_orcd.errors import InvalidRequest


def test_a_tensor_is_read_by_the_launch_that_names_what_is_before_it():
    class Region:
        def __init__(self, address, nbytes):
            self.address, self.nbytes = address, nbytes

    class Launch:
        def __init__(self, *params):
            self.params = params

    tensors = {"q": Region(1000, 100), "k": Region(1100, 50), "v": Region(2000, 80), "norm": Region(5000, 64)}
    convert, qk, v = Launch(7, 5000), Launch(1000, 3), Launch(2000, 1 << 40)
    assert bench_kernels.owners([convert, qk, v], tensors) == [{"norm"}, {"q", "k"}, {"v"}]
    half = Launch(1000, 1050)  # the halves of one matrix
    assert bench_kernels.owners([half], {"q": tensors["q"]}) == [{"q"}]
    again = Launch(2000)  # the first of those that are told is meant
    assert bench_kernels.owners([v, again], {"v": tensors["v"]}) == [{"v"}, set()]


def report(cublas_us: float | None, version: str | None, absent: str | None) -> KernelReport:
    qkv = Kind("decode_q5_0_128e", ("attn_norm", "attn_q"), 24, (66, 1, 1), 1_234_567, 0, 2.5, 493.8, 12.3,
               78.9, cublas_us)  # fmt: skip
    sample = Kind("sample_max", ("sample",), 1, (132, 1, 1), 0, 0, 7.0, None, None, None, None)
    return KernelReport("GPU", "fused", 4000.0, version, absent, (Step(8, 64, 0, 25, 60.0, 67.0, -7.0, (qkv, sample)),))


def test_the_table_is_aligned_and_adds_up():
    text = bench_kernels.as_text(report(5.25, "13.1.2", None))
    head, _, title, names, *rows = text.splitlines()
    assert (
        head == "kernels of GPU, fused lowering; copy 4000 GB/s; cuBLAS 13.1.2"
        and title == "decode of 8 at position 64"
    )
    assert (
        " ".join(names.split()) == "kernel ops launches grid MB each us each GB/s of copy TFLOP/s us a step cuBLAS us"
    )
    assert rows[0].split() == ["decode_q5_0_128e", "attn_norm", "attn_q", "24", "66x1x1", "1.23", "2.50", "494", "12",
                               "%", "79", "60.0", "5.25"]  # fmt: skip
    assert rows[1].split() == ["sample_max", "sample", "1", "132x1x1", "0.00", "7.00", "7.0"]
    assert [row.split()[-1] for row in rows[2:]] == ["67.0", "-7.0", "60.0"] and rows[4].startswith("the step")
    end = names.index("us a step") + len("us a step")
    assert [row[:end].split()[-1] for row in rows] == ["60.0", "7.0", "67.0", "-7.0", "60.0"]
    assert all(row == row.rstrip() for row in rows)


def test_the_table_says_that_there_is_no_cublas():
    text = bench_kernels.as_text(report(None, None, "it is not installed"))
    assert "no cuBLAS (it is not installed)" in text and "cuBLAS us" not in text


def test_the_cpu_is_refused():
    bench_kernels.check_device("cuda:0")
    with pytest.raises(InvalidRequest, match="launches of a GPU") as e:
        bench_kernels.check_device("cpu")
    assert e.value.fields["field"] == "kernels"
