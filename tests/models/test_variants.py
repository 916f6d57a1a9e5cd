"""Files that say the same in another form: per-layer arrays, trailing ones in shapes, tensors fused or split.

Each variant of a reference file must give the very logits of that file, on the CPU engine; a lowered plan must name the
same rows.
"""

from __future__ import annotations

import struct

import numpy as np
import pytest
from helpers import cpu_engines
from helpers import gguf_forge as g
from helpers.golden_forge import N_LAYERS, fused_gate_up, fused_qkv, split_gate_up, split_qkv, take_apart

from worker_orcd.cuda import lowering
from worker_orcd.errors import ModelLoadError
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import plan

N_TOKENS = 24


def arrays(f):
    arch = f.keys["general.architecture"][1][8:].decode()
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length", "expert_feed_forward_length"):
        kind, raw = f.keys.get(f"{arch}.{key}", (None, b""))
        if kind is not None:
            f.raw(f"{arch}.{key}", g.ARR, struct.pack("<IQ", kind, N_LAYERS) + raw * N_LAYERS)


def trailing_ones(f):
    for tensor in f.tensors:
        tensor.dims = (*tensor.dims, *(1,) * (4 - len(tensor.dims)))


CASES = [
    *[(name, arrays) for name in ("llama-Q4_0", "phi3-Q8_0", "gpt2-Q8_0", "gpt-oss-MXFP4")],
    *[(name, trailing_ones) for name in ("llama-Q4_K_M", "qwen2-Q8_0", "gpt2-Q8_0", "gpt-oss-MXFP4", "phi3-Q4_K_M")],
    *[(name, fused_qkv) for name in ("llama-F16", "llama-Q4_0")],
    *[(name, lambda f: fused_qkv(f, True)) for name in ("qwen2-Q8_0", "qwen2-Q4_0")],
    *[(name, fused_gate_up) for name in ("llama-Q4_0", "llama-Q4_K_M", "qwen2-Q8_0")],
    *[(name, split_qkv) for name in ("phi3-Q8_0", "phi3-Q4_K_M", "phi3-swa-Q8_0")],
    *[(name, split_gate_up) for name in ("phi3-Q8_0", "phi3-Q4_K_M")],
    ("gpt2-Q8_0", lambda f: split_qkv(f, bias=True)),
]


def logits(path, tokens):
    engine = cpu_engines.open_engine(path)
    return engine.forward(cpu_engines.rows((0, 0, tokens)))


@pytest.mark.parametrize(("name", "change"), CASES)
def test_a_variant_gives_the_very_logits_of_the_file(name, change, goldens_dir, tmp_path):
    path = goldens_dir / f"{name}.gguf"
    with np.load(path.with_suffix(".npz")) as z:
        tokens, reference = z["tokens"][0][:N_TOKENS], z["logits"][0][:N_TOKENS]
    forge = take_apart(path, vocabulary=False)
    change(forge)
    variant = tmp_path / "variant.gguf"
    variant.write_bytes(forge.build())
    got = logits(variant, tokens)
    assert np.array_equal(got, logits(path, tokens))
    assert ((got - reference) ** 2).mean() / (reference**2).mean() < 1e-3
    with ModelFile(path) as a, ModelFile(variant) as b:
        assert rows_of_lowered(plan.build(a)) == rows_of_lowered(plan.build(b))


def rows_of_lowered(p: plan.Plan) -> set[tuple[object, ...]]:
    """Which row of which buffer each product of the lowered plan writes, from which input, with what is folded in; the
    kinds of other ops."""
    rows: set[tuple[object, ...]] = set()
    for op in lowering.lower(p):
        if not isinstance(op, lowering.MatMulGroup):
            rows.add((type(op).__name__,))
            continue
        assert op.norm is None or op.norm.inp == op.inp
        folded = (op.norm, op.residual, op.glu)
        for part in op.parts:
            assert part.inp == (op.norm.out if op.norm else op.inp)
            assert p.weights[part.weight].shape[1] == part.out.width
            rows |= {(part.out.buf, part.inp.buf, *folded, part.out.offset + i) for i in range(part.out.width)}
    return rows


