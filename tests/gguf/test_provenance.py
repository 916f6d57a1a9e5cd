"""Provenance: digests of files, parts, chunks and tokenizers; the list of trusted models, which fails closed and must
be a regular file (gguf.regular_file)."""

from __future__ import annotations

import hashlib
import json
import os
import threading

import pytest
from helpers import gguf_forge as g
from helpers.fake_engine import FakeEngine
from helpers.gguf_forge import I32, STR, U16, Forge

from worker_orcd import LLM
from worker_orcd.errors import Cancelled, InvalidRequest, ModelLoadError
from worker_orcd.gguf import digests as provenance
from worker_orcd.gguf import trusted_models
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.gguf.trusted_models import TrustedModels, verify
from worker_orcd.runtime import devices
from worker_orcd.tokenizer.tokenizer import Tokenizer

KIB64 = 64 << 10
SHA = "ab" * 32


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def path(tmp_path):
    """A model file of 300 KB."""
    forge = g.tiny_llama().put("padding", STR, os.urandom(150_000).hex())
    (tmp_path / "m.gguf").write_bytes(forge.build())
    return tmp_path / "m.gguf"


@pytest.fixture
def split(tmp_path):
    """A model in three parts, the first without tensors; a directory of its own."""
    whole, parts = g.tiny_llama(), [Forge(), Forge()]
    tensors, whole.tensors = whole.tensors, []
    for i, tensor in enumerate(tensors):
        parts[i % 2].tensors.append(tensor)
    paths = []
    (tmp_path / "split").mkdir()
    for i, part in enumerate([whole, *parts]):
        part.put("split.no", U16, i).put("split.count", U16, 3).put("split.tensors.count", I32, len(tensors))
        part.put("padding", STR, os.urandom(40_000).hex())
        paths.append(tmp_path / "split" / f"m-0000{i + 1}-of-00003.gguf")
        paths[-1].write_bytes(part.build())
    return paths


@pytest.fixture
def listed(tmp_path):
    """A function: entries (or raw bytes) -> path of the list that holds them."""

    def write(*entries):
        data = entries[0] if entries and isinstance(entries[0], bytes) else json.dumps(list(entries)).encode()
        (tmp_path / "trusted.json").write_bytes(data)
        return tmp_path / "trusted.json"

    return write


def entry(data: bytes, name: str = "m", chunk_bytes: int | None = None) -> dict:
    found = {"name": name, "source": "a test", "sha256": sha(data)}
    if chunk_bytes is not None:
        chunks = [sha(data[i : i + chunk_bytes]) for i in range(0, len(data), chunk_bytes)]
        found |= {"chunk_bytes": chunk_bytes, "chunks": chunks}
    return found


def refused(path, trusted, expect=None) -> str:
    with ModelFile(path) as mf, pytest.raises(ModelLoadError) as caught:
        verify(mf, TrustedModels(trusted), expect)
    assert str(path) in caught.value.message and str(trusted) in caught.value.message
    assert "\n" not in caught.value.message
    return caught.value.message


# -- digests


