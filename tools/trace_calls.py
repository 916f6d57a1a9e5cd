#!/usr/bin/env python3
"""Which calls of the CUDA driver a generation makes, its prompt included: counted by CUPTI after a first generation.

    python tools/trace_calls.py --model M.gguf [--steps 200] [--batch 1]

What must not be there is a wait or a copy for every kernel or every token: a decode step is one graph launch.
Needs a GPU and libcupti (of the CUDA toolkit, or of the package nvidia-cuda-cupti).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import glob
import json
import os
import sys
import sysconfig
import time
from collections.abc import Iterator

import numpy as np

from worker_orcd import LLM, SamplingParams
from worker_orcd.errors import WorkerError

DRIVER_API = 1  # CUPTI_CB_DOMAIN_DRIVER_API
ENTER = 0  # CUPTI_API_ENTER
_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.POINTER(ctypes.c_int))
_PLACES = (
    "{site}/nvidia/cu13/lib/libcupti.so*",
    "{site}/nvidia/cuda_cupti/lib/libcupti.so*",
    "{cuda}/extras/CUPTI/lib64/libcupti.so*",
    "{cuda}/lib64/libcupti.so*",
)
#: calls that make the host wait for the device
WAITS = ("cuStreamSynchronize", "cuEventSynchronize", "cuCtxSynchronize", "cuMemcpyDtoH", "cuMemcpyHtoD", "cuMemcpy")


def library() -> ctypes.CDLL:
    """libcupti, wherever it is."""
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    sites = [sysconfig.get_paths()["purelib"], *(p for p in sys.path if p.endswith("-packages"))]
    for pattern in _PLACES:
        for site in sites:
            for path in sorted(glob.glob(pattern.format(site=site, cuda=cuda))):
                return ctypes.CDLL(path)
    return ctypes.CDLL("libcupti.so")


@contextlib.contextmanager
def counted(calls: collections.Counter[str]) -> Iterator[None]:
    """Count the driver calls of every thread of this process, by name."""
    cupti = library()
    ids: collections.Counter[int] = collections.Counter()

    def ask(name: str, *args: object) -> None:
        status = getattr(cupti, name)(*args)
        if status:
            raise RuntimeError(f"{name} failed with {status}")

    @_CALLBACK
    def callback(user: int, domain: int, call: int, data: ctypes._Pointer) -> None:
        if data[0] == ENTER:
            ids[call] += 1

    subscriber = ctypes.c_void_p()
    ask("cuptiSubscribe", ctypes.byref(subscriber), callback, None)
    try:
        ask("cuptiEnableDomain", 1, subscriber, DRIVER_API)
        yield
    finally:
        ask("cuptiUnsubscribe", subscriber)
    for call, n in ids.items():
        name = ctypes.c_char_p()
        ask("cuptiGetCallbackName", DRIVER_API, call, ctypes.byref(name))
        calls[(name.value or b"?").decode()] += n


def trace(model: str, steps: int, batch: int) -> dict[str, object]:
    """Generate `steps` tokens in each of `batch` sequences, after a first such run that is not counted.

    Returns:
        {"calls": name -> number, "tokens", "decode_steps", "seconds"}.
    """
    params = SamplingParams(max_tokens=steps, temperature=0.8, seed=1, ignore_eos=True)
    prompts = [np.arange(1, 9).tolist()] * batch
    with LLM(model, device="cuda:0", progress=False, check_tensors=False) as llm:
        llm.generate(prompts, params)
        calls: collections.Counter[str] = collections.Counter()
        with counted(calls):
            began = time.perf_counter()
            n = sum(len(c.token_ids) for c in llm.generate(prompts, params))
            seconds = time.perf_counter() - began
    return {"calls": dict(calls.most_common()), "tokens": n, "decode_steps": n // batch - 1, "seconds": seconds}


def main() -> int:
    """The command; returns the exit code: 1 where the host waited more often than once in ten steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="FILE")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="write the result there too")
    options = parser.parse_args()
    try:
        result = trace(options.model, options.steps, options.batch)
    except (WorkerError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    calls = result["calls"]
    print(f"{result['tokens']} tokens in {result['seconds']:.3f} s, {result['decode_steps']} decode steps")
    for name, n in calls.items():
        print(f"{n:8}  {name}")
    waits = sum(n for name, n in calls.items() if name.startswith(WAITS) and "Async" not in name)
    print(f"{waits} calls that wait for the device")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result | {"waits": waits}, file, indent=1)
    return int(waits > result["decode_steps"] / 10)


if __name__ == "__main__":
    sys.exit(main())
