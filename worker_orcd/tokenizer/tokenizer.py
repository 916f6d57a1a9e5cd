"""Tokenizer: text to token ids and back, whatever file it came from.

The public face over three kinds: `gguf-bpe` and `gguf-spm` (from_gguf.py) and `hf-json` (from_json.py). Here
is what they share: special tokens, BOS, decoding, streaming, chat. Control tokens in a text are text unless the caller
asks; only a chat template writes them as ids.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from worker_orcd._gguf import GgufFile, Metadata
from worker_orcd.chat.template import ChatTemplate
from worker_orcd.errors import InternalError, InvalidRequest, ModelLoadError
from worker_orcd.gguf import quants
from worker_orcd.tokenizer import from_gguf, from_json
from worker_orcd.tokenizer.parts import TokenizerParts
from worker_orcd.tokenizer.special_tokens import SpecialTokens, end_of_turn, stop_ids
from worker_orcd.tokenizer.stream import ByteStreamDecoder, StreamDecoder, WindowStreamDecoder

if TYPE_CHECKING:
    from worker_orcd.gguf.model_file import ModelFile


class Tokenizer:
    """Text <-> token ids. Made by `from_file` or `from_model`; safe to use from several threads.

    Attributes:
        kind: "gguf-bpe", "gguf-spm" or "hf-json".
        path: the file it came from.
        sha256: which tokenizer it is: of a tokenizer.json the SHA-256 of its bytes, of a GGUF file that of the keys
            ``tokenizer.ggml.*`` in a canonical form (`from_gguf.metadata_sha256`).
        n_vocab: ids are below this.
        bos_id, eos_id, eot_id, unk_id, pad_id: special ids, or None.
        add_bos: whether `encode` begins with `bos_id` unless told otherwise.
        stop_ids: ids that end generation, ascending.
        chat_template: jinja source of the file, or None.
    """

    def __init__(self, parts: TokenizerParts) -> None:
        self._parts = parts
        self.kind = parts.kind
        self.path = parts.path
        self.sha256 = parts.sha256
        self.n_vocab = parts.n_vocab
        self.bos_id = parts.bos_id
        self.unk_id = parts.unk_id
        self.pad_id = parts.pad_id
        self.add_bos = parts.add_bos
        self.eos_id = parts.eos_id
        self.eot_id = end_of_turn(parts.known_ids) if parts.eot_id is None else parts.eot_id
        self.stop_ids = stop_ids(parts.known_ids, (parts.eos_id, parts.eot_id, parts.eom_id))
        self.chat_template = parts.chat_template
        self._chat = None
        if parts.chat_template is not None:
            # a control token of one character cannot be told from the text of a message, so in chat it is no token
            self._chat_special = SpecialTokens([t for t in parts.special.tokens if len(t.text) > 1 or not t.control])
            bos, eos = ("" if i is None else parts.text_of(i) for i in (parts.bos_id, parts.eos_id))
            controls = [t.text for t in self._chat_special.tokens if t.control]
            self._chat = ChatTemplate(parts.chat_template, parts.path, bos, eos, controls)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Load a tokenizer alone.

        Args:
            path: a model .gguf, a vocabulary-only .gguf, a tokenizer.json, or a directory that holds one.

        Raises:
            ModelLoadError: the file cannot be read, is damaged, or holds no tokenizer.
        """
        path = os.fsdecode(path)
        if os.path.isdir(path):
            path = os.path.join(path, "tokenizer.json")
        if path.endswith(".json"):
            return cls(from_json.load(path))
        file = GgufFile(path, quants.BLOCK_SIZES)
        try:
            parts = from_gguf.load(file.metadata)
        finally:
            file.close()
        if parts is None:
            raise ModelLoadError("holds no tokenizer (tokenizer.ggml.model is absent or 'none')", path)
        return cls(parts)

    @classmethod
    def from_model(cls, model_file: ModelFile, override: str | os.PathLike[str] | None = None) -> Tokenizer | None:
        """The tokenizer of a model: `override`, else a tokenizer.json beside the model, else the model's own metadata.

        Special ids and a chat template that a tokenizer.json does not name are taken from the model's metadata.

        Args:
            model_file: the open model.
            override: a path as for `from_file`.

        Returns:
            The tokenizer, or None where there is none at all.

        Raises:
            ModelLoadError: as `from_file`; the tokenizer has more ids than the model has embeddings; or the
                tokenizer.json beside the model holds other tokens than the model's metadata.
        """
        beside = os.path.join(os.path.dirname(model_file.path), "tokenizer.json")
        if override is not None:
            tokenizer = cls.from_file(override)
        elif os.path.exists(beside):
            tokenizer = cls.from_file(beside)
            _check_same_tokens(tokenizer, model_file)
        else:
            parts = from_gguf.load(model_file.metadata)
            if parts is None:
                return None
            tokenizer = cls(parts)
        embeddings = model_file.tensors.get("token_embd.weight")
        if embeddings is not None and tokenizer.n_vocab > embeddings.shape[-1]:
            raise ModelLoadError(
                f"has {tokenizer.n_vocab} tokens, but {model_file.path} has embeddings for {embeddings.shape[-1]}: "
                "it is not this model's tokenizer",
                tokenizer.path,
            )
        if tokenizer.path != model_file.path:
            tokenizer = cls(_completed(tokenizer._parts, model_file.metadata))
        return tokenizer

    def encode(self, text: str, *, special: bool = False, add_bos: bool | None = None) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text without lone surrogates.
            special: take the text of a control token for the token; otherwise it is text like any other.
            add_bos: begin with `bos_id`; None: as the file says (`self.add_bos`).

        Raises:
            InvalidRequest: the text holds lone surrogates; BOS is asked for and there is none.
        """
        try:
            text.encode()
        except UnicodeEncodeError as e:
            reason = f"text holds a surrogate code point at character {e.start}, which no UTF-8 text can"
            raise InvalidRequest(reason, field="text") from None
        ids: list[int] = []
        if self.add_bos if add_bos is None else add_bos:
            if self.bos_id is None:
                raise InvalidRequest("add_bos is asked for, but the tokenizer has no BOS token", field="add_bos")
            ids.append(self.bos_id)
        return ids + self._encode(self._parts.special.cut(text, special), True)

    def _encode(self, fragments: list[str | int], first: bool) -> list[int]:
        ids: list[int] = []
        for fragment in fragments:
            if isinstance(fragment, int):
                ids.append(fragment)
            else:
                ids += self._parts.encode(fragment, first)
            first = False
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False, continues: bool = False) -> str:
        """Text of token ids. Bytes that are no UTF-8 become U+FFFD, one for each maximal ill-formed part.

        Args:
            ids: token ids; those from `n_vocab` on (outputs that a model pads its vocabulary with) have no text.
            skip_special: leave control tokens out.
            continues: the ids go on from others, so that a leading space belongs to the text. Otherwise the space that
                `gguf-spm` begins every text with is taken off.

        Raises:
            InvalidRequest: an id is negative.
        """
        if self._parts.table is not None:
            return self._parts.table.decode(ids, skip_special, continues)
        return self._decode_by_library(list(ids), skip_special)

    def _decode_by_library(self, ids: list[int], skip_special: bool) -> str:
        if ids and min(ids) < 0:
            raise InvalidRequest(f"token id {min(ids)} is negative", field="ids")
        if self._parts.decode is None:
            raise InternalError(f"the tokenizer of {self.path} has neither a table nor a decoder")
        return self._parts.decode([i for i in ids if i < self.n_vocab], skip_special)

    def stream(self, *, skip_special: bool = False, continues: bool = False) -> StreamDecoder:
        """A decoder for tokens that arrive one at a time; its pieces together are `decode` of all of them.

        Args: as `decode`.
        """
        if self._parts.table is not None:
            return ByteStreamDecoder(self._parts.table, skip_special, continues)
        return WindowStreamDecoder(lambda ids: self._decode_by_library(ids, skip_special))

    @property
    def chat_template_sha256(self) -> str | None:
        """SHA-256 of the chat template's UTF-8 text, in hexadecimal; None where there is no template."""
        return None if self._chat is None else self._chat.sha256

    def apply_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation in the form of the file's chat template.

        Control tokens are those that the template writes. What looks like one in a message is text.

        Args:
            messages: dicts with `role` and `content` (a string, a list of text parts or, of an assistant, None), in
                order.
            add_generation_prompt: end with the start of the assistant's turn.

        Raises:
            InvalidRequest: there is no chat template, the messages are malformed, or the template refuses them, does
                what a template must not do, or needs more time, memory or text than allowed.
            InternalError: the process that renders the template cannot be started, or was ended by something else.
        """
        if self._chat is None:
            raise InvalidRequest(f"{self.path} has no chat template; pass the prompt as text", field="messages")
        text, mark = self._chat.render(messages, add_generation_prompt)
        fragments: list[str | int] = []
        for fragment in self._chat_special.cut(text, True):
            if isinstance(fragment, int):
                fragments.append(fragment)
            else:  # without marks, control tokens of the messages are text; user-defined ones are found now
                fragments += self._chat_special.cut(fragment.replace(mark, ""), False)
        ids = self._encode(fragments, True)
        if self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids


def _check_same_tokens(tokenizer: Tokenizer, model_file: ModelFile) -> None:
    """Refuse a tokenizer.json of another model that happens to lie in the same directory: compare 256 tokens."""
    tokens = model_file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        return
    n = min(len(tokens), tokenizer.n_vocab)
    ids = range(0, n, max(1, n // 256))
    other = sum(tokenizer._parts.text_of(i) != tokens[i] for i in ids)
    if other > len(ids) // 4:  # converters rename a few
        raise ModelLoadError(
            f"{other} of {len(ids)} tokens compared are not those of {model_file.path}, which lies beside it: move it "
            "away, or name the model's own tokenizer",
            tokenizer.path,
        )


def _completed(parts: TokenizerParts, metadata: Metadata) -> TokenizerParts:
    """`parts` of another file with what they lack from a model's metadata: special ids and the chat template."""
    found: dict[str, Any] = {}
    for name in ("bos", "eos", "eot", "eom"):
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if getattr(parts, f"{name}_id") is None and isinstance(value, int) and 0 <= value < parts.n_vocab:
            found[f"{name}_id"] = value
    template = metadata.get("tokenizer.chat_template")
    if parts.chat_template is None and isinstance(template, str):
        found["chat_template"] = template
    return replace(parts, **found)
