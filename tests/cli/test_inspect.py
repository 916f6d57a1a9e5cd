"""`worker-orcd inspect` (diagnose.inspect): what it shows of good, partial and hostile files."""

from __future__ import annotations

import json

from helpers import gguf_forge as g
from helpers.golden_forge import take_apart


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


def test_inspect_tells_how_a_gpu_would_run_it(call, golden, monkeypatch):
    def told():
        code, out, err = call("inspect", golden, "--json")
        assert code == 0 and err == ""
        facts = json.loads(out)
        return facts["gpu"], facts["plan"]["ops"]

    fused, n_ops = told()
    assert fused["lowering"] == "fused" and 0 < fused["ops"] < n_ops
    monkeypatch.setenv("WORKER_ORCD_LOWERING", "plain")
    assert told()[0] | {"lowering": "plain", "ops": n_ops} == told()[0]
    assert "\nkernels of a GPU:\n  lowering  plain\n" in call("inspect", golden)[1]
    monkeypatch.setenv("WORKER_ORCD_LOWERING", "fast")
    assert told()[0] == {"error": "WORKER_ORCD_LOWERING is fused or plain, not 'fast'"}


def test_inspect_names_what_is_slow_on_any_gpu(call, goldens_dir):
    path = goldens_dir / "llama-F16.gguf"
    facts = json.loads(call("inspect", path, "--json")[1])
    (slow,) = facts["gpu"]["slow"]
    assert slow["types"] == ["F16"] and slow["tensors"]["blk.*.ffn_down.weight"] == 2
    line = next(line for line in call("inspect", path)[1].splitlines() if line.startswith("  slow "))
    assert "F16 blk.*.attn_q.weight (2)" in line and line.endswith(slow["reason"])
    assert json.loads(call("inspect", goldens_dir / "llama-Q4_0.gguf", "--json")[1])["gpu"]["slow"] == []


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
        "gpu": {"error": "\x1b"},
    }
    text = inspect.as_text(facts)
    assert all(line.isprintable() for line in text.split("\n"))


def test_inspect_names_tensor_types_that_are_not_supported_and_shows_the_rest(call, goldens_dir):
    for name in ("IQ4_XS", "IQ2_XXS", "NVFP4", "TQ1_0", "IQ1_M", "IQ4_NL", "IQ3_S"):
        path = goldens_dir / "arch" / f"llama-{name}.gguf"
        code, out, err = call("inspect", path)
        assert code == 0 and err == ""
        assert f"cannot be loaded: unsupported tensor type {name} (" in out
        assert "llama.block_count" in out and "n_embd" in out and "token_embd.weight" in out
        facts = json.loads(call("inspect", path, "--json")[1])
        assert facts["unsupported"] and all(
            reason.startswith("unsupported tensor type ") for reason in facts["unsupported"]
        )
        assert name in facts["types"] and facts["types"][name]["bytes"] > 0
        assert name in {t["type"] for t in facts["tensors"]}
        assert facts["hparams"]["n_layer"] == 2 and facts["plan"]["ops"] > 20
        assert name in facts["memory"]["error"] and facts["tokenizer"]["kind"] == "gguf-bpe"


def test_inspect_names_an_architecture_that_is_not_supported_and_shows_the_rest(call, goldens_dir):
    path = goldens_dir / "arch" / "cohere2-F16.gguf"
    code, out, err = call("inspect", path)
    assert code == 0 and err == ""
    assert "cannot be loaded: unsupported architecture 'cohere2' (supported: llama, " in out
    assert "cohere2.logit_scale" in out and "blk.3.ffn_down.weight" in out and "kind  " in out
    facts = json.loads(call("inspect", path, "--json")[1])
    assert facts["arch"] == "cohere2" and len(facts["unsupported"]) == 1 and len(facts["tensors"]) == 34
    assert "unsupported architecture" in facts["plan"]["error"] and facts["tokenizer"]["n_vocab"] == 288


def test_inspect_shows_a_file_of_unknown_types_and_no_architecture(call, goldens_dir, tmp_path):
    forge = take_apart(goldens_dir / "llama-F16.gguf", vocabulary=False).drop("general.architecture")
    forge.tensor("blk.0.attn_q.weight").type_id = 99
    forge.put("general.file_type", g.STR, "none")
    path = tmp_path / "strange.gguf"
    path.write_bytes(forge.build())
    code, out, err = call("inspect", path)
    assert code == 0 and err == ""
    assert "no architecture, F16" in out and "cannot be loaded: general.architecture is missing" in out
    assert (
        "unsupported tensor type type 99" not in out
        and "unsupported tensor type 99 (tensor blk.0.attn_q.weight)" in out
    )
    facts = json.loads(call("inspect", path, "--json")[1])
    assert facts["arch"] == "" and facts["file_type"] is None and facts["types"]["type 99"]["tensors"] == 1
    assert {t["name"] for t in facts["tensors"]} == {t.name for t in forge.tensors}


def test_a_key_that_keeps_a_file_from_loading_is_named(call, goldens_dir, tmp_path):
    forge = take_apart(goldens_dir / "llama-F16.gguf").put("llama.logit_scale", g.F32, 2.0)
    path = tmp_path / "scaled.gguf"
    path.write_bytes(forge.build())
    code, out, _ = call("inspect", path)
    assert code == 0 and "cannot be loaded: llama.logit_scale is 2, which is not supported" in out
    facts = json.loads(call("inspect", path, "--json")[1])
    assert "llama.logit_scale" in facts["hparams"]["error"] and facts["tokenizer"]["n_vocab"]
