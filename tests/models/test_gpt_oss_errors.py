"""models.gpt_oss: GPT-OSS files that are not what they must be: one clear error each, before anything is loaded."""

from __future__ import annotations

import json
import struct
import types

import pytest
from helpers.gpt_oss_file import GptOssFile

from worker_orcd import LLM
from worker_orcd.errors import ModelLoadError
from worker_orcd.gguf import quants
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import plan
from worker_orcd.tokenizer.tokenizer import Tokenizer


def refused(mf) -> ModelLoadError:
    with pytest.raises(ModelLoadError) as caught:
        plan.build(mf)
    assert caught.value.message.startswith("gpt-oss-20b.gguf: ") and "\n" not in caught.value.message
    return caught.value


def test_the_published_shapes_are_a_plan():
    the_plan = plan.build(GptOssFile())
    weights = the_plan.weights.values()
    assert sum(w.kind == "experts" for w in weights) == 72
    assert sum(w.name.endswith("attn_sinks.weight") for w in weights) == 24


@pytest.mark.parametrize(
    "name",
    [
        "attn_sinks.weight",
        "ffn_gate_inp.weight",
        "ffn_gate_inp.bias",
        "attn_q.bias",
        "ffn_up_exps.weight",
        "ffn_down_exps.bias",
        "post_attention_norm.weight",
    ],
)
def test_a_tensor_is_missing(name):
    mf = GptOssFile(2)
    del mf.tensors[f"blk.1.{name}"]
    error = refused(mf)
    assert f"tensor 'blk.1.{name}' is missing" in error.message and error.fields["field"] == f"blk.1.{name}"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("attn_sinks.weight", (63,)),
        ("attn_sinks.weight", (1, 64)),
        ("ffn_gate_inp.bias", (31,)),
        ("ffn_down_exps.weight", (2880, 2880, 31)),
        ("ffn_gate_exps.bias", (32, 2880)),
    ],
)
def test_a_tensor_has_another_shape(name, shape):
    mf = GptOssFile(2)
    mf.tensors[f"blk.0.{name}"].shape = shape
    message = refused(mf).message
    assert f"tensor 'blk.0.{name}': shape {list(shape)}, the hyperparameters say" in message


def test_sinks_in_a_quantized_type():
    mf = GptOssFile(2)
    mf.tensors["blk.0.attn_sinks.weight"].type_id = quants.BY_NAME["Q8_0"].id
    assert "'blk.0.attn_sinks.weight': a vector must be F32, F16 or BF16" in refused(mf).message


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"expert_count": 31}, "hyperparameters say [2880, 31]"),
        ({"expert_count": 64}, "hyperparameters say [2880, 64]"),
        ({"expert_count": 0}, "gpt-oss.expert_count"),
        ({"expert_count": 1 << 20}, "gpt-oss.expert_count"),
        ({"expert_used_count": 0}, "gpt-oss.expert_used_count"),
        ({"expert_used_count": 33}, "gpt-oss.expert_used_count is 33, of 32 experts"),
        ({"expert_feed_forward_length": 2816}, "hyperparameters say [2880, 2816, 32]"),
    ],
)
def test_a_wrong_expert_count(changes, text):
    assert text in refused(GptOssFile(2, **changes)).message


@pytest.mark.parametrize("key", ["expert_count", "expert_used_count", "expert_feed_forward_length"])
def test_no_expert_count(key):
    mf = GptOssFile(2)
    del mf.metadata[f"gpt-oss.{key}"]
    assert f"gpt-oss.{key}" in refused(mf).message


def test_experts_in_a_type_without_a_kernel(goldens_dir, tmp_path):
    data = bytearray((goldens_dir / "gpt-oss-MXFP4.gguf").read_bytes())
    name = b"blk.1.ffn_up_exps.weight"
    at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
    (n_dims,) = struct.unpack_from("<I", data, at)
    at += 4 + 8 * n_dims
    assert struct.unpack_from("<I", data, at) == (quants.BY_NAME["MXFP4"].id,)
    struct.pack_into("<I", data, at, 20)  # IQ4_NL
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ModelLoadError) as caught:
        LLM(tmp_path / "m.gguf", device="cpu", progress=False)
    assert name.decode() in caught.value.message and "type" in caught.value.message and "20" in caught.value.message
    print(caught.value.message)


def test_a_tokenizer_json_of_another_vocabulary(goldens_dir, tmp_path):
    (tmp_path / "m.gguf").write_bytes((goldens_dir / "gpt-oss-MXFP4.gguf").read_bytes())
    with ModelFile(tmp_path / "m.gguf") as mf:
        n_vocab = mf.tensors["token_embd.weight"].shape[1]
    vocab = {f"t{i}": i for i in range(n_vocab + 1)}
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    LLM(tmp_path / "m.gguf", device="cpu", progress=False).close()  # it lies beside a model that has its own
    named = tmp_path / "tokenizer.json"
    with pytest.raises(ModelLoadError) as caught:
        LLM(tmp_path / "m.gguf", device="cpu", progress=False, tokenizer=named)
    assert "tokenizer.json" in caught.value.message
    print(caught.value.message)
    for content, text in ((b'{"model":', "is no tokenizer.json"), (b"\0" * 10, "is no tokenizer.json")):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(ModelLoadError, match=text):
            LLM(tmp_path / "m.gguf", device="cpu", progress=False, tokenizer=named)
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ModelLoadError, match="1073741824 bytes, limit"):
        LLM(tmp_path / "m.gguf", device="cpu", progress=False, tokenizer=named)


def test_the_gpt_oss_tokenizer_beside_a_model_with_fewer_tokens(model_path):
    directory = model_path("qwen").parent / "gpt-oss-tokenizer"
    if not (directory / "tokenizer.json").is_file():
        pytest.skip(f"{directory} is not there")
    small = types.SimpleNamespace(
        path="m.gguf", metadata={}, tensors={"token_embd.weight": types.SimpleNamespace(shape=(2880, 151936))}
    )
    with pytest.raises(ModelLoadError, match="has embeddings for 151936: it is not this model's tokenizer"):
        Tokenizer.from_model(small, override=directory)
