"""Added tokens of a tokenizer.json (added_tokens, from_json): found where the `tokenizers` library finds them."""

import itertools
import json
import random

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from worker_orcd.tokenizer.added_tokens import AddedTokens
from worker_orcd.tokenizer.from_json import JsonEncoder
from worker_orcd.tokenizer.tokenizer import Tokenizer

FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
COMBINATIONS = list(itertools.product((False, True), repeat=4))
NORMALIZERS = {
    "none": None,
    "lower": normalizers.Lowercase(),
    "prepend": normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")]),
}


def library(*added: AddedToken, normalizer=None) -> Library:
    """Every byte is a token, so that ids say where each character went."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Library(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_tokens(list(added))
    return made


def both(tmp_path, *added: AddedToken, normalizer=None, template=None) -> tuple[Library, Tokenizer]:
    made = library(*added, normalizer=normalizer)
    made.save(str(tmp_path / "tokenizer.json"))
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    return Library.from_file(str(tmp_path / "tokenizer.json")), Tokenizer.from_file(tmp_path)


def texts(seed: int, n: int) -> list[str]:
    """Tokens among letters, digits, joiners and white space of all kinds."""
    rng = random.Random(seed)
    pieces = ["<x>", "<X>", "<x>y", "x", "é", "9", "_", "-", "\u200d", " ", "  ", "\n", "\t", "\u00a0", "\u3000",
              "\u2028", "\u0085", "\x1f", "\U0001f600", ""]  # fmt: skip
    return ["".join(rng.choices(pieces, k=rng.randint(1, 9))) for _ in range(n)]


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("flags", COMBINATIONS, ids=lambda f: "".join("01"[b] for b in f))
def test_every_flag_is_the_librarys(flags, normalizer, tmp_path):
    special = AddedToken("<x>", special=True, **dict(zip(FLAGS, flags, strict=True)))
    ordinary = AddedToken("<x>y", special=False, normalized=False)
    oracle, ours = both(tmp_path, special, ordinary, normalizer=NORMALIZERS[normalizer])
    found = 0
    for text in texts(1, 150):
        want = oracle.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, special=True) == want, text
        found += 256 in want
    assert found >= 1, "the texts hold the token"
    oracle.encode_special_tokens = True
    for text in texts(2, 150):
        assert ours.encode(text) == oracle.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("flags", COMBINATIONS, ids=lambda f: "".join("01"[b] for b in f))
def test_control_tokens_of_a_chat_template_are_the_librarys(flags, tmp_path):
    """What the template writes is cut as the library cuts it; what a user writes is text."""
    special = AddedToken("<x>", special=True, **dict(zip(FLAGS, flags, strict=True)))
    written = texts(3, 60)
    template = "{{ messages[0].content }}{{ " + json.dumps(written, ensure_ascii=False) + "[messages | length - 1] }}"
    oracle, ours = both(tmp_path, special, AddedToken("<x>y", normalized=False), template=template)
    for i, text in enumerate(written):
        messages = [{"role": "user", "content": "a"}] * (i + 1)
        assert ours.apply_chat(messages) == oracle.encode("a" + text, add_special_tokens=False).ids, text
    i = next(i for i, text in enumerate(written) if "<" not in text)
    assert 256 not in ours.apply_chat([{"role": "user", "content": "a <x> b"}] * (i + 1))


def test_no_other_text_becomes_a_control_token_in_chat(tmp_path):
    """The library finds a normalized token in normalized text; in a message that would be a way around the marks."""
    special = AddedToken("<x>", special=True, normalized=True)
    template = "<x>{{ messages[0].content }}"
    oracle, ours = both(tmp_path, special, normalizer=normalizers.Lowercase(), template=template)
    assert oracle.encode("<X>").ids == [256] == ours.encode("<X>", special=True)
    ids = ours.apply_chat([{"role": "user", "content": "<X> <x>"}])
    assert (ids[0], ids.count(256)) == (256, 1)


def test_fragments():
    added = AddedTokens({
        7: AddedToken("<x>", lstrip=True, rstrip=True, special=True, normalized=False),
        9: AddedToken("<y>", single_word=True, special=True, normalized=False),
        4: AddedToken("<x>b", special=False, normalized=False),
        5: AddedToken("<z>", special=False, normalized=True),
    })  # fmt: skip
    assert added.cut("", True) == []
    assert added.cut("plain", True) == ["plain"]
    assert added.cut("\U0001f600  <x>\u3000 é<y> <y>", True) == ["\U0001f600", 7, "é<y> ", 9]
    assert added.cut("<x>b<x> <z>", True) == [4, 7, "<z>"], "the longer one first; <z> is the library's to find"
    assert added.cut("a <x> b", False) == ["a <x> b"]
    assert added.only(lambda t: t.token != 7).cut("<x><y>", True) == ["<x>", 9]
    assert [t.token for t in added.tokens if t.control] == [7, 9]


def test_both_tokenizers_of_a_file_number_added_tokens_alike(tmp_path):
    """Ids with gaps, tokens that the vocabulary has too, and an order of its own."""
    data = json.loads(library().to_str())
    data["model"]["vocab"] = {"a": 0, "b": 9, "<in>": 2}
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    data["added_tokens"] = [{"id": i, "content": t, **token} for i, t in ((2, "<in>"), (10, "<q>"), (11, "<p>"))]
    made = Library.from_str(json.dumps(data))
    made.encode_special_tokens = True
    other = JsonEncoder(made, ())._special
    assert repr(other.get_added_tokens_decoder()) == repr(made.get_added_tokens_decoder())
    assert other.encode("a<q><in>b<p>").ids == [0, *map(made.token_to_id, ("<q>", "<in>")), 9, made.token_to_id("<p>")]


def test_long_text_with_many_control_tokens_is_quick_and_exact(tmp_path):
    oracle, ours = both(tmp_path, AddedToken("<x>", special=True, normalized=False))
    text = "ab <x>" * 20_000
    assert ours.encode(text, special=True) == oracle.encode(text, add_special_tokens=False).ids
