"""Errors over tokenizer files quote at most 80 characters of them, escaped, on one line (library, metadata, bpe)."""

import json
import re

import pytest
from helpers.gguf_forge import I32, STR, tiny_vocab
from helpers.tiny_library import tiny_library

from worker_orcd.errors import ModelLoadError
from worker_orcd.tokenizer.tokenizer import Tokenizer

#: a terminal's control sequence, line breaks, text from right to left, and more than a screen of it
NASTY = "\x1b[31mev\nil\u2028\u202e" * 400
QUOTE = r"\x1b[31mev\nil\u2028\u202e\x1b[31mev\n"
#: characters of the sentence around the quotes, of which a message has two at most
SENTENCE = 500


def refused(path) -> str:
    """The message over a file, without its path."""
    with pytest.raises(ModelLoadError) as caught:
        Tokenizer.from_file(path)
    message = caught.value.message.removeprefix(f"{path}: ")
    assert message.isprintable(), message
    assert len(message) < SENTENCE, message
    return message


BPE = ["a", "b", "c", "ab", "<s>", "</s>"]


def _byte_token(forge, text):
    types = [6] + [1] * 5
    forge.put_array("tokenizer.ggml.tokens", STR, [text, *BPE[1:]]).put_array("tokenizer.ggml.token_type", I32, types)


GGUF = {
    "model": lambda f, t: f.put("tokenizer.ggml.model", STR, t),
    "pre": lambda f, t: f.put("tokenizer.ggml.pre", STR, t),
    "token twice": lambda f, t: f.put_array("tokenizer.ggml.tokens", STR, [*BPE[:4], t, t]),
    "byte token": _byte_token,
    "merge of one piece": lambda f, t: f.put_array("tokenizer.ggml.merges", STR, [t]),
    "merge of unknown pieces": lambda f, t: f.put_array("tokenizer.ggml.merges", STR, [f"{t} {t}"]),
}


@pytest.mark.parametrize("name", GGUF)
def test_text_of_a_gguf_file(name, tmp_path):
    forge = tiny_vocab()
    GGUF[name](forge, NASTY[:4000])  # a token may be that long
    path = tmp_path / "vocab.gguf"
    path.write_bytes(forge.build())
    message = refused(path)
    assert QUOTE in message
    assert max(map(len, re.findall("'([^']*)'", message))) <= 80


def _set(data, at, value):
    for key in at[:-1]:
        data = data[key]
    data[at[-1]] = value


JSON = {
    "version": ("version",),
    "merge": ("model", "merges"),
    "model": ("model", "type"),
    "pre-tokenizer": ("pre_tokenizer",),
    "normalizer": ("normalizer",),
    "added token": ("added_tokens", 0, "content"),
}


@pytest.mark.parametrize("name", JSON)
def test_messages_of_the_library(name, tmp_path):
    data = json.loads(tiny_library().to_str())
    value = {"merge": [f"a {NASTY}"], "added token": {NASTY: 1}}.get(name, NASTY)
    _set(data, JSON[name], value)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data))
    message = refused(path)
    assert message.startswith("is no tokenizer.json: ")
    assert len(message) <= len("is no tokenizer.json: ") + 80
    assert "Cannot instantiate" not in message, "every message would begin so"


def test_a_template_of_the_post_processor(tmp_path):
    data = json.loads(tiny_library().to_str())
    single = [{"SpecialToken": {"id": NASTY, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    data["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {}}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data))
    refused(path)
