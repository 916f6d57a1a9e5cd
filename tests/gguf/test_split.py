"""Split models (-0000i-of-0000N.gguf): whole ones load as one, others are refused naming the part and what it lacks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers import gguf_forge as g
from helpers.gguf_forge import I32, STR, U16, Forge

from worker_orcd._gguf import GgufFile
from worker_orcd.errors import ModelLoadError
from worker_orcd.gguf import quants
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import plan


def split(tmp_path: Path, n: int = 3, stem: str = "m") -> list[Path]:
    """A tiny model in n parts, the first without tensors, as the usual splitting tools can write it."""
    whole = g.tiny_llama()
    parts = [whole] + [Forge() for _ in range(n - 1)]
    tensors, whole.tensors = whole.tensors, []
    for i, t in enumerate(tensors):
        parts[1 + i % (n - 1)].tensors.append(t)
    paths = []
    for i, part in enumerate(parts):
        part.put("split.no", U16, i).put("split.count", U16, n).put("split.tensors.count", I32, len(tensors))
        paths.append(tmp_path / f"{stem}-{i + 1:05d}-of-{n:05d}.gguf")
        paths[-1].write_bytes(part.build())
    return paths


def spoil(path: Path, change) -> None:
    """Rewrite a part of a split with `change` made to its keys; its tensors stay."""
    with GgufFile(path, quants.BLOCK_SIZES) as file:
        forge = Forge(tensors=[g.f32(t.name, *t.shape) for t in file.tensors.values()])
        for key in ("split.no", "split.count", "split.tensors.count"):
            forge.put(key, I32, file.metadata[key])
        if "general.architecture" in file.metadata:
            forge.put("general.architecture", STR, "llama")
    change(forge)
    path.write_bytes(forge.build())


def test_a_split_model_loads_as_one(tmp_path):
    paths = split(tmp_path)
    with ModelFile(paths[0]) as mf:
        assert len(mf.parts) == 3 and mf.size == sum(p.stat().st_size for p in paths)
        assert set(mf.tensors) == {t.name for t in g.tiny_llama().tensors}
        assert mf.part_of("output_norm.weight").path == str(paths[2]) and len(mf.view("output_norm.weight")) == 128
        plan.build(mf)
        mf.check_tensors()
        mf.check_unchanged()
        os.truncate(paths[2], 100)
        with pytest.raises(ModelLoadError, match=r"00003-of-00003\.gguf: was cut"):
            mf.check_unchanged()


def test_a_relative_path_of_a_split_model(tmp_path, monkeypatch):
    split(tmp_path)
    monkeypatch.chdir(tmp_path)
    with ModelFile("m-00001-of-00003.gguf") as mf:
        assert len(mf.parts) == 3


def test_split_models_that_are_not_whole(tmp_path):
    def refused(says: str, which: int = 0) -> None:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(ModelLoadError, match=says):
            ModelFile(paths[which])
        assert len(os.listdir("/proc/self/fd")) == before

    paths = split(tmp_path)
    refused("is part 2 of a split model; load it by its first, .*m-00001-of-00003.gguf", which=1)
    paths[1].rename(tmp_path / "away")
    refused("m-00002-of-00003.gguf: part 2 of 3 of the model is missing")
    (tmp_path / "away").write_bytes(b"GGUF")
    (tmp_path / "away").rename(paths[1])
    refused("m-00002-of-00003.gguf: truncated")

    for part, key, value, says in (
        (1, "split.no", 2, "00002-of-00003.gguf: split.no is 2, must be 1"),
        (2, "split.count", 4, "00003-of-00003.gguf: split.count is 4, must be 3"),
        (0, "split.tensors.count", 13, "split.tensors.count is 13, must be 12"),
        (0, "split.count", 4, r"split.count is 4, but the file is not named .*-of-00004.gguf"),
        (0, "split.count", 70000, "split.count is 70000"), (0, "split.no", -1, "split.no is -1"),
    ):  # fmt: skip
        paths = split(tmp_path)
        spoil(paths[part], lambda f, key=key, value=value: f.put(key, I32, value))
        refused(says)
    for part, key in ((1, "split.no"), (1, "split.count"), (0, "split.no"), (0, "split.tensors.count")):
        paths = split(tmp_path)
        spoil(paths[part], lambda f, key=key: f.drop(key))
        refused(f"{key} is missing")
    paths = split(tmp_path)
    spoil(paths[2], lambda f: f.tensors.append(g.f32("token_embd.weight", 32, 6)))
    refused("00003-of-00003.gguf: tensor 'token_embd.weight' is in an earlier part too")
    paths = split(tmp_path)
    paths[0] = paths[0].rename(tmp_path / "renamed.gguf")
    refused("split.count is 3, but the file is not named")


def test_keys_of_later_parts_must_be_those_of_the_first(tmp_path):
    paths = split(tmp_path)
    spoil(paths[1], lambda f: f.put("llama.block_count", g.U32, 1).put("other.key", g.U32, 7))
    with ModelFile(paths[0]) as mf:
        plan.build(mf)
    for key, kind, value in (
        ("llama.block_count", g.U32, 2),
        ("llama.block_count", g.U64, 1),
        ("llama.rope.scaling.factor", g.F32, 4.0),
    ):
        spoil(paths[1], lambda f, key=key, kind=kind, value=value: f.put(key, kind, value))
        with pytest.raises(ModelLoadError, match=rf"00002-of-00003.gguf: {key} is not what the first part says"):
            ModelFile(paths[0])
        with ModelFile(paths[0], for_report=True) as mf:
            assert len(mf.parts) == 3
