"""cuBLAS as a yardstick: products of bfloat16 matrices of the shapes of a model's, with float32 sums.

The library is found where CUDA's wheels (nvidia-cublas) or toolkits put it and called by ctypes; where it is absent
nothing is lost but the comparison. Knows no model and no engine.
"""

from __future__ import annotations

import ctypes
from typing import Any

#: of cublas_api.h and library_types.h
_OP_N, _OP_T, _R_32F, _R_16BF, _COMPUTE_32F, _DEFAULT_ALGORITHM = 0, 1, 0, 14, 68, -1
#: workspace of the library, so that it allocates nothing while its calls are recorded
_WORKSPACE_BYTES = 64 << 20


class CublasError(Exception):
    """The library is absent, or a call of it failed; the message is one line."""


def load() -> ctypes.CDLL:
    """The library.

    Raises:
        CublasError: it cannot be found or loaded.
    """
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        return ctypes.CDLL(load_nvidia_dynamic_lib("cublas").abs_path)
    except (ImportError, OSError, RuntimeError, TypeError) as error:  # the finder's own errors are RuntimeErrors
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(": ")[0]
        raise CublasError(f"cuBLAS is not installed (pip install nvidia-cublas): {reason[:200]}") from None


class Cublas:
    """A handle whose products are queued in one stream.

    Args:
        library: what `load` gives.
        context, stream: of the GPU, of `_driver`; the context is current in this thread.

    Raises:
        CublasError: a call of the library failed.
    """

    def __init__(self, library: ctypes.CDLL, context: Any, stream: Any) -> None:
        self._library, self._handle, self._workspace = library, ctypes.c_void_p(), None
        self._call("cublasCreate_v2", ctypes.byref(self._handle))
        try:
            self._call("cublasSetStream_v2", self._handle, ctypes.c_void_p(stream.pointer))
            self._workspace = context.allocate(_WORKSPACE_BYTES, "cublas")
            workspace = ctypes.c_void_p(self._workspace.pointer)
            self._call("cublasSetWorkspace_v2", self._handle, workspace, ctypes.c_size_t(_WORKSPACE_BYTES))
        except BaseException:
            self.close()
            raise

    @property
    def version(self) -> str:
        """Of the library, for example "13.1.0"."""
        number = ctypes.c_int()
        self._call("cublasGetVersion_v2", self._handle, ctypes.byref(number))
        return f"{number.value // 10000}.{number.value // 100 % 100}.{number.value % 100}"

    def product(self, out: int, w: int, x: int, n_rows: int, n_out: int, k: int) -> None:
        """Queue out = x W^T.

        Args:
            out, w, x: device addresses of float32 [n_rows, n_out], bfloat16 [n_out, k] and bfloat16 [n_rows, k].
        """
        one, zero = ctypes.c_float(1), ctypes.c_float(0)
        self._call(
            "cublasGemmEx", self._handle, _OP_T, _OP_N, n_out, n_rows, k, ctypes.byref(one),
            ctypes.c_void_p(w), _R_16BF, k, ctypes.c_void_p(x), _R_16BF, k, ctypes.byref(zero),
            ctypes.c_void_p(out), _R_32F, n_out, _COMPUTE_32F, _DEFAULT_ALGORITHM,
        )  # fmt: skip

    def close(self) -> None:
        """Let go of the handle; nothing of it may be running. Idempotent."""
        if self._handle:
            self._library.cublasDestroy_v2(self._handle)
            self._handle = ctypes.c_void_p()
        if self._workspace is not None:
            self._workspace.close()
            self._workspace = None

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self._library, name)(*args)
        if status != 0:
            raise CublasError(f"{name} failed: status {status}")
