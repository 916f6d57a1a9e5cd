"""Histograms against those of prometheus_client, which write the same to the byte."""

from __future__ import annotations

import threading

import pytest
from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest
from prometheus_client import Histogram as Theirs
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from worker_orcd.observe.histogram import Histogram

BOUNDS = (0.001, 0.0025, 0.5, 1.0, 20.0, 5000.0, 2e6)


def _both(bounds: tuple[float, ...], values: list[float]) -> tuple[Histogram, CollectorRegistry]:
    disable_created_metrics()
    ours, registry = Histogram("some_seconds", "What it is.", bounds), CollectorRegistry()
    theirs = Theirs("some_seconds", "What it is.", buckets=bounds, registry=registry)
    for value in values:
        ours.observe(value)
        theirs.observe(value)
    return ours, registry


@pytest.mark.parametrize(
    "values",
    [
        [],
        [0.0],
        list(BOUNDS),  # a value that is a bound is in its bucket
        [b * 1.0000001 for b in BOUNDS],
        [0.0011, 3, 4999.5, 1e9, 1 / 3, 7],
        [123456.789] * 1234,  # a sum of more than six digits
    ],
)
def test_the_lines_are_those_of_the_library(values):
    ours, registry = _both(BOUNDS, values)
    assert ours.text().encode() == generate_latest(registry)
    mine = CollectorRegistry()
    mine.register(ours)
    assert generate_latest(mine) == generate_latest(registry)
    assert generate_openmetrics(mine) == generate_openmetrics(registry)


@pytest.mark.parametrize("n", [999_999, 1_000_000, 12_345_678])
def test_counts_of_many_digits(n):
    ours, registry = _both((1.0,), [])
    ours._counts[0] = n
    theirs = registry._names_to_collectors["some_seconds"]
    theirs._buckets[0].inc(n)
    assert ours.text().encode() == generate_latest(registry)


def test_values_of_many_threads_are_all_counted():
    ours = Histogram("some", "What it is.", BOUNDS)

    def observe() -> None:
        for i in range(2000):
            ours.observe(i % 7)

    threads = [threading.Thread(target=observe) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "some_count 8000.0\n" in ours.text()
    assert f"some_sum {4 * sum(i % 7 for i in range(2000))}.0\n" in ours.text()
