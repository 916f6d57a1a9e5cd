"""Pace: how many prompt tokens the next step may have, by what steps took until now.

Two things are measured and never mixed. What a *decode step* takes is taken from steps of decoding sequences alone, so
that no mixed step makes the next one longer; where prompts leave no such step, one is asked for now and then. What a
step *with prompt tokens* takes is a curve over its rows (`StepTimes`). Beside sequences that decode a step may take
`STRETCH` times a decode step of as many of them: their streams go on at an even pace while prompts are read. Where that
is less than `EVEN_SECONDS`, which nobody sees, it may take these for `EVEN_TOKENS`: the shortest steps read prompts far
too slowly, and a prompt still takes so many steps that most of the streams' gaps are such ones.

Numbers in, numbers out: no clock, no engine, no scheduler. What sequences get does not depend on any of it.
"""

from __future__ import annotations

from collections import deque

#: a step with prompt tokens takes about this long at most, so that a cancelled prompt stops within 100 ms
STEP_SECONDS = 0.08
#: and at most so many decode steps of the sequences that decode beside it
STRETCH = 2.5
#: or so long, for so many prompt tokens, or so many for each of them
EVEN_SECONDS, EVEN_TOKENS, EVEN_TOKENS_EACH = 0.01, 256, 8
#: where a decode step alone takes most of `STEP_SECONDS`, prompts still get half of one
LEAST_STRETCH = 1.5
#: prompt tokens of the first step where nobody has measured any
FIRST_PREFILL_TOKENS = 64
#: fewest prompt tokens of a step without sequences that decode, and beside some
MIN_PREFILL_TOKENS, MIN_MIXED_TOKENS = 16, 8
#: a GPU multiplies so many rows as fast as fewer, up to the next such tile: larger steps have whole ones
TILE = 64

#: steps of one measurement of a decode step, and how many steps with prompt tokens may come between two of them; a
#: single one may have been disturbed, and is soon followed by another
DECODE_STEPS, MEASURE_EVERY, CONFIRM_AFTER = 2, 32, 4
#: one of so many steps with prompt tokens has about twice the rows: what larger steps take may have changed
TRY_EVERY = 256
#: a step that takes so many times what is expected counts only after another such one
SURPRISE = 1.5


