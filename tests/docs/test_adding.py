"""docs/adding-*.md, performed: each recipe changes the files that it says, in a copy of the tree, and works there."""

from __future__ import annotations

import shutil
from pathlib import Path

import build_cuda
import pytest
from docs.recipes import ROOT, Edit, Tree, edits, perform

ARCHITECTURE, QUANT_TYPE, API = "adding-an-architecture.md", "adding-a-quant-type.md", "adding-to-the-api.md"
NO_GXX = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def changed(tree: Tree, page: str, heading: str, leave_out: str = "") -> tuple[set[str], set[str], set[str]]:
    """Perform a section; returns the (code, documentation, references of the tests) that it changed."""
    files = tree.perform(page, heading, leave_out)
    docs, tests = ({f for f in files if f.startswith(folder)} for folder in ("docs/", "tests/"))
    return files - docs - tests, docs, tests


def compile_kernels(tree: Tree, *sources: str) -> dict[str, bytes]:
    """Fatbins of the copy's `sources` for one architecture, by name, by its own tools/build_cuda.py."""
    try:
        build_cuda.cuda_root()
    except build_cuda.BuildError as e:
        pytest.skip(str(e))
    tree.run("tools/build_cuda.py", "--archs", "90a", "--out", "fatbins", *sources, timeout=200)
    return {Path(s).stem: (tree.root / "fatbins" / f"{Path(s).stem}.fatbin").read_bytes() for s in sources}


def test_a_flag_variant_is_one_place(tree: Tree):
    code, docs, tests = changed(tree, ARCHITECTURE, "## A flag of a known family: one place")
    assert code == {"worker_orcd/models/qwen.py"} and not docs and not tests
    tree.prove("flag_variant")
    tree.pytest("tests/models/test_registry.py")


@NO_GXX
def test_a_quant_type_is_four_places(tree: Tree):
    code, docs, tests = changed(tree, QUANT_TYPE, "## A type: four places")
    assert code == {"worker_orcd/gguf/quants.py", "csrc/cpu/quant.h", "csrc/cuda/quant/q4_0.cuh"} and not docs
    # the oracle is the fourth; the GPU's tests want the formula in CUDA too, as the page says
    assert tests == {"tests/helpers/quant_blocks.py", "tests/gpu/kernels/dequant.cu"}
    tree.prove("quant_type")
    shown = tree.pytest("tests/cuda/test_layout.py", "-k", "Q4_S or fragment_order")
    assert "skipped" not in shown and " passed" in shown


def test_a_quant_type_gets_its_kernels(tree: Tree):
    tree.perform(QUANT_TYPE, "## A type: four places")
    only = '#include "quant/types.cuh"\n#undef FOR_EACH_TYPE\n#define FOR_EACH_TYPE(X) X(Q4_S, q4_s)\n'
    for name in ("repack", "matvec"):
        (tree.root / "csrc" / "cuda" / f"{name}_q4_s.cu").write_text(f'{only}#include "{name}.cu"\n')
    (tree.root / "csrc" / "cuda" / "dequant_q4_s.cu").write_text(f'{only}#include "dequant.cu"\n')
    for name in ("dequant.cu", "dequant_params.h"):
        shutil.copy2(tree.root / "tests" / "gpu" / "kernels" / name, tree.root / "csrc" / "cuda" / name)
    names = ("repack", "matvec", "dequant")
    made = compile_kernels(tree, *(f"csrc/cuda/{name}_q4_s.cu" for name in names))
    for name, kernel in zip(names, (b"repack_q4_s", b"matvec_q4_s_8", b"dequant_q4_s"), strict=True):
        assert kernel in made[f"{name}_q4_s"]


def test_a_route_is_three_places(tree: Tree):
    heading = "## A route: three places"
    code, docs, tests = changed(tree, API, heading, leave_out="docs/http.md")
    assert code == {"wsgi/native/limits.py", "wsgi/app.py"} and not docs and not tests
    tree.prove("route")
    row = [e for e in edits(ROOT / "docs" / API, heading) if e.file == "docs/http.md"]
    assert len(row) == 1
    assert "GET /limits" in tree.pytest("tests/service/test_docs.py", fails=True), "a route without its row was let by"
    perform(row[0], tree.root)
    tree.pytest("tests/service/test_docs.py", "tests/packaging/test_imports.py", "-k", "test_docs or http or libraries")


def test_a_serve_option_is_two_places(tree: Tree):
    code, docs, tests = changed(tree, API, "## A serve option: two places")
    assert code == {"worker_orcd/config.py", "wsgi/service.py"} and not tests
    assert docs == {"docs/cli.md"}, "its documentation"
    tree.prove("serve_option")
    tree.pytest("tests/cli/test_serve_options.py")


@NO_GXX
def test_a_sampling_parameter_is_four_places(tree: Tree):
    code, docs, tests = changed(tree, API, "## A sampling parameter: four places")
    engines = {"csrc/cpu/sample.cpp", "csrc/cuda/sample_row.cuh"}
    assert code == {"worker_orcd/engine/sampling.py", "csrc/params/sampling.h", *engines}
    assert docs == {"docs/http.md", "docs/python.md"}, "its documentation"
    assert tests == {"tests/helpers/sampling_reference.py"}
    tree.rebuild_cpu()
    tree.prove("sampling_parameter")
    tree.pytest(
        "tests/engine/test_sampling.py", "tests/service/test_docs.py", "tests/packaging/test_params_mirror.py",
        "tests/compiled/test_cpu_sampling.py",
    )  # fmt: skip


def test_a_sampling_parameter_gets_its_kernel(tree: Tree):
    tree.perform(API, "## A sampling parameter: four places")
    made = compile_kernels(tree, "csrc/cuda/sample.cu")
    assert all(name in made["sample"] for name in (b"sample_max", b"sample_draw"))


def test_a_block_that_no_longer_fits_is_an_error(tmp_path: Path):
    (tmp_path / "a.py").write_text("x = 1\ny = 1\n")
    for edit in (Edit("a.py", "", "", "z"), Edit("a.py", "after", "= 1", "z"), Edit("a.py", "instead", "w", "z")):
        with pytest.raises(AssertionError, match=r"is there already|2 lines|0 lines"):
            perform(edit, tmp_path)
    perform(Edit("a.py", "after", "x =", "z = 1\n"), tmp_path)
    perform(Edit("a.py", "before", "x =", "w = 1\n"), tmp_path)
    perform(Edit("a.py", "instead", "y =", "v = 1\n"), tmp_path)
    assert (tmp_path / "a.py").read_text() == "w = 1\nx = 1\nz = 1\nv = 1\n"
    page = tmp_path / "page.md"
    page.write_text("## One\n```python file=a.py below=x\n```\n## Two\n```python\nshown\n```\n")
    with pytest.raises(ValueError, match="not understood"):
        edits(page, "## One")
    assert edits(page, "## Two") == []
