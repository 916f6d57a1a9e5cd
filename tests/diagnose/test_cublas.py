"""cuBLAS by ctypes: what C gets of each call, on a library of the same functions; and where there is none."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

from worker_orcd.diagnose import cublas
from worker_orcd.diagnose.cublas import Cublas, CublasError

#: the prototypes are those of cublas_api.h
STAND_IN = """
#include <stddef.h>
#include <string.h>
typedef struct { int ta, tb, m, n, k, at, lda, bt, ldb, ct, ldc, compute, algorithm; const void *a, *b; void *c;
                 float alpha, beta; void *handle, *stream, *workspace; size_t workspace_bytes; int created; } Seen;
Seen seen;
int fails;
int cublasCreate_v2(void** h) { *h = (void*)0x123456789abc; ++seen.created; return 0; }
int cublasDestroy_v2(void* h) { if (h == (void*)0x123456789abc) --seen.created; return 0; }
int cublasSetStream_v2(void* h, void* s) { seen.handle = h, seen.stream = s; return fails; }
int cublasSetWorkspace_v2(void* h, void* w, size_t n) { seen.workspace = w, seen.workspace_bytes = n; return 0; }
int cublasGetVersion_v2(void* h, int* v) { *v = 130203; return 0; }
int cublasGemmEx(void* h, int ta, int tb, int m, int n, int k, const void* alpha, const void* a, int at, int lda,
                 const void* b, int bt, int ldb, const void* beta, void* c, int ct, int ldc, int compute, int algo) {
    Seen s = {ta, tb, m, n, k, at, lda, bt, ldb, ct, ldc, compute, algo, a, b, c, *(float*)alpha, *(float*)beta,
              h, seen.stream, seen.workspace, seen.workspace_bytes, seen.created};
    seen = s;
    return fails;
}
"""
NUMBERS = ("ta", "tb", "m", "n", "k", "at", "lda", "bt", "ldb", "ct", "ldc", "compute", "algorithm")


class Seen(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in NUMBERS),
        *((name, ctypes.c_void_p) for name in "abc"),
        ("alpha", ctypes.c_float),
        ("beta", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("handle", "stream", "workspace")),
        ("workspace_bytes", ctypes.c_size_t),
        ("created", ctypes.c_int),
    )


@pytest.fixture
def library(tmp_path):
    if shutil.which("gcc") is None:
        pytest.skip("the stand-in needs gcc")
    (tmp_path / "cublas.c").write_text(STAND_IN)
    command = ["gcc", "-shared", "-fPIC", "-o", tmp_path / "libcublas.so", tmp_path / "cublas.c"]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(tmp_path / "libcublas.so"))


class Context:
    """Hands out one allocation."""

    def __init__(self) -> None:
        self.held = 0

    def allocate(self, nbytes, label):
        self.held += 1
        return SimpleNamespace(
            pointer=0x7F0000000000, nbytes=nbytes, close=lambda: setattr(self, "held", self.held - 1)
        )


STREAM = SimpleNamespace(pointer=0x5555AAAABBBB)


def test_a_call_has_the_arguments_that_c_expects(library):
    """Addresses past 32 bits, and the row-major product as the column-major one that it is."""
    context, seen = Context(), Seen.in_dll(library, "seen")
    handle = Cublas(library, context, STREAM)
    assert handle.version == "13.2.3" and seen.created == 1
    handle.product(0x7E0000000010, 0x7E0000000020, 0x7E0000000030, 3, 500, 70)
    assert [getattr(seen, name) for name in NUMBERS] == [1, 0, 500, 3, 70, 14, 70, 14, 70, 0, 500, 68, -1]
    assert (seen.c, seen.a, seen.b) == (0x7E0000000010, 0x7E0000000020, 0x7E0000000030)
    assert (seen.alpha, seen.beta, seen.handle, seen.stream) == (1.0, 0.0, 0x123456789ABC, STREAM.pointer)
    assert (seen.workspace, seen.workspace_bytes) == (0x7F0000000000, 64 << 20)
    ctypes.c_int.in_dll(library, "fails").value = 13
    with pytest.raises(CublasError, match="cublasGemmEx failed: status 13"):
        handle.product(1, 2, 3, 4, 5, 6)
    handle.close()
    handle.close()
    assert seen.created == context.held == 0


def test_a_handle_that_cannot_be_set_up_is_let_go(library):
    context, seen = Context(), Seen.in_dll(library, "seen")
    ctypes.c_int.in_dll(library, "fails").value = 7
    with pytest.raises(CublasError, match="cublasSetStream_v2 failed: status 7"):
        Cublas(library, context, STREAM)
    assert seen.created == context.held == 0


@pytest.mark.parametrize("error", [RuntimeError("no libcublas.so.13\nand more"), OSError("no libcublas.so.13"), None])
def test_where_there_is_none_it_says_what_to_install(error, monkeypatch):
    finder = ModuleType("cuda.pathfinder")
    if error is not None:  # None: a finder of before it could load

        def load(name):
            assert name == "cublas"
            raise error

        finder.load_nvidia_dynamic_lib = load
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", finder)
    with pytest.raises(CublasError, match=r"pip install nvidia-cublas") as e:
        cublas.load()
    assert "\n" not in str(e.value) and (error is None or "no libcublas.so.13" in str(e.value))


def test_what_is_found_is_loaded(library, monkeypatch):
    finder = ModuleType("cuda.pathfinder")
    finder.load_nvidia_dynamic_lib = lambda name: SimpleNamespace(abs_path=library._name)
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", finder)
    assert Cublas(cublas.load(), Context(), STREAM).version == "13.2.3"
