"""The streams of completions and of chat completions: what `StreamFormat` asks for, in OpenAI's chunks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import UNSET

from worker_orcd.errors import WorkerError
from worker_orcd.serving.job import Completion, Finished, Job, TextPiece
from worker_orcd.wsgi.http_errors import openai_details
from worker_orcd.wsgi.openai.answers import (
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    CompletionAnswer,
    CompletionChoice,
    CompletionLogprobs,
    Usage,
)
from worker_orcd.wsgi.openai.heads import Head, cached_tokens, usage
from worker_orcd.wsgi.openai.logprobs import Likely, Offsets, TokenTexts, add_end, chat_logprobs, completion_logprobs
from worker_orcd.wsgi.stream_format import PING, PieceTemplate, json_line

DONE = b"data: [DONE]\n\n"
#: stands for the text while a template is made; no other part of a chunk can hold it
_TEXT = "\x00text\x00"


@dataclass(frozen=True)
class Wanted:
    """What a stream shows beside its text.

    Attributes:
        n_top: most likely tokens of each place; None: no log-probabilities.
        token_ids: of the text.
        usage: a chunk of its own at the end.
        running_usage: and in each chunk.
    """

    n_top: int | None = None
    token_ids: bool = False
    usage: bool = False
    running_usage: bool = False

    @property
    def plain(self) -> bool:
        """Whether two pieces of a choice differ in their text alone."""
        return self.n_top is None and not self.token_ids and not self.running_usage


def data(value: Any) -> bytes:
    """One server-sent event without a name."""
    return b"data: " + json_line(value) + b"\n\n"


def silent_stream(whole: CompletionAnswer, with_usage: bool) -> bytes:
    """The stream of an answer in which nothing was generated."""
    counts, whole.usage = whole.usage, None if with_usage else UNSET
    out = data(whole)
    if with_usage:
        whole.choices, whole.usage = [], counts
        out += data(whole)
    return out + DONE


class Chunks(ABC):
    """What both streams share.

    Args:
        head: of every chunk.
        jobs: a choice each; every `n` of them have one prompt.
        n: choices of a prompt.
        wanted: what is shown.
        texts: of single tokens.
    """

    ping = PING

    def __init__(self, head: Head, jobs: Sequence[Job], n: int, wanted: Wanted, texts: TokenTexts) -> None:
        self.head = head
        self.jobs = jobs
        self.n = n
        self.wanted = wanted
        self.texts = texts
        self.n_shown = [0] * len(jobs)  # tokens of each choice whose text went out

    def opening(self) -> bytes:
        """The first chunk of each choice."""
        return b"".join(self.first(choice) for choice in range(len(self.jobs)))

    def template(self, choice: int) -> PieceTemplate | None:
        """A chunk with text and nothing else that changes."""
        if not self.wanted.plain:
            return None
        before, _, after = data(self.chunk(choice, _TEXT)).partition(json_line(_TEXT)[1:-1])
        return PieceTemplate(before, after)

    def pieces(self, choice: int, pieces: Sequence[TextPiece]) -> bytes:
        """A chunk for each piece."""
        out = b""
        for piece in pieces:
            out += data(self.chunk(choice, piece.text, piece.token_ids))
        return out

    def finished(self, choice: int, end: Finished) -> bytes:
        """The chunk with the reason, and with the tokens that gave no text."""
        if self.wanted.plain:
            chunk = self.chunk(choice, "", (), end.finish_reason)
        else:
            completion = self.jobs[choice].completion()
            chunk = self.chunk(choice, "", completion.token_ids[self.n_shown[choice] :], end.finish_reason)
            self.complete(choice, chunk, completion)
        chunk.choices[0].stop_reason = end.stop_reason
        self.n_shown[choice] = end.tokens_out
        return data(chunk)

    def closing(self) -> bytes:
        """The usage, if it was asked for, and the mark of the end."""
        return (data(self.chunk(None)) if self.wanted.usage else b"") + DONE

    def failed(self, error: WorkerError) -> bytes:
        """The error in the place of a chunk; the mark of a good end does not follow."""
        return data(openai_details(error))

    def usage(self) -> Usage:
        """Of all choices, so far."""
        return usage((job.tokens_in for job in self.jobs[:: self.n]), cached_tokens(self.jobs, self.n), self.n_shown)

    def common(self, ends: bool) -> dict[str, Any]:
        """What every chunk has; `ends`: the one after all choices."""
        facts = self.head.facts()
        if ends or self.wanted.running_usage:
            facts["usage"] = self.usage()
        elif self.wanted.usage:
            facts["usage"] = None
        return facts

    def extras(self, tokens: Sequence[int]) -> dict[str, Any]:
        """What a choice has beside its text."""
        return {"token_ids": list(tokens)} if self.wanted.token_ids else {}

    def likely(self, choice: int, tokens: Sequence[int]) -> list[Likely]:
        """The log-probabilities of the next tokens of a choice."""
        return list(self.jobs[choice].logprobs(self.n_shown[choice], len(tokens)))

    @abstractmethod
    def complete(self, choice: int, chunk: Any, completion: Completion) -> None:
        """Add to the last chunk of a choice what is known only now."""

    @abstractmethod
    def first(self, choice: int) -> bytes:
        """What comes before any generated text."""

    @abstractmethod
    def chunk(self, choice: int | None, text: str = "", tokens: Sequence[int] = (), reason: str | None = None) -> Any:
        """A chunk with text of a choice and the tokens that it took; None: with none."""


class ChatChunks(Chunks):
    """The stream of POST /v1/chat/completions.

    Args:
        prompt: the ids of the prompt, where they are shown.
        others: as of `Chunks`.
    """

    def __init__(self, *others: Any, prompt: Sequence[int] | None = None) -> None:
        super().__init__(*others)
        self._prompt = prompt

    def first(self, choice: int) -> bytes:
        """The role of who speaks."""
        speaks = ChatChunkChoice(index=choice, delta=ChatDelta("assistant", ""), **self.extras(()))
        chunk = ChatChunk(**self.common(False), choices=[speaks])
        if self._prompt is not None and choice == 0:
            chunk.prompt_token_ids = list(self._prompt)
        return data(chunk)

    def chunk(self, choice: int | None, text: str = "", tokens: Sequence[int] = (), reason: str | None = None) -> Any:
        """See `Chunks.chunk`."""
        if choice is None:
            return ChatChunk(**self.common(True), choices=[])
        found = None
        if self.wanted.n_top is not None and tokens:
            found = chat_logprobs(self.texts, tokens, self.likely(choice, tokens), self.wanted.n_top)
        self.n_shown[choice] += len(tokens)
        delta = ChatDelta(content=text) if text else ChatDelta()
        said = ChatChunkChoice(index=choice, delta=delta, logprobs=found, finish_reason=reason, **self.extras(tokens))
        return ChatChunk(**self.common(False), choices=[said])

    def complete(self, choice: int, chunk: Any, completion: Completion) -> None:
        """Nothing: the token that ends a message is none of it."""


class CompletionChunks(Chunks):
    """The stream of POST /v1/completions.

    Args:
        openings: of each choice, what stands before its text: an echo of its prompt, and the prompt's ids.
        others: as of `Chunks`.
    """

    def __init__(self, *others: Any, openings: Sequence[CompletionChoice | None]) -> None:
        super().__init__(*others)
        self._openings = openings
        starts = [0 if opening is None else len(opening.text) for opening in openings]
        self._offsets = [Offsets(self.texts, True, start) for start in starts]

    def first(self, choice: int) -> bytes:
        """The echo, if there is one."""
        opening = self._openings[choice]
        return b"" if opening is None else data(CompletionAnswer(**self.common(False), choices=[opening]))

    def chunk(self, choice: int | None, text: str = "", tokens: Sequence[int] = (), reason: str | None = None) -> Any:
        """See `Chunks.chunk`."""
        if choice is None:
            return CompletionAnswer(**self.common(True), choices=[])
        found = None
        if self.wanted.n_top is not None and tokens:
            found = completion_logprobs(self.texts, tokens, self.likely(choice, tokens), self._offsets[choice])
        self.n_shown[choice] += len(tokens)
        said = CompletionChoice(index=choice, text=text, logprobs=found, finish_reason=reason, **self.extras(tokens))
        return CompletionAnswer(**self.common(False), choices=[said])

    def complete(self, choice: int, chunk: Any, completion: Completion) -> None:
        """The token that ended the choice has a log-probability too."""
        if self.wanted.n_top is None:
            return
        said = chunk.choices[0]
        found = said.logprobs or CompletionLogprobs([], [], [], [])
        add_end(self.texts, found, self.jobs[choice], completion, self._offsets[choice])
        said.logprobs = found if found.tokens else None
