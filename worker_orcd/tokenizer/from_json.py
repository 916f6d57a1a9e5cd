"""`hf-json`: a tokenizer.json of the `tokenizers` library, beside a model or given by path.

The library loads and runs it; this file bounds what is read, refuses what does not fit, tells control tokens from text
and turns the vocabulary into bytes where the file's decoder allows, so that streaming costs nothing. What a text begins
with is what the file's post-processor puts before it. What tokenizer.json does not say (which tokens are BOS and EOS,
the chat template) is read from tokenizer_config.json and chat_template.jinja beside it, where they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from worker_orcd.errors import ModelLoadError, excerpt
from worker_orcd.gguf.regular_file import read_regular_file
from worker_orcd.tokenizer.added_tokens import AddedTokens
from worker_orcd.tokenizer.library import decode_with, encode_with, failing_as, keep_from_text
from worker_orcd.tokenizer.metadata import MAX_TEMPLATE_CHARS, MAX_TOKENS
from worker_orcd.tokenizer.parts import TokenizerParts
from worker_orcd.tokenizer.special_tokens import find_known
from worker_orcd.tokenizer.vocab import SPM_SPACE, Vocab, byte_level_bytes, spm_bytes

#: published tokenizer.json files stay under 40 MB
MAX_JSON_BYTES = 128 << 20
#: tokenizer_config.json and chat_template.jinja
MAX_CONFIG_BYTES = 4 << 20

#: id of the text in `_begin`: above those of every vocabulary
_TEXT_ID = 0x7FFFFFFF

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def load(path: str) -> TokenizerParts:
    """Build a tokenizer from a tokenizer.json.

    Raises:
        ModelLoadError: the file cannot be read, is too large or no tokenizer of the library; or its ids are not the
            dense numbering of a vocabulary.
    """
    data = read_regular_file(path, MAX_JSON_BYTES)
    tokenizer = _parse(data, path)
    added = tokenizer.get_added_tokens_decoder()
    tokens = _texts(tokenizer, added, path)
    control = {i for i, t in added.items() if t.special}
    config = _config(path)

    def named(name: str) -> int | None:
        text = config.get(f"{name}_token")
        text = text.get("content") if isinstance(text, dict) else text
        return tokenizer.token_to_id(text) if isinstance(text, str) else None

    encoder = JsonEncoder(tokenizer, [tokens[i] for i in sorted(control)])
    begin = _begin(tokenizer, len(tokens), path)
    bos_id = named("bos")
    return TokenizerParts(
        kind="hf-json",
        path=path,
        sha256=hashlib.sha256(data).hexdigest(),
        n_vocab=len(tokens),
        encode=encoder.encode,
        encode_special=encoder.encode_special,
        special=AddedTokens(added),
        table=_table(tokenizer, tokens, control, added),
        decode=lambda token_ids, skip: decode_with(tokenizer, token_ids, skip),
        known_ids=find_known(tokenizer.token_to_id, added.__contains__),
        bos_id=begin[0] if bos_id is None and begin else bos_id,
        eos_id=named("eos"),
        unk_id=named("unk"),
        pad_id=named("pad"),
        begin=begin,
        chat_template=_chat_template(path, config),
        text_of=lambda token: tokenizer.id_to_token(token) or "",
    )


def _parse(data: bytes, path: str) -> Tokenizer:
    with failing_as(lambda reason: ModelLoadError(f"is no tokenizer.json: {reason}", path)):
        tokenizer = Tokenizer.from_buffer(data)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # here the text of a control token is text; JsonEncoder holds another tokenizer for where it is not
    tokenizer.encode_special_tokens = True
    return tokenizer


def _texts(tokenizer: Tokenizer, added: dict[int, Any], path: str) -> list[str]:
    """Text of every token by id; "" for an id that no token has."""
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    n = max([*vocab.values(), *added], default=-1) + 1
    if n > MAX_TOKENS:
        raise ModelLoadError(f"has token id {n - 1}, limit {MAX_TOKENS - 1}", path)
    if n == 0:
        raise ModelLoadError("has an empty vocabulary", path)
    texts = [""] * n
    for text, token in vocab.items():
        texts[token] = text
    for token, of in added.items():
        texts[token] = of.content  # also where the vocabulary has two texts for an id
    return texts


def _begin(tokenizer: Tokenizer, n_vocab: int, path: str) -> tuple[int, ...]:
    """The ids that the post-processor puts before a text. What it puts behind one ends it, and no prompt is at its end.

    The library applies it to a text of one token that no vocabulary has, so that before and behind can be told apart
    whatever kinds of post-processor the file has in sequence.
    """
    if tokenizer.post_processor is None:
        return ()
    probe = Tokenizer(models.WordLevel({"text": _TEXT_ID}, unk_token="text"))
    probe.post_processor = tokenizer.post_processor
    with failing_as(lambda reason: ModelLoadError(f"its post_processor fails: {reason}", path)):
        ids = probe.encode("text", add_special_tokens=True).ids
    if ids.count(_TEXT_ID) != 1:
        raise ModelLoadError("its post_processor leaves the text out or repeats it", path)
    begin = tuple(ids[: ids.index(_TEXT_ID)])
    if any(i >= n_vocab for i in begin):
        raise ModelLoadError(f"its post_processor writes token id {max(begin)}, but there are {n_vocab} tokens", path)
    return begin


def _states(part: Any) -> list[dict[str, Any]]:
    """What a decoder or pre-tokenizer is made of, in order, as the library's own JSON."""
    if part is None:
        return []
    state = json.loads(part.__getstate__())
    states: list[dict[str, Any]] = state.get("decoders", state.get("pretokenizers", [state]))
    return states


