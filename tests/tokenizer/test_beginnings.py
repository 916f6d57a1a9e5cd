"""What a text begins with and where generation ends: by tokenizer.json, by keys of a GGUF file, by their defaults."""

import json

import pytest
from helpers.gguf_forge import BOOL, STR, U32, Forge, tiny_vocab
from helpers.tiny_library import tiny_library
from tokenizers import Tokenizer as Library
from tokenizers import processors

from worker_orcd.errors import InvalidRequest, ModelLoadError
from worker_orcd.tokenizer import bpe
from worker_orcd.tokenizer.tokenizer import Tokenizer

START, END, PAD = 4, 5, 6
NAMES = [("<s>", START), ("</s>", END), ("<pad>", PAD)]


def _template(single, pair="$A $B"):
    return processors.TemplateProcessing(single, pair, NAMES)


#: name -> (post-processor, ids that a text begins with)
POST_PROCESSORS = {
    "none": (None, []),
    "byte-level": (processors.ByteLevel(trim_offsets=False), []),
    "prefix": (_template("<s> $A", "<s> $A <s> $B"), [START]),
    "suffix": (_template("$A </s>", "$A </s> $B </s>"), []),
    "both": (_template("<s> $A </s>"), [START]),
    "two before": (_template("<pad> <s> $A"), [PAD, START]),
    "before a pair only": (_template("$A", "<s> $A $B"), []),
    "same token on both sides": (_template("</s> $A </s>"), [END]),
    "sequence": (processors.Sequence([processors.ByteLevel(), _template("<s> $A </s>")]), [START]),
    "sequence with suffix": (processors.Sequence([processors.ByteLevel(), _template("$A </s>")]), []),
    "bert": (processors.BertProcessing(("</s>", END), ("<s>", START)), [START]),
    "roberta": (processors.RobertaProcessing(("</s>", END), ("<s>", START)), [START]),
}


def _load(tmp_path, post_processor, config=None) -> tuple[Library, Tokenizer]:
    library = tiny_library(special=("<s>", "</s>", "<pad>"))
    if post_processor is not None:
        library.post_processor = post_processor
    library.save(str(tmp_path / "tokenizer.json"))
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return library, Tokenizer.from_file(tmp_path)


@pytest.mark.parametrize("name", POST_PROCESSORS)
def test_a_text_begins_with_what_the_post_processor_puts_first(name, tmp_path):
    post_processor, begin = POST_PROCESSORS[name]
    library, tokenizer = _load(tmp_path, post_processor)
    assert tokenizer.encode("ab") == [*begin, 0, 1]
    assert tokenizer.encode("") == begin
    assert tokenizer.encode("ab", add_bos=False) == [0, 1]
    assert tokenizer.encode("a<s>b", special=True) == [*begin, 0, START, 1]
    whole = library.encode("ab").ids
    assert whole[: len(begin) + 2] == tokenizer.encode("ab"), "the library agrees, up to what it puts behind"
    assert (tokenizer.add_bos, tokenizer.bos_id) == (bool(begin), begin[0] if begin else None)
    if begin:
        assert tokenizer.encode("ab", add_bos=True) == [*begin, 0, 1]
    else:
        with pytest.raises(InvalidRequest, match="no BOS token"):
            tokenizer.encode("ab", add_bos=True)


@pytest.mark.parametrize("add_bos", [None, True, False, "yes"])
@pytest.mark.parametrize("name", POST_PROCESSORS)
def test_add_bos_token_of_the_config_changes_nothing(name, add_bos, tmp_path):
    """As in transformers 5, which drops the key where there is a tokenizer.json: the post-processor alone decides."""
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_eos_token": True}
    if add_bos is not None:
        config["add_bos_token"] = add_bos
    post_processor, begin = POST_PROCESSORS[name]
    tokenizer = _load(tmp_path, post_processor, config)[1]
    assert tokenizer.encode("ab") == [*begin, 0, 1]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (START, END), "as the config names them, whatever comes first"
    assert tokenizer.encode("ab", add_bos=True) == [*(begin or [START]), 0, 1]


