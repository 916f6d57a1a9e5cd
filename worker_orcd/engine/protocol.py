"""What every engine offers to the scheduler: the ragged step and the decode loop over a paged KV cache.

`_cpu.CpuEngine` and `_engine.CudaEngine` implement this protocol.

A *slot* is the place of one running sequence in the engine (0 .. max_seqs-1): its sampling state and its rows of the
block tables. Blocks of `BLOCK_SIZE` positions come from one pool per KV group of the plan; who owns which block is the
scheduler's business, the engine only reads the tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from worker_orcd.engine.sampling import SamplingParams
from worker_orcd.engine.token_edits import NO_EDITS, TokenEdits
from worker_orcd.errors import InvalidRequest

#: positions of one KV block
BLOCK_SIZE = 64


@dataclass(frozen=True)
class EngineConfig:
    """Sizes fixed at start-up.

    Attributes:
        max_seqs: slots.
        max_batch_tokens: tokens of one step (of prompts and of running sequences together), at least max_seqs.
        context_length: positions a sequence may reach.
        n_blocks: blocks of the pool of each KV group of the plan.
    """

    max_seqs: int
    max_batch_tokens: int
    context_length: int
    n_blocks: tuple[int, ...]

    @property
    def max_blocks_per_seq(self) -> int:
        """Columns of a block table."""
        return -(-self.context_length // BLOCK_SIZE)


@dataclass
class Batch:
    """The tokens of one step, grouped by sequence, positions ascending within one; each is a row of every activation.

    Attributes:
        tokens: int32 [n_tokens].
        positions: int32 [n_tokens].
        slots: int32 [n_tokens].
        n_decode: the first `n_decode` are the next token of running sequences, the rest are tokens of prompts.
        output_indices: int32 [n_out], ascending: which of them are followed by a token (or logits) that is wanted.
    """

    tokens: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    n_decode: int
    output_indices: np.ndarray


class StepAborted(Exception):
    """A step was given up because its control was aborted. Nothing that it computed counts, the KV that it wrote
    included; the same step can be run again."""


def check_stop_offsets(offsets: np.ndarray, n: int, n_stop: int) -> None:
    """Raise `InvalidRequest` where `offsets` [n + 1] do not divide `n_stop` stop ids among `n` sequences."""
    if len(offsets) != n + 1 or offsets[0] != 0 or offsets[-1] != n_stop or (offsets[1:] < offsets[:-1]).any():
        raise InvalidRequest(f"stop_offsets must be {n + 1} ascending numbers, 0 to {n_stop}", field="stop_offsets")


class Engine(Protocol):
    """A loaded model on one device. Not thread-safe: one thread calls it; `control.interrupt()` may come from any.

    What a row leaves in the KV cache, and its logits, are the same bits whatever call it is part of, as the token of a
    prompt, of a chunk of one or of a running sequence, and whatever rows are beside it. So the KV of a text can be used
    again without asking how it was computed.
    """

    n_vocab: int
    config: EngineConfig
    #: int32 [n_kv_groups, max_seqs, max_blocks_per_seq], written by the scheduler before a step; -1: no block
    block_tables: np.ndarray
    #: int32 [max_seqs], written likewise: index of the plan's rotary frequency table that the slot's sequence turns by
    rope_tables: np.ndarray
    #: what a warm-up has to run, so that no later call is the first of its kind: steps of so many prompt tokens,
    #: ascending, texts of so many tokens whose logits are all asked for, and decode steps of so many sequences
    warm_rows: tuple[int, ...]
    warm_outputs: tuple[int, ...]
    warm_seqs: tuple[int, ...]

    def set_slot(self, slot: int, sampling: SamplingParams, edits: TokenEdits = NO_EDITS) -> None:
        """Give a slot to a new sequence: sets how its tokens are drawn and forgets the tokens of the one before.

        Args:
            slot: index of the slot.
            sampling: with a seed; of its fields only `numbers()` count. The seed keys the counter-based generator
                together with the position of the drawn token, so a draw depends on nothing else. The penalties count
                the tokens sampled in this slot since this call.
            edits: what is done to the logits of single tokens. Bans too go by the tokens sampled since this call.

        Raises:
            InvalidRequest: a number out of range, named; edits of tokens that are not there.
        """

    def step(
        self, batch: Batch, want_logits: bool = False, control: Any = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Run one ragged step.

        Args:
            control: a `Control` whose abort may end the step; None: nothing does.

        Returns:
            (sampled int32 [n_out], logits float32 [n_out, n_vocab] or None). A sampled token below 0 means that there
            was no distribution to draw from. Releases the GIL while it works. `output_indices` may be empty.

        Raises:
            StepAborted: it was, before its end.
        """

    def forward(self, batch: Batch, stop_after: str | None = None, control: Any = None) -> np.ndarray:
        """Run one step without sampling. Returns float32 logits [n_out, n_vocab], or with `stop_after` the whole
        output buffer of that op, [n_tokens or n_out, width]. Aborted as `step`."""

    def decode(
        self,
        slots: np.ndarray,
        seq_ids: np.ndarray,
        tokens: np.ndarray,
        positions: np.ndarray,
        n_steps: int,
        stop_ids: np.ndarray,
        stop_offsets: np.ndarray,
        ring: Any,
        control: Any,
    ) -> np.ndarray:
        """Run up to `n_steps` steps of all `slots` together, each feeding its sampled token to its next step.

        The GIL is released throughout. After each step the pairs (seq_ids[j], token) go to `ring`. Returns early,
        at a step boundary, when a slot sampled one of its stop ids or `control` was interrupted (the flag is cleared
        by the caller); an aborted step does not count. Each step is counted in `control`. An engine may run a step or
        two past that; their tokens are returned too, but of a slot that has stopped nothing more goes to `ring`. A
        drawn token below 0 means that there was nothing to draw from (NaN logits, or every token banned).

        An engine that reads weights from a file raises `ModelLoadError`, here as in `step` and `forward`, when that
        file has changed; a token of the step that this voids goes nowhere.

        Args:
            slots, seq_ids, tokens, positions: int32/int64/int32/int32 [n]; tokens[j] is the input of the first step
                at positions[j].
            stop_ids: int32 [n_stop], the token ids that end each sequence, those of one after those of another.
            stop_offsets: int32 [n + 1], from 0 to n_stop: slot j ends at stop_ids[stop_offsets[j]:stop_offsets[j + 1]].

        Returns:
            int32 [steps_done, n]: the sampled tokens.
        """

    def copy_block(self, group: int, source: int, target: int) -> None:
        """Copy a block of a KV group to another one, in all its layers, before anything that is asked for later.

        Raises:
            InternalError: there is no such group or block.
        """

    def close(self) -> None:
        """Free everything; the engine is dead afterwards. Idempotent."""
