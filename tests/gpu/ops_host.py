"""What the tests of the smaller kernels share: rules of shape from csrc/params, float64 errors, a paged cache.

The rules are compiled from the headers themselves, so that tests and kernels cannot drift apart.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from gpu.kernel_harness import CONSTANTS, CSRC, HEADERS, Gpu

KV_BLOCK = CONSTANTS["KV_BLOCK"]


@functools.cache
def _library() -> ctypes.CDLL:
    source = ""
    for header in HEADERS:
        if header.rules:
            source += f'#include "{header.name}"\n'
        for name, (result, arguments) in header.rules.items():
            declared, passed = ", ".join(map(" ".join, arguments)), ", ".join(a for _, a in arguments)
            source += f"{result} host_{name}({declared}) {{ return {name}({passed}); }}\n"
    with tempfile.TemporaryDirectory() as tmp:
        c, so = Path(tmp) / "ops_host.c", Path(tmp) / "ops_host.so"
        c.write_text(source)
        subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-I", str(CSRC), "-o", str(so), str(c)], check=True)
        return ctypes.CDLL(str(so))


def rule(name: str, *args: int) -> int:
    """The function `name` of int32 numbers in csrc/params."""
    result, arguments = next(header.rules[name] for header in HEADERS if name in header.rules)
    assert {result, *(kind for kind, _ in arguments)} == {"int32_t"} and len(args) == len(arguments)
    return int(getattr(_library(), f"host_{name}")(*(ctypes.c_int32(int(a)) for a in args)))


def nmse(got: np.ndarray, want: np.ndarray) -> float:
    """Normalized mean squared error against a float64 reference; NaN where `got` has one."""
    want = want.astype(np.float64)
    return float(((got - want) ** 2).mean() / (want**2).mean())


def check_nmse(got: np.ndarray, want: np.ndarray, limit: float, what: str) -> None:
    """Print the measured error beside its limit and assert it."""
    error = nmse(got, want)
    print(f"{what}: NMSE {error:.2e} (limit {limit:.0e})")
    assert error <= limit, f"{what}: NMSE {error:.3e} > {limit:.0e}"


class PagedCache:
    """A float16 arena of one layer as the kernels lay it out; what no sequence holds is NaN.

    `block_table` int32 [n_seqs, max_blocks]; the blocks of a sequence are scattered over the arena.
    """

    def __init__(self, rng, lengths, n_head_kv: int, head_dim: int, spare_blocks: int = 3, filled: bool = True) -> None:
        self.n_head_kv, self.head_dim = n_head_kv, head_dim
        n_blocks = [-(-max(n, 1) // KV_BLOCK) for n in lengths]
        order = rng.permutation(sum(n_blocks) + spare_blocks).astype(np.int32)
        self.max_blocks = max(n_blocks) + 1
        self.block_table = np.full((len(lengths), self.max_blocks), -1, np.int32)
        self.arena = np.full((len(order), n_head_kv, 2 * KV_BLOCK * head_dim), np.nan, np.float16)
        self.k, self.v = [], []
        start = 0
        for s, n in enumerate(lengths):
            self.block_table[s, : n_blocks[s]] = order[start : start + n_blocks[s]]
            start += n_blocks[s]
            k, v = (rng.standard_normal((n, n_head_kv, head_dim)).astype(np.float16) for _ in range(2))
            self.k.append(k)
            self.v.append(v)
            if filled:
                for position in range(n):
                    self.put(s, position, k[position], v[position])

    def _views(self, seq: int, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Of a position: K [n_head_kv, head_dim / 8, 8] and V [n_head_kv, head_dim]."""
        block, at = self.block_table[seq, position // KV_BLOCK], position % KV_BLOCK
        k, v = self.arena[block].reshape(self.n_head_kv, 2, -1).swapaxes(0, 1)
        tiles = KV_BLOCK // 8
        return (
            k.reshape(self.n_head_kv, tiles, self.head_dim // 8, 8, 8)[:, at // 8, :, at % 8],
            v.reshape(self.n_head_kv, tiles, self.head_dim, 8)[:, at // 8, :, at % 8],
        )

    def put(self, seq: int, position: int, k, v) -> None:
        """K and V of a position, [n_head_kv, head_dim] each."""
        own = self._views(seq, position)
        for to, x in zip(own, (k, v), strict=True):
            to[:] = np.broadcast_to(x, (self.n_head_kv, self.head_dim)).reshape(to.shape)

    def at(self, seq: int, position: int) -> np.ndarray:
        """K and V of a position, [2, n_head_kv, head_dim]."""
        return np.stack([x.reshape(self.n_head_kv, self.head_dim) for x in self._views(seq, position)])


def attention_reference(q, k, v, position: int, scale: float, window: int = 0, sinks=None) -> np.ndarray:
    """float64 attention of one row: q [n_head, head_dim]; k, v [n, n_head_kv, head_dim]. Returns [n_head, head_dim]."""
    first = max(0, position - window + 1) if window else 0
    group = len(q) // k.shape[1]
    k, v = (np.repeat(x[first : position + 1].astype(np.float64), group, 1) for x in (k, v))
    s = np.einsum("hd,nhd->hn", q.astype(np.float64), k) * scale
    top = s.max(1, keepdims=True)
    if sinks is not None:
        top = np.maximum(top, sinks[:, None])
    e = np.exp(s - top)
    total = e.sum(1, keepdims=True) + (np.exp(sinks[:, None] - top) if sinks is not None else 0)
    return np.einsum("hn,nhd->hd", e / total, v)


def view(buffer, offset: int) -> int:
    """The address of element `offset` of a float32 buffer."""
    return buffer.ptr + 4 * offset


def new_gpu() -> Gpu:
    """The device of the kernel tests."""
    return Gpu()
