"""The package as a whole: what an import touches, who may import whom, what the installed package holds."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import worker_orcd

ROOT = Path(__file__).resolve().parents[2]
STDLIB = sys.stdlib_module_names
#: modules of the package that know no file, kernel or library: data and rules
PURE = ("arch", "quants", "plan", "lowering", "config", "errors")


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_import_is_cheap_and_touches_no_library():
    done = run("""
import sys, json
before = set(sys.modules)
import worker_orcd
print(json.dumps(sorted(m for m in set(sys.modules) - before)))
""")
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    foreign = [m for m in loaded if m.split(".")[0] not in {*STDLIB, "worker_orcd"}]
    assert not foreign
    assert not [m for m in loaded if m.startswith("worker_orcd._")], "a compiled module was loaded"


def test_compiled_modules_import_without_a_driver():
    modules = [p.name.split(".")[0] for p in Path(worker_orcd.__file__).parent.glob("_*.abi3.so")]
    assert modules, "no compiled module is installed"
    done = run(f"""
import importlib
for name in {modules!r}:
    importlib.import_module("worker_orcd." + name)
assert "libcuda.so" not in open("/proc/self/maps").read(), "the driver was opened on import"
""")
    assert done.returncode == 0, done.stderr


def test_public_names_resolve():
    assert worker_orcd.errors.WorkerError.code == "INTERNAL"
    for name in worker_orcd.__all__:
        assert name in dir(worker_orcd)
        assert getattr(worker_orcd, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        worker_orcd.nonsense  # noqa: B018


def test_version_is_the_distribution_s():
    try:
        installed = importlib.metadata.version("worker-orcd")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the source tree is tested in place, no distribution is installed")
    assert installed == worker_orcd.__version__


def imports_of(path: Path) -> set[str]:
    """Full names of the modules that a .py, .pyx or .pxd file imports; those under TYPE_CHECKING do not count."""
    text = path.read_text()
    package = "worker_orcd.wsgi" if path.parent.name == "wsgi" else "worker_orcd"
    out: set[str] = set()
    if path.suffix == ".py":
        tree = ast.parse(text)
        skipped = {id(n) for i in ast.walk(tree) if isinstance(i, ast.If) and ast.unparse(i.test) == "TYPE_CHECKING"
                   for n in ast.walk(i)}
        for node in ast.walk(tree):
            if id(node) in skipped:
                continue
            if isinstance(node, ast.Import):
                out |= {a.name for a in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    base = ".".join(filter(None, [package, base]))
                out |= {f"{base}.{a.name}" if base in ("worker_orcd", "worker_orcd.wsgi") else base for a in node.names}
        return out
    for line in text.splitlines():
        if m := re.match(r"\s*from\s+(\.*)([\w.]*)\s+c?import\s+(.+)", line):
            base = ".".join(filter(None, [package if m[1] else "", m[2]]))
            names = [n.split(" as ")[0].strip(" ()") for n in m[3].split("#")[0].split(",") if n.strip(" ()")]
            out |= {f"{base}.{n}" for n in names} if base in ("worker_orcd", "cuda.bindings") else {base}
        elif m := re.match(r"\s*c?import\s+([\w.]+)", line):
            out.add(m[1])
    return out


def compiled(names: set[str]) -> set[str]:
    """Those of `names` that are compiled modules of the package, short."""
    return {n.split(".")[1] for n in names if n.startswith("worker_orcd._")}


def sources(folder: str, pattern: str) -> list[Path]:
    found = sorted((ROOT / folder).glob(pattern))
    assert found, f"{folder}/{pattern} matches nothing"
    return found


def test_only_the_driver_layer_calls_the_driver():
    """Others may name cydriver's types (a stream, an address); a call of it must be checked, and only one place is."""
    for path in [*sources("pyx/worker_orcd", "*.pyx"), *sources("pyx/worker_orcd", "*.pxd")]:
        if path.stem != "_driver":
            assert not re.findall(r"\bcu\.cu[A-Z]\w*\(", path.read_text()), path.name
    for path in sources("worker_orcd", "*.py"):
        assert not [i for i in imports_of(path) if i.split(".")[0] == "cuda"], path.name


