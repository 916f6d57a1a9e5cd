"""Compile csrc/cuda/*.cu to worker_orcd/fatbins/*.fatbin with nvcc: one fatbin per source, all architectures in it.

Used by setup.py, and by hand while writing kernels: ``python tools/build_cuda.py --archs 90a csrc/cuda/pointwise.cu``.
A fatbin is rebuilt when its source, a header it includes (nvcc's own dependency file), spills.txt, the flags or
the compiler changed. A kernel that spills registers fails the build unless csrc/cuda/spills.txt lists it with a reason.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "cuda"
#: machine code of a release; "90a" has Hopper's own instructions and runs on compute capability 9.0 only
ARCHS = ("80", "86", "89", "90a", "100", "120")
#: PTX of a release: what later GPUs compile from
NEWEST_PTX = "120"
#: PTX of a build that saw no GPU: the oldest, because every supported GPU can compile it
OLDEST_PTX = "80"
MIN_NVCC = 13

_QUERY = """
import ctypes
lib = ctypes.CDLL("libcuda.so.1")
n, cc = ctypes.c_int(), []
if lib.cuInit(0) == 0 and lib.cuDeviceGetCount(ctypes.byref(n)) == 0:
    for i in range(n.value):
        a, b = ctypes.c_int(), ctypes.c_int()
        lib.cuDeviceGetAttribute(ctypes.byref(a), 75, i)
        lib.cuDeviceGetAttribute(ctypes.byref(b), 76, i)
        cc.append(f"{a.value}.{b.value}")
print(*cc)
"""


class BuildError(Exception):
    """The kernels cannot be compiled; the message says what to do."""


@dataclass(frozen=True)
class Targets:
    """What goes into every fatbin: machine code of `sass` architectures and, where not None, PTX of `ptx`."""

    sass: tuple[str, ...]
    ptx: str | None

    def flags(self) -> list[str]:
        """nvcc's -gencode options."""
        out = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.sass]
        if self.ptx:
            out.append(f"-gencode=arch=compute_{self.ptx},code=compute_{self.ptx}")
        return out

    def __str__(self) -> str:
        return ", ".join([f"sm_{a}" for a in self.sass] + ([f"PTX {self.ptx}"] if self.ptx else []))


