"""The stubs (*.pyi) of the compiled modules say what the modules hold."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import worker_orcd

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(worker_orcd.__file__).resolve().parent
MODULES = sorted(p.stem for p in (ROOT / "pyx" / "worker_orcd").glob("_*.pyx"))
#: what stubtest finds in a module that Cython wrote and that is nobody's to use, and names that a module imported
NOT_IN_STUBS = r"""
worker_orcd\..*\.__(reduce|setstate)_cython__
worker_orcd\._\w+\.__test__
worker_orcd\._\w+\.__pyx_capi__
worker_orcd\._(cpu|engine)\.BLOCK_SIZE
worker_orcd\._cpu\.(TYPES|ACT_ACTIVATIONS|GLU_ACTIVATIONS)
worker_orcd\._upload\.CHECK_REASONS
"""


def test_stubs_name_what_the_modules_hold(tmp_path: Path):
    """Names, kinds and signatures of functions, methods and attributes, compared by mypy's stubtest."""
    pytest.importorskip("mypy.stubtest")
    allowed = tmp_path / "allowed"
    allowed.write_text(NOT_IN_STUBS)
    settings = tmp_path / "mypy.ini"  # NumPy's stubs take longer than all of ours, which name but its arrays
    settings.write_text("[mypy]\n[mypy-numpy.*]\nfollow_imports = skip\nfollow_imports_for_stubs = True\n")
    env = dict(os.environ)
    if PACKAGE.parent == ROOT:  # tested in place
        env["MYPYPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", *(f"worker_orcd.{m}" for m in MODULES), "--concise",
         "--ignore-disjoint-bases", "--ignore-unused-allowlist", "--allowlist", str(allowed),
         "--mypy-config-file", str(settings)],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def constructor(signature: str) -> list[tuple[str, bool]]:
    """(name, whether it has a default) of each argument in the signature that Cython writes in a docstring."""
    signature = re.sub(r"\[[^]]*\]|'[^']*'", "", signature)  # types of memoryviews and text of defaults hold commas
    arguments = [a.partition("=") for a in signature.split(",") if a.strip()]
    return [(name.split()[-1], equals == "=") for name, equals, _ in arguments]


def stub_constructors(module: str) -> dict[str, list[tuple[str, bool]]]:
    """Class -> arguments of the `__init__` that its stub declares."""
    found = {}
    for item in ast.parse((PACKAGE / f"{module}.pyi").read_text()).body:
        for method in item.body if isinstance(item, ast.ClassDef) else ():
            if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                names = [a.arg for a in method.args.args[1:]]
                n_required = len(names) - len(method.args.defaults)
                found[item.name] = [(name, i >= n_required) for i, name in enumerate(names)]
    return found


@pytest.mark.parametrize("module", MODULES)
def test_stubs_name_the_arguments_of_constructors(module: str):
    """Which stubtest cannot see: the `__init__` of an extension type has no signature."""
    compiled = importlib.import_module(f"worker_orcd.{module}")
    runtime = {}
    for name, kind in vars(compiled).items():
        if isinstance(kind, type) and kind.__module__ == compiled.__name__ and not name.startswith("_"):
            written = re.match(rf"{name}\((.*)\)(?: -> None)?\n", kind.__doc__ or "")
            if written:
                runtime[name] = constructor(written[1])
    stubs = stub_constructors(module)
    assert {name: stubs.get(name) for name in runtime} == runtime
    # a class of Python shows its arguments to stubtest
    assert {name for name in stubs if name not in runtime} <= {"TensorInfo"}


def test_the_comparison_reads_what_cython_writes():
    assert constructor("bytes blob, const uint32_t[::1] offsets, int n=2, str label='a, b', Context c=None") == [
        ("blob", False), ("offsets", False), ("n", True), ("label", True), ("c", True)]  # fmt: skip
    assert constructor("") == []
