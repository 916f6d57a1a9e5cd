"""tools/requantize.py and the MXFP4 quantizer: the best block there is, the same model in another type."""

from __future__ import annotations

import gguf
import mxfp4
import numpy as np
import pytest
import requantize
from gguf.quants import dequantize
from helpers.gguf_forge import tiny_llama

from worker_orcd.errors import InvalidRequest, ModelLoadError
from worker_orcd.gguf import quants
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import plan

RNG = np.random.default_rng(7)


def brute_force(x: np.ndarray) -> np.ndarray:
    """Smallest sum of squared errors of each block [n, 32] over all 255 scales, float64."""
    grid = np.unique(mxfp4.E2M1).astype(np.float64)
    best = np.full(len(x), np.inf)
    for scale in range(255):
        values = grid * 2.0 ** (scale - 127)
        nearest = values[np.searchsorted((values[1:] + values[:-1]) / 2, x)]
        best = np.minimum(best, ((x - nearest) ** 2).sum(axis=1))
    return best


def blocks(kind: str) -> np.ndarray:
    """Float32 [200, 32] of a distribution."""
    normal = RNG.standard_normal((200, 32))
    if kind == "normal":
        return normal.astype(np.float32)
    if kind == "all exponents":
        return (normal * np.exp2(RNG.integers(-150, 125, (200, 1)))).astype(np.float32)
    if kind == "on rounding borders":
        return (RNG.integers(-32, 33, (200, 32)) / 4).astype(np.float32)
    if kind == "one outlier":
        normal[:, 0] = 100
        return normal.astype(np.float32)
    # the whole block at rounding borders of the usual scale, so that a smaller scale that cuts the largest one is best
    small = np.full((200, 32), 0.25) * RNG.choice([-1, 1], (200, 32))
    small[:, 0] = RNG.uniform(4, 4.4, 200)
    return small.astype(np.float32)


@pytest.mark.parametrize("kind", ["normal", "all exponents", "on rounding borders", "one outlier", "best when cut"])
def test_mxfp4_blocks_are_the_best_there_are(kind):
    x = blocks(kind)
    packed = mxfp4.quantize(x)
    error = ((x.astype(np.float64) - dequantize(packed, gguf.GGMLQuantizationType.MXFP4)) ** 2).sum(axis=1)
    best = brute_force(x.astype(np.float64))
    worst = np.max(error / np.where(best > 0, best, 1))
    print(f"{kind}: error / best at most {worst:.9f}, limit 1.000001")
    assert np.all(error <= best * 1.000001) and np.all(error[best == 0] == 0)
    if kind == "best when cut":
        assert np.all(packed[:, 0] == 126), "these blocks are no case of a cut largest element"


def test_mxfp4_of_what_it_can_hold_is_exact():
    codes = RNG.integers(0, 16, (300, 32))
    codes[:, 5] = 7
    x = mxfp4.E2M1[codes] * np.exp2(RNG.integers(-126, 120, (300, 1))).astype(np.float32)
    assert np.array_equal(dequantize(mxfp4.quantize(x), gguf.GGMLQuantizationType.MXFP4), x)
    zeros = mxfp4.quantize(np.zeros((2, 3, 64), np.float32))
    assert zeros.shape == (2, 3, 34) and not zeros.any()


def values(model: ModelFile, name: str) -> np.ndarray:
    info = model.tensors[name]
    raw = np.frombuffer(model.view(name), np.uint8)
    return dequantize(raw, gguf.GGMLQuantizationType(info.type_id)).reshape(-1, info.shape[0])


