"""Compiles csrc/cuda/*.cu, and kernels of tests, as host C++: one library a file, in build/kernels-on-cpu.

    python tests/kernels_on_cpu/build.py [names of kernel files]

Files are compiled again when they, a header or this folder changed. What is changed in their text: the headers with
machine instructions (`REPLACED`) are those of this folder, shared memory becomes variables of the library, and a table
of the kernels is put behind.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = ROOT / "build" / "kernels-on-cpu"
#: folders with kernel files
SOURCES = (ROOT / "csrc" / "cuda", ROOT / "tests" / "gpu" / "kernels", HERE)
#: headers of csrc/cuda/common for which this folder has others
REPLACED = ("ptx.cuh", "wgmma.cuh")
FLAGS = [
    "-std=c++17", "-O2", "-fPIC", "-g1", "-ffp-contract=off", "-fno-strict-aliasing", "-fvisibility=hidden",
    "-fno-gnu-unique", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-unused-variable",
]  # fmt: skip
if platform.machine() == "x86_64":
    FLAGS += ["-mavx2", "-mfma", "-mf16c"]

_DYNAMIC = re.compile(r"extern\s+__shared__\s+(?:__attribute__\s*\(\(aligned\(\d+\)\)\)\s+)?([\w:]+)\s+(\w+)\[\]\s*;")
_KERNEL = re.compile(r'extern\s+"C"\s+__global__\s+void\s+')
_NAME = re.compile(r"\s*(\w+)\(const\s+__grid_constant__\s+(\w+)\s+(\w+)\)\s*\{")

_TABLE = """
alignas(1024) __attribute__((section(".bss.dynamic")))
uint8_t on_cpu_dynamic[on_cpu::kMaxDynamic + on_cpu::kGuardBytes];
// What lies in .bss of the file, in a section of its own after build.py has renamed it.
__attribute__((used)) static char on_cpu_fixed[16];
extern "C" uint8_t __start_shared_memory[], __stop_shared_memory[];
static const on_cpu::Kernel on_cpu_kernels[] = {
%s    {nullptr, nullptr, 0, 0},
};
extern "C" __attribute__((visibility("default"))) const on_cpu::Library on_cpu_library = {
    on_cpu_kernels, on_cpu_dynamic, __start_shared_memory, __stop_shared_memory};
