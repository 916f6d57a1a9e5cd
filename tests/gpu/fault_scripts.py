"""What test_faults.py and test_device_memory.py run in processes of their own: things that may take a process down, and
measurements that need one that has done nothing else. Each prints one JSON object.

    python fault_scripts.py memory|sweep|poison MODEL DEVICE_INDEX [SECONDS]
"""

from __future__ import annotations

import collections
import faulthandler
import gc
import json
import struct
import sys
import threading
import time

from worker_orcd import LLM, SamplingParams, _driver
from worker_orcd.engine.protocol import EngineConfig
from worker_orcd.errors import CudaError, NotReady, WorkerError
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import plan

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7]]


def open_llm(model: str, index: int, **more: object) -> LLM:
    return LLM(model, device=f"cuda:{index}", max_seqs=2, max_batch_tokens=64, progress=False, **more)


def ids_of(llm: LLM) -> list[tuple[int, ...]]:
    return [c.token_ids for c in llm.generate(PROMPTS, GREEDY)]


def memory(model: str, index: int, kv_bytes: int) -> dict[str, object]:
    """Device memory before, while and after an engine with a KV cache of about `kv_bytes` is there; twice, and then a
    hundred generations."""
    from worker_orcd._engine import CudaEngine

    context = _driver.Context(index)
    free = [context.memory()[0]]
    kv_bytes = min(kv_bytes, int(0.6 * free[0]))
    rounds = []
    with ModelFile(model) as mf:
        p = plan.build(mf)
        per_block = sum(64 * len(g.layers) * 4 * p.n_head_kv * p.head_dim for g in p.kv_groups)
        config = EngineConfig(64, 2048, p.context_length, (kv_bytes // per_block,) * len(p.kv_groups))
        for _ in range(2):
            seen: list[int] = []
            engine = CudaEngine(mf, p, config, device=index, on_plan=lambda plan, n, seen=seen: seen.append(n))
            ready = context.memory()[0]
            rounds.append(
                {
                    "planned": engine.vram_plan.required,
                    "resident": engine.vram_plan.resident,
                    "free_when_planned": seen[0],
                    "used": free[-1] - ready,
                    "labels": sorted(m.label for m in engine.context.allocations()),
                    "faults": engine.check_residency(),
                }
            )
            engine.close()
            del engine
            gc.collect()
            free.append(context.memory()[0])
    with open_llm(model, index) as llm:
        ids = ids_of(llm)
        before = context.memory()[0]
        same = all(ids_of(llm) == ids for _ in range(100))
        generated = before - context.memory()[0]
    gc.collect()
    return {
        "rounds": rounds,
        "free": free,
        "free_at_end": context.memory()[0],
        "taken_by_100_generations": generated,
        "same_ids": same,
    }


def sweep(model: str, index: int, seconds: float) -> dict[str, object]:
    """Make the n-th driver call of load + generate + close fail, for as many n as fit `seconds`; then each n-th call of
    a generation of one engine, which must do the next one right."""
    outer = _driver.Context(index)

    def whole() -> list[tuple[int, ...]]:
        with open_llm(model, index) as llm:
            return ids_of(llm)

    expected = whole()
    gc.collect()
    whole()
    gc.collect()
    baseline = outer.memory()[0]
    began = time.monotonic()
    _driver._fail_nth(1 << 40)
    whole()
    n_calls = (1 << 40) - _driver._fail_nth(0)
    one = time.monotonic() - began
    stride = max(1, round(n_calls * one / (0.7 * seconds)))
    calls: collections.Counter[str] = collections.Counter()
    problems, most, tried, survived = [], 0, 0, 0
    for n in range(1, n_calls + 1, stride):
        _driver._fail_nth(n)
        tried += 1
        try:
            if whole() != expected:
                problems.append(f"call {n}: other ids")
            survived += 1
        except CudaError as error:
            calls[str(error.fields.get("call"))] += 1
        except Exception as error:
            problems.append(f"call {n}: {type(error).__name__}: {error}")
        _driver._fail_nth(0)
        gc.collect()
        most = max(most, baseline - outer.memory()[0])
    whole()
    gc.collect()
    lost = baseline - outer.memory()[0]
    with open_llm(model, index) as llm:
        ids_of(llm)
        _driver._fail_nth(1 << 40)
        ids_of(llm)
        n_generate = (1 << 40) - _driver._fail_nth(0)
        refused = 0
        for n in range(1, n_generate + 1):
            _driver._fail_nth(n)
            try:
                ids_of(llm)
            except CudaError:
                refused += 1
            except Exception as error:
                problems.append(f"generation, call {n}: {type(error).__name__}: {error}")
            _driver._fail_nth(0)
            if ids_of(llm) != expected:
                problems.append(f"generation, call {n}: wrong ids afterwards")
    return {
        "n_calls": n_calls,
        "stride": stride,
        "tried": tried,
        "survived": survived,
        "calls": calls,
        "lost": lost,
        "most": most,
        "n_generate": n_generate,
        "refused": refused,
        "problems": problems[:20],
        "n_problems": len(problems),
        "threads": [t.name for t in threading.enumerate() if t.name.startswith(("orcd", "upload"))],
    }


def poison(model: str, index: int) -> dict[str, object]:
    """Run jobs in eight threads, then a kernel with an address that is nobody's: how each thread ends."""
    fatal: list[WorkerError] = []
    llm = LLM(model, device=f"cuda:{index}", max_seqs=8, progress=False, on_fatal=fatal.append)
    ends: list[str] = []
    done = [0] * 8

    def work(i: int) -> None:
        try:
            while True:
                llm.submit([1 + i, 2, 3], SamplingParams(max_tokens=200, seed=i, ignore_eos=True)).completion()
                done[i] += 1
        except WorkerError as error:
            ends.append(f"{error.code}{' sticky' if isinstance(error, CudaError) and error.sticky else ''}")

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(8)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 30
    while min(done) < 1 and time.monotonic() < end:
        time.sleep(0.01)
    context = llm._loop._engine.context
    kernel = context.load("repack").kernel("repack_q8_0")
    stream = context.stream()
    began = time.monotonic()
    kernel.launch(stream, (1, 1, 1), 256, 0, struct.pack("<QQq4i", 0x10, 0x10, 34, 32, 1, 0, 1))  # RepackParams
    for thread in threads:
        thread.join(20)
    seconds = time.monotonic() - began
    try:
        llm.submit([1], GREEDY)
        refused = "accepted"
    except NotReady as error:
        refused = error.code
    try:
        checked = str(llm.check_residency())
    except WorkerError as error:
        checked = error.code
    llm.close()
    return {
        "ends": sorted(ends),
        "fatal": [e.code for e in fatal],
        "seconds": seconds,
        "refused": refused,
        "residency": checked,
        "hanging": sum(t.is_alive() for t in threads),
        "jobs_before": sum(done),
    }


def main() -> None:
    what, model, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
    limit = float(sys.argv[4]) if len(sys.argv) > 4 else 60.0
    faulthandler.dump_traceback_later(limit + 120, exit=True)  # a hang says where
    results = {
        "memory": lambda: memory(model, index, 16 << 30),
        "sweep": lambda: sweep(model, index, limit),
        "poison": lambda: poison(model, index),
    }
    print(json.dumps(results[what]()), flush=True)


if __name__ == "__main__":
    main()
