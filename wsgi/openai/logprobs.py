"""Log-probabilities of tokens in OpenAI's two shapes, and the text of a token alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from worker_orcd.serving.job import Completion, Job
from worker_orcd.wsgi.openai.answers import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

#: JSON has no infinity; clients of vLLM know this number in its place
LEAST = -9999.0

#: of one token: {token id: log-probability}, most likely first; None where nothing predicts it
Likely = Mapping[int, float] | None


class Decoder(Protocol):
    """What is needed of a tokenizer's stream decoder."""

    def push(self, token: int) -> str:
        """The text that a token completes."""

    def flush(self) -> str:
        """The end of the text."""


class Vocabulary(Protocol):
    """What is needed of a tokenizer."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token."""

    def stream(self, *, continues: bool) -> Decoder:
        """A decoder, of a text that goes on from a prompt or of a whole one."""


class TokenTexts:
    """The texts of single tokens.

    Args:
        tokenizer: None for a model without one: then tokens are called by their numbers.
    """

    def __init__(self, tokenizer: Vocabulary | None) -> None:
        self._tokenizer = tokenizer

    def data(self, token: int) -> bytes:
        """The bytes of a token."""
        return b"" if self._tokenizer is None else self._tokenizer.token_bytes(token)

    def text(self, token: int) -> str:
        """The text of a token; bytes that are no UTF-8 become U+FFFD."""
        return self.data(token).decode("utf-8", "replace")

    def name(self, token: int) -> str:
        """The text of a token, or where it is none its bytes as in ``bytes:\\xe2\\x80``, or its number."""
        if self._tokenizer is None:
            return f"token_id:{token}"
        data = self.data(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def decoder(self, continues: bool) -> Decoder | None:
        """A stream decoder: of a text that goes on from a prompt, or of a whole one."""
        return None if self._tokenizer is None else self._tokenizer.stream(continues=continues)


class Offsets:
    """Where in the text of a choice its tokens begin: at the first character that they have a part in.

    Args:
        texts: decodes.
        continues: whether the tokens go on from a prompt.
        start: characters before the first token.
        given: the text that was encoded, where it is known. Some tokenizers put a space before a text, also after a
            control token in it, that decoding cannot tell from one that was there.
    """

    def __init__(self, texts: TokenTexts, continues: bool, start: int = 0, given: str | None = None) -> None:
        self._decoder = texts.decoder(continues)
        self._given = None if given is None else given.replace("\u2581", " ")  # SPM writes a space so, and reads it so
        self.n_chars = start

    def push(self, token: int) -> int:
        """The offset of the next token."""
        at = self.n_chars
        if self._decoder is not None:
            piece = self._decoder.push(token)
            added = self._given is not None and piece[:1] == " " != self._given[at : at + 1]
            self.n_chars += len(piece) - added
        return at

    def end(self) -> int:
        """Characters of the text when no token follows."""
        if self._decoder is not None:
            self.n_chars += len(self._decoder.flush())
        return self.n_chars


def completion_logprobs(
    texts: TokenTexts, tokens: Sequence[int], likely: Iterable[Likely], offsets: Offsets
) -> CompletionLogprobs:
    """The shape of completions.

    Args:
        tokens: ids.
        likely: of each, with itself.
        offsets: moved on by the tokens.
    """
    out = CompletionLogprobs([], [], [], [])
    for token, found in zip(tokens, likely, strict=True):
        out.text_offset.append(offsets.push(token))
        out.tokens.append(texts.name(token))
        out.token_logprobs.append(None if found is None else max(found[token], LEAST))
        out.top_logprobs.append(None if found is None else _by_name(texts, found))
    return out


def add_end(texts: TokenTexts, out: CompletionLogprobs, job: Job, completion: Completion, offsets: Offsets) -> None:
    """Add the token that ended a job, if no stop string did. Clients that score by count (`echo`, one token) want it.

    Args:
        out: of the tokens of its text.
        completion: the job's.
        offsets: moved on by these tokens.
    """
    end, token = offsets.end(), job.drawn(len(completion.token_ids))
    if token is not None and not isinstance(completion.stop_reason, str):
        (found,) = job.logprobs(len(completion.token_ids), 1)
        out.text_offset.append(end)
        out.tokens.append(texts.name(token))
        out.token_logprobs.append(max(found[token], LEAST))
        out.top_logprobs.append(_by_name(texts, found))


def chat_logprobs(texts: TokenTexts, tokens: Sequence[int], likely: Iterable[Likely], n_top: int) -> ChatLogprobs:
    """The shape of chat completions, with the `n_top` most likely tokens in each place."""
    content = []
    for token, found in zip(tokens, likely, strict=True):
        found = found or {token: LEAST}
        top = [
            TopLogprob(texts.text(i), max(value, LEAST), list(texts.data(i)))
            for i, value in list(found.items())[:n_top]
        ]
        content.append(TokenLogprob(texts.text(token), max(found[token], LEAST), list(texts.data(token)), top))
    return ChatLogprobs(content)


def _by_name(texts: TokenTexts, found: Mapping[int, float]) -> dict[str, float]:
    named: dict[str, float] = {}
    for token, value in found.items():
        named.setdefault(texts.name(token), max(value, LEAST))  # of tokens with one text the likeliest
    return named