def test_digests_are_those_of_the_bytes(path):
    data = path.read_bytes()
    with ModelFile(path) as mf:
        assert provenance.file_sha256(mf) == sha(data)
        assert provenance.part_digests(mf) == (sha(data), (sha(data),))
        ranges = provenance.chunk_ranges(mf.size, KIB64)
        assert len(ranges) == -(-len(data) // KIB64) and ranges[-1][1] == len(data)
        for n_threads in (1, 4):
            found = provenance.range_digests(mf, ranges, n_threads=n_threads)
            assert found == [sha(data[a:b]) for a, b in ranges]


def test_parts_of_a_split_model_are_one_after_another(split):
    data = [p.read_bytes() for p in split]
    whole = b"".join(data)
    with ModelFile(split[0]) as mf:
        assert provenance.part_digests(mf) == (sha(whole), tuple(map(sha, data)))
        ranges = provenance.chunk_ranges(mf.size, KIB64)
        assert provenance.range_digests(mf, ranges) == [sha(whole[a:b]) for a, b in ranges], "over the ends of parts"


@pytest.mark.parametrize("n_threads", [1, 3])
def test_progress_goes_up_to_the_size_and_may_end_it(path, n_threads):
    with ModelFile(path) as mf:
        ranges = [(0, mf.size), *provenance.chunk_ranges(mf.size, KIB64)]
        seen = []
        provenance.range_digests(mf, ranges, seen.append, n_threads)
        assert seen == sorted(seen) and seen[-1] == mf.size

        def stop(done):
            raise Cancelled("enough")

        with pytest.raises(Cancelled):
            provenance.range_digests(mf, ranges, stop, n_threads)
        assert not [t for t in threading.enumerate() if t.name.startswith("sha256")]


def test_a_file_that_changes_while_it_is_read_is_one_error(path):
    n_open = len(os.listdir("/proc/self/fd"))
    with ModelFile(path) as mf:
        os.truncate(path, mf.size - 10)
        with pytest.raises(ModelLoadError, match="was cut"):
            provenance.file_sha256(mf)
    path.write_bytes(g.tiny_llama().build())
    with ModelFile(path) as mf:
        os.utime(path, ns=(1, 1))
        with pytest.raises(ModelLoadError, match="was written to"):
            provenance.file_sha256(mf)
    assert len(os.listdir("/proc/self/fd")) == n_open


def test_a_model_may_be_closed_while_it_is_hashed(path):
    data, mf = path.read_bytes(), ModelFile(path)
    reader = provenance._Reader(mf)
    mf.close()
    digest = hashlib.sha256()
    assert list(reader.feed(digest.update, 0, len(data)))[-1] == len(data)
    assert digest.hexdigest() == sha(data)
    reader.close()


def test_the_tokenizer_of_a_gguf_file_has_the_digest_of_its_keys(path):
    forge = g.tiny_llama()
    (path.parent / "plain.gguf").write_bytes(forge.build())
    digest = Tokenizer.from_file(path.parent / "plain.gguf").sha256
    assert Tokenizer.from_file(path).sha256 == digest, "other keys and tensors do not count"
    forge.put("tokenizer.ggml.eos_token_id", g.U32, 3)
    (path.parent / "other.gguf").write_bytes(forge.build())
    assert Tokenizer.from_file(path.parent / "other.gguf").sha256 != digest
    with ModelFile(path) as mf:
        keys = sorted(k for k in mf.metadata if k.startswith("tokenizer.ggml."))
        assert keys[-1] == "tokenizer.ggml.tokens"
        tokens = mf.metadata["tokenizer.ggml.tokens"]
        stored = b"".join(len(t.encode()).to_bytes(8, "little") + t.encode() for t in tokens)
        assert mf.metadata.raw("tokenizer.ggml.tokens") == stored
        head = f"tokenizer.ggml.tokens array[string] {len(tokens)}\n".encode()
        before = b"".join(_line(mf.metadata, k) for k in keys[:-1])
        assert sha(before + head + stored) == digest


def _line(metadata, key) -> bytes:
    kind = metadata.value_type(key)
    n = metadata.array_len(key) if kind.startswith("array") else 1
    return f"{key} {kind} {n}\n".encode() + metadata.raw(key)


def test_a_tokenizer_json_has_the_digest_of_its_bytes(model_path):
    directory = model_path("qwen").parent / "gpt-oss-tokenizer"
    if not (directory / "tokenizer.json").is_file():
        pytest.skip(f"{directory} is not there")
    assert Tokenizer.from_file(directory).sha256 == sha((directory / "tokenizer.json").read_bytes())


# -- the list


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "is no JSON"),
        (b"[", "is no JSON"),
        (b"\xff", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"1" * 10_000, "is no JSON"),
        (b"3", "must be a list of entries"),
        (b'"x"', "must be a list of entries"),
        (b"null", "must be a list of entries"),
        (b"[3]", "entry 0 must be an object"),
        (b"[[]]", "entry 0 must be an obj"),
        (b"{}", "entry 0: name must be a text of 1 to 256"),
        (b'[{"name": "a", "name": "b"}]', "has the field 'name' twice"),
    ],
)
def test_a_list_that_is_none(listed, data, text):
    with pytest.raises(ModelLoadError) as caught:
        TrustedModels(listed(data))
    assert text in caught.value.message and "trusted.json" in caught.value.message and "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"name": ""}, "name must be a text of 1 to 256"),
        ({"name": 3}, "name must be"),
        ({"name": "a\nb"}, "name must be"),
        ({"name": "\ud800"}, "name must be"),
        ({"name": "x" * 257}, "name must be"),
        ({"source": None}, "source must be a text of 0 to 2048"),
        ({"source": "x" * 2049}, "source must be"),
        ({"sha256": SHA.upper()}, "sha256 must be 64 lowercase"),
        ({"sha256": SHA[1:]}, "sha256 must be"),
        ({"sha256": None}, "sha256 must be"),
        ({"sha256": [SHA]}, "sha256 must be"),
        ({"sha256": SHA[:63] + "\u0661"}, "sha256 must be"),
        ({"chunks": []}, "chunks must be a list of digests"),
        ({"chunks": SHA}, "chunks must be"),
        ({"chunks": [SHA, "x"]}, "chunks must be"),
        ({"chunks": None}, "chunks must be"),
        ({"chunk_bytes": KIB64}, "chunk_bytes is there without chunks"),
        ({"chunks": [SHA], "chunk_bytes": 0}, "chunk_bytes must be a whole number"),
        ({"chunks": [SHA], "chunk_bytes": True}, "chunk_bytes must be"),
        ({"chunks": [SHA], "chunk_bytes": 65536.0}, "chunk_bytes must be"),
        ({"chunks": [SHA], "chunk_bytes": 1 << 31}, "chunk_bytes must be"),
        ({"sha265": SHA}, "'sha265' is no field of an entry"),
    ],
)
def test_an_entry_that_breaks_its_rule(listed, change, text):
    good = {"name": "m", "source": "", "sha256": SHA}
    assert len(TrustedModels(listed(good)).entries) == 1
    with pytest.raises(ModelLoadError) as caught:
        TrustedModels(listed({**good, "name": "n", "sha256": "cd" * 32}, {**good, **change}))
    assert f"entry 1: {text}" in caught.value.message


