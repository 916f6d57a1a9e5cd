"""Loading on the CPU where the system gives less memory than it has: sizes that nobody named get smaller."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from helpers.gguf_patch import with_uint32

MIB = 1 << 20
SCRIPT = """
import json, resource, sys
from worker_orcd import LLM, SamplingParams, errors
LLM(sys.argv[1], device="cpu", progress=False, context_length=64, max_seqs=1, n_threads=1).close()
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, [pages * resource.getpagesize() + int(sys.argv[2])] * 2)
named = json.loads(sys.argv[3])
try:
    with LLM(sys.argv[1], device="cpu", progress=False, n_threads=1, **named) as llm:
        ids = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True))[0].token_ids
        print(json.dumps({"kv_bytes": llm.info.kv_bytes, "ids": ids}))
except errors.WorkerError as error:
    print(json.dumps(error.details()))
"""


@pytest.fixture
def load(goldens_dir, tmp_path):
    """(bytes that the system gives, named sizes) -> what the load gave; the cache of the model takes 1 GiB unasked."""
    model = with_uint32(goldens_dir / "llama-Q4_0.gguf", tmp_path / "m.gguf", "llama.context_length", 131_072)

    def run(limit: int, **named: int) -> dict[str, object]:
        command = [sys.executable, "-c", SCRIPT, str(model), str(limit), json.dumps(named)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_the_kv_cache_gets_smaller_until_it_fits(load):
    plenty, little = load(4096 * MIB), load(700 * MIB)
    assert plenty["kv_bytes"] == 1024 * MIB > little["kv_bytes"] > 100 * MIB
    assert little["ids"] == plenty["ids"]


def test_a_size_that_was_named_is_refused_with_both_numbers(load):
    error = load(700 * MIB, kv_cache_bytes=1024 * MIB)
    assert error["code"] == "INSUFFICIENT_MEMORY"
    assert error["bytes_required"] > 1024 * MIB and error["bytes_available"] > 0
