"""Tokenizer: text to token ids and back, whatever file it came from.

The public face over three kinds: `gguf-bpe` and `gguf-spm` (from_gguf.py) and `hf-json` (from_json.py). Here
is what they share: special tokens, BOS, decoding, streaming, chat. Control tokens in a text are text unless the caller
asks; only a chat template writes them as ids.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from worker_orcd._gguf import GgufFile, Metadata
from worker_orcd._text import TextDecoder
from worker_orcd.chat.template import ChatTemplate
from worker_orcd.config import file_path
from worker_orcd.errors import InternalError, InvalidRequest, ModelLoadError
from worker_orcd.gguf import quants
from worker_orcd.tokenizer import from_gguf, from_json
from worker_orcd.tokenizer.metadata import MAX_TOKENS
from worker_orcd.tokenizer.parts import TokenizerParts
from worker_orcd.tokenizer.special_tokens import end_of_turn, stop_ids
from worker_orcd.tokenizer.stream import StreamDecoder, WindowStreamDecoder

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
        add_bos: whether `encode` begins with BOS unless told otherwise.
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
        self.add_bos = bool(parts.begin)
        self._begin = list(parts.begin) or ([] if parts.bos_id is None else [parts.bos_id])
        self.eos_id = parts.eos_id
        self.eot_id = end_of_turn(parts.known_ids) if parts.eot_id is None else parts.eot_id
        self.stop_ids = stop_ids(parts.known_ids, (parts.eos_id, parts.eot_id, parts.eom_id, *parts.fill_end_ids))
        self.chat_template = parts.chat_template
        self._chat = None
        if parts.chat_template is not None:
            # a control token of one character cannot be told from the text of a message, so in chat it is no token
            self._chat_special = parts.special.only(lambda t: len(t.text) > 1 or not t.control)
            bos, eos = ("" if i is None else parts.text_of(i) for i in (parts.bos_id, parts.eos_id))
            controls = [t.text for t in self._chat_special.tokens if t.control]
            self._chat = ChatTemplate(parts.chat_template, parts.path, bos, eos, controls)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Load a tokenizer alone.

        Args:
            path: a model .gguf, a vocabulary-only .gguf, a tokenizer.json, or a directory that holds one.

        Raises:
            InvalidRequest: `path` is no path.
            ModelLoadError: the file cannot be read, is damaged, or holds no tokenizer.
        """
        path = file_path("tokenizer", path)
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
        """The tokenizer of a model: `override`, else the model's own vocabulary, else a tokenizer.json beside it.

        A tokenizer from another file is completed from the model's metadata: special ids and a chat template that
        `override` does not name are the model's; before those of a tokenizer.json that only lies beside it, the
        model's come first.

        Args:
            model_file: the open model.
            override: a path as for `from_file`.

        Returns:
            The tokenizer, or None where there is none at all.

        Raises:
            ModelLoadError: as `from_file`; the tokenizer has more ids than the model has embeddings; or the model
                names special ids that the tokenizer.json beside it does not have.
        """
        if override is not None:
            parts = cls.from_file(override)._parts
            _check_fits(parts, model_file, "it is not this model's tokenizer")
            return cls(_completed(parts, _named(model_file.metadata, parts.n_vocab), own_first=False))
        own = from_gguf.load(model_file.metadata)
        if own is not None:
            _check_fits(own, model_file, "its vocabulary and its tensors do not belong together")
            return cls(own)
        beside = os.path.join(os.path.dirname(model_file.path), "tokenizer.json")
        if not os.path.isfile(beside):
            return None
        parts = from_json.load(beside)
        remedy = "it is not this model's tokenizer; move it away, or name the right one with --tokenizer"
        _check_fits(parts, model_file, remedy)
        for name, value in _named(model_file.metadata, MAX_TOKENS).items():
            if isinstance(value, int) and value >= parts.n_vocab:
                reason = f"has {parts.n_vocab} tokens, but {model_file.path} has {name} {value}: {remedy}"
                raise ModelLoadError(reason, beside)
        return cls(_completed(parts, _named(model_file.metadata, parts.n_vocab), own_first=True))

    def encode(self, text: str, *, special: bool = False, add_bos: bool | None = None) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text without lone surrogates.
            special: take the text of a control token for the token; otherwise it is text like any other.
            add_bos: begin with BOS (`bos_id`, or the several tokens that a tokenizer.json puts first); None: as the
                file says (`self.add_bos`). Nothing is ever put behind a text, since it is to be gone on from.

        Raises:
            InvalidRequest: the text is none or holds lone surrogates; BOS is asked for and there is none.
        """
        if not isinstance(text, str):
            raise InvalidRequest(f"text must be a string, not {type(text).__name__}", field="text")
        special = bool(special)
        try:
            text.encode()
        except UnicodeEncodeError as e:
            reason = f"text holds a surrogate code point at character {e.start}, which no UTF-8 text can"
            raise InvalidRequest(reason, field="text") from None
        ids: list[int] = []
        if self.add_bos if add_bos is None else add_bos:
            if not self._begin:
                raise InvalidRequest("add_bos is asked for, but the tokenizer has no BOS token", field="add_bos")
            ids += self._begin
        if special and self._parts.encode_special is not None:
            return ids + self._parts.encode_special(text)
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
            InvalidRequest: an id is negative, or no whole number.
        """
        try:
            ids = [operator.index(i) for i in ids]
        except TypeError:
            raise InvalidRequest("ids must be a list of whole numbers", field="ids") from None
        if self._parts.table is not None:
            return self._parts.table.decode(ids, skip_special, continues)
        return self._decode_by_library(ids, skip_special)

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
            return TextDecoder(self._parts.table.table, skip_special, continues)
        return WindowStreamDecoder(lambda ids: self._decode_by_library(ids, skip_special))

    @property
    def chat_template_sha256(self) -> str | None:
        """SHA-256 of the chat template's UTF-8 text, in hexadecimal; None where there is no template."""
        return None if self._chat is None else self._chat.sha256

    def apply_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **options: Any
    ) -> list[int]:
        """Token ids of a conversation in the form of the file's chat template.

        Control tokens are those that the template writes. What looks like one in a message is text.

        Args:
            messages: dicts with `role` and `content` (a string, a list of text parts or, of an assistant, None), in
                order.
            add_generation_prompt: end with the start of the assistant's turn.
            options: `continue_final_message`, `documents`, `variables`: see `ChatTemplate.render`.

        Raises:
            InvalidRequest: there is no chat template, the messages are malformed, or the template refuses them, does
                what a template must not do, or needs more time, memory or text than allowed.
            InternalError: the process that renders the template cannot be started, or was ended by something else.
        """
        text, mark = self._render(messages, add_generation_prompt, **options)
        fragments: list[str | int] = []
        for fragment in self._chat_special.cut(text, True):
            if isinstance(fragment, int):
                fragments.append(fragment)
            else:  # without marks, control tokens of the messages are text; user-defined ones are found now
                fragments += self._chat_special.cut(fragment.replace(mark, ""), False)
        ids = self._encode(fragments, True)
        if self.add_bos and (not ids or ids[0] not in (self._begin[0], self.bos_id)):
            ids[:0] = self._begin
        return ids

    def chat_text(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **options: Any
    ) -> str:
        """The text that the file's chat template makes of a conversation. In it the control tokens of the template can
        no more be told from what looks like one in a message.

        Args, Raises: as `apply_chat`.
        """
        text, mark = self._render(messages, add_generation_prompt, **options)
        return text.replace(mark, "")

    def _render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, **options: Any
    ) -> tuple[str, str]:
        if self._chat is None:
            raise InvalidRequest(f"{self.path} has no chat template; pass the prompt as text", field="messages")
        return self._chat.render(messages, add_generation_prompt, **options)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token; empty for ids from `n_vocab` on. Of a tokenizer that is no table of bytes, the UTF-8
        of what the token is decoded to alone.

        Raises:
            InvalidRequest: the id is negative.
        """
        if self._parts.table is not None:
            return self._parts.table.token_bytes(token)
        return self._decode_by_library([token], False).encode()


def _check_fits(parts: TokenizerParts, model_file: ModelFile, conclusion: str) -> None:
    """Refuse a tokenizer with ids that the model has no embeddings for."""
    embeddings = model_file.tensors.get("token_embd.weight")
    if embeddings is not None and parts.n_vocab > embeddings.shape[-1]:
        where = "" if parts.path == model_file.path else f"{model_file.path} has "
        reason = f"has {parts.n_vocab} tokens, but {where}embeddings for {embeddings.shape[-1]}: {conclusion}"
        raise ModelLoadError(reason, parts.path)


def _named(metadata: Metadata, limit: int) -> dict[str, int | str]:
    """Special ids below `limit` and the chat template in a model's metadata, by their names in `TokenizerParts`."""
    found: dict[str, int | str] = {}
    for name in ("bos", "eos", "eot", "eom"):
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if type(value) is int and 0 <= value < limit:
            found[f"{name}_id"] = value
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        found["chat_template"] = template
    return found


def _completed(parts: TokenizerParts, named: dict[str, int | str], own_first: bool) -> TokenizerParts:
    """`parts` of another file with what the model's metadata names: all of it, or only what they lack."""
    found: dict[str, Any] = {k: v for k, v in named.items() if own_first or getattr(parts, k) is None}
    return replace(parts, **found)