@pytest.mark.parametrize(("module", "allowed"), [
    ("_driver", set()),
    ("_gguf", set()),
    ("_ring", set()),
    ("_spm", set()),
    ("_nodes", {"_driver"}),
    ("_upload", {"_driver", "_gguf"}),
    ("_expert_nodes", {"_driver", "_nodes"}),
    ("_engine", {"_driver", "_ring", "_upload", "_nodes", "_expert_nodes"}),
    ("_cpu", {"_ring", "_gguf"}),
])
def test_compiled_modules_know_only_what_is_below_them(module: str, allowed: set[str]):
    paths = [p for p in (ROOT / "pyx" / "worker_orcd").glob(f"{module}.p*") if p.suffix in (".pyx", ".pxd")]
    if not paths:
        pytest.skip(f"{module} does not exist yet")
    names = set().union(*(imports_of(p) for p in paths))
    assert compiled(names) - {module} <= allowed
    upward = {"llm", "scheduler", "loop", "tokenizer", "chat", "cli", "wsgi", "config", "model_file", "demo_model"}
    assert not {n.split(".")[1] for n in names if n.startswith("worker_orcd.")} & upward
    assert not {n.split(".")[0] for n in names} & {"falcon", "gunicorn", "tokenizers", "click", "jinja2"}


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_use_the_standard_library_and_each_other(module: str):
    names = imports_of(ROOT / "worker_orcd" / f"{module}.py")
    foreign = {n for n in names if n.split(".")[0] not in STDLIB and n.split(".")[0] != "worker_orcd"}
    assert not foreign
    assert {n.split(".")[1] for n in names if n.startswith("worker_orcd.")} <= set(PURE)


def test_http_never_touches_a_compiled_module_and_nothing_below_knows_http():
    for path in sources("wsgi", "*.py"):
        assert not compiled(imports_of(path)), path.name
    for path in sources("worker_orcd", "*.py"):
        if path.stem.startswith("cli"):
            continue
        known = {n for n in imports_of(path) if n.split(".")[0] in ("falcon", "gunicorn") or ".wsgi" in n}
        assert not known, path.name


def test_nothing_imports_tests_or_tools():
    for path in [*sources("worker_orcd", "*.py"), *sources("wsgi", "*.py"), *sources("pyx/worker_orcd", "*.pyx")]:
        assert not {n.split(".")[0] for n in imports_of(path)} & {"tests", "tools", "oracle", "build_cuda"}, path.name


def test_kernel_sources_include_only_kernel_sources():
    csrc = ROOT / "csrc"
    for path in csrc.rglob("*"):
        if path.suffix not in (".cu", ".cuh", ".h", ".cpp"):
            continue
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.M):
            homes = [path.parent / name, csrc / name, csrc / "cuda" / name]
            assert any(h.resolve().is_relative_to(csrc) and h.exists() for h in homes), f"{path.name}: {name}"
        assert not re.search(r"#\s*include\s+<(Python|cuda_runtime|torch|cublas)", path.read_text()), path.name


def test_the_installed_package_is_whole():
    """Everything of the tree is in the installed package, and nothing that does not belong there."""
    package = Path(worker_orcd.__file__).parent
    if package.resolve() == ROOT / "worker_orcd":
        pytest.skip("the source tree is tested in place, not an installed package")
    for path in [*sources("worker_orcd", "*.py"), ROOT / "worker_orcd" / "py.typed"]:
        assert (package / path.name).is_file(), path.name
    for path in sources("wsgi", "*.py"):
        assert (package / "wsgi" / path.name).is_file(), path.name
    for path in sources("pyx/worker_orcd", "_*.pyx"):
        assert (package / f"{path.stem}.abi3.so").is_file(), path.name
    kernels = sorted(p.stem for p in (ROOT / "csrc" / "cuda").glob("*.cu"))
    fatbins = sorted(p.stem for p in (package / "fatbins").glob("*.fatbin"))
    assert fatbins == kernels
    manifest = json.loads((package / "fatbins" / "manifest.json").read_text()) if kernels else {}
    assert sorted(manifest) == kernels
    assert all(m["sass"] or m["ptx"] for m in manifest.values())
    suffixes = {p.suffix for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert suffixes <= {".py", ".so", ".fatbin", ".json", ".typed"}