@pytest.mark.parametrize(
    ("golden", "kind"),
    [
        ("llama-F16", "MXFP4"),
        ("llama-F16", "Q4_0"),
        ("gpt2-F16", "Q8_0"),
        ("qwen2-Q4_K_M", "MXFP4"),
        ("gpt-oss-MXFP4_MOE", "Q8_0"),
    ],
)
def test_the_same_model_in_another_type(goldens_dir, tmp_path, golden, kind):
    target = tmp_path / "out.gguf"
    requantize.requantize(goldens_dir / f"{golden}.gguf", target, kind)
    with ModelFile(goldens_dir / f"{golden}.gguf") as before, ModelFile(target) as after:
        after.check_tensors()
        assert after.quant_kind == kind and after.file_type == requantize.FILE_TYPE[kind]
        assert list(after.tensors) == list(before.tensors)
        skipped = {"general.file_type", "general.quantization_version", "general.alignment"}
        assert set(after.metadata) - skipped == set(before.metadata) - skipped
        for key in set(before.metadata) - skipped:
            assert after.metadata.value_type(key) == before.metadata.value_type(key)
            assert after.metadata[key] == before.metadata[key], key
        # half a step of the largest magnitude of a block: 1/127 (Q8_0), 1/8 (Q4_0); a cut of 8 to 6 (MXFP4)
        bound = {"Q8_0": 0.5 / 127, "Q4_0": 1 / 8, "MXFP4": 0.26}[kind]
        n_written = 0
        for name, weight in plan.build(after).weights.items():
            a, b = values(before, name), values(after, name)
            if quants.TYPES[weight.type_id].name == kind:
                n_written += 1
                largest = np.abs(a.reshape(-1, 32)).max(axis=1, keepdims=True)
                error = np.abs(a - b).reshape(-1, 32) - largest * bound
                assert error.max() <= 1e-3 * largest.max(), name
            else:
                assert np.array_equal(a, b), name
                assert weight.kind in ("vector", "expert_vectors") or "gate_inp" in name or "position" in name, name
        assert n_written > 5


def test_what_has_the_type_is_copied(goldens_dir, tmp_path):
    source, target = goldens_dir / "llama-Q4_0.gguf", tmp_path / "out.gguf"
    requantize.requantize(source, target, "Q4_0")
    with ModelFile(source) as before, ModelFile(target) as after:
        name = "blk.0.ffn_down.weight"
        assert bytes(before.view(name)) == bytes(after.view(name))


def test_rows_that_are_no_whole_blocks_stay(tmp_path):
    forge = tiny_llama()
    for tensor in forge.tensors:
        if tensor.name == "blk.0.ffn_down.weight":
            tensor.dims, tensor.nbytes = (48, 32), 48 * 32 * 4
        elif tensor.name in ("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"):
            tensor.dims, tensor.nbytes = (32, 48), 48 * 32 * 4
    forge.put("llama.feed_forward_length", 4, 48)
    (tmp_path / "in.gguf").write_bytes(forge.build())
    counts = requantize.requantize(tmp_path / "in.gguf", tmp_path / "out.gguf", "MXFP4")
    assert counts == {"F32": 4, "MXFP4": 8}
    with ModelFile(tmp_path / "out.gguf") as out:
        assert out.tensors["blk.0.ffn_down.weight"].type_id == 0


def test_bad_input_leaves_nothing_behind(tmp_path, capsys):
    source, target = tmp_path / "in.gguf", tmp_path / "out.gguf"
    source.write_bytes(tiny_llama().build())
    with pytest.raises(InvalidRequest, match="input itself"):
        requantize.requantize(source, source, "Q8_0")
    with pytest.raises(InvalidRequest, match="Q4_K"):
        requantize.requantize(source, target, "Q4_K")
    forge = tiny_llama()
    forge.tensor("output.weight").data = np.full(192, 1e9, np.float32).tobytes()
    source.write_bytes(forge.build())
    with pytest.raises(InvalidRequest, match=r"output\.weight"):
        requantize.requantize(source, target, "Q8_0")
    forge.tensor("output.weight").data = np.full(192, np.nan, np.float32).tobytes()
    source.write_bytes(forge.build())
    with pytest.raises(ModelLoadError, match=r"output\.weight"):
        requantize.requantize(source, target, "MXFP4")
    source.write_bytes(b"GGUF")
    assert requantize.main([str(source), str(target), "--type", "MXFP4"]) == 1
    assert "error:" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["in.gguf"]
