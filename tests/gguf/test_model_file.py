"""Good GGUF files: everything a file says is read as it stands there, lazily, without copies; splits load as one."""

from __future__ import annotations

import collections.abc
import gc
import math
import os
import random
import struct
import tracemalloc
from pathlib import Path

import gguf
import pytest
from helpers import gguf_forge as g
from helpers.gguf_forge import ARR, BOOL, F32, F64, I8, I16, I32, I64, STR, U8, U16, U32, U64, Forge
from helpers.hostile_cases import SCALES

from worker_orcd._gguf import GgufFile
from worker_orcd.errors import ModelLoadError
from worker_orcd.gguf import quants
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.tokenizer import metadata as tokenizer_metadata

GOLDENS = [
    "llama-F16",
    "llama-Q4_0",
    "llama-Q4_K_M",
    "qwen2-Q8_0",
    "qwen2-Q4_K_M",
    "qwen2-Q4_0",
    "phi3-Q4_K_M",
    "phi3-Q8_0",
    "phi3-swa-Q8_0",
    "gpt2-F16",
    "gpt2-Q8_0",
    "gpt2-Q4_K_M",
    "gpt-oss-MXFP4_MOE",
    "gpt-oss-Q4_K_M",
    "gpt-oss-MXFP4",
]


@pytest.fixture
def write(tmp_path):
    """A function: forge -> path of the file it builds."""

    def one(forge: Forge, name: str = "model.gguf") -> Path:
        path = tmp_path / name
        path.write_bytes(forge.build())
        return path

    return one


def same(a: object, b: object) -> bool:
    """Equality where NaN equals NaN."""
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("name", [*GOLDENS, "tokenizers/llama-spm", "tokenizers/phi-3"])
def test_reads_what_the_gguf_package_reads(goldens_dir, name):
    path = goldens_dir / f"{name}.gguf"
    theirs = gguf.GGUFReader(path)
    with ModelFile(path) as mf:
        keys = [k for k in theirs.fields if not k.startswith("GGUF.")]
        assert list(mf.metadata) == keys
        for key in keys:
            assert same(mf.metadata[key], theirs.fields[key].contents()), key
        assert list(mf.tensors) == [t.name for t in theirs.tensors]
        for t in theirs.tensors:
            ours = mf.tensors[t.name]
            assert (ours.shape, ours.type_id) == (tuple(map(int, t.shape)), t.tensor_type)
            assert (ours.offset, ours.nbytes) == (t.data_offset, t.n_bytes)
            assert mf.view(t.name) == t.data.tobytes()
        if not mf.tensors:
            return
        mf.check_tensors(n_threads=2)
        kind = name.removeprefix("phi3-swa-").rpartition("-")[2]
        assert mf.quant_kind == {"MXFP4_MOE": "MXFP4"}.get(kind, kind)


@pytest.mark.parametrize(
    "name, kind, n_tensors, n_vocab", [("qwen", "Q4_K_M", 291, 151936), ("smollm2", "Q4_1", 272, 49152)]
)
def test_real_models(model_path, name, kind, n_tensors, n_vocab):
    with ModelFile(model_path(name)) as mf:
        mf.check_tensors()
        assert (mf.quant_kind, len(mf.tensors), mf.size) == (kind, n_tensors, os.path.getsize(model_path(name)))
        assert tokenizer_metadata.validate(mf.metadata).n_vocab == n_vocab


def test_opening_a_large_vocabulary_decodes_nothing(goldens_dir):
    gc.collect()
    tracemalloc.start()
    mf = ModelFile(goldens_dir / "tokenizers" / "llama-bpe.gguf")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert mf.metadata.array_len("tokenizer.ggml.merges") == 280147
    print(f"opened 8 MB of metadata with {peak / 1024:.0f} KiB, limit 256")
    assert peak < 256 << 10


SCALARS = [
    (U8, 255, "uint8"),
    (I8, -128, "int8"),
    (U16, 65535, "uint16"),
    (I16, -32768, "int16"),
    (U32, 2**32 - 1, "uint32"),
    (I32, -(2**31), "int32"),
    (U64, 2**64 - 1, "uint64"),
    (I64, -(2**63), "int64"),
    (F32, 0.1, "float32"),
    (F64, 0.1, "float64"),
    (BOOL, True, "bool"),
    (STR, "gr\u00fc\u00dfe \u4e2d\0x", "string"),
]