@pytest.mark.parametrize(("template", "ids"), [
    ("{{ bos_token }}a", [START, 0]),
    ("a", [PAD, START, 0]),
    ("<pad><s>a", [PAD, START, 0]),
    ("", [PAD, START]),
])  # fmt: skip
def test_a_chat_begins_once(template, ids, tmp_path):
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = _load(tmp_path, POST_PROCESSORS["two before"][0], {"bos_token": "<s>"})[1]
    assert tokenizer.apply_chat([{"role": "user", "content": "x"}]) == ids


@pytest.mark.parametrize(("single", "names", "reason"), [
    ("$A $A", NAMES, "leaves the text out or repeats it"),
    ("<s>", NAMES, "leaves the text out or repeats it"),
    ("$B", NAMES, "fails: "),
    ("<s> $A", [("<s>", 7)], "writes token id 7, but there are 7 tokens"),
    ("<s> $A", [("<s>", 2**31)], "writes token id 2147483648, but"),
])  # fmt: skip
def test_post_processors_of_no_use_are_refused(single, names, reason, tmp_path):
    with pytest.raises(ModelLoadError, match=rf"tokenizer\.json: its post_processor {reason}"):
        _load(tmp_path, processors.TemplateProcessing(single, None, names))


# --- GGUF: what counts where a key is absent -----------------------------------------------------------------------

#: pre-tokenizers whose files need not say that a text begins with BOS
ADDS_BOS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"}


def _gguf(tmp_path, forge: Forge) -> Tokenizer:
    path = tmp_path / "vocab.gguf"
    path.write_bytes(forge.build())
    return Tokenizer.from_file(path)


@pytest.mark.parametrize("pre", sorted({*bpe.PRE_TOKENIZERS, ""}))
def test_defaults_of_byte_level_vocabularies(pre, tmp_path):
    forge = tiny_vocab()
    forge.drop("tokenizer.ggml.pre")
    if pre:
        forge.put("tokenizer.ggml.pre", STR, pre)
    begin = [4] if pre in ADDS_BOS else []
    assert _gguf(tmp_path, forge).encode("ab") == [*begin, 3]
    for said in (True, False):
        forge.put("tokenizer.ggml.add_bos_token", BOOL, said)
        assert _gguf(tmp_path, forge).encode("ab") == ([4, 3] if said else [3])
    forge.drop("tokenizer.ggml.add_bos_token", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id")
    tokenizer = _gguf(tmp_path, forge)
    assert tokenizer.encode("ab") == [3], "without a BOS token nothing comes first"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (None, None, None)
    assert tokenizer.stop_ids == (5,), "</s>, typed control"


def test_defaults_of_sentencepiece_vocabularies(tmp_path):
    forge = tiny_vocab(model="llama").drop("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id")
    tokenizer = _gguf(tmp_path, forge)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.add_bos) == (1, 2, 0, True)
    space_a = 261
    assert tokenizer.encode("a") == [1, space_a], "BOS, and a space before the text"
    forge.put("tokenizer.ggml.add_bos_token", BOOL, False).put("tokenizer.ggml.add_space_prefix", BOOL, False)
    assert _gguf(tmp_path, forge).encode("a") == [260]


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_an_id_of_minus_1_is_none(model, tmp_path):
    """As llama.cpp saves a model that lacks them; in files of its oldest converters only padding is -1."""
    forge = tiny_vocab(model=model).put("tokenizer.ggml.padding_token_id", U32, 2**32 - 1)
    tokenizer = _gguf(tmp_path, forge)
    assert tokenizer.pad_id is None
    bos, eos = (4, 5) if model == "gpt2" else (1, 2)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (bos, eos)
    for name in ("bos", "eos", "eot", "eom", "unknown", "fim_pad", "fim_rep", "fim_sep", "seperator", "mask"):
        forge.put(f"tokenizer.ggml.{name}_token_id", U32, 2**32 - 1)
    tokenizer = _gguf(tmp_path, forge)
    named = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eot_id, tokenizer.unk_id, tokenizer.pad_id)
    assert named == (None,) * 5 and not tokenizer.add_bos
    assert tokenizer.encode("a") == ([0] if model == "gpt2" else [261])
    assert tokenizer.decode(tokenizer.encode("a")).strip() == "a"
    forge.put("tokenizer.ggml.add_bos_token", BOOL, True)
    with pytest.raises(ModelLoadError, match="add_bos_token is true"):
        _gguf(tmp_path, forge)


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_nothing_is_put_behind_a_prompt(model, tmp_path):
    """`add_eos_token` is for training texts; a prompt is gone on from."""
    plain = _gguf(tmp_path, tiny_vocab(model=model)).encode("a")
    assert _gguf(tmp_path, tiny_vocab(model=model).put("tokenizer.ggml.add_eos_token", BOOL, True)).encode("a") == plain