def run(*command: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository root; the caller looks at `returncode`, `stdout` and `stderr`."""
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=timeout)


def present_archs() -> tuple[str, ...]:
    """Architectures of `ARCHS` that fit the GPUs of this machine. The driver is asked in a process of its own."""
    try:
        ask = run(sys.executable, "-c", _QUERY, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = {arch_for(int(major), int(minor)) for major, minor in re.findall(r"(\d+)\.(\d+)", ask.stdout)}
    return tuple(a for a in ARCHS if a in found)


def arch_for(major: int, minor: int) -> str | None:
    """The architecture of `ARCHS` whose machine code runs on this compute capability, the closest one; or None."""
    fits = [a for a in ARCHS if not a.endswith("a") and int(a) // 10 == major and int(a) % 10 <= minor]
    exact = f"{major}{minor}a"
    return exact if exact in ARCHS else (fits[-1] if fits else None)


def targets(spec: str | None) -> tuple[Targets, str]:
    """What to compile for, and why, from the text of WORKER_ORCD_CUDA_ARCHS ("all", "ptx", "90a", "90a,100")."""
    if not spec:
        here = present_archs()
        if here:
            return Targets(here, None), "the GPU of this machine"
        return Targets((), OLDEST_PTX), "no GPU here, so PTX only; WORKER_ORCD_CUDA_ARCHS=all compiles for every GPU"
    why = f"WORKER_ORCD_CUDA_ARCHS={spec}"
    if spec == "all":
        return Targets(ARCHS, NEWEST_PTX), why
    wanted = [a.strip().removeprefix("sm_") for a in spec.split(",") if a.strip()]
    unknown = [a for a in wanted if a not in (*ARCHS, "ptx")]
    if unknown or not wanted:
        raise BuildError(
            f"{why}: unknown architecture {', '.join(unknown) or '(none)'}; use all, ptx or some of {', '.join(ARCHS)}"
        )
    return Targets(tuple(a for a in ARCHS if a in wanted), OLDEST_PTX if "ptx" in wanted else None), why


def cuda_root() -> Path:
    """The CUDA toolkit: the wheels of the build environment, else a system toolkit.

    `importlib` and not a path finder of the CUDA packages: those do not see pip's build isolation.
    """
    try:
        spec = importlib.util.find_spec("nvidia.cu13")
    except ModuleNotFoundError:
        spec = None
    for place in spec.submodule_search_locations if spec else ():
        if (Path(place) / "bin" / "nvcc").exists():
            return Path(place)
    for nvcc in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if nvcc and os.path.exists(nvcc) and _nvcc_version(nvcc)[0] >= MIN_NVCC:
            return Path(nvcc).resolve().parent.parent
    raise BuildError(
        "no CUDA compiler: neither the wheels (pip install 'cuda-toolkit[nvcc,cccl]==13.0.*') nor a"
        f" system nvcc of version {MIN_NVCC} or later was found"
    )


def _nvcc_version(nvcc: str | Path) -> tuple[int, str]:
    out = run(str(nvcc), "--version").stdout
    found = re.search(r"release (\d+)\.\d+, V([\d.]+)", out)
    return (int(found[1]), found[2]) if found else (0, "unknown")


def is_stale(out: Path, stamp: str) -> bool:
    """Whether `out` must be rebuilt: it, its dependency file or its stamp is missing, or the stamp or a source changed.

    Only dependencies inside the repository count: toolkit headers live in a new place for every isolated build, and the
    stamp holds the compiler's version.
    """
    dep, mark = out.with_name(out.name + ".d"), out.with_name(out.name + ".stamp")
    if not (out.exists() and dep.exists() and mark.exists()) or mark.read_text() != stamp:
        return True
    built = out.stat().st_mtime
    names = dep.read_text().replace("\\\n", " ").split(":", 1)[-1].split()
    inside = [p for p in (Path(os.path.abspath(ROOT / n)) for n in names) if p.is_relative_to(ROOT)]
    return any(not p.exists() or p.stat().st_mtime > built for p in inside)


def mark_built(out: Path, stamp: str) -> None:
    """Remember what `out` was built with; see `is_stale`."""
    out.with_name(out.name + ".stamp").write_text(stamp)


def spilling(ptxas_log: str) -> list[tuple[str, str, int]]:
    """(kernel, arch, bytes) of every kernel of an ``nvcc -Xptxas -v`` log that spills registers to memory."""
    out, kernel, arch = [], "?", "?"
    for line in ptxas_log.splitlines():
        if m := re.search(r"Compiling entry function '(\S+)' for 'sm_(\w+)'", line):
            kernel, arch = m[1], m[2]
        elif m := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if int(m[1]) + int(m[2]):
                out.append((kernel, arch, int(m[1]) + int(m[2])))
    return out


def allowed_spills(path: Path) -> list[tuple[re.Pattern[str], str, str]]:
    """Rows (kernel regex, arch or "*", reason) of csrc/cuda/spills.txt; a row without a reason is an error."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = line.split(None, 2)
        if len(parts) < 3:
            raise BuildError(f"{path.name} line {number}: expected 'kernel-regex arch reason'")
        rows.append((re.compile(parts[0]), parts[1], parts[2]))
    return rows


class Compiler:
    """nvcc with the project's flags; `compile` may be called from several threads."""

    def __init__(self, targets: Targets, work_dir: Path) -> None:
        if shutil.which("g++") is None:
            raise BuildError("g++ was not found: nvcc needs it (on Debian: apt-get install g++)")
        self.root = cuda_root()
        self.nvcc = self.root / "bin" / "nvcc"
        self.version = _nvcc_version(self.nvcc)[1]
        self.targets = targets
        self.work_dir = work_dir
        self.spills = KERNELS / "spills.txt"

    def flags(self) -> list[str]:
        """Options of every kernel. No fast math: denormals, NaN and division are those of the plan."""
        return [
            "-O3",
            "-std=c++17",
            "-I",
            str(ROOT / "csrc"),
            "-I",
            str(KERNELS),
            "-Xptxas",
            "-v",
            *self.targets.flags(),
        ]

    def stamp(self) -> str:
        """What a fatbin depends on besides its sources."""
        spills = self.spills.read_text() if self.spills.exists() else ""
        return "\n".join([self.version, *self.flags(), os.environ.get("NVCC_APPEND_FLAGS", ""), spills])

    def output(self, source: Path) -> Path:
        """Where `source` is compiled to."""
        return self.work_dir / f"{source.stem}.fatbin"

    def stale(self, source: Path) -> bool:
        """Whether `compile` has anything to do."""
        return is_stale(self.output(source), self.stamp())

    def compile(self, source: Path) -> Path:
        """Compile one source, whether or not it is up to date. Raises BuildError with the compiler's words."""
        out = self.output(source)
        self.work_dir.mkdir(parents=True, exist_ok=True)
        made = out.with_name(out.name + ".new")
        command = [str(self.nvcc), "-fatbin", *self.flags(), "-MMD", "-MF", f"{out}.d", str(source), "-o", str(made)]
        done = run(*command)
        if done.returncode:
            raise BuildError(f"nvcc failed on {source.name}:\n{done.stdout}{done.stderr}")
        warnings = [ln for ln in done.stderr.splitlines() if "warning" in ln.lower()]
        if warnings:
            print("\n".join(warnings), flush=True)
        rows = allowed_spills(self.spills)
        bad = [
            s
            for s in spilling(done.stdout + done.stderr)
            if not any(r.search(s[0]) and a in ("*", s[1]) for r, a, _ in rows)
        ]
        if bad:
            made.unlink()
            listed = "\n".join(f"  {kernel} on sm_{arch}: {n} bytes" for kernel, arch, n in bad)
            raise BuildError(
                f"{source.name}: kernels that spill registers (list them with a reason in csrc/cuda/spills.txt"
                f" or make them smaller):\n{listed}"
            )
        made.replace(out)
        mark_built(out, self.stamp())
        return out


def sources() -> list[Path]:
    """The kernel files."""
    return sorted(KERNELS.glob("*.cu"))


def install(compiler: Compiler, names: list[str], out_dir: Path) -> None:
    """Copy built fatbins to the package and write ``manifest.json``: {name: {"sass": [...], "ptx": arch or null}}."""
    out_dir.mkdir(parents=True, exist_ok=True)
    manifest_path = out_dir / "manifest.json"
    manifest = json.loads(manifest_path.read_text()) if manifest_path.exists() else {}
    here = {s.stem for s in sources()}
    for old in set(manifest) - here:
        (out_dir / f"{old}.fatbin").unlink(missing_ok=True)
        del manifest[old]
    for name in names:
        temporary = out_dir / f".{name}.fatbin.new"
        shutil.copyfile(compiler.work_dir / f"{name}.fatbin", temporary)
        temporary.replace(out_dir / f"{name}.fatbin")
        manifest[name] = {"sass": list(compiler.targets.sass), "ptx": compiler.targets.ptx}
    temporary = manifest_path.with_suffix(".new")
    temporary.write_text(json.dumps(dict(sorted(manifest.items())), indent=1) + "\n")
    temporary.replace(manifest_path)


def main() -> int:
    """Compile kernels into the source tree; returns an exit code."""
    parser = argparse.ArgumentParser(description="Compile csrc/cuda/*.cu into worker_orcd/fatbins.")
    parser.add_argument("files", nargs="*", type=Path, help="sources (default: all)")
    parser.add_argument(
        "--archs",
        default=os.environ.get("WORKER_ORCD_CUDA_ARCHS"),
        help="all, ptx, or for example 90a,100 (default: the GPU that is present)",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "worker_orcd" / "fatbins")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    files = [f.resolve() for f in args.files] or sources()

    def one(source: Path) -> None:
        start = time.monotonic()
        if compiler.stale(source):
            compiler.compile(source)
            print(f"nvcc {source.name}: {time.monotonic() - start:.1f} s", flush=True)

    try:
        chosen, why = targets(args.archs)
        compiler = Compiler(chosen, ROOT / "build" / "fatbins")
        print(f"kernels for {chosen} ({why}), nvcc {compiler.version} of {compiler.root}", flush=True)
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(one, files))
        install(compiler, [f.stem for f in files], args.out)
    except BuildError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
