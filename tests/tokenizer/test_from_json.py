"""tokenizer.json files (from_json, library): damaged, truncated, huge, with gaps, with a config beside."""

import json
import os
import pathlib
import random
import time

import pytest
from helpers.tiny_library import tiny_library
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from worker_orcd.errors import ModelLoadError
from worker_orcd.tokenizer import metadata
from worker_orcd.tokenizer.tokenizer import Tokenizer


def _json(tmp_path, data: bytes) -> pathlib.Path:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"null", b"[" * 100_000, b"\xff\xfe{}",
     b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":-1},"merges":[]}}',
     b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":["a b"]}}',
     b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":[["a"]]}}',
     b'{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{},"merges":[]}}',
     b'{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{"a":4000000000},"merges":[]}}'],
    ids=["empty", "object", "null", "deep", "utf16", "negative", "merge-unknown", "merge-short", "no-tokens", "id-4e9"],
)  # fmt: skip
def test_damaged_json_is_one_error(data, tmp_path):
    start = time.process_time()
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json: "):
        Tokenizer.from_file(_json(tmp_path, data))
    assert time.process_time() - start < 1.0


def test_truncated_json_is_one_error(tmp_path):
    whole = tiny_library().to_str().encode()
    for cut in random.Random(1).sample(range(len(whole) - 1), 40):
        with pytest.raises(ModelLoadError):
            Tokenizer.from_file(_json(tmp_path, whole[:cut]))


def test_huge_json_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "tokenizer.json"
    with open(path, "wb") as f:
        f.truncate(1 << 30)
    with pytest.raises(ModelLoadError, match="1073741824 bytes, limit 134217728"):
        Tokenizer.from_file(path)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(ModelLoadError, match="No such file"):
        Tokenizer.from_file(tmp_path)  # a directory without tokenizer.json
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ModelLoadError, match="not a regular file"):
        Tokenizer.from_file(tmp_path)


def test_json_settings_for_training_are_off(tmp_path):
    library = tiny_library()
    library.enable_truncation(2)
    library.enable_padding(length=16)
    library.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_file(tmp_path).encode("abcd") == [0, 1, 2, 3]


@pytest.mark.parametrize("data", [b"[]", b"{", b"[" * 10_000], ids=["list", "cut", "deep"])
def test_damaged_config_is_one_error(data, tmp_path):
    tiny_library().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_bytes(data)
    with pytest.raises(ModelLoadError, match=r"tokenizer_config\.json"):
        Tokenizer.from_file(tmp_path)


def test_config_beside_names_special_tokens_and_template(tmp_path):
    tiny_library(special=("<s>", "<|end|>")).save(str(tmp_path / "tokenizer.json"))
    templates = [{"name": "x", "template": "no"}, {"name": "default", "template": "{{ 'a' }}"}]
    config = {"bos_token": {"content": "<s>"}, "eos_token": "<|end|>"}
    config["chat_template"] = templates
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_file(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos, tokenizer.stop_ids) == (4, 5, False, (5,))
    assert tokenizer.encode("ab", add_bos=True) == [4, 0, 1]
    assert tokenizer.chat_template == "{{ 'a' }}"
    (tmp_path / "chat_template.jinja").write_text("{{ 'b' }}")
    assert Tokenizer.from_file(tmp_path).apply_chat([{"role": "user", "content": "x"}]) == [1]


def test_damaged_template_beside_is_one_error(tmp_path):
    tiny_library().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(ModelLoadError, match=r"chat_template\.jinja: is not UTF-8: .* \(at byte 3\)"):
        Tokenizer.from_file(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"a" * (metadata.MAX_TEMPLATE_CHARS + 1))
    with pytest.raises(ModelLoadError, match="the chat template has 1048577 characters, limit 1048576"):
        Tokenizer.from_file(tmp_path)


def test_ids_with_gaps_are_counted(tmp_path):
    data = json.loads(tiny_library(special=()).to_str())
    data["model"]["vocab"] = {"a": 0, "b": 9}
    for decoder, text in ((data["decoder"], "ab"), (json.loads(decoders.WordPiece().__getstate__()), "a b")):
        data["decoder"] = decoder
        tokenizer = Tokenizer.from_file(_json(tmp_path, json.dumps(data).encode()))
        assert (tokenizer.n_vocab, tokenizer.decode([0, 5, 9, 8])) == (10, text)
        stream = tokenizer.stream()
        assert "".join([*map(stream.push, [0, 5, 9, 8]), stream.flush()]) == text, "an id of no token says nothing"


def test_space_before_the_first_word_only(tmp_path):
    """Metaspace "first": a fragment behind a control token is not the start of the text."""
    library = Library(models.BPE(vocab={"\u2581": 0, "a": 1, "b": 2}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    library.decoder = decoders.Metaspace(prepend_scheme="first")
    library.add_special_tokens([AddedToken("<x>", special=True, normalized=False)])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(tmp_path)
    assert tokenizer.encode("a<x>b", special=True) == [0, 1, 3, 2] == library.encode("a<x>b").ids
    assert tokenizer.encode("<x>b", special=True) == [3, 2] == library.encode("<x>b").ids
    assert tokenizer.decode([0, 1, 0, 2]) == "a b" == library.decode([0, 1, 0, 2])
