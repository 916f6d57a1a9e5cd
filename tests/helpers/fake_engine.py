"""An engine with no model: it checks the scheduler's bookkeeping and draws tokens from a hash of what it sees.

Every row is "written" to the block its table names, and every row "reads" all positions its groups let it see: a block
table that is wrong in any way is an assertion. The drawn token depends on the tokens read, the seed and the position
only, so that a sequence must get the same ids alone and in a crowd, with a cold cache and with a warm one.
"""

from __future__ import annotations

import time
import zlib

import numpy as np

from worker_orcd.engine.protocol import BLOCK_SIZE, Batch, EngineConfig, StepAborted, check_stop_offsets
from worker_orcd.engine.sampling import SamplingParams
from worker_orcd.engine.token_edits import NO_EDITS, TokenEdits
from worker_orcd.models.plan import KvGroup

STOP_ID = 0


class FakeEngine:
    """Implements `Engine`. `step_seconds` is the time of one step, plus `row_seconds` for each row; an abort ends it
    early where `abortable`. A decode run goes `steps_past_end` steps past the end of a sequence."""

    def __init__(
        self,
        config: EngineConfig,
        groups: tuple[KvGroup, ...],
        n_vocab: int = 50,
        step_seconds: float = 0.0,
        row_seconds: float = 0.0,
        never_stop: bool = False,
        abortable: bool = True,
        steps_past_end: int = 0,
    ) -> None:
        self.n_vocab = n_vocab
        self.config = config
        self.groups = groups
        self.step_seconds, self.row_seconds = step_seconds, row_seconds
        self.never_stop, self.abortable, self.steps_past_end = never_stop, abortable, steps_past_end
        self.block_tables = np.full((len(groups), config.max_seqs, config.max_blocks_per_seq), -1, np.int32)
        self.rope_tables = np.zeros(config.max_seqs, np.int32)
        # (token, position, rope table)
        self.kv = [np.full((n, BLOCK_SIZE, 3), -1, np.int64) for n in config.n_blocks]
        self.history: dict[int, list[int]] = {}
        self.begins = [True] * config.max_seqs  # of each slot, whether its sequence has computed nothing yet
        #: prompts by slot; where a test tells them, what was taken from others is compared with them
        self.prompts: dict[int, np.ndarray] = {}
        self.n_prompt_rows = 0
        self.n_copied = 0
        self.sampling: dict[int, SamplingParams] = {}
        self.calls: list[str] = []
        self._control = None
        self.fail_with: Exception | None = None
        self.closed = False
        self.n_rows_seen = 0

    def set_slot(self, slot: int, sampling: SamplingParams, edits: TokenEdits = NO_EDITS) -> None:
        self.sampling[slot] = sampling
        self.begins[slot] = True

    def copy_block(self, group: int, source: int, target: int) -> None:
        assert not self.closed and source != target
        self.kv[group][target] = self.kv[group][source]
        self.n_copied += 1

    def step(self, batch: Batch, want_logits: bool = False, control=None):
        self._control = control
        self._begin("step", len(batch.tokens))
        digests = self._run(batch)
        out = np.array(
            [self._draw(digests[r], int(batch.slots[r]), int(batch.positions[r])) for r in batch.output_indices],
            np.int32,
        )
        return out, (self._logits(batch, digests) if want_logits else None)

    def forward(self, batch: Batch, stop_after: str | None = None, control=None) -> np.ndarray:
        assert stop_after is None
        self._control = control
        self._begin("forward", len(batch.tokens))
        return self._logits(batch, self._run(batch))

    def decode(self, slots, seq_ids, tokens, positions, n_steps, stop_ids, stop_offsets, ring, control) -> np.ndarray:
        assert n_steps >= 1 and len(set(slots.tolist())) == len(slots)
        self._control = control
        rows = []
        tokens, positions = tokens.copy(), positions.copy()
        n = len(slots)
        check_stop_offsets(stop_offsets, n, len(stop_ids))
        stopped: set[int] = set()
        while len(rows) < n_steps and not (rows and control.interrupted):
            try:
                self._begin("decode", n)
            except StepAborted:
                break
            digests = self._run(Batch(tokens, positions, slots, n, np.arange(n, dtype=np.int32)))
            tokens = np.array([self._draw(digests[j], int(slots[j]), int(positions[j])) for j in range(n)], np.int32)
            positions = positions + 1
            rows.append(tokens)
            control.step_done()
            for j, (seq_id, token) in enumerate(zip(seq_ids.tolist(), tokens.tolist(), strict=True)):
                if j in stopped:
                    continue
                ring.put(seq_id, token)
                if token in stop_ids[stop_offsets[j] : stop_offsets[j + 1]]:
                    n_steps = n_steps if stopped else min(n_steps, len(rows) + self.steps_past_end)
                    stopped.add(j)
        return np.array(rows, np.int32).reshape(len(rows), n)

    def close(self) -> None:
        self.closed = True

    def _begin(self, call: str, n_rows: int) -> None:
        assert not self.closed
        self.calls.append(call)
        self.n_rows_seen = max(self.n_rows_seen, n_rows)
        if self.step_seconds or self.row_seconds:
            until = time.monotonic() + self.step_seconds + n_rows * self.row_seconds
            while (left := until - time.monotonic()) > 0:
                if self.abortable and self._control is not None and self._control.aborted:
                    raise StepAborted
                time.sleep(min(left, 0.005))
        if self.fail_with is not None:
            error, self.fail_with = self.fail_with, None
            raise error

    def _run(self, batch: Batch) -> list[int]:
        """Write and read the cache. Returns a digest of what each row saw."""
        n = len(batch.tokens)
        assert 1 <= n <= self.config.max_batch_tokens and batch.n_decode <= n
        assert (
            batch.tokens.dtype == batch.positions.dtype == batch.slots.dtype == batch.output_indices.dtype == np.int32
        )
        assert np.all(np.diff(batch.output_indices) > 0)
        self.n_prompt_rows += n - batch.n_decode
        seen: list[int] = []  # slots, to check that rows are grouped
        rows = zip(batch.tokens.tolist(), batch.positions.tolist(), batch.slots.tolist(), strict=True)
        for token, pos, slot in rows:
            assert 0 <= token < self.n_vocab and pos < self.config.context_length
            if not seen or seen[-1] != slot:
                assert slot not in seen
                seen.append(slot)
                self._look_back(slot, pos)
            history = self.history[slot]
            assert len(history) == pos, f"slot {slot}: row at {pos} after {len(history)} positions"
            history.append(token)
            for g, kv in enumerate(self.kv):
                block = self.block_tables[g, slot, pos // BLOCK_SIZE]
                assert block >= 0, f"group {g} slot {slot}: no block for position {pos}"
                kv[block, pos % BLOCK_SIZE] = token, pos, self.rope_tables[slot]
        digests = []
        for pos, slot in zip(batch.positions.tolist(), batch.slots.tolist(), strict=True):
            digest = 0
            for g, (group, kv) in enumerate(zip(self.groups, self.kv, strict=True)):
                low = max(pos - group.window + 1, 0) if group.window else 0
                at = np.arange(low, pos + 1)
                blocks = self.block_tables[g, slot, at // BLOCK_SIZE]
                assert np.all(blocks >= 0), f"group {g} slot {slot}: a visible position has no block"
                got = kv[blocks, at % BLOCK_SIZE]
                assert got[:, 1].tolist() == at.tolist(), f"group {g} slot {slot}: block overwritten"
                assert np.all(got[:, 2] == self.rope_tables[slot]), f"slot {slot}: turned by other frequencies"
                assert got[:, 0].tolist() == self.history[slot][low : pos + 1]
                digest = zlib.crc32(got.tobytes(), digest)
            digests.append(digest)
        return digests

    def _look_back(self, slot: int, pos: int) -> None:
        """Before the first row of a slot: the tokens before it, where they are not known those of its table."""
        history = [] if self.begins[slot] else self.history[slot]
        for p in range(len(history), pos):
            prompt = self.prompts.get(slot, ())
            token = int(prompt[p]) if p < len(prompt) else -1
            for table, kv in zip(self.block_tables[:, slot], self.kv, strict=True):
                if token < 0 and table[p // BLOCK_SIZE] >= 0:
                    token = int(kv[table[p // BLOCK_SIZE], p % BLOCK_SIZE, 0])
            history.append(token)
        # a prompt begins again where its frequency table changes
        self.history[slot], self.begins[slot] = history[:pos], False

    def _draw(self, digest: int, slot: int, pos: int) -> int:
        token = zlib.crc32(f"{digest} {self.sampling[slot].seed} {pos}".encode()) % self.n_vocab
        return max(token, 1) if self.never_stop else token

    def _logits(self, batch: Batch, digests: list[int]) -> np.ndarray:
        return np.stack(
            [
                np.random.default_rng(digests[r]).standard_normal(self.n_vocab).astype(np.float32)
                for r in batch.output_indices
            ]
        )


class LetterDecoder:
    """A stream decoder for fake vocabularies: each token is one letter."""

    LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

    def push(self, token_id: int) -> str:
        return self.LETTERS[token_id]

    def flush(self) -> str:
        return ""
