"""What the scheduler keeps of a sequence, and the pieces of work that it gives the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from worker_orcd.engine.protocol import Batch
from worker_orcd.engine.sampling import SamplingParams
from worker_orcd.engine.token_edits import NO_EDITS, TokenEdits
from worker_orcd.serving.prefix_cache import Node


def positions_kept(n_prompt: int, max_tokens: int) -> int:
    """Positions in the KV cache of a prompt that is continued to the end: nothing is computed of the last token."""
    return n_prompt + max(max_tokens - 1, 0)


@dataclass(eq=False)
class SequenceState:
    """One sequence, from submission to its last token.

    Attributes:
        seq_id: number of the sequence.
        prompt: int32 [n_prompt].
        max_tokens: tokens to generate, >= 1; 0 for a teacher-forced sequence: logits of every token of its prompt.
        sampling: how tokens are drawn; None for a teacher-forced one.
        stops: whether the model's end-of-text tokens end it.
        stop_token_ids: further tokens that end it.
        edits: what is done to the logits of single tokens.
        want_logits: whether the logits of each drawn token are wanted.
        slot: place in the engine, -1 while waiting.
        n_past: positions in the KV cache.
        n_cached: tokens of its prompt that were found in the prefix cache and not computed; final with its first token.
        n_out: tokens generated; `last_token` is the newest, not yet in the cache.
        rope_table: index of the rotary frequency table it turns by.
        cursor: where in the prefix cache the first `n_chained` blocks of it end, which it has; None: it takes nothing
            from there and puts nothing there any more.
        drawn: the tokens generated since its prompt was computed; all but the newest are in the KV cache.
        n_passed: sequences that were queued after it and admitted before it.
        ended: None while it lives, then "stop", "length", "dropped", or "failed" where the engine drew no token.
    """

    seq_id: int
    prompt: np.ndarray
    max_tokens: int
    sampling: SamplingParams | None = None
    stops: bool = True
    want_logits: bool = False
    stop_token_ids: tuple[int, ...] = ()
    edits: TokenEdits = NO_EDITS
    slot: int = -1
    n_past: int = 0
    n_cached: int = 0
    n_out: int = 0
    last_token: int = -1
    rope_table: int = 0
    cursor: Node | None = None
    n_chained: int = 0
    drawn: list[int] = field(default_factory=list)
    n_passed: int = 0
    ended: str | None = None
    blocks: list[dict[int, int]] = field(default_factory=list)  # per KV group: {block number: block of the pool}
    need: list[int] = field(default_factory=list)  # per KV group: blocks to set aside; admission fills it in
    reserved: list[int] = field(default_factory=list)  # per KV group: those that are set aside

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt)

    @property
    def n_positions(self) -> int:
        """Positions that it will have in the KV cache at most."""
        return positions_kept(self.n_prompt, self.max_tokens)

    @property
    def prefilling(self) -> bool:
        """Whether prompt tokens are still to be computed."""
        return self.n_past < self.n_prompt

    def written(self, first: int, end: int) -> np.ndarray:
        """The tokens at positions first .. end-1 of the KV cache, int32 [end - first], end <= `n_past`: of the prompt,
        and those drawn behind it."""
        if end <= self.n_prompt:
            return self.prompt[first:end]
        drawn = self.drawn[max(first - self.n_prompt, 0) : end - self.n_prompt]
        return np.concatenate([self.prompt[first:], np.array(drawn, np.int32)])


@dataclass
class StepWork:
    """One ragged step: `chunks` lists (sequence, its number of tokens) in batch order, `outputs` those that draw."""

    batch: Batch
    chunks: list[tuple[SequenceState, int]]
    outputs: list[SequenceState]
    want_logits: bool

    @classmethod
    def of(cls, chunks: list[tuple[SequenceState, int]], n_decode: int) -> StepWork:
        """The step of these chunks, of which the first `n_decode` are the next token of sequences that decode."""
        tokens: list[np.ndarray] = []
        positions: list[np.ndarray] = []
        slots: list[np.ndarray] = []
        outputs, output_indices, at = [], [], 0
        for seq, n in chunks:
            end = seq.n_past + n
            tokens.append(seq.prompt[seq.n_past : end] if seq.prefilling else np.array([seq.last_token], np.int32))
            positions.append(np.arange(seq.n_past, end, dtype=np.int32))
            slots.append(np.full(n, seq.slot, np.int32))
            at += n
            if end >= seq.n_prompt:
                outputs.append(seq)
                output_indices.append(at - 1)
        batch = Batch(
            np.concatenate(tokens),
            np.concatenate(positions),
            np.concatenate(slots),
            n_decode,
            np.array(output_indices, np.int32),
        )
        return cls(batch, chunks, outputs, any(s.want_logits for s in outputs))

    @property
    def seqs(self) -> list[SequenceState]:
        """The sequences of the step."""
        return [seq for seq, _ in self.chunks]

    @property
    def n_prefill_tokens(self) -> int:
        """Prompt tokens of the step."""
        return len(self.batch.tokens) - self.batch.n_decode


@dataclass
class LogitsWork:
    """A chunk of one teacher-forced sequence; every token's logits are an output."""

    batch: Batch
    seq: SequenceState

    @property
    def seqs(self) -> list[SequenceState]:
        """The one sequence."""
        return [self.seq]


@dataclass
class DecodeWork:
    """`n_steps` steps of sequences that all decode; the arrays are those of `Engine.decode`."""

    seqs: list[SequenceState]
    slots: np.ndarray
    seq_ids: np.ndarray
    tokens: np.ndarray
    positions: np.ndarray
    n_steps: int
    stop_ids: np.ndarray
    stop_offsets: np.ndarray