@pytest.mark.parametrize(("pre", "whole"), [(p, p in ADDS_BOS) for p in sorted(bpe.PRE_TOKENIZERS)])
def test_words_that_are_tokens_come_before_merges(pre, whole, tmp_path):
    """llama.cpp's `ignore_merges`: "abc" is a token that no merge leads to."""
    forge = tiny_vocab().put("tokenizer.ggml.pre", STR, pre).put("tokenizer.ggml.add_bos_token", BOOL, False)
    tokens = ["a", "b", "c", "ab", "<s>", "</s>", "abc"]
    forge.put_array("tokenizer.ggml.tokens", STR, tokens).drop("tokenizer.ggml.token_type")
    assert _gguf(tmp_path, forge).encode("abc") == ([6] if whole else [3, 2])


# --- where generation ends -----------------------------------------------------------------------------------------

#: texts at which llama.cpp ends generation -> whether an ordinary token of that text does so here too. Left out are
#: <|tool_response> and its kin of vocabularies of model "gemma4", which are refused.
ENDS = {
    **dict.fromkeys(["<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>",
                     "<|eom_id|>", "<|end_of_text|>", "<end_of_utterance>", "<\uff5cend\u2581of\u2581sentence\uff5c>",
                     "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>",
                     "<reponame>", "<|file_sep|>"], True),
    **dict.fromkeys(["</s>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>", "[e~[", "<turn|>", "<|flush|>", "<|calls|>",
                     "<PAD>", "[PAD]", "<REPO>"], False),
}  # fmt: skip


@pytest.mark.parametrize("text", ENDS)
def test_texts_that_end_generation(text, tmp_path):
    def stops(kind):
        forge = tiny_vocab().drop("tokenizer.ggml.eos_token_id")
        forge.put_array("tokenizer.ggml.tokens", STR, ["a", "b", "c", "ab", "<s>", text])
        forge.put_array("tokenizer.ggml.token_type", 5, [1, 1, 1, 1, 3, kind])
        return _gguf(tmp_path, forge).stop_ids

    assert stops(3) == stops(4) == (5,)
    assert stops(1) == ((5,) if ENDS[text] else ())


@pytest.mark.parametrize("key", ["eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep"])
def test_keys_that_end_generation(key, tmp_path):
    forge = tiny_vocab().drop("tokenizer.ggml.eos_token_id").put(f"tokenizer.ggml.{key}_token_id", U32, 2)
    assert _gguf(tmp_path, forge).stop_ids == (2, 5)
    with pytest.raises(ModelLoadError, match=f"{key}_token_id is 6, but the vocabulary has 6 tokens"):
        _gguf(tmp_path, forge.put(f"tokenizer.ggml.{key}_token_id", U32, 6))


@pytest.mark.parametrize("pair", [("<|return|>", "<|call|>"), ("<|flush|>", "<|calls|>")])
def test_formats_of_messages_do_not_end_with_a_message(pair, tmp_path):
    forge = tiny_vocab()
    forge.put_array("tokenizer.ggml.tokens", STR, ["a", "b", "c", "ab", "<s>", "<|end|>", *pair])
    forge.put_array("tokenizer.ggml.token_type", 5, [1, 1, 1, 1, 3, 3, 3, 3])
    assert _gguf(tmp_path, forge).stop_ids == (6, 7)