@pytest.mark.parametrize("kind, value, name", SCALARS, ids=[s[2] for s in SCALARS])
def test_every_value_type_alone_and_in_an_array(write, kind, value, name):
    other = {STR: "", BOOL: False}.get(kind, 0)
    forge = (
        g.tiny_llama()
        .put("one", kind, value)
        .put_array("many", kind, [other, value, other])
        .put_array("none", kind, [])
    )
    stored = struct.unpack("<f", struct.pack("<f", value))[0] if kind == F32 else value
    with GgufFile(write(forge), quants.BLOCK_SIZES) as file:
        m = file.metadata
        assert same(m["one"], stored) and m.value_type("one") == name
        assert same(m["many"][1], stored) and m["many"][::2] == [other, other]
        assert m.value_type("many") == f"array[{name}]"
        assert (m.array_len("many"), m["none"], m.array_len("none")) == (3, [], 0)
        assert m.head("many", 1) == [other] and m.head("many", 99) == m["many"] and same(m.head("one", 0), stored)
        with open(file.path, "rb") as f:
            f.seek(m.offset("one"))
            assert f.read(len(g.pack(kind, value))) == g.pack(kind, value)
        with pytest.raises(TypeError, match="one is no array"):
            m.array_len("one")


def test_one_level_of_nested_arrays(write):
    inner = [g.array(U8, [1, 2]), g.array(STR, ["a", "b"]), g.array(F64, []), g.array(BOOL, [True])]
    forge = g.tiny_llama().raw("nested", ARR, struct.pack("<IQ", ARR, 4) + b"".join(inner))
    with GgufFile(write(forge), quants.BLOCK_SIZES) as file:
        assert file.metadata["nested"] == [[1, 2], ["a", "b"], [], [True]]
        assert file.metadata.value_type("nested") == "array[array]"
        assert file.metadata.head("nested", 2) == [[1, 2], ["a", "b"]]


def test_metadata_is_a_mapping(write):
    with GgufFile(write(g.tiny_llama().put("x", U8, 7)), quants.BLOCK_SIZES) as file:
        m = file.metadata
        assert isinstance(m, collections.abc.Mapping)
        assert "x" in m and "y" not in m and 3 not in m
        assert m.get("x") == 7 and m.get("y") is None and m.get("y", 1) == 1
        assert len(m) == len(list(m)) == len(dict(m)) and dict(m.items())["x"] == 7 and 7 in m.values()
        for missing in (m.__getitem__, m.value_type, m.array_len, m.offset, lambda k: m.head(k, 1)):
            with pytest.raises(KeyError, match="y"):
                missing("y")


def test_a_bad_string_fails_where_it_is_read_and_only_there(write):
    path = write(g.tiny_llama().put("bad", STR, b"ab\xff").put_array("list", STR, ["ok", b"\xc3("]))
    with ModelFile(path) as mf:
        for key, where in (("bad", "'bad' is not UTF-8"), ("list", r"'list'\[1\] is not UTF-8")):
            with pytest.raises(ModelLoadError, match=where) as info:
                mf.metadata[key]
            assert path.read_bytes()[info.value.fields["offset"] :][:1] in (b"\xff", b"\xc3")
        assert mf.metadata.head("list", 1) == ["ok"]


def test_strings_that_changed_since_the_file_was_opened_stay_inside_it(write):
    nested = struct.pack("<IQ", ARR, 2) + g.array(STR, ["abc"]) + g.array(U8, [1])
    path = write(g.tiny_llama().put("s", STR, "abc").put_array("list", STR, ["abc", "d"]).raw("nested", ARR, nested))
    with GgufFile(path, quants.BLOCK_SIZES) as file, open(path, "r+b") as out:
        for key, at in (("s", 0), ("list", 0), ("list", 11), ("nested", 4), ("nested", 12), ("nested", 27)):
            where = file.metadata.offset(key) + at
            good = os.pread(out.fileno(), 8, where)
            for length in (2**64 - 1, 2**63, 2**31, 1000):
                os.pwrite(out.fileno(), struct.pack("<Q", length), where)
                with pytest.raises(ModelLoadError, match=f"'{key}' was changed after the file was opened"):
                    file.metadata[key]
            os.pwrite(out.fileno(), good, where)
        assert (file.metadata["s"], file.metadata["list"], file.metadata["nested"]) == (
            "abc",
            ["abc", "d"],
            [["abc"], [1]],
        )
        with pytest.raises(ModelLoadError, match="was written to"):
            os.utime(path, (1, 1))
            file.check_unchanged()


