"""Prefill and decode speed of worker-orcd and of llama.cpp: one file, one machine, the same threads, in one sitting.

Usage: python tools/compare_llama_cpp.py MODEL.gguf [--python PATH] [--threads N] [-p 128] [-n 64] [--repeat 5] [--json]

llama.cpp is used through the package llama-cpp-python. `--python` names the interpreter that has it, where it is not
this one. The two programs take turns, so that neither has the machine in a better hour; the process that waits is idle.
One sequence decodes: llama.cpp is fed random ids and uses no sampler, worker-orcd begins with a random id and goes on
with its greedy sampler. Prints the medians and their ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

#: the process with llama.cpp reads lines `prefill N` and `decode N` and answers with seconds
_PEER = "--peer"


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == [_PEER]:
        peer(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
        return
    from worker_orcd.machine import usable_cores

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--python", default=sys.executable, help="interpreter that can import llama_cpp")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("-p", "--n-prompt", type=int, default=128)
    parser.add_argument("-n", "--n-gen", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    tests = {"prefill": args.n_prompt, "decode": args.n_gen}
    llama = LlamaCpp(args.python, args.model, args.threads, max(tests.values()))
    try:
        report = compare(llama, args, tests)
    finally:
        llama.close()
    if args.json:
        print(json.dumps(report))
        return
    print(f"{report['model']}, CPU, {args.threads} threads, median of {args.repeat}, llama-cpp-python {llama.version}")
    print(f"{'tokens/s':14s} {'worker-orcd':>12s} {'llama.cpp':>12s} {'ratio':>8s}")
    for name, row in report["tests"].items():
        print(f"{name:14s} {row['worker_orcd']:12.1f} {row['llama_cpp']:12.1f} {row['ratio']:8.2f}")


def compare(llama: LlamaCpp, args: argparse.Namespace, tests: dict[str, int]) -> dict[str, object]:
    """Let the two take turns. One untimed round warms caches and clocks."""
    from worker_orcd.diagnose.bench import Bench

    seconds: dict[tuple[str, str], list[float]] = {}
    with Bench(args.model, "cpu", max(tests.values()), n_threads=args.threads) as ours:
        for turn in range(args.repeat + 1):
            for test, n in tests.items():
                mine = ours.prefill(n) if test == "prefill" else ours.decode(n)[0]
                theirs = llama.time(test, n)
                if turn:
                    seconds.setdefault((test, "worker_orcd"), []).append(mine)
                    seconds.setdefault((test, "llama_cpp"), []).append(theirs)
    rows = {}
    for test, n in tests.items():
        mine, theirs = (n / statistics.median(seconds[test, who]) for who in ("worker_orcd", "llama_cpp"))
        rows[f"{test} {n}"] = {"worker_orcd": mine, "llama_cpp": theirs, "ratio": mine / theirs}
    return {
        "model": os.path.basename(args.model),
        "threads": args.threads,
        "repeat": args.repeat,
        "llama_cpp_python": llama.version,
        "tests": rows,
    }


class LlamaCpp:
    """llama.cpp in a process of its own."""

    def __init__(self, python: str, model: str, threads: int, n_positions: int) -> None:
        command = [python, os.path.abspath(__file__), _PEER, os.path.abspath(model), str(threads), str(n_positions)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self._process.stdout.readline().strip()
        if not self.version:
            sys.exit(f"error: {python} cannot run llama.cpp (is llama-cpp-python installed there? see --python)")

    def time(self, test: str, n: int) -> float:
        """Seconds of one test."""
        print(test, n, file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


def peer(model: str, threads: int, n_positions: int) -> None:
    """The side with llama.cpp: answer one line of seconds for each test asked for."""
    import random

    import llama_cpp

    llm = llama_cpp.Llama(
        model,
        n_ctx=max(512, n_positions),
        n_batch=max(512, n_positions),
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=False,
        verbose=False,
    )
    pick = random.Random(1)
    ids = [pick.randrange(llm.n_vocab()) for _ in range(n_positions)]
    print(llama_cpp.__version__, flush=True)
    for line in sys.stdin:
        test, n = line.split()
        llm.reset()
        began = time.perf_counter()
        if test == "prefill":
            llm.eval(ids[: int(n)])
        else:
            for i in range(int(n)):
                llm.eval(ids[i : i + 1])
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
