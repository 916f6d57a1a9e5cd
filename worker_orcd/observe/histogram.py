"""Histogram: what `prometheus_client` has under that name, for workers that many ask at once.

With the buckets that vLLM has, the lines of one of the library's take 0.15 ms of Python for each scrape, and a worker
has ten of them. This one makes its lines from ready ones, in 8 us.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

#: from here on the library writes a number with an exponent
_FIRST_LONG = 1_000_000


class Histogram(Collector):
    """Counts of values by size. All methods may be called from any thread.

    Args:
        name: of the metric, with letters, digits and underscores only.
        documentation: one line without backslashes.
        bounds: the upper ends of its buckets, each in its own, ascending; one without end comes behind them.
    """

    def __init__(self, name: str, documentation: str, bounds: Sequence[float]) -> None:
        self._name, self._documentation, self._bounds = name, documentation, tuple(bounds)
        self._marks = [floatToGoString(bound) for bound in (*bounds, float("inf"))]  # type: ignore[no-untyped-call]
        self._head = f"# HELP {name} {documentation}\n# TYPE {name} histogram\n"
        self._beginnings = [f'{name}_bucket{{le="{mark}"}} ' for mark in self._marks]
        self._lock = threading.Lock()
        self._counts = [0] * len(self._marks)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        bucket = bisect_left(self._bounds, value)
        with self._lock:
            self._counts[bucket] += 1
            self._sum += value

    def collect(self) -> Iterator[Metric]:
        """The family. Called by a registry."""
        cumulative, total = self._read()
        buckets = list(zip(self._marks, cumulative, strict=True))
        yield HistogramMetricFamily(self._name, self._documentation, buckets=buckets, sum_value=total)

    def text(self) -> str:
        """Its lines in Prometheus's own form, as `prometheus_client.generate_latest` writes what `collect` gives."""
        cumulative, total = self._read()
        lines = [
            f"{beginning}{n}.0\n" if n < _FIRST_LONG else f"{beginning}{_number(n)}\n"
            for beginning, n in zip(self._beginnings, cumulative, strict=True)
        ]
        end = f"{self._name}_count {_number(cumulative[-1])}\n{self._name}_sum {_number(total)}\n"
        return self._head + "".join(lines) + end

    def _read(self) -> tuple[list[int], float]:
        """How many values are not above each bound, and the sum of all."""
        with self._lock:
            counts, total = self._counts.copy(), self._sum
        n = 0
        return [n := n + count for count in counts], total


def _number(value: float) -> str:
    text: str = floatToGoString(value)  # type: ignore[no-untyped-call]
    return text