@pytest.mark.parametrize("same", ["name", "sha256", "chunks"])
def test_entries_that_are_there_twice(listed, same):
    one = {"name": "a", "source": "", "sha256": SHA, "chunks": [SHA]}
    two = {"name": "b", "source": "", "sha256": "cd" * 32, "chunks": ["cd" * 32]}
    assert len(TrustedModels(listed(one, two)).entries) == 2
    with pytest.raises(ModelLoadError, match=f"entry 1: {same} is that of entry 0 too"):
        TrustedModels(listed(one, {**two, same: one[same]}))


def test_a_list_that_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with open(tmp_path / "huge.json", "wb") as file:
        file.truncate(1 << 30)
    for name, text in (
        ("missing", "cannot be read: No such file"),
        ("fifo", "not a regular file"),
        (".", "not a reg"),
        ("huge.json", f"has 1073741824 bytes, limit {trusted_models.MAX_LIST_BYTES}"),
    ):
        with pytest.raises(ModelLoadError, match=text):
            TrustedModels(tmp_path / name)


# -- verification


@pytest.mark.parametrize("chunk_bytes", [None, KIB64, 100_000, 1 << 20])
def test_a_listed_model_is_trusted(path, listed, chunk_bytes):
    data = path.read_bytes()
    other = entry(b"another", "other", KIB64)
    trusted = listed(other, entry(data, "mine", chunk_bytes))
    seen = []
    with ModelFile(path) as mf:
        found = verify(mf, TrustedModels(trusted), None, seen.append)
        assert found.facts() == {
            "sha256": sha(data),
            "verified_by": "chunks" if chunk_bytes else "sha256",
            "trusted_name": "mine",
            "trusted_source": "a test",
        }
        assert seen == sorted(seen)
        both = verify(mf, TrustedModels(trusted), sha(data))
        assert both.by == "sha256" and both.entry.name == "mine"