class StepTimes:
    """What a step of so many rows takes: straight lines between measured points, and on at both ends; through the
    origin where there is one point only.

    A step of more rows takes no less time, and no more than in proportion: there is a constant part, and one for each
    row. So a measurement also bounds what is believed of other sizes, and what was right while contexts were longer
    does not stay for long. A single step that takes far longer than expected was held up by something else.
    """

    def __init__(self) -> None:
        # one point (rows, seconds) for each power of two that rows are rounded up to; both ascend
        self._points: dict[int, tuple[int, float]] = {}
        self._surprised = False

    def took(self, rows: int, seconds: float) -> None:
        """A step of `rows` took `seconds`."""
        rows = -(-rows // TILE) * TILE if rows > TILE else rows
        key = (rows - 1).bit_length()
        if self._points:
            expected = self._expected(rows)
            surprised, self._surprised = self._surprised, seconds > SURPRISE * expected
            if self._surprised and not surprised:
                return
            if key in self._points:
                seconds = (expected + min(seconds, 2 * expected)) / 2
        for other, (n, believed) in self._points.items():
            share = seconds * n / rows
            self._points[other] = n, min(max(believed, min(share, seconds)), max(share, seconds))
        self._points[key] = rows, seconds

    def rows_within(self, seconds: float) -> int | None:
        """The most rows of a step that takes `seconds`, up to twice as many as were measured; None: none were."""
        if not self._points:
            return None
        points = self._line()
        i = next((i for i, (_, longer) in enumerate(points[1:]) if longer > seconds), len(points) - 2)
        (n, took), (more, longer) = points[i : i + 2]
        rows = n + (more - n) * (seconds - took) / max(longer - took, 1e-9)
        return int(min(max(rows, 0), max(2 * points[-1][0], FIRST_PREFILL_TOKENS)))

    def _expected(self, rows: int) -> float:
        points = self._line()
        i = next((i for i, (more, _) in enumerate(points[1:]) if more >= rows), len(points) - 2)
        (n, took), (more, longer) = points[i : i + 2]
        return took + (longer - took) * (rows - n) / (more - n)

    def _line(self) -> list[tuple[int, float]]:
        """The points, two at least."""
        points = sorted(self._points.values())
        return points if len(points) > 1 else [(0, 0.0), *points]


class Pace:
    """Chooses the prompt tokens of steps. One thread uses it.

    Args:
        max_batch_tokens: rows of a step.
    """

    def __init__(self, max_batch_tokens: int) -> None:
        self._max_rows = max_batch_tokens
        self._steps, self._forwards = StepTimes(), StepTimes()
        self._n_mixed = 0  # steps with prompt tokens so far
        # (sequences, seconds of a step, `_n_mixed` then), the newest last
        self._decoded: deque[tuple[int, float, int]] = deque(maxlen=8)

    def decode_took(self, n_seqs: int, seconds: float) -> None:
        """A step of `n_seqs` sequences that decode, and nothing else, took `seconds`."""
        self._decoded.append((n_seqs, seconds, self._n_mixed))

    def step_took(self, n_rows: int, seconds: float) -> None:
        """A step with prompt tokens, of `n_rows` rows in all, took `seconds`."""
        self._n_mixed += 1
        self._steps.took(n_rows, max(seconds, 1e-6))

    def forward_took(self, n_rows: int, seconds: float) -> None:
        """A step of `n_rows` teacher-forced tokens, whose logits go to the host, took `seconds`."""
        self._n_mixed += 1
        self._forwards.took(n_rows, max(seconds, 1e-6))

    def prompt_tokens(self, n_decode: int, forced: bool = False) -> int:
        """The most prompt tokens of the next step beside `n_decode` sequences that decode.

        Args:
            forced: teacher-forced tokens, in a step of their own between two of these sequences.

        Returns:
            1 .. max_batch_tokens; 0: a step of the `n_decode` sequences alone shall come first, to be measured.
        """
        seconds = STEP_SECONDS
        if n_decode:
            decode = self._decode_seconds(n_decode)
            if decode is None:
                return 0
            seconds = min(STRETCH * decode, max(STEP_SECONDS, LEAST_STRETCH * decode))
        times = self._forwards if forced else self._steps
        rows = times.rows_within(seconds)
        others = 0 if forced else n_decode
        most = max(self._max_rows - others, 1)
        if rows is None:
            return min(FIRST_PREFILL_TOKENS, most)
        if n_decode and seconds < EVEN_SECONDS:
            tokens = max(EVEN_TOKENS, EVEN_TOKENS_EACH * n_decode)
            rows = max(rows, min(times.rows_within(EVEN_SECONDS) or 0, others + tokens))
        if n_decode and self._n_mixed % TRY_EVERY == TRY_EVERY - 1:
            rows *= 2
        if n_decode and rows > TILE:
            n = min(rows - rows % TILE - others, most)
        else:
            n = min(rows - others, most)
            n -= n % 8 if n < most else 0
        return max(n, min(MIN_MIXED_TOKENS if n_decode else MIN_PREFILL_TOKENS, most))

    def _decode_seconds(self, n: int) -> float | None:
        """What a decode step of `n` sequences takes now; None: nobody knows. The middle one of the last three counts:
        one of them may have been held up by something else."""
        alike = [(m, seconds, at) for m, seconds, at in self._decoded if n <= 2 * m and 2 * m <= 3 * n]
        if not alike or self._n_mixed - alike[-1][2] >= (MEASURE_EVERY if len(alike) > 1 else CONFIRM_AFTER):
            return None
        times = sorted(seconds * min(n / m, 1) for m, seconds, _ in alike[-3:])
        return times[(len(times) - 1) // 2]
