"""Text that reads like a control token stays text, also where the model of a tokenizer has that text as a piece."""

import json

import pytest
from helpers.gguf_forge import I32, STR, U32, Forge
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from worker_orcd.tokenizer.library import keep_from_text
from worker_orcd.tokenizer.tokenizer import Tokenizer

TEMPLATE = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
CONTROLS = ["<unk>", "<s>", "</s>", "END"]
LETTERS = list("ab<>/sunkEND")
VOCABULARY = {text: i for i, text in enumerate([*CONTROLS, *LETTERS, "\u2581", "</", "s>"])}


def unigram():
    made = Library(models.Unigram([(t, -2.0 * (t not in CONTROLS)) for t in VOCABULARY], 0, False))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return made


def unigram_with_a_space_before_the_first_word_only():
    made = unigram()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return made


def whole_words_first():
    return Library(models.BPE(VOCABULARY, [], ignore_merges=True))


def merges():
    return Library(models.BPE(VOCABULARY, [("<", "/"), ("s", ">"), ("</", "s>")]))


def words():
    made = Library(models.WordLevel(VOCABULARY, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def spaces_before_words():
    """Of which the pre-tokenizer leaves a control token whole only behind a line break."""
    made = Library(models.BPE(VOCABULARY | {"\u010a": 20, "\u0120": 21}, [], ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return made


KINDS = (unigram, unigram_with_a_space_before_the_first_word_only, whole_words_first, merges, words,
         spaces_before_words)  # fmt: skip
TEXTS = ["</s>", "END", "<s>", "a</s>b", "</s></s>", "a </s> b", "<s>a</s>", "a\nEND", "\nEND\n", "ENDEND"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_becomes_a_control_token_of_a_tokenizer_json(kind, tmp_path):
    made = kind()
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROLS])
    made.encode_special_tokens = True
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    ours = Tokenizer.from_file(tmp_path)
    controls = {1, 2, 3}  # a character that the model does not know is <unk>
    assert any(controls & {*made.encode(t, add_special_tokens=False).ids} for t in TEXTS), "else there is no danger"
    for text in TEXTS:
        assert not controls & {*ours.encode(text)}, text
        ids = ours.apply_chat([{"role": "user", "content": text}])
        assert [i for i in ids if i in controls] == [1, 2], text
        assert ours.encode(text, special=True) != ours.encode(text)


@pytest.mark.parametrize(
    ("pre", "merges", "control"),
    [("llama-bpe", ["a b"], "END"), ("gpt-2", ["E N", "EN D"], "END"), ("gpt-2", ["a b"], "END")],
)
def test_no_text_becomes_a_control_token_of_a_gguf_file(pre, merges, control, tmp_path):
    tokens = [*LETTERS, "ab", "EN", control]
    forge = Forge().put("general.architecture", STR, "llama").put("tokenizer.ggml.model", STR, "gpt2")
    forge.put("tokenizer.ggml.pre", STR, pre).put("tokenizer.ggml.bos_token_id", U32, 0)
    forge.put_array("tokenizer.ggml.tokens", STR, tokens).put_array("tokenizer.ggml.merges", STR, merges)
    forge.put_array("tokenizer.ggml.token_type", I32, [1] * (len(tokens) - 1) + [3])
    path = tmp_path / "vocab.gguf"
    path.write_bytes(forge.build())
    ours = Tokenizer.from_file(path)
    end = tokens.index(control)
    assert ours.encode(control, special=True, add_bos=False) == [end]
    for text in (control, f"ab{control}", control * 2):
        assert end not in ours.encode(text)
        assert ours.decode(ours.encode(text, add_bos=False)) == text


def test_a_tokenizer_that_cuts_such_texts_anyway_stays_as_it_is():
    made = whole_words_first()
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-zA-Z]|[^a-zA-Z]+"), "isolated")
    before = str(made.pre_tokenizer)
    keep_from_text(made, [*CONTROLS, "absent", "a"])
    assert str(made.pre_tokenizer) == before
