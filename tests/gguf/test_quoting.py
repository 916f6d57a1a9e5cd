"""Text of a file in a message: escaped, on one line, short."""

import struct

import pytest
from helpers import gguf_forge as g

from worker_orcd.errors import MAX_QUOTED, ModelLoadError, excerpt, quoted
from worker_orcd.gguf.model_file import ModelFile

LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


@pytest.mark.parametrize("text", ["", "llama", "it's", "x" * MAX_QUOTED, "\u00e9\u4e16"])
def test_short_plain_text_stays(text: str):
    assert excerpt(text) == text
    assert quoted(text) == f"'{text}'"


@pytest.mark.parametrize("character", [*LINE_ENDS, "\x1b", "\0", "\ud800", "\u202e", "\U000e0001"])
@pytest.mark.parametrize("n", [1, 7, 80, 1000])
def test_no_character_leaves_the_line_or_passes_the_limit(character: str, n: int):
    shown = excerpt(character * n)
    assert shown.isprintable() and len(shown) <= MAX_QUOTED
    whole = character.encode("unicode_escape").decode() if character != "\ud800" else "\\ud800"
    kept = shown.removesuffix("...")
    assert kept == whole * (len(kept) // len(whole)) and kept  # no escape is cut in two


def test_long_text_ends_in_dots():
    assert excerpt("x" * 81) == "x" * 77 + "..."
    assert len(excerpt("y" * (1 << 20))) == MAX_QUOTED


def spoiled(name: str) -> g.Forge:
    forge = g.tiny_llama()
    if name == "a key twice":
        forge.put("k" * 60_000, g.U8, 1)
        forge.extra_keys.append(g.string("k" * 60_000) + struct.pack("<IB", g.U8, 1))
    elif name == "a key that is not ASCII":
        forge.put("\u2028" * 20_000, g.U8, 1)
    elif name == "a key of quotes":
        forge.raw("'" * 60_000, 99, b"")
    elif name == "a tensor of quotes":
        forge.tensor("output_norm.weight").name = "'\\" * 31
        forge.tensors.append(forge.tensor("'\\" * 31))
    return forge


@pytest.mark.parametrize("name", ["a key twice", "a key that is not ASCII", "a key of quotes", "a tensor of quotes"])
def test_what_the_parser_quotes_is_short_and_on_one_line(name, tmp_path):
    (tmp_path / "f.gguf").write_bytes(spoiled(name).build())
    with pytest.raises(ModelLoadError) as caught:
        ModelFile(tmp_path / "f.gguf")
    reason = caught.value.fields["reason"]
    assert reason.isprintable() and reason.isascii() and "'" in reason
    quotation = reason[reason.index("'") + 1 : reason.rindex("'")]
    assert len(quotation) <= MAX_QUOTED
    print(reason)


def test_a_long_key_whose_value_is_not_utf8(tmp_path):
    key = "llama." + "n" * 60_000
    (tmp_path / "f.gguf").write_bytes(g.tiny_llama().put(key, g.STR, b"\xff").build())
    with ModelFile(tmp_path / "f.gguf") as mf, pytest.raises(ModelLoadError, match="is not UTF-8") as caught:
        mf.metadata[key]
    assert len(caught.value.fields["reason"]) < 2 * MAX_QUOTED and len(caught.value.fields["field"]) <= MAX_QUOTED
