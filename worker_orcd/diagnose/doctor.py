"""What this machine has, what is missing for worker-orcd, and what to do about it.

`check` only looks: it never raises, allocates nothing on a GPU and makes no CUDA context. The driver is asked in a
process of its own, so that a broken one cannot take this process down. The command line formats the findings.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

from worker_orcd.cuda.images import Image, packaged
from worker_orcd.diagnose import demo_model
from worker_orcd.machine import free_memory, usable_cores

#: libraries of the package, as their distributions are called
LIBRARIES = (
    "numpy",
    "cuda-bindings",
    "tokenizers",
    "falcon",
    "gunicorn",
    "msgspec",
    "click",
    "tqdm",
    "jinja2",
    "prometheus_client",
)
#: compiled modules and what they are for
MODULES = {
    "_gguf": "reading model files",
    "_spm": "SentencePiece tokenizers",
    "_text": "making text of tokens",
    "_ring": "passing tokens on",
    "_output": "sending text to clients",
    "_cpu": "the CPU engine",
    "_driver": "the CUDA driver layer",
    "_upload": "loading into GPU memory",
    "_nodes": "the CUDA graph's nodes",
    "_engine": "the CUDA engine",
}
#: free memory under which even small models are tight
LOW_MEMORY = 1 << 30

_ASK_DRIVER = """
import ctypes, json
out = {"library": False, "version": None, "status": 0, "gpus": []}
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError as e:
    out["why"] = str(e)
else:
    out["library"] = True
    version, count = ctypes.c_int(), ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(version)) == 0:
        out["version"] = f"{version.value // 1000}.{version.value % 1000 // 10}"
    out["status"] = cuda.cuInit(0)
    if out["status"] == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0:
        for i in range(count.value):
            name, major, minor = ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_int()
            size, bus = ctypes.c_size_t(), ctypes.create_string_buffer(32)
            cuda.cuDeviceGetName(name, 256, i)
            cuda.cuDeviceTotalMem_v2(ctypes.byref(size), i)
            cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, i)
            cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, i)
            cuda.cuDeviceGetPCIBusId(bus, 32, i)
            out["gpus"].append({"name": name.value.decode(errors="replace"), "total": size.value, "free": None,
                                "capability": [major.value, minor.value], "bus": bus.value.decode()})
# free memory from the management library: the driver itself tells it only to a context
class Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]
try:
    nvml = ctypes.CDLL("libnvidia-ml.so.1")
except OSError:
    pass
else:
    if nvml.nvmlInit_v2() == 0:
        for gpu in out["gpus"]:
            handle, memory = ctypes.c_void_p(), Memory()
            if (nvml.nvmlDeviceGetHandleByPciBusId_v2(gpu["bus"].encode(), ctypes.byref(handle)) == 0
                    and nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0):
                gpu["free"] = memory.free
