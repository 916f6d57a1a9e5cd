"""The package as a whole: what an import touches and what the installed package holds."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

import worker_orcd

ROOT = Path(__file__).resolve().parents[2]
STDLIB = sys.stdlib_module_names


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


def test_the_installed_package_is_whole():
    """Everything of the tree is in the installed package, and nothing that does not belong there."""
    package = Path(worker_orcd.__file__).parent
    if package.resolve() == ROOT / "worker_orcd":
        pytest.skip("the source tree is tested in place, not an installed package")
    modules = [p.relative_to(ROOT / "worker_orcd") for p in (ROOT / "worker_orcd").rglob("*.py")]
    modules += [Path("wsgi") / p.relative_to(ROOT / "wsgi") for p in (ROOT / "wsgi").rglob("*.py")]
    assert len(modules) > 50
    page = [Path("wsgi") / p.relative_to(ROOT / "wsgi") for p in (ROOT / "wsgi" / "static").iterdir()]
    assert Path("wsgi/static/index.html") in page
    assert {p.relative_to(package) for p in (package / "wsgi" / "static").iterdir()} == set(page)
    for path in [*modules, *page, Path("py.typed")]:
        assert (package / path).is_file(), path
    installed = {p.relative_to(package) for p in package.rglob("*.py")}
    assert installed == set(modules), "a module is installed that the tree does not hold"
    compiled = sorted(p.stem for p in (ROOT / "pyx" / "worker_orcd").glob("_*.pyx"))
    assert sorted(p.name for p in package.glob("*.so")) == [f"{name}.abi3.so" for name in compiled]
    assert sorted(p.stem for p in package.glob("*.pyi")) == compiled
    kernels = sorted(p.stem for p in (ROOT / "csrc" / "cuda").glob("*.cu"))
    fatbins = sorted(p.stem for p in (package / "fatbins").glob("*.fatbin"))
    assert fatbins == kernels
    manifest = json.loads((package / "fatbins" / "manifest.json").read_text()) if kernels else {}
    assert sorted(manifest) == kernels
    assert all(m["sass"] or m["ptx"] for m in manifest.values())
    suffixes = {p.suffix for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert suffixes <= {".py", ".pyi", ".so", ".fatbin", ".json", ".typed", *(p.suffix for p in page)}