@pytest.mark.parametrize("key", ["attention.head_count", "attention.head_count_kv", "feed_forward_length"])
def test_layers_that_differ_are_named(key, goldens_dir, tmp_path):
    forge = take_apart(goldens_dir / "llama-Q4_0.gguf", vocabulary=False)
    (value,) = struct.unpack("<I", forge.keys[f"llama.{key}"][1])
    forge.put_array(f"llama.{key}", g.U32, [value, 2 * value])
    (tmp_path / "f.gguf").write_bytes(forge.build())
    says = rf"llama.{key}\[1\] is {2 * value}, but \[0\] is {value}: layers that differ"
    with ModelFile(tmp_path / "f.gguf") as mf, pytest.raises(ModelLoadError, match=says) as caught:
        plan.build(mf)
    assert caught.value.fields["offset"] == mf.metadata.offset(f"llama.{key}")


@pytest.mark.parametrize("values", [[4], [4, 4, 4], []])
def test_an_array_of_another_length_is_refused(values, goldens_dir, tmp_path):
    forge = take_apart(goldens_dir / "llama-Q4_0.gguf", vocabulary=False)
    forge.put_array("llama.attention.head_count", g.U32, values)
    (tmp_path / "f.gguf").write_bytes(forge.build())
    with ModelFile(tmp_path / "f.gguf") as mf, pytest.raises(ModelLoadError, match=r"head_count has \d elements"):
        plan.build(mf)


def test_a_file_with_both_forms_is_refused(goldens_dir, tmp_path):
    forge = take_apart(goldens_dir / "llama-Q4_0.gguf", vocabulary=False)
    parts = [forge.tensor(f"blk.0.attn_{name}.weight") for name in "qkv"]
    fused_qkv(forge)
    forge.tensors += parts
    (tmp_path / "f.gguf").write_bytes(forge.build())
    with ModelFile(tmp_path / "f.gguf") as mf, pytest.raises(ModelLoadError, match=r"attn_q.weight' has no place"):
        plan.build(mf)


def biases_of(forge: g.Forge) -> list[g.Tensor]:
    return [t for t in forge.tensors if t.name.endswith((".attn_q.bias", ".attn_k.bias", ".attn_v.bias"))]


def test_a_qwen2_without_biases_is_one_whose_biases_are_0(goldens_dir, tmp_path):
    """Models that are Llama but for the rotation are converted to this architecture."""
    forge, path = take_apart(goldens_dir / "qwen2-Q8_0.gguf", vocabulary=False), tmp_path / "m.gguf"
    tokens = np.arange(N_TOKENS, dtype=np.int32)

    def got() -> np.ndarray:
        path.write_bytes(forge.build())
        return logits(path, tokens)

    whole = got()
    assert len(biases_of(forge)) == 3 * N_LAYERS
    for bias in biases_of(forge):
        bias.data = bytes(len(bias.data))
    zero = got()
    forge.drop(*(t.name for t in biases_of(forge)))
    assert np.array_equal(got(), zero) and not np.array_equal(zero, whole)


@pytest.mark.parametrize("name", ["qwen2-Q8_0", "llama-F16"])
@pytest.mark.parametrize("part", "qkv")
def test_a_layer_has_all_biases_of_q_k_and_v_or_none(name, part, goldens_dir, tmp_path):
    forge, path = take_apart(goldens_dir / f"{name}.gguf", vocabulary=False), tmp_path / "m.gguf"
    for other in "qkv" if not biases_of(forge) else "":
        forge.tensors.append(g.f32(f"blk.1.attn_{other}.bias", forge.tensor(f"blk.1.attn_{other}.weight").dims[1]))
    forge.drop(f"blk.1.attn_{part}.bias")
    path.write_bytes(forge.build())
    with ModelFile(path) as mf, pytest.raises(ModelLoadError, match=rf"blk\.1\.attn_{part}\.bias' is missing"):
        plan.build(mf)
