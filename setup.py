"""Build: Cython extensions for the stable ABI, C++ CPU kernels with an instruction set per file, nvcc -> fatbins.

pyproject.toml holds what is not a program. Every compile job (kernels of both kinds and extensions) goes through one
small pool, is skipped when up to date, and says its name when it starts.

Environment:
    WORKER_ORCD_CUDA_ARCHS   what the GPU kernels are compiled for; see tools/build_cuda.py
    WORKER_ORCD_SANITIZE     for example "address,undefined": instrumented extensions in build/sanitize, no GPU kernels
    WORKER_ORCD_BUILD_JOBS   compile jobs at a time (default: the cores, at most 8)
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
import build_cuda  # noqa: E402
import gen_params  # noqa: E402

usable_cores = runpy.run_path(str(ROOT / "worker_orcd" / "machine.py"))["usable_cores"]
SANITIZE = os.environ.get("WORKER_ORCD_SANITIZE", "")
#: C++ sources of an extension, as globs in csrc; an extension not named here has none
CPP_SOURCES = {
    "_cpu": ("cpu/*.cpp", "host/tensor_check.cpp"),
    "_gguf": ("host/tensor_check.cpp",),
    "_upload": ("host/tensor_check.cpp",),
}
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"]
#: a file compiled for an instruction set is only ever called after cpuid was asked; all else runs on any x86-64
ISA_FLAGS = {
    "_avx512vnni": [*AVX512, "-mavx512vnni"],
    "_avx512": AVX512,
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
}


def say(text: str) -> None:
    """Progress: on stderr, where pip shows it with -v and make always."""
    print(f"worker-orcd build: {text}", file=sys.stderr, flush=True)


def isa_of(path: Path) -> str:
    """One of ISA_FLAGS, or "" (baseline)."""
    return next((s for s in ISA_FLAGS if path.stem.endswith(s)), "")


def uses_cuda_headers(name: str, seen: set[str] | None = None) -> bool:
    """Whether the generated C++ of module `name` includes cuda.h: it, or a module it cimports, cimports cydriver."""
    seen = seen if seen is not None else set()
    seen.add(name)
    paths = [ROOT / "pyx" / "worker_orcd" / f"{name}{suffix}" for suffix in (".pyx", ".pxd")]
    lines = [ln for p in paths if p.exists() for ln in p.read_text().splitlines() if re.search(r"\bcimport\b", ln)]
    used = {n for ln in lines for n in re.findall(r"\b(cydriver|_[a-z]\w*)\b", ln)}
    return "cydriver" in used or any(uses_cuda_headers(n, seen) for n in used - seen)


def extensions() -> list[Extension]:
    """One extension for each pyx/worker_orcd/_x.pyx. The folder mirrors the package, or Cython misses the .pxd."""
    out = []
    for pyx in sorted((ROOT / "pyx" / "worker_orcd").glob("_*.pyx")):
        # Baseline objects first: of an inline function that several objects define, the linker keeps the first, and
        # that must not be the one compiled for a newer processor.
        found = (p for pattern in CPP_SOURCES.get(pyx.stem, ()) for p in (ROOT / "csrc").glob(pattern))
        cpp = sorted(found, key=lambda p: (isa_of(p), p.name))
        ext = Extension(
            f"worker_orcd.{pyx.stem}",
            [str(pyx.relative_to(ROOT))],
            language="c++",
            py_limited_api=True,
            libraries=["pthread"],
        )
        ext.cpp_sources = cpp
        ext.cuda_headers = uses_cuda_headers(pyx.stem)
        out.append(ext)
    return out


def packages() -> list[str]:
    """Every folder of worker_orcd/ and wsgi/ that holds Python modules; wsgi/ is installed as worker_orcd.wsgi."""
    found = find_packages(str(ROOT), include=["worker_orcd", "worker_orcd.*", "wsgi", "wsgi.*"])
    return [f"worker_orcd.{name}" if name.split(".")[0] == "wsgi" else name for name in found]


class Build(build):
    """Starts from an empty build_lib, so that nothing of an older tree gets into a wheel; objects are kept apart."""

    def initialize_options(self) -> None:
        """Keep instrumented objects apart."""
        super().initialize_options()
        if SANITIZE:
            self.build_base = "build/sanitize"

    def run(self) -> None:
        """Build everything."""
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildExt(build_ext):
    """Compiles objects and fatbins in one pool, then links."""

    def run(self) -> None:
        """Translate, compile, link, and put the fatbins beside the extensions."""
        if shutil.which("g++") is None:
            raise CompileError("g++ was not found (on Debian: apt-get install g++)")
        start = time.monotonic()
        base = Path(self.build_temp)
        base.mkdir(parents=True, exist_ok=True)
        gen_params.write()
        built = cythonize(
            self.extensions,
            build_dir="build/cython",
            include_path=[str(ROOT / "pyx")],
            compiler_directives={"language_level": 3, "embedsignature": True},
            quiet=True,
        )
        self.object_dir = base.resolve() / "objects"
        kernel_dir = ROOT / "build" / base.name / "objects"  # another one in a build with sanitizers only
        for folder in (self.object_dir, kernel_dir):
            folder.mkdir(parents=True, exist_ok=True)
        self.compiler_version = build_cuda.run("g++", "--version").stdout.split("\n")[0]
        jobs: dict[Path, object] = {}
        objects: dict[str, list[Path]] = {}
        for ext, made in zip(self.extensions, built, strict=True):
            name = ext.name.rpartition(".")[2]
            wanted = {self.object_dir / f"{name}.o": (Path(made.sources[0]).resolve(), self.module_flags(ext))}
            for c in ext.cpp_sources:
                is_kernels = c.stem.startswith("kernels_")
                obj = (kernel_dir if is_kernels else self.object_dir) / f"cpu-{c.stem}.o"
                wanted[obj] = (c, self.flags(not is_kernels) + ISA_FLAGS.get(isa_of(c), []))
            objects[name] = list(wanted)
            for obj, job in wanted.items():
                jobs.setdefault(obj, job)
        try:
            self.run_jobs(jobs, self.kernel_compiler())
            for name, parts in objects.items():
                self.link(name, parts)
            if self.kernels:
                build_cuda.install(self.kernels, [s.stem for s in build_cuda.sources()], self.package_dir() / "fatbins")
        except build_cuda.BuildError as e:
            raise CompileError(str(e)) from None
        say(f"done in {time.monotonic() - start:.0f} s")

    def kernel_compiler(self) -> build_cuda.Compiler | None:
        """nvcc for this build, or None where there is nothing for it to do."""
        self.kernels = None
        if SANITIZE:
            say(f"extensions with -fsanitize={SANITIZE}; GPU kernels are left out")
        elif build_cuda.sources():
            chosen, why = build_cuda.targets(os.environ.get("WORKER_ORCD_CUDA_ARCHS"))
            self.kernels = build_cuda.Compiler(chosen, ROOT / "build" / "fatbins")
            say(f"GPU kernels for {chosen} ({why}), nvcc {self.kernels.version} of {self.kernels.root}")
            if not chosen.sass:
                say("PTX has no register allocation: spills are checked only in builds for an architecture")
        return self.kernels

    def run_jobs(self, objects: dict[Path, object], kernels: build_cuda.Compiler | None) -> None:
        """Compile whatever is out of date, the long jobs (GPU kernels) first."""
        todo = []
        if kernels:
            stale = [s for s in build_cuda.sources() if kernels.stale(s)]
            todo += [(f"nvcc {s.name}", lambda s=s: kernels.compile(s)) for s in stale]
        for obj, (source, flags) in objects.items():
            stamp = "\n".join([self.compiler_version, *(f.replace(str(self.cuda_root()), "CUDA") for f in flags)])
            if build_cuda.is_stale(obj, stamp):
                todo.append((f"c++ {source.name}", lambda a=(source, obj, flags, stamp): self.compile_object(*a)))
        workers = int(os.environ.get("WORKER_ORCD_BUILD_JOBS") or min(usable_cores(), 8))
        say(f"{len(todo)} files to compile, {workers} at a time")

        def one(numbered: tuple[int, tuple[str, object]]) -> None:
            number, (title, job) = numbered
            start = time.monotonic()
            job()
            say(f"[{number}/{len(todo)}] {title}: {time.monotonic() - start:.1f} s")

        with ThreadPoolExecutor(workers) as pool:
            ended = [pool.submit(one, n) for n in enumerate(todo, 1)]
        faults = [job.exception() for job in ended]
        if any(faults):  # all of them at once: each rebuild costs minutes
            raise build_cuda.BuildError("\n".join(str(f) for f in faults if f))

    def flags(self, instrumented: bool = True) -> list[str]:
        """Options of all C++: optimized, hidden symbols, no instruction set beyond baseline x86-64.

        Args:
            instrumented: with the sanitizers of `WORKER_ORCD_SANITIZE`. The CPU's kernels are not, and so those of any
                other build: what is between their vector instructions takes the compiler minutes a file.
        """
        out = [
            "-std=c++17",
            "-fPIC",
            "-fvisibility=hidden",
            "-pthread",
            "-Wall",
            "-Wno-unused-function",
            "-DNDEBUG",
            f"-I{ROOT / 'csrc'}",
        ]
        if SANITIZE and instrumented:
            checks = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"]
            return [*out, "-O1", "-g", "-fno-omit-frame-pointer", *checks]
        return [*out, "-O3", "-g0"]

    def module_flags(self, ext: Extension) -> list[str]:
        """Options of the C++ that Cython wrote."""
        out = [
            *self.flags(),
            "-DPy_LIMITED_API=0x030B0000",
            "-DCYTHON_LIMITED_API=1",
            "-Wno-deprecated-declarations",
            "-Wno-unused-but-set-variable",
            f"-I{sysconfig.get_paths()['include']}",
            f"-I{ROOT / 'pyx' / 'worker_orcd'}",
        ]
        if ext.cuda_headers:
            out.append(f"-I{self.cuda_root() / 'include'}")
            if importlib.util.find_spec("cuda.bindings") is None:
                raise CompileError(f"{ext.name} needs cuda-bindings==13.0.* at build time")
        return out

    def cuda_root(self) -> Path:
        """The CUDA toolkit, asked for once."""
        if not hasattr(self, "_cuda_root"):
            self._cuda_root = build_cuda.cuda_root()
        return self._cuda_root

    def compile_object(self, source: Path, obj: Path, flags: list[str], stamp: str) -> None:
        """One source to one object."""
        done = build_cuda.run("g++", *flags, "-MMD", "-MF", f"{obj}.d", "-c", str(source), "-o", str(obj))
        if done.returncode:
            raise build_cuda.BuildError(f"g++ failed on {source.name}:\n{done.stderr}")
        if done.stderr.strip():
            say(done.stderr.strip())
        build_cuda.mark_built(obj, stamp)

    def package_dir(self) -> Path:
        """Where the package is being put together."""
        return ROOT / "worker_orcd" if self.inplace else Path(self.build_lib) / "worker_orcd"

    def link(self, name: str, objects: list[Path]) -> None:
        """Objects to worker_orcd/<name>.abi3.so."""
        out = self.package_dir() / f"{name}.abi3.so"
        out.parent.mkdir(parents=True, exist_ok=True)
        flags = [f"-fsanitize={SANITIZE}"] if SANITIZE else ["-s"]
        done = build_cuda.run("g++", "-shared", "-pthread", *flags, *map(str, objects), "-o", str(out))
        if done.returncode:
            raise build_cuda.BuildError(f"linking {name} failed:\n{done.stderr}")

    def get_outputs(self) -> list[str]:
        """Files this command made, for installers that ask."""
        package = Path(self.build_lib) / "worker_orcd"
        return [str(p) for p in (*package.glob("*.so"), *package.glob("fatbins/*"))]

    def get_ext_filename(self, ext_name: str) -> str:
        """The stable-ABI name, whatever Python builds it."""
        return ext_name.replace(".", os.sep) + ".abi3.so"

    def copy_extensions_to_source(self) -> None:
        """Nothing: in-place builds link there."""


class Wheel(bdist_wheel):
    """One wheel for CPython 3.11 and later."""

    def finalize_options(self) -> None:
        """Tag it cp311-abi3."""
        self.py_limited_api = "cp311"
        super().finalize_options()


setup(
    packages=packages(),
    ext_modules=extensions(),
    cmdclass={"build": Build, "build_ext": BuildExt, "bdist_wheel": Wheel},
)