print(json.dumps(out))
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what, for example "GPU 0".
        status: "ok", "missing" (something does not work without it) or "warn".
        detail: what was found.
        advice: what to do, "" where nothing needs doing.
    """

    name: str
    status: str
    detail: str
    advice: str = ""


class _Gpu(TypedDict):
    """A GPU as `_ASK_DRIVER` tells it; sizes in bytes."""

    name: str
    total: int
    free: int | None
    capability: list[int]
    bus: str


class _Driver(TypedDict):
    """What `_ASK_DRIVER` prints."""

    library: bool
    version: str | None
    status: int
    gpus: list[_Gpu]
    why: NotRequired[str]


def check() -> list[Finding]:
    """Scan everything. Never raises: a scan that fails is a finding too."""
    out: list[Finding] = []
    scans: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python,
        _libraries,
        _processor,
        _memory,
        _modules,
        _gpus_and_kernels,
        _models,
    )
    for scan in scans:
        try:
            out.extend(scan())
        except Exception as e:
            out.append(Finding(scan.__name__.strip("_"), "warn", f"could not be looked at: {e!r}"))
    return out


def has_gpu() -> bool:
    """Whether the driver shows a GPU that a packaged kernel image fits."""
    images = packaged()
    return bool(images) and any(_fits(gpu["capability"], images) for gpu in _driver()["gpus"])


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    good = sys.version_info >= (3, 11) and sys.implementation.name == "cpython"
    yield Finding(
        "Python",
        "ok" if good else "missing",
        f"{sys.implementation.name} {version}, {sys.executable}",
        "" if good else "use CPython 3.11 or later",
    )
    system, machine = platform.system(), platform.machine()
    good = (system, machine) == ("Linux", "x86_64")
    yield Finding(
        "platform",
        "ok" if good else "missing",
        f"{system} {machine}",
        "" if good else "worker-orcd runs on Linux x86-64",
    )


def _libraries() -> Iterator[Finding]:
    missing, found = [], []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    yield Finding("libraries", "ok", ", ".join(found))
    if missing:
        yield Finding("libraries", "missing", ", ".join(missing), f"pip install {' '.join(missing)}")


def _processor() -> Iterator[Finding]:
    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.*)$", text, re.M)
    flags = set((re.search(r"^flags\s*: (.*)$", text, re.M) or ("", ""))[1].split())
    best = next(
        (
            name
            for name, needs in (
                ("AVX-512 VNNI", {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}),
                ("AVX-512", {"avx512f", "avx512bw", "avx512vl", "avx512dq"}),
                ("AVX2", {"avx2", "fma", "f16c"}),
            )
            if needs <= flags
        ),
        "baseline x86-64",
    )
    slow = best.startswith("baseline")
    yield Finding(
        "processor",
        "warn" if slow else "ok",
        f"{model[1] if model else 'unknown'}, {usable_cores()} cores, {best}",
        "the CPU engine is slow without AVX2" if slow else "",
    )


def _memory() -> Iterator[Finding]:
    free = free_memory() or 0
    low = free < LOW_MEMORY
    yield Finding(
        "memory",
        "warn" if low else "ok",
        f"{free / 1e9:.1f} GB available",
        "models may not fit; end other programs" if low else "",
    )


def _modules() -> Iterator[Finding]:
    present = [m for m in MODULES if importlib.util.find_spec(f"worker_orcd.{m}") is not None]
    if present:
        yield Finding("compiled modules", "ok", ", ".join(present))
    if len(present) < len(MODULES):
        absent = ", ".join(f"{m} ({what})" for m, what in MODULES.items() if m not in present)
        yield Finding(
            "compiled modules",
            "missing",
            absent,
            "install the package (pip install .), and run outside its source tree",
        )


def _gpus_and_kernels() -> Iterator[Finding]:
    images = packaged()
    if images:
        codes = sorted({code for image in images.values() for code in _codes(image)})
        yield Finding("GPU kernels", "ok", f"{len(images)} images: {', '.join(codes)}")
    else:
        yield Finding(
            "GPU kernels", "missing", "none are installed", "install a wheel, or build with WORKER_ORCD_CUDA_ARCHS=all"
        )
    driver = _driver()
    if not driver["library"]:
        yield Finding(
            "NVIDIA driver",
            "missing",
            f"libcuda.so.1 was not found ({driver.get('why', '')})",
            "install the NVIDIA driver (580 or later) to use a GPU; --device cpu works without",
        )
        return
    new_enough = driver["version"] and int(driver["version"].split(".")[0]) >= 13
    yield Finding(
        "NVIDIA driver",
        "ok" if new_enough else "warn",
        f"CUDA {driver['version'] or 'unknown'}",
        "" if new_enough else "the kernels are built with CUDA 13: install driver 580 or later",
    )
    if not driver["gpus"]:
        why = f"cuInit says {driver['status']}" if driver["status"] else "the driver shows none"
        yield Finding(
            "GPU",
            "missing",
            why,
            "see nvidia-smi and, in a container, whether GPUs are passed in; --device cpu works without",
        )
    for index, gpu in enumerate(driver["gpus"]):
        major, minor = gpu["capability"]
        fits = _fits(gpu["capability"], images)
        room = f"{gpu['free'] / 1e9:.1f} GB free of " if gpu["free"] is not None else ""
        yield Finding(
            f"GPU {index}",
            "ok" if fits else "missing",
            f"{gpu['name']}, compute capability {major}.{minor}, {room}{gpu['total'] / 1e9:.1f} GB",
            ""
            if fits
            else f"no kernel image fits {major}.{minor}: build on this machine, or with WORKER_ORCD_CUDA_ARCHS=all",
        )


def _models() -> Iterator[Finding]:
    where = demo_model.models_dir()
    found = sorted(p.name for p in where.glob("*.gguf")) if where.is_dir() else []
    if demo_model.NAME not in found:
        yield Finding("demo model", "warn", f"not in {where}", "worker-orcd demo-model fetches it (98 MB)")
    if found:
        yield Finding("models", "ok", f"{where}: {', '.join(found)}")


def _codes(image: Image) -> list[str]:
    return [f"sm_{a}" for a in image["sass"]] + ([f"PTX {image['ptx']}"] if image["ptx"] else [])


def _fits(capability: list[int], images: dict[str, Image]) -> bool:
    """Whether every image has code for the compute capability: machine code of its generation, or older PTX."""
    major, minor = capability

    def runs(arch: str) -> bool:
        number = int(arch.rstrip("a"))
        if arch.endswith("a"):
            return number == major * 10 + minor
        return number // 10 == major and number % 10 <= minor

    return all(
        any(runs(a) for a in i["sass"]) or (i["ptx"] and int(i["ptx"]) <= major * 10 + minor) for i in images.values()
    )


def _driver() -> _Driver:
    """The driver's answers, from a process of its own, which imports no module of the user's folder."""
    try:
        done = subprocess.run(
            [sys.executable or "python3", "-I", "-c", _ASK_DRIVER], check=False, capture_output=True, text=True,
            timeout=60, cwd="/",
        )  # fmt: skip
        answers: _Driver = json.loads(done.stdout)
        return answers
    except (OSError, ValueError, subprocess.TimeoutExpired) as e:
        return {"library": False, "version": None, "status": 0, "gpus": [], "why": f"asking it failed: {e}"}


if __name__ == "__main__":
    sys.exit(not has_gpu())