def test_one_entry_needs_no_list(path, listed):
    with ModelFile(path) as mf:
        assert verify(mf, TrustedModels(listed(json.dumps(entry(path.read_bytes())).encode())), None).entry.name == "m"


def test_a_split_model_is_trusted_as_a_whole(split, listed):
    whole = b"".join(p.read_bytes() for p in split)
    for chunk_bytes in (None, KIB64):
        trusted = listed(entry(whole, "split", chunk_bytes))
        with ModelFile(split[0]) as mf:
            assert verify(mf, TrustedModels(trusted), None).sha256 == sha(whole)
    data = bytearray(split[2].read_bytes())
    data[-1] ^= 1
    split[2].write_bytes(data)
    assert "chunk " in refused(split[0], trusted)


def test_an_unlisted_model_is_refused(path, listed):
    data = path.read_bytes()
    assert refused(path, listed()).endswith("which lists nothing")
    assert f"which lists 1 model: its SHA-256 is {sha(data)}" in refused(path, listed(entry(b"other")))
    message = refused(path, listed(entry(b"other", "m.gguf"), entry(b"another", "a", KIB64)))
    assert "which lists 2 models, one of them under this name with another digest" in message


@pytest.mark.parametrize("at", [0, KIB64, 200_000, -1])
def test_one_flipped_bit_is_refused(path, listed, at):
    data = path.read_bytes()
    spoiled = bytearray(data)
    spoiled[at] ^= 1
    expected = at % len(data) // KIB64
    # the file is good, the list is of one that differs in a bit
    assert "its SHA-256 is" in refused(path, listed(entry(bytes(spoiled))))
    message = refused(path, listed(entry(bytes(spoiled), "m", KIB64)))
    assert f"chunk {expected} (bytes {expected * KIB64} to " in message and "is not that of 'm'" in message


def test_a_file_that_is_longer_or_shorter_is_refused(path, listed):
    data = path.read_bytes()
    for other in (data[:-1], data + b"\0", data[:KIB64], data + data):
        for chunk_bytes in (None, KIB64):
            refused(path, listed(entry(other, "m", chunk_bytes)))


def test_an_entry_that_contradicts_itself_is_refused(path, listed):
    data = path.read_bytes()
    wrong = entry(b"x" * len(data), "wrong", KIB64) | {"sha256": sha(data)}
    refused(path, listed(wrong))
    refused(path, listed(wrong, entry(b"other")))


def test_both_demands_must_be_met(path, listed):
    data = path.read_bytes()
    with ModelFile(path) as mf:
        with pytest.raises(ModelLoadError, match=f"SHA-256 is {sha(data)}, not {SHA}"):
            verify(mf, TrustedModels(listed(entry(data))), SHA)
        assert verify(mf, None, None) == trusted_models.Verified()
        assert verify(mf, None, sha(data)).facts()["verified_by"] == "sha256"
    assert "its SHA-256 is" in refused(path, listed(entry(b"other")), sha(data))


# -- whole models and commands


@pytest.fixture
def engines(monkeypatch):
    made = []

    def open_engine(device, model_file, plan, config, **_):
        made.append(FakeEngine(config, plan.kv_groups, plan.n_vocab))
        return made[-1]

    monkeypatch.setattr(devices, "open_engine", open_engine)
    return made


def test_an_llm_knows_where_it_comes_from(path, listed, engines):
    data = path.read_bytes()
    tokenizer = Tokenizer.from_file(path)
    with LLM(path, device="cpu", progress=False) as llm:
        assert llm.info.sha256 is None and llm.info.verified_by is None
        assert llm.info.tokenizer_sha256 == tokenizer.sha256
        assert llm.digest() == llm.info.sha256 == sha(data)
        assert llm.info.verified_by is None, "nobody demanded anything"
    trusted = listed(entry(data, "mine", KIB64))
    seen = []
    with LLM(path, device="cpu", progress=lambda done, total: seen.append(done), trusted_models=trusted) as llm:
        info = llm.info.to_dict()
    assert (info["sha256"], info["verified_by"], info["trusted_name"]) == (sha(data), "chunks", "mine")
    assert seen == sorted(seen) and seen[-1] == len(data)