def _table(tokenizer: Tokenizer, tokens: list[str], control: set[int], added: Iterable[int]) -> Vocab | None:
    """The vocabulary as bytes, or None where the decoder does more than look tokens up."""
    states = _states(tokenizer.decoder)
    types = [s["type"] for s in states]
    if types == ["ByteLevel"]:
        return Vocab(*byte_level_bytes(tokens, set(added)), control, strip_space=False)
    to_space = {"type": "Replace", "pattern": {"String": SPM_SPACE}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    if states[:3] == [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}] and states[3:] in ([], [strip]):
        byte_tokens = [i for i, t in enumerate(tokens) if len(t) == 6 and _BYTE_TOKEN.fullmatch(t)]
        return Vocab(*spm_bytes(tokens, set(added), byte_tokens), control, strip_space=states[3:] == [strip])
    if types == ["Metaspace"] and states[0]["replacement"] == SPM_SPACE:
        strips = states[0].get("prepend_scheme", "always") != "never"
        return Vocab(*spm_bytes(tokens, set(added), ()), control, strip_space=strips)
    return None


class JsonEncoder:
    """Text -> ids. Safe to use from several threads.

    Args:
        tokenizer: takes the text of a control token for text.
        controls: texts of the control tokens.
    """

    def __init__(self, tokenizer: Tokenizer, controls: Collection[str]) -> None:
        self._first = self._later = tokenizer
        #: finds control tokens in text; the library has a switch for that, which no thread may turn while another
        #: one encodes
        self._special = _twin(tokenizer)
        states = _states(tokenizer.pre_tokenizer)
        if [s["type"] for s in states] == ["Metaspace"] and states[0].get("prepend_scheme") == "first":
            # this pre-tokenizer puts a space before the first word of a text, which a later fragment is not
            self._later = _twin(tokenizer)
            self._later.encode_special_tokens = True
            self._later.pre_tokenizer = pre_tokenizers.Metaspace(
                states[0]["replacement"], "never", states[0].get("split", True)
            )
            keep_from_text(self._later, controls)
        keep_from_text(self._first, controls)

    def encode(self, text: str, first: bool) -> list[int]:
        """Ids of a fragment of text; `first`: it starts the whole text."""
        return encode_with(self._first if first else self._later, text)

    def encode_special(self, text: str) -> list[int]:
        """Ids of a whole text, in which the text of a control token is the token."""
        return encode_with(self._special, text)


def _twin(tokenizer: Tokenizer) -> Tokenizer:
    """`tokenizer` once more, sharing its vocabulary, with settings of its own."""
    other = Tokenizer(tokenizer.model)
    if tokenizer.normalizer is not None:
        other.normalizer = tokenizer.normalizer
    if tokenizer.pre_tokenizer is not None:
        other.pre_tokenizer = tokenizer.pre_tokenizer
    added = tokenizer.get_added_tokens_decoder()
    other.add_tokens([added[i] for i in sorted(added)])  # numbered upwards, as they were the first time
    return other


def _config(path: str) -> dict[str, Any]:
    """tokenizer_config.json beside `path`, or {}."""
    beside = os.path.join(os.path.dirname(path), "tokenizer_config.json")
    if not os.path.exists(beside):
        return {}
    try:
        config = json.loads(read_regular_file(beside, MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as e:
        raise ModelLoadError(f"is no JSON: {excerpt(str(e))}", beside) from None
    if not isinstance(config, dict):
        raise ModelLoadError("is no JSON object", beside)
    return config


def _chat_template(path: str, config: dict[str, Any]) -> str | None:
    beside = os.path.join(os.path.dirname(path), "chat_template.jinja")
    if os.path.exists(beside):
        try:
            template: Any = read_regular_file(beside, MAX_CONFIG_BYTES).decode()
        except UnicodeDecodeError as e:
            raise ModelLoadError(f"is not UTF-8: {e.reason}", beside, e.start) from None
    else:
        template = config.get("chat_template")
        if isinstance(template, list):  # several by name
            by_name = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = by_name.get("default")
    if not isinstance(template, str):
        return None
    if len(template) > MAX_TEMPLATE_CHARS:
        raise ModelLoadError(f"the chat template has {len(template)} characters, limit {MAX_TEMPLATE_CHARS}", path)
    return template
