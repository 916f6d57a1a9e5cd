"""Every number of a file at its extremes: the file loads, or one ModelLoadError names the key.

Never another exception, a hang, a plan that is not finite, or memory that the file does not hold.
"""

from __future__ import annotations

import dataclasses
import math
import resource
import struct
import time

import pytest
from helpers import gguf_forge as g
from helpers.golden_forge import take_apart

from worker_orcd.errors import MAX_QUOTED, ModelLoadError
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import keys, plan, registry

FILES = ("llama-Q4_0", "qwen2-Q8_0", "arch/qwen3-F16", "phi3-Q8_0", "gpt2-Q8_0", "gpt-oss-MXFP4",
         "arch/qwen2-yarn-F16", "arch/phi3-su-long-F16", "arch/llama-linear-F16", "arch/llama-rope3-F16")  # fmt: skip

INTEGERS = [
    (g.U32, 0), (g.I32, -1), (g.U32, 1), (g.U32, 2), (g.U32, 3), (g.U32, 1 << 24), (g.U32, 1 << 31), (g.U32, 2**32 - 1),
    (g.U64, 1 << 63), (g.I64, -(1 << 63)), (g.U64, 2**64 - 1),
]  # fmt: skip
FLOATS = [
    (kind, value) for kind in (g.F32, g.F64)
    for value in (0.0, -0.0, -1.0, 1.0, 1 + 2**-23, math.nan, math.inf, -math.inf, 2.0**63, 1e-45, 3e38)
] + [(g.F64, 5e-324), (g.F64, 1.7e308), (g.F64, 1 + 2**-52)]  # fmt: skip


def finite(value: object) -> bool:
    """Whether every float of a plan is finite."""
    if isinstance(value, float):
        return math.isfinite(value)
    if dataclasses.is_dataclass(value):
        return all(finite(getattr(value, f.name)) for f in dataclasses.fields(value))
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    return not isinstance(value, tuple) or all(map(finite, value))


def peak_mib() -> float:
    """The most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize("name", FILES)
def test_extreme_numbers_load_or_are_refused(name, goldens_dir, tmp_path):
    forge = take_apart(goldens_dir / f"{name}.gguf", vocabulary=False)
    (arch,) = (raw[8:].decode() for key, (_, raw) in forge.keys.items() if key == "general.architecture")
    path = tmp_path / "f.gguf"
    start_mib, loaded, refused = peak_mib(), 0, 0
    read = [key for key, rule in keys.rules(registry.ROWS[arch]).items() if isinstance(rule, keys.Applied)]
    for key in read:
        full = f"{arch}.{key}"
        for kind in sorted({kind for kind, _ in INTEGERS + FLOATS}):
            changed = dataclasses.replace(forge, keys=dict(forge.keys)).put(full, kind, 1)
            path.write_bytes(changed.build())
            with ModelFile(path) as mf:
                at = mf.metadata.offset(full)
            for value in (value for k, value in INTEGERS + FLOATS if k == kind):
                with path.open("r+b") as file:
                    file.seek(at)
                    file.write(g.pack(kind, value))
                started = time.monotonic()
                try:
                    with ModelFile(path) as mf:
                        p = plan.build(mf)
                except ModelLoadError as error:
                    refused += 1
                    reason = error.fields["reason"]
                    assert error.fields["field"] and reason.isprintable() and len(reason) < 4 * MAX_QUOTED
                else:
                    loaded += 1
                    assert finite(p), (full, kind, value)
                assert time.monotonic() - started < 5, (full, kind, value)
    assert loaded and refused
    assert peak_mib() - start_mib < 64 + 8 * len(forge.build()) / 2**20
    print(f"{name}: {loaded} loaded, {refused} refused")


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0, 1e-45, 1e-9])
@pytest.mark.parametrize(("name", "tensor"), [
    ("arch/llama-rope3-F16", "rope_freqs.weight"), ("arch/phi3-su-long-F16", "rope_factors_long.weight"),
    ("arch/phi3-su-long-F16", "rope_factors_short.weight"),
])  # fmt: skip
def test_divisors_of_frequencies_are_checked(name, tensor, value, goldens_dir, tmp_path):
    forge = take_apart(goldens_dir / f"{name}.gguf", vocabulary=False)
    divisors = forge.tensor(tensor)
    divisors.data = divisors.data[:-4] + struct.pack("<f", value)
    (tmp_path / "f.gguf").write_bytes(forge.build())
    with ModelFile(tmp_path / "f.gguf") as mf, pytest.raises(ModelLoadError, match=tensor):
        plan.build(mf)


def test_a_very_large_divisor_stops_a_pair(goldens_dir, tmp_path):
    forge = take_apart(goldens_dir / "arch/llama-rope3-F16.gguf", vocabulary=False)
    divisors = forge.tensor("rope_freqs.weight")
    divisors.data = divisors.data[:-4] + struct.pack("<f", 1e30)
    (tmp_path / "f.gguf").write_bytes(forge.build())
    with ModelFile(tmp_path / "f.gguf") as mf:
        assert registry.hparams_of(mf).inv_freq[-1] < 1e-30


def test_divisors_in_a_file_that_does_not_rotate_have_no_place(goldens_dir, tmp_path):
    forge = take_apart(goldens_dir / "gpt2-Q8_0.gguf", vocabulary=False)
    forge.tensors.append(g.f32("rope_freqs.weight", 32))
    (tmp_path / "f.gguf").write_bytes(forge.build())
    with ModelFile(tmp_path / "f.gguf") as mf, pytest.raises(ModelLoadError, match=r"rope_freqs.weight' has no place"):
        plan.build(mf)


NASTY = "x\n\x1b[2J\u2028\x85\ud7ff'" * 1000


@pytest.mark.parametrize("key", ["general.architecture", "llama.rope.scaling.type", "llama.tensor_data_layout",
                                 "llama.attention.scale", "llama.unknown"])  # fmt: skip
def test_text_of_a_file_is_quoted_short_and_on_one_line(key, goldens_dir, tmp_path):
    forge = take_apart(goldens_dir / "llama-Q4_0.gguf", vocabulary=False).put(key, g.STR, NASTY)
    (tmp_path / "f.gguf").write_bytes(forge.build())
    with ModelFile(tmp_path / "f.gguf") as mf, pytest.raises(ModelLoadError) as caught:
        plan.build(mf)
    reason = caught.value.fields["reason"]
    assert reason.isprintable() and r"x\n\x1b[2J\u2028" in reason
    quotation = reason.split("'", 1)[1].rsplit("...'", 1)[0]
    assert len(quotation) <= MAX_QUOTED - 3