"""


def host_text(text: str) -> str:
    """Preprocessed CUDA C++ as host C++, with the table of its kernels.

    Raises:
        ValueError: a kernel does not have the one form: ``extern "C" __global__ void [__launch_bounds__(...)]
            name(const __grid_constant__ Params p)``, or with ``__maxnreg__(...)`` in that place.
    """
    text = _DYNAMIC.sub(r"\1* const \2 = reinterpret_cast<\1*>(on_cpu_dynamic);", text)
    text = text.replace("__shared__", "static")
    out, at, rows = [], 0, []
    for start in _KERNEL.finditer(text):
        end, bound = start.end(), "1024"
        if text.startswith("__launch_bounds__(", end):
            begin = end + len("__launch_bounds__(")
            end, comma = _closing(text, begin)
            bound = text[begin : comma or end - 1]
        elif text.startswith("__maxnreg__(", end):
            end, _ = _closing(text, end + len("__maxnreg__("))
        kernel = _NAME.match(text, end)
        if kernel is None:
            raise ValueError(f"a kernel of an unknown form: {text[start.start() : end + 100]!r}")
        name, params, parameter = kernel.groups()
        out += [text[at : start.start()], f"static void {name}(const {params}& {parameter}) {{"]
        rows.append(
            f'    {{"{name}", [](const void* p) {{ {name}(*static_cast<const {params}*>(p)); }}, sizeof({params}), '
            f"{bound}}},\n"
        )
        at = kernel.end()
    return "".join(out) + text[at:] + _TABLE % "".join(rows)


def _closing(text: str, at: int) -> tuple[int, int]:
    """Past the parenthesis that closes the one before `at`, and the first comma at its level (0: none)."""
    depth, comma = 1, 0
    while depth:
        char = text[at]
        depth += (char == "(") - (char == ")")
        comma = comma or (at if char == "," and depth == 1 else 0)
        at += 1
    return at, comma


def _view() -> Path:
    """A copy of csrc made of links, in which the headers `REPLACED` are those of this folder."""
    view = OUT / "csrc"
    csrc = ROOT / "csrc"
    wanted = {p.relative_to(csrc): p for p in [*csrc.glob("cuda/**/*"), *csrc.glob("params/*")] if p.is_file()}
    for name in REPLACED:
        wanted[Path("cuda/common") / name] = HERE / name
    for link in [p for p in view.rglob("*") if p.is_symlink()] if view.exists() else []:
        if wanted.get(link.relative_to(view)) != Path(os.readlink(link)):
            link.unlink()
    for name, target in wanted.items():
        link = view / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(target)
    return view


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[-3:])}:\n{done.stderr}")
    return done.stdout


def _is_new(target: Path, inputs: list[Path]) -> bool:
    if not target.exists():
        return False
    made = target.stat().st_mtime
    return all(p.exists() and p.stat().st_mtime <= made for p in inputs)


def _compile(source: Path, view: Path) -> bool:
    """One library; whether it had to be made."""
    library, parts = OUT / f"{source.stem}.so", OUT / f"{source.stem}.d"
    if parts.exists():
        names = parts.read_text().split(":", 1)[1].replace("\\\n", " ").split()
        if _is_new(library, [Path(__file__), *map(Path, names)]):
            return False
    seen = view / "cuda" / source.name if source.parent == SOURCES[0] else source
    where = ["-I", str(view), "-I", str(view / "cuda"), "-I", str(HERE)]
    text = _run(["g++", *FLAGS, "-E", "-x", "c++", *where, "-include", str(HERE / "cuda_on_cpu.h"), "-MD", "-MF",
                 str(parts), "-MT", "x", str(seen)])  # fmt: skip
    text = host_text(text)
    for name in REPLACED:
        text = text.replace(f'"{view}/cuda/common/{name}"', f'"{HERE}/{name}"')
    text = text.replace(f'"{view}/', f'"{ROOT}/csrc/')
    host = OUT / f"{source.stem}.ii"
    key = OUT / f"{source.stem}.key"
    digest = hashlib.sha256(repr((FLAGS, re.sub(r"(?m)^# \d+ .*$", "", text))).encode()).hexdigest()
    if library.exists() and key.exists() and key.read_text() == digest:
        library.touch()  # a comment changed
        return False
    host.write_text(text)
    made, built = OUT / f"{source.stem}.o", OUT / f"{source.stem}.tmp.so"
    _run(["g++", *FLAGS, "-c", "-fpreprocessed", "-o", str(made), "-x", "c++", str(host)])
    # a compiler drops the attribute `section` of a variable in a template
    _run(["objcopy", "--set-section-flags", ".bss=alloc,load,data,contents", "--rename-section", ".bss=shared_memory",
          str(made)])  # fmt: skip
    _run(["g++", "-shared", "-o", str(built), "-Wl,-rpath,$ORIGIN", "-Wl,-z,defs", str(made),
          str(OUT / "runtime.so")])  # fmt: skip
    built.replace(library)
    key.write_text(digest)
    return True


def _runtime() -> None:
    library, parts = OUT / "runtime.so", [*HERE.glob("runtime.*"), HERE / "launch.h", Path(__file__)]
    if not _is_new(library, parts):
        flags = [f for f in FLAGS if f not in ("-ffp-contract=off", "-fvisibility=hidden", "-O2")]
        _run(["g++", *flags, "-O3", "-ffp-contract=fast", "-shared", "-Wl,-soname,runtime.so", "-o", str(library),
              str(HERE / "runtime.cpp")])  # fmt: skip


def _driver() -> None:
    library = OUT / "libcuda.so.1"
    parts = [*sorted((ROOT / "tests" / "fake_driver").glob("*.[ch]")), HERE / "launch.h"]
    if not _is_new(library, parts):
        _run(["gcc", "-shared", "-fPIC", "-O1", "-g1", "-Wl,-soname,libcuda.so.1", "-o", str(library),
              str(ROOT / "tests" / "fake_driver" / "libcuda.c"), "-lpthread", "-ldl"])  # fmt: skip


def build(names: list[str] | None = None) -> Path:
    """Build what is not up to date: the runtime, the stand-in driver, the kernel files (all, or those of `names`).

    Returns:
        the folder of the libraries: FAKE_CUDA_KERNELS, and to be in LD_LIBRARY_PATH.

    Raises:
        RuntimeError: with what the compiler said.
    """
    if shutil.which("g++") is None:
        raise RuntimeError("g++ is not installed")
    OUT.mkdir(parents=True, exist_ok=True)
    with (OUT / "lock").open("w") as lock:  # one build at a time; closing it lets the next one begin
        fcntl.flock(lock, fcntl.LOCK_EX)
        _build(names)
    return OUT


def _build(names: list[str] | None) -> None:
    view = _view()
    _runtime()
    _driver()
    sources = [p for folder in SOURCES for p in sorted(folder.glob("*.cu")) if names is None or p.stem in names]
    sources.sort(key=lambda p: -p.stat().st_size)
    if names is None:
        for stale in OUT.glob("*.so"):
            if stale.stem not in {"runtime", *(p.stem for p in sources)}:
                stale.unlink()
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda p: _compile(p, view), sources))
    for source, was_made in zip(sources, made, strict=True):
        if was_made:
            print(f"built {source.relative_to(ROOT)} for the CPU", file=sys.stderr)


def environment() -> dict[str, str]:
    """What a process needs to find the kernels and the stand-in driver."""
    path = os.pathsep.join(filter(None, [str(OUT), os.environ.get("LD_LIBRARY_PATH")]))
    return {
        "LD_LIBRARY_PATH": path, "FAKE_CUDA_KERNELS": str(OUT), "FAKE_CUDA_DELAY_US": "0", "FAKE_CUDA_SMS": "4",
        "FAKE_CUDA_MEMORY": str(4 << 30), "WORKER_ORCD_FAULTS": "1", "OPENBLAS_NUM_THREADS": "1",
    }  # fmt: skip


if __name__ == "__main__":
    try:
        build(sys.argv[1:] or None)
    except (RuntimeError, ValueError) as error:
        sys.exit(str(error))