def test_an_untrusted_model_never_gets_an_engine(path, listed, engines):
    for trusted in (listed(entry(b"other")), listed(b"{"), path.parent / "missing.json"):
        with pytest.raises(ModelLoadError):
            LLM(path, device="cpu", progress=False, trusted_models=trusted)
    assert engines == []


def test_the_command_writes_an_entry_that_is_trusted(call, path, tmp_path):
    data = path.read_bytes()
    code, out, err = call("provenance", path, "--source", "a test")
    assert code == 0 and err == ""
    found = json.loads(out)
    assert found == {
        "name": "m.gguf",
        "source": "a test",
        "sha256": sha(data),
        "chunk_bytes": 64 << 20,
        "chunks": [sha(data)],
    }
    assert call("provenance", path, "--name", "mine", "--out", tmp_path / "t.json") == (0, "", "")
    with ModelFile(path) as mf:
        assert verify(mf, TrustedModels(tmp_path / "t.json"), None).facts()["trusted_name"] == "mine"
    code, _, err = call("provenance", path, "--name", "")
    assert code == 1 and err.startswith("error: INVALID_REQUEST: name must be")
    code, _, err = call("provenance", tmp_path / "missing.gguf")
    assert code == 1 and err.startswith("error: MODEL_LOAD_FAILED: ")


def test_a_chunk_of_an_entry_has_64_mib(monkeypatch, path):
    monkeypatch.setattr(trusted_models, "CHUNK_BYTES", KIB64)
    monkeypatch.setattr(trusted_models, "chunk_ranges", lambda size: provenance.chunk_ranges(size, KIB64))
    with ModelFile(path) as mf:
        made = trusted_models.entry_of(mf, "m", "")
        assert made == entry(path.read_bytes(), "m", KIB64) | {"source": ""}
        with pytest.raises(InvalidRequest):
            trusted_models.entry_of(mf, "m", "a\nb")


def test_inspect_shows_digests(call, path, split):
    data = path.read_bytes()
    code, out, _ = call("inspect", path, "--json")
    facts = json.loads(out)
    assert code == 0 and "sha256" not in facts
    assert facts["tokenizer"]["sha256"] == Tokenizer.from_file(path).sha256
    assert facts["tokenizer"]["chat_template_sha256"] is None
    code, out, _ = call("inspect", path, "--sha256")
    assert code == 0 and f"whole  {sha(data)}" in out
    code, out, _ = call("inspect", split[0], "--sha256", "--json")
    parts = {str(p): sha(p.read_bytes()) for p in split}
    assert json.loads(out)["sha256"] == parts | {"whole": sha(b"".join(p.read_bytes() for p in split))}


def test_serve_takes_the_list_from_its_variable(monkeypatch, call, path):
    from worker_orcd.wsgi import server

    seen = []
    monkeypatch.setattr(server, "serve", seen.append)
    monkeypatch.setenv("WORKER_ORCD_TRUSTED_MODELS", "list.json")
    monkeypatch.setenv("WORKER_ORCD_VRAM_LIMIT_MB", "16384")
    assert call("serve", "--model", path)[0] == 0
    assert seen[0].trusted_models == "list.json" and seen[0].vram_limit_bytes == 16384 << 20


@pytest.mark.parametrize("command", ["generate", "bench"])
def test_other_commands_refuse_too(call, path, listed, command):
    args = [command, "--model", path, "--device", "cpu", "--trusted-models", listed(entry(b"other"))]
    code, out, err = call(*args, *(["--prompt", "x"] if command == "generate" else []))
    assert code == 1 and out == "" and err.startswith("error: MODEL_LOAD_FAILED: ") and "is not trusted" in err
    code, _, err = call(
        command,
        "--model",
        path,
        "--device",
        "cpu",
        "--vram-limit-mb",
        "100",
        *(["--prompt", "x"] if command == "generate" else ["-p", "4", "-n", "0"]),
    )
    assert code == 1 and err.startswith("error: INVALID_REQUEST: a limit of device memory is for a GPU")
