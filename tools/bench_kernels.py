"""Times the matrix kernels on the shapes of real models: us, GB/s, share of a device copy, TFLOP/s.

    python tools/bench_kernels.py --json out.json [--quick] [--only q4_k]

Weights rotate among copies that together exceed the L2 cache, so that every launch reads memory as a decode step does.
Times are medians of graph replays with programmatic dependent launch. Needs a GPU. Prints a short table last.
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

from gpu.kernel_harness import Gpu  # noqa: E402
from gpu.matmul_host import Decode, Matmul, Matrix  # noqa: E402

from worker_orcd.cuda import layout  # noqa: E402
from worker_orcd.gguf import quants  # noqa: E402

#: bytes of weights to rotate through: well over the L2 of the GPUs this is for
ROTATE = 256 << 20
#: (what, type, n_outs of one launch, k)
DECODE = [
    ("qwen qk", "Q5_0", (896, 128), 896),
    ("qwen o", "Q5_0", (896,), 896),
    ("qwen gate up", "Q5_0", (4864, 4864), 896),
    ("qwen down", "Q6_K", (896,), 4864),
    ("qwen output", "Q8_0", (151936,), 896),
    ("phi3 qkv", "Q5_K", (9216,), 3072),
    ("phi3 o", "Q4_K", (3072,), 3072),
    ("phi3 gate up", "Q4_K", (16384,), 3072),
    ("phi3 down", "Q6_K", (3072,), 8192),
    ("phi3 output", "Q6_K", (32064,), 3072),
    ("gpt-oss qkv", "Q8_0", (4096, 512, 512), 2880),
    ("gpt-oss o", "Q8_0", (2880,), 4096),
    ("gpt-oss output", "Q8_0", (201088,), 2880),
    *[(f"{t.name} 4096", t.name, (4096,), 4096) for t in quants.TYPES.values()],
]
ROWS = (1, 2, 4, 8, 16, 32, 64)
PREFILL = [
    ("qwen qk", "Q5_0", 1024, 896), ("qwen o", "Q5_0", 896, 896), ("qwen gate", "Q5_0", 4864, 896),
    ("qwen down", "Q6_K", 896, 4864), ("phi3 qkv", "Q5_K", 9216, 3072), ("phi3 gate up", "Q4_K", 16384, 3072),
    ("phi3 down", "Q6_K", 3072, 8192), ("gpt-oss qkv", "Q8_0", 5120, 2880),
    *[(f"{t.name} 4096", t.name, 4096, 4096) for t in quants.TYPES.values()],
]  # fmt: skip
PREFILL_ROWS = (64, 512, 2048)


def copies(gpu: Gpu, type_name: str, n_outs: tuple[int, ...], k: int) -> tuple[list[list[Matrix]], int]:
    """Sets of matrices of random packed tiles that exceed the cache, and the bytes of one set."""
    type_id = quants.BY_NAME[type_name].id
    sizes = [layout.packed_bytes(type_id, n, k) for n in n_outs]
    rng, sets = np.random.default_rng(0), []
    for _ in range(max(1, min(32, -(-ROTATE // sum(sizes))))):
        matrices = []
        for n, size in zip(n_outs, sizes, strict=True):
            # Small bytes: whatever they are scales or codes of, the products are finite and not trivial.
            w = rng.integers(0, 48, size, dtype=np.uint8)
            matrices.append(Matrix(type_id, n, k, gpu.buffer(w, guard=False)))
        sets.append(matrices)
    return sets, sum(sizes)


def copy_rate(gpu: Gpu) -> float:
    """Bytes a second, read plus written, of a large device-to-device copy."""
    n = 1 << 30
    a, b = gpu.empty(n, np.uint8, guard=False), gpu.empty(n, np.uint8, guard=False)
    return 2 * n / gpu.time(lambda: gpu.copy(b, a, n), n_inner=2)


def rotating(launches: list) -> object:
    """A callable that queues the next of `launches` at each call."""
    turn = itertools.cycle(launches)
    return lambda: next(turn).run(pdl=True)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write every measurement here")
    parser.add_argument("--only", default="", help="only shapes whose name or type contains this")
    parser.add_argument("--quick", action="store_true", help="fewer row counts")
    args = parser.parse_args()
    gpu = Gpu()
    rate = copy_rate(gpu)
    wanted = lambda what, t: args.only.lower() in f"{what} {t}".lower()  # noqa: E731
    results, table = [], [f"{gpu.name}: copy {rate / 1e9:.0f} GB/s (read + write)"]

    rows_decode = (1, 8, 64) if args.quick else ROWS
    table.append(f"{'decode: us (% of copy)':34s}" + "".join(f"{n:>5d} rows  " for n in rows_decode))
    for what, type_name, n_outs, k in DECODE:
        if not wanted(what, type_name):
            continue
        sets, n_bytes = copies(gpu, type_name, (sum(n_outs),), k)  # side by side, they are one to a launch
        line = f"{what:16s} {type_name:5s} {n_bytes / 1e6:7.2f} MB  "
        for n_rows in rows_decode:
            x = gpu.buffer(np.random.default_rng(1).standard_normal((n_rows, k), np.float32))
            outs = [gpu.empty((n_rows, sum(n_outs)))]
            launches = [Decode(gpu, s, x, outs, n_rows) for s in sets]
            seconds = gpu.time(rotating(launches), n_inner=len(sets) * -(-16 // len(sets)), n_repeat=9)
            share = n_bytes / seconds / rate
            (_, launch, _), *_ = launches[0].launches
            results.append({"kernel": launch.kernel, "what": what, "n_out": n_outs, "k": k, "rows": n_rows,
                            "us": seconds * 1e6, "GB/s": n_bytes / seconds / 1e9, "of_copy": share})  # fmt: skip
            line += f"{seconds * 1e6:7.1f} {100 * share:3.0f}%"
            del launches, outs
        table.append(line)
        del sets

    rows_prefill = (2048,) if args.quick else PREFILL_ROWS
    table.append(f"{'prefill: us (TFLOP/s)':34s}" + "".join(f"{n:>6d} rows    " for n in rows_prefill))
    for what, type_name, n_out, k in PREFILL:
        if not wanted(what, type_name):
            continue
        sets, n_bytes = copies(gpu, type_name, (n_out,), k)
        m, line = sets[0][0], f"{what:16s} {type_name:5s} {n_out:5d} x {k:4d} "
        for n_rows in rows_prefill:
            x = gpu.buffer(np.random.default_rng(1).standard_normal((n_rows, k), np.float32))
            out = gpu.empty((n_rows, n_out))
            product = Matmul(gpu, m, x, out, n_rows)
            product.run()
            seconds = gpu.time(lambda p=product: p.run(pdl=True, convert_x=False), n_inner=5, n_repeat=9)
            tflops = 2e-12 * n_rows * n_out * k / seconds
            results.append({"kernel": product.launch.kernel, "what": what, "n_out": n_out, "k": k, "rows": n_rows,
                            "us": seconds * 1e6, "TFLOP/s": tflops})  # fmt: skip
            line += f"{seconds * 1e6:8.1f} ({tflops:4.0f})  "
        table.append(line)
        del sets, m
    if args.json:
        args.json.write_text(json.dumps({"gpu": gpu.name, "copy_bytes_per_s": rate, "results": results}, indent=1))
    print("\n".join(table))


if __name__ == "__main__":
    main()
