"""StopMatcher: finds stop strings in text that arrives in pieces, and holds back what may still become one.

The answer does not depend on how the text is cut into pieces: of several stop strings the one that is complete first
ends the text; of two complete at the same character, the longer. One Knuth-Morris-Pratt automaton a string, so the work
is linear in the text.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Watches one text for up to a few stop strings.

    Args:
        stops: non-empty strings; none at all is the common case, and then every piece goes straight through.

    Attributes:
        found: the string that is complete, None before.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        # longest first: of two complete at one character the longer starts earlier
        self._stops = sorted(stops, key=len, reverse=True)
        self._falls = [_fall_table(s) for s in self._stops]
        self._matched = [0] * len(self._stops)  # characters of each string that the text's end matches
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece.

        Returns:
            (text that is free to be shown, whether a stop string is complete). After a complete one the matcher holds
            nothing more, and the text after it is dropped.
        """
        if not self._stops:
            return text, False
        buffer = self._held + text
        for at, char in enumerate(text, start=len(self._held) + 1):
            for i, stop in enumerate(self._stops):
                n, fall = self._matched[i], self._falls[i]
                while n and stop[n] != char:
                    n = fall[n]
                n += stop[n] == char
                self._matched[i] = n
                if n == len(stop):
                    self._held, self.found = "", stop
                    return buffer[: at - n], True
        free = len(buffer) - max(self._matched)
        self._held = buffer[free:]
        return buffer[:free], False

    def flush(self) -> str:
        """The text held back, which no stop string can claim any more because the text has ended."""
        held, self._held = self._held, ""
        return held


def _fall_table(stop: str) -> list[int]:
    """table[n]: the longest proper prefix of `stop` that is also a suffix of its first n characters."""
    table = [0] * len(stop)
    n = 0
    for i in range(1, len(stop) - 1):
        while n and stop[n] != stop[i]:
            n = table[n]
        n += stop[n] == stop[i]
        table[i + 1] = n
    return table
