"""The rules of the kernel build: which architectures, which spills, what is out of date."""

from __future__ import annotations

import os
import time
from pathlib import Path

import build_cuda
import pytest

LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'quiet' for 'sm_80'
ptxas info    : Function properties for quiet
    64 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 34 registers, used 1 barriers, 1200 bytes cumulative stack size, 368 bytes cmem[0]
ptxas info    : Compiling entry function '_Z5heavyILi4EEv6Params' for 'sm_90a'
ptxas info    : Function properties for _Z5heavyILi4EEv6Params
    16 bytes stack frame, 12 bytes spill stores, 24 bytes spill loads
"""


def test_spills_are_found_by_kernel_and_architecture():
    assert build_cuda.spilling(LOG) == [("_Z5heavyILi4EEv6Params", "90a", 36)]


def test_spill_list_needs_a_reason(tmp_path: Path):
    listed = tmp_path / "spills.txt"
    listed.write_text("# comment\n\nheavy 90a measured: 2 % faster than with fewer rows\n")
    ((pattern, arch, reason),) = build_cuda.allowed_spills(listed)
    assert pattern.search("_Z5heavyILi4EEv6Params") and arch == "90a" and reason.startswith("measured")
    listed.write_text("heavy 90a\n")
    with pytest.raises(build_cuda.BuildError, match="line 1"):
        build_cuda.allowed_spills(listed)
    assert build_cuda.allowed_spills(tmp_path / "absent") == []


def test_targets_of_the_environment_variable():
    everything, _ = build_cuda.targets("all")
    assert everything.sass == build_cuda.ARCHS and everything.ptx == build_cuda.NEWEST_PTX
    assert build_cuda.targets("ptx")[0] == build_cuda.Targets((), build_cuda.OLDEST_PTX)
    assert build_cuda.targets("100, sm_90a")[0].sass == ("90a", "100")
    assert "-gencode=arch=compute_90a,code=sm_90a" in build_cuda.targets("90a")[0].flags()
    for bad in ("91", "90a,foo", ","):
        with pytest.raises(build_cuda.BuildError, match="unknown architecture"):
            build_cuda.targets(bad)


def test_targets_of_this_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build_cuda, "present_archs", lambda: ("90a",))
    assert build_cuda.targets(None)[0] == build_cuda.Targets(("90a",), None)
    monkeypatch.setattr(build_cuda, "present_archs", lambda: ())
    chosen, why = build_cuda.targets(None)
    assert chosen == build_cuda.Targets((), build_cuda.OLDEST_PTX) and "no GPU" in why


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), "80"),
        ((8, 6), "86"),
        ((8, 7), "86"),
        ((8, 9), "89"),
        ((9, 0), "90a"),
        ((10, 0), "100"),
        ((10, 3), "100"),
        ((12, 0), "120"),
        ((12, 1), "120"),
        ((7, 5), None),
        ((11, 0), None),
    ],
)
def test_architecture_of_a_capability(capability: tuple[int, int], arch: str | None):
    assert build_cuda.arch_for(*capability) == arch


def test_up_to_date_means_same_stamp_and_older_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build_cuda, "ROOT", tmp_path)
    source, header, out = tmp_path / "k.cu", tmp_path / "k.cuh", tmp_path / "k.fatbin"
    for path in (source, header, out):
        path.write_text("x")
    assert build_cuda.is_stale(out, "flags"), "no dependency file yet"
    (tmp_path / "k.fatbin.d").write_text("k.fatbin : k.cu \\\n  k.cuh /usr/include/elsewhere.h\n")
    build_cuda.mark_built(out, "flags")
    assert not build_cuda.is_stale(out, "flags")
    assert build_cuda.is_stale(out, "other flags")
    later = time.time() + 10
    os.utime(header, (later, later))
    assert build_cuda.is_stale(out, "flags"), "a header is newer"
    header.unlink()
    assert build_cuda.is_stale(out, "flags"), "a header is gone"


def test_no_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build_cuda.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build_cuda.shutil, "which", lambda name: None)
    monkeypatch.setattr(build_cuda.os.path, "exists", lambda path: False)
    with pytest.raises(build_cuda.BuildError, match="cuda-toolkit"):
        build_cuda.cuda_root()


def test_kernels_of_the_tests_compile(tmp_path: Path):
    """tests/gpu compiles them when it needs them; they must follow the headers that they include on any machine."""
    sources = sorted((build_cuda.ROOT / "tests" / "gpu" / "kernels").glob("*.cu"))
    assert sources
    try:
        compiler = build_cuda.Compiler(build_cuda.Targets(("90a",), None), tmp_path)
    except build_cuda.BuildError as e:
        pytest.skip(str(e))
    for source in sources:
        assert compiler.compile(source).stat().st_size > 0
