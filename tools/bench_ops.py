"""Times the kernels that are no matrix products on the shapes of real models: us, GB/s or TFLOP/s.

    python tools/bench_ops.py --json out.json [--only decode]

KV caches rotate among copies that together exceed the L2 cache. Times are medians of graph replays with programmatic
dependent launch. Needs a GPU. Prints a short table last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]

from gpu.kernel_harness import CONSTANTS, Gpu, params  # noqa: E402
from gpu.ops_host import KV_BLOCK, rule  # noqa: E402
from gpu.test_sample import Sampler, is_short  # noqa: E402

from worker_orcd._nodes import attention_heads, decode_grid, decode_max_splits, decode_shapes  # noqa: E402
from worker_orcd.cuda import layout  # noqa: E402

#: bytes of KV cache to rotate through: well over the L2 of the GPUs this is for
ROTATE = 256 << 20
#: name, n_head, n_head_kv, head_dim
MODELS = [("qwen 0.5b", 14, 2, 64), ("llama 8b", 32, 8, 128), ("phi3 mini", 32, 32, 96), ("gpt-oss", 64, 8, 64)]
DECODE = [(1, 128), (1, 256), (1, 512), (1, 2048), (1, 32768), (8, 2048), (64, 512)]  # sequences, keys of each
PREFILL = [(1, 512), (1, 2048), (8, 256)]  # sequences, rows of each
NORMS = [(896, 1), (896, 64), (2880, 1), (3072, 2048), (4096, 1)]
SAMPLES = {
    "greedy": {"temperature": 0.0},
    "t=1": {},
    "top-p": {"top_p": 0.9},
    "top-k, top-p": {"top_k": 40, "top_p": 0.9},
}


class Cache:
    """A paged cache of `n_seqs` sequences of `n_keys`, `n_copies` times in one arena."""

    def __init__(self, gpu: Gpu, n_seqs: int, n_keys: int, n_head_kv: int, head_dim: int) -> None:
        rng = np.random.default_rng(0)
        self.max_blocks = -(-n_keys // KV_BLOCK)
        n_blocks = n_seqs * self.max_blocks
        self.block_halves = n_head_kv * 2 * KV_BLOCK * head_dim
        self.n_bytes = 2 * n_blocks * self.block_halves
        self.n_copies = max(1, min(24, ROTATE // self.n_bytes))
        some = rng.standard_normal((min(n_blocks, 64), self.block_halves), np.float32).astype(np.float16)
        halves = np.resize(some, (self.n_copies * n_blocks, self.block_halves))
        self.arena = gpu.buffer(halves, guard=False)
        self.tables = gpu.buffer(rng.permutation(n_blocks).astype(np.int32).reshape(n_seqs, -1))

    def address(self, i: int) -> int:
        """The arena of copy i."""
        return self.arena.ptr + i * self.n_bytes


def decode(gpu: Gpu, shape: tuple[int, int, int], n_seqs: int, n_keys: int) -> dict:
    """Rotation, cache write and attention of one row per sequence at the end of `n_keys` keys."""
    n_head, n_head_kv, head_dim = shape
    cache, width = Cache(gpu, n_seqs, n_keys, n_head_kv, head_dim), (n_head + 2 * n_head_kv) * head_dim
    x = gpu.buffer(np.random.default_rng(1).standard_normal((n_seqs, width), np.float32))
    inv_freq = gpu.buffer((10000.0 ** (-np.arange(head_dim // 2) * 2 / head_dim)).astype(np.float32))
    out = gpu.empty((n_seqs, n_head * head_dim))
    positions = gpu.buffer(np.full(n_seqs, n_keys - 1, np.int32))
    slots = gpu.buffer(np.arange(n_seqs, dtype=np.int32))
    max_splits, heads = decode_max_splits(n_keys, 0), attention_heads(n_head, n_head_kv)
    partial = gpu.empty((n_seqs, n_head, max_splits, head_dim + 4))
    counters = gpu.buffer(np.zeros((n_seqs, heads), np.uint32))
    shapes = decode_shapes(head_dim, gpu.max_smem)
    grid_x, groups, depth, smem = decode_grid(n_seqs, heads, max_splits, shapes, gpu.n_sm, gpu.max_smem)
    kernel = gpu.kernel("attention_decode", f"attention_decode_{head_dim}")
    k, v = (x.ptr + 4 * n * head_dim for n in (n_head, n_head + n_head_kv))
    launches = [
        params("AttentionDecodeParams", q=x, k=k, v=v, inv_freq=inv_freq, kv=cache.address(i),
               block_table=cache.tables, positions=positions, slots=slots, out=out, partial=partial, counters=counters,
               q_stride=width, k_stride=width, v_stride=width, out_stride=n_head * head_dim, n_head=n_head,
               n_head_kv=n_head_kv, n_rot=head_dim, rope_type=1, max_blocks=cache.max_blocks, max_splits=max_splits,
               groups=groups, depth=depth, kv_group=n_head // n_head_kv,
               head_tiles=rule("decode_head_tiles", n_head, n_head_kv), scale=head_dim**-0.5, mscale=1.0)
        for i in range(cache.n_copies)
    ]  # fmt: skip
    turn = itertools.cycle(launches)
    threads = groups * CONSTANTS["DECODE_THREADS"]
    seconds = gpu.time(
        lambda: gpu.launch(kernel, (grid_x, heads, n_seqs), threads, next(turn), smem=smem, pdl=True),
        n_inner=max(8, cache.n_copies), n_repeat=9,
    )  # fmt: skip
    return {"us": seconds * 1e6, "GB/s": 4 * n_seqs * n_keys * n_head_kv * head_dim / seconds / 1e9}


def prefill(gpu: Gpu, shape: tuple[int, int, int], n_seqs: int, n_rows: int) -> dict:
    """Causal attention of whole prompts."""
    n_head, n_head_kv, head_dim = shape
    cache, width = Cache(gpu, n_seqs, n_rows, n_head_kv, head_dim), n_head * head_dim
    q = gpu.buffer(np.random.default_rng(1).standard_normal((n_seqs * n_rows, width), np.float32))
    out = gpu.empty((n_seqs * n_rows, width))
    tiles = [
        (s * n_rows + at, min(KV_BLOCK, n_rows - at), at, s) for s in range(n_seqs) for at in range(0, n_rows, KV_BLOCK)
    ]
    tiles.sort(key=lambda t: -t[2])
    dtiles = gpu.buffer(np.array(tiles, np.int32))
    p = params("AttentionPrefillParams", q=q, kv=cache.arena, block_table=cache.tables, tiles=dtiles, out=out,
               q_stride=width, out_stride=width, n_head=n_head, n_head_kv=n_head_kv, max_blocks=cache.max_blocks,
               scale=head_dim**-0.5)  # fmt: skip
    how = "warpgroup" if gpu.arch == layout.WGMMA_ARCH else "prefill"
    kernel, smem = gpu.kernel(f"attention_{how}", f"attention_{how}_{head_dim}"), rule(f"{how}_smem_bytes", head_dim)
    seconds = gpu.time(
        lambda: gpu.launch(kernel, (len(tiles), n_head), 128, p, smem=smem, pdl=True), n_inner=8, n_repeat=9
    )
    operations = 4 * head_dim * n_head * n_seqs * n_rows * (n_rows + 1) / 2
    return {"us": seconds * 1e6, "TFLOP/s": operations / seconds / 1e12}


def norm(gpu: Gpu, n: int, n_rows: int) -> dict:
    """RMS norm of rows."""
    x = gpu.buffer(np.random.default_rng(1).standard_normal((n_rows, n), np.float32))
    w, out = gpu.buffer(np.ones(n, np.float32)), gpu.empty((n_rows, n))
    p = params("NormParams", x=x, weight=w, out=out, x_stride=n, out_stride=n, n=n, eps=1e-6)
    kernel, threads = gpu.kernel("norm", "norm_vec4"), rule("norm_threads", n, 0)
    seconds = gpu.time(lambda: gpu.launch(kernel, n_rows, threads, p, pdl=True))
    return {"us": seconds * 1e6, "GB/s": 8 * n_rows * n / seconds / 1e9}


def rope_kv(gpu: Gpu, shape: tuple[int, int, int], n_rows: int) -> dict:
    """Rotation of q and k and the cache write, rows of one sequence."""
    n_head, n_head_kv, head_dim = shape
    cache, width = Cache(gpu, 1, n_rows, n_head_kv, head_dim), (n_head + 2 * n_head_kv) * head_dim
    x = gpu.buffer(np.random.default_rng(1).standard_normal((n_rows, width), np.float32))
    inv_freq = gpu.buffer((10000.0 ** (-np.arange(head_dim // 2) * 2 / head_dim)).astype(np.float32))
    positions, slots = gpu.buffer(np.arange(n_rows, dtype=np.int32)), gpu.buffer(np.zeros(n_rows, np.int32))
    k, v = (x.ptr + 4 * heads * head_dim for heads in (n_head, n_head + n_head_kv))
    p = params("RopeKvParams", q=x, k=k, v=v,
               inv_freq=inv_freq, kv=cache.arena, block_table=cache.tables, positions=positions, slots=slots,
               q_stride=width,
               k_stride=width, v_stride=width, n_head=n_head, n_head_kv=n_head_kv, head_dim=head_dim, n_rot=head_dim,
               rope_type=1, max_blocks=cache.max_blocks, mscale=1.0)  # fmt: skip
    kernel, split = gpu.kernel("rope_kv", "rope_kv"), min(8, -(-width // 1024))
    seconds = gpu.time(lambda: gpu.launch(kernel, (n_rows, split), 256, p, pdl=True))
    return {"us": seconds * 1e6, "GB/s": n_rows * (8 * (n_head + n_head_kv) + 8 * n_head_kv) * head_dim / seconds / 1e9}


def sample(gpu: Gpu, slot: dict, n_rows: int, n_vocab: int) -> dict:
    """The launches of a draw."""
    rng = np.random.default_rng(1)
    sampler = Sampler(gpu, n_rows, n_vocab, [slot | {"seed": s} for s in range(n_rows)])
    logits = (rng.standard_normal((n_rows, n_vocab), np.float32) * 3).astype(np.float32)
    sampler.set_logits(logits, range(n_rows), [0] * n_rows)
    seconds = gpu.time(lambda: sampler.launch(draw=not is_short(slot, n_vocab)))
    return {"us": seconds * 1e6, "GB/s": 4 * n_rows * n_vocab / seconds / 1e9}


def cases() -> list:
    """(what, how, arguments) of every measurement."""
    listed = []
    for name, *shape in MODELS:
        listed += [(f"decode {name} {b} x {n}", decode, (tuple(shape), b, n)) for b, n in DECODE]
        listed += [(f"prefill {name} {b} x {n}", prefill, (tuple(shape), b, n)) for b, n in PREFILL]
        listed += [(f"rope_kv {name} {n} rows", rope_kv, (tuple(shape), n)) for n in (1, 64, 2048)]
    listed += [(f"norm {n} x {rows} rows", norm, (n, rows)) for n, rows in NORMS]
    for rows in (1, 64):
        listed += [(f"sample {what} {rows} rows", sample, (slot, rows, 151936)) for what, slot in SAMPLES.items()]
    return listed


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write every measurement here")
    parser.add_argument("--only", default="", help="only measurements whose name contains this")
    args = parser.parse_args()
    gpu, results = Gpu(), []
    for what, how, arguments in cases():
        if args.only in what:
            results.append({"what": what} | how(gpu, *arguments))
    print(gpu.name)
    for r in results:
        print(
            f"{r['what']:32s}{r['us']:9.1f} us "
            + " ".join(f"{v:8.0f} {k}" for k, v in r.items() if k not in ("what", "us"))
        )
    if args.json:
        args.json.write_text(json.dumps({"gpu": gpu.name, "results": results}, indent=1))


if __name__ == "__main__":
    main()