def test_views_are_read_only_share_the_mapping_and_outlive_the_file(write):
    forge = g.tiny_llama()
    forge.tensor("output_norm.weight").data = bytes(range(128))
    mf = ModelFile(write(forge))
    view = mf.view("output_norm.weight")
    assert view.readonly and view.contiguous and view.format == "B" and view == bytes(range(128))
    with pytest.raises(TypeError):
        view[0] = 1
    assert view.cast("f").nbytes == 128
    metadata = mf.metadata
    mf.close()
    mf.close()
    assert view == bytes(range(128))
    for use in (lambda: mf.view("output_norm.weight"), lambda: metadata["general.architecture"], mf.check_unchanged,
                mf.parts[0].fileno):  # fmt: skip
        with pytest.raises(ValueError, match="is closed"):
            use()


def mapped(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


def test_files_and_mappings_go_when_the_last_user_goes(write):
    path = write(g.tiny_llama())
    before = len(os.listdir("/proc/self/fd"))
    mf = ModelFile(path)
    view = mf.view("output.weight")
    mf.close()
    assert mapped(path) == 1 and len(os.listdir("/proc/self/fd")) == before
    del view
    gc.collect()
    assert mapped(path) == 0
    ModelFile(path)  # not even closed
    gc.collect()
    assert mapped(path) == 0 and len(os.listdir("/proc/self/fd")) == before


def test_a_thousand_files_at_a_time_and_no_more(write, monkeypatch):
    """1024 mappings can be guarded; the one too many is an error, not a crash."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1300:
        pytest.skip(f"this process may only have {hard} files open")
    path, files = write(g.tiny_llama()), []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1300), hard))
    try:
        with pytest.raises(ModelLoadError, match="Too many open files"):
            for _ in range(1025):
                files.append(GgufFile(path, quants.BLOCK_SIZES))
        assert len(files) > 1000
    finally:
        for file in files:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_alignment_gaps_and_missing_padding(write):
    forge = g.tiny_llama().put("general.alignment", U32, 4096)
    forge.alignment = 4096
    for t in forge.tensors:
        t.nbytes = t.nbytes or len(t.data)
    with GgufFile(write(forge), quants.BLOCK_SIZES) as file:
        assert file.alignment == 4096 and all(t.offset % 4096 == 0 for t in file.tensors.values())
    gap = g.tiny_llama()
    gap.tensors = gap.tensors[:2]
    gap.tensors[1].offset = 2048
    with pytest.raises(ModelLoadError, match="ends at byte"):
        GgufFile(write(gap), quants.BLOCK_SIZES)
    gap.tensors[1].data = bytes(2048 - 768 + 128)
    gap.tensors[1].nbytes = 128
    with GgufFile(write(gap), quants.BLOCK_SIZES) as file:
        assert file.tensors["output_norm.weight"].offset == file.data_offset + 2048


def test_typed_getters(write):
    forge = (
        g.tiny_llama()
        .put("i", U16, 9)
        .put("f", F32, 0.5)
        .put("s", STR, "x")
        .put("b", BOOL, False)
        .put("nan", F64, math.nan)
    )
    forge.put("n", I64, -5).put_array("is", I32, [1, 2, 3]).put_array("fs", F32, [1.0])
    with ModelFile(write(forge)) as mf:
        assert mf.get_int("i", 0, 9) == 9 and mf.get_int("n", -5, 0) == -5
        assert mf.get_int("absent", 5, 6, 0) == 0 and mf.get_int("absent", 5, 6, None) is None
        assert mf.get_float("f", 0.0, 1.0) == 0.5 and mf.get_float("absent", 1.0, 2.0, 0.0) == 0.0
        assert mf.get_str("s") == "x" and mf.get_str("absent", "d") == "d"
        assert mf.get_ints("is", 1, 3, 3) == [1, 2, 3] and mf.get_ints("i", 1, 9, 2) == [9, 9]
        assert mf.get_ints("absent", 1, 9, 2, None) is None
        for call, says in (
            (lambda: mf.get_int("i", 0, 8), "i is 9, must be 0 to 8"),
            (lambda: mf.get_int("n", 0, 8), "n is -5"),
            (lambda: mf.get_int("f", 0, 8), "f is float32, must be an integer"),
            (lambda: mf.get_int("b", 0, 8), "b is bool"),
            (lambda: mf.get_int("absent", 0, 8), "absent is missing"),
            (lambda: mf.get_float("nan", -1, 1), "nan is nan"),
            (lambda: mf.get_float("i", 0, 9), "i is uint16, must be a float"),
            (lambda: mf.get_float("f", 0.6, 1), "f is 0.5"),
            (lambda: mf.get_str("i"), "i is uint16, must be a string"),
            (lambda: mf.get_ints("is", 1, 2, 3), r"is\[2\] is 3"),
            (lambda: mf.get_ints("is", 1, 3, 4), "has 3 elements"),
            (lambda: mf.get_ints("fs", 1, 3, 1), "must be integers"),
            (lambda: mf.get_int("is", 0, 8), "is array"),
        ):
            with pytest.raises(ModelLoadError, match=says) as info:
                call()
            assert "absent" in says or info.value.fields["offset"] == mf.metadata.offset(info.value.fields["field"])


@pytest.mark.parametrize("type_id", sorted(quants.TYPES))
def test_extreme_but_finite_numbers_pass_the_check(write, type_id):
    """Random bytes wherever they cannot be NaN or infinity, the largest numbers in the scales."""
    t = quants.TYPES[type_id]
    rng = random.Random(type_id)
    n_blocks = 70_000 if type_id == 2 else 999  # more than one chunk of the check
    data = bytearray(rng.randbytes(n_blocks * t.type_size))
    largest = {0: b"\xff\xff\x7f\xff", 1: b"\xff\xfb", 30: b"\x7f\xff", 39: b"\xfe"}.get(type_id, b"\xff\xfb")
    for block in range(n_blocks):
        for at in SCALES[type_id][2] if type_id in SCALES else (0,):
            start = block * t.type_size + at
            data[start : start + len(largest)] = largest
    forge = g.tiny_llama()
    forge.tensors.append(g.Tensor("t", (t.block_size, n_blocks), type_id, data=bytes(data)))
    with ModelFile(write(forge)) as mf:
        mf.check_tensors(n_threads=2)


def test_the_check_names_the_first_fault_whatever_the_threads(write):
    n_blocks = 200_000
    data = bytearray(n_blocks * 18)
    places = [17 * 18, 90_000 * 18, 199_999 * 18]
    for at in places:
        data[at : at + 2] = b"\x00\x7e"
    forge = g.tiny_llama()
    forge.tensors.append(g.Tensor("t", (32, n_blocks), 2, data=bytes(data)))
    path = write(forge)
    for threads in (1, 2, 5, 0):
        with (
            ModelFile(path) as mf,
            pytest.raises(ModelLoadError, match="tensor 't' holds NaN or infinity in a block") as info,
        ):
            mf.check_tensors(n_threads=threads)
        assert info.value.fields["offset"] == mf.tensors["t"].offset + places[0]
        assert info.value.fields["tensor"] == "t"


def test_the_check_tells_how_far_it_is_and_can_be_stopped(write, monkeypatch):
    monkeypatch.setattr("worker_orcd.gguf.model_file._CHECK_BATCH", 4096)
    seen: list[int] = []
    with ModelFile(write(g.tiny_llama())) as mf:
        mf.check_tensors(progress=seen.append)
        assert len(seen) > 5 and seen == sorted(seen) and seen[-1] == sum(t.nbytes for t in mf.tensors.values())

        def stop(done: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            mf.check_tensors(progress=stop)


def test_split_count_of_one_is_a_whole_file(write):
    with ModelFile(write(g.tiny_llama().put("split.count", U16, 1))) as mf:
        assert len(mf.parts) == 1


def test_quant_kind_is_what_the_file_holds(write):
    def kind(file_type: int | None, type_id: int, row: int = 32) -> str:
        forge = g.tiny_llama().drop("general.file_type")
        if file_type is not None:
            forge.put("general.file_type", U32, file_type)
        size = quants.TYPES[type_id].row_bytes(row)
        forge.tensors = [g.f32("norm", 4096), g.Tensor("m", (row, 99), type_id, size * 99)]
        with ModelFile(write(forge)) as mf:
            return mf.quant_kind

    assert kind(2, 2) == "Q4_0" and kind(None, 2) == "Q4_0" and kind(7, 2) == "Q4_0" and kind(999, 39) == "MXFP4"
    assert kind(15, 12, 256) == "Q4_K_M" and kind(15, 8) == "Q8_0"


# The vocabulary


def test_vocabulary_of_the_real_tokenizers(goldens_dir):
    expected = {
        "gpt-2": (50257, 50000, False, 0),
        "llama-bpe": (128256, 280147, True, 0),
        "llama-spm": (32000, 0, True, 256),
        "phi-3": (32064, 0, True, 256),
        "qwen2": (151936, 151387, False, 0),
    }
    for name, (n_vocab, n_merges, add_bos, n_bytes) in expected.items():
        with ModelFile(goldens_dir / "tokenizers" / f"{name}.gguf") as mf:
            v = tokenizer_metadata.validate(mf.metadata)
        assert (v.n_vocab, len(v.merges), v.add_bos, len(v.byte_ids)) == (n_vocab, n_merges, add_bos, n_bytes)
        assert len(v.types) == n_vocab == len(v.vocab) and v.tokens[v.vocab[v.tokens[1234]]] == v.tokens[1234]
        assert all(v.tokens[i] == f"<0x{b:02X}>" for b, i in enumerate(v.byte_ids))
        assert v.add_space_prefix is (v.model == "llama") and v.bos_id < n_vocab


def test_vocabulary_without_the_optional_keys(write):
    p = "tokenizer.ggml."
    with ModelFile(
        write(g.tiny_vocab().drop(p + "pre", p + "token_type", p + "bos_token_id", p + "eos_token_id"))
    ) as mf:
        v = tokenizer_metadata.validate(mf.metadata)
        assert (v.pre, v.bos_id, v.eos_id, v.unk_id, v.pad_id, v.add_bos, v.chat_template) == (
            "default",
            *[None] * 4,
            False,
            None,
        )
        assert v.types == [tokenizer_metadata.NORMAL] * 6 and v.scores == []
    with ModelFile(write(g.tiny_vocab(model="llama").drop(p + "bos_token_id", p + "eos_token_id"))) as mf:
        v = tokenizer_metadata.validate(mf.metadata)
        assert (v.bos_id, v.eos_id, v.unk_id, v.add_bos, v.add_space_prefix) == (1, 2, 0, True, True)
    for forge in (g.tiny_vocab().drop(p + "model"), g.tiny_vocab().put(p + "model", STR, "none")):
        with ModelFile(write(forge)) as mf:
            assert tokenizer_metadata.validate(mf.metadata) is None


def test_empty_tokens_get_names(write):
    forge = g.tiny_vocab().put_array("tokenizer.ggml.tokens", STR, ["a", "b", "", "ab", "", "</s>"])
    with ModelFile(write(forge)) as mf:
        assert tokenizer_metadata.validate(mf.metadata).tokens[2:5] == ["[EMPTY_2]", "ab", "[EMPTY_4]"]


def test_names_and_sizes_of_types_are_those_of_ggml():
    for kind, (elements, n_bytes) in gguf.constants.GGML_QUANT_SIZES.items():
        assert quants.type_name(kind.value) == kind.name
        assert quants.REPORT_BLOCK_SIZES[kind.value] == (elements, n_bytes)
    assert quants.type_name(99) == "type 99" and quants.BLOCK_SIZES.keys() == quants.TYPES.keys()


def test_only_a_report_opens_a_file_of_other_types(goldens_dir):
    path = goldens_dir / "arch" / "llama-IQ4_XS.gguf"
    with pytest.raises(ModelLoadError, match="unknown or removed tensor type 23"):
        ModelFile(path)
    with ModelFile(path, for_report=True) as mf:
        assert mf.unsupported_types == (23,) and mf.quant_kind == "IQ4_XS"


def test_integers_of_layers(write):
    forge = g.tiny_llama().put_array("same", U16, [5, 5, 5]).put_array("other", U16, [5, 6, 5]).put("one", U8, 5)
    with ModelFile(write(forge)) as mf:
        assert mf.get_int_of_layers("same", 1, 9, 3) == mf.get_int_of_layers("one", 1, 9, 3) == 5
        assert mf.get_int_of_layers("absent", 1, 9, 3, None) is None
        assert mf.get_int_of_layers("absent", 1, 9, 3, 7) == 7
        for key, says in (("other", r"other\[1\] is 6, but \[0\] is 5"), ("absent", "absent is missing")):
            with pytest.raises(ModelLoadError, match=says):
                mf.get_int_of_layers(key, 1, 9, 3)


def test_trailing_ones_of_a_shape_are_dropped(write):
    forge = g.Forge().put("general.architecture", g.STR, "x")
    forge.tensors = [g.f32("a", 32, 1, 1, 1), g.f32("b", 1, 1), g.f32("c", 1, 32, 1), g.f32("d", 4, 1, 8)]
    with ModelFile(write(forge)) as mf:
        assert [t.shape for t in mf.tensors.values()] == [(32,), (1,), (1, 32), (4, 1, 8)]
        assert [t.nbytes for t in mf.tensors.values()] == [128, 4, 128, 128]
