"""`worker-orcd inspect` (diagnose.inspect): what it shows of good, partial and hostile files."""

from __future__ import annotations

import json


def test_inspect_shows_every_file(call, goldens_dir):
    for path in sorted(goldens_dir.glob("*.gguf")):
        code, out, err = call("inspect", path)
        assert code == 0 and err == ""
        assert all(f"\n{part}:" in out for part in ("metadata", "types", "tokenizer", "hparams", "plan", "memory"))
        assert "token_embd.weight" in out and "KV cache, 1,000 tokens" in out
        code, out, _ = call("inspect", path, "--json")
        facts = json.loads(out)
        assert facts["quant_kind"] == path.stem.split("-")[-1] or path.stem.startswith(("gpt-oss", "phi3"))
        assert facts["memory"]["weight_bytes"] <= facts["bytes"] and facts["plan"]["ops"] > 20
        assert {t["name"] for t in facts["tensors"]} >= {"token_embd.weight"}


def test_inspect_of_a_vocabulary_goes_as_far_as_it_goes(call, goldens_dir):
    for path in sorted((goldens_dir / "tokenizers").glob("*.gguf")):
        code, out, _ = call("inspect", path, "--json")
        facts = json.loads(out)
        assert code == 0 and facts["tensors"] == [] and facts["quant_kind"] is None
        assert facts["tokenizer"]["kind"] in ("gguf-bpe", "gguf-spm") and "error" in facts["plan"]
    assert "no tensors" in call("inspect", goldens_dir / "tokenizers" / "phi-3.gguf")[1]


def test_inspect_escapes_what_a_file_says():
    from worker_orcd.diagnose import inspect

    facts = {
        "path": "a\x1b[2J",
        "name": "b\n",
        "arch": "llama",
        "quant_kind": "F16",
        "version": 3,
        "bytes": 10,
        "parts": ["a"],
        "metadata": {"k\r": "v\x07" * 100},
        "types": {},
        "tensors": [],
        "tokenizer": {"error": "x\n"},
        "hparams": {"error": "x"},
        "plan": {"error": "x"},
        "memory": {"error": "\x1b"},
    }
    text = inspect.as_text(facts)
    assert all(line.isprintable() for line in text.split("\n"))
