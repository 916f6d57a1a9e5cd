"""What a run has shown: numbers, a table for people, and a list of what was wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from load_client.client import Shared
from load_client.watch import Sample

#: limits in milliseconds, of the 99th percentile; what is not named here is told and not judged
TIME_LIMITS = {"/health": 10.0, "/metrics": 10.0, "cancel": 100.0, "leaving": 100.0}
#: MiB of growth for 1,000 jobs, past the warming up
SLOPE_LIMIT_MIB = 1.0
#: share of a run that warms up; jobs and samples past it without which no slope is told
WARM_SHARE, SLOPE_JOBS, SLOPE_SAMPLES = 0.2, 1000, 20
#: ways to leave that the worker hears of later, by design: the bytes that nobody read come first
NOT_JUDGED = ("reset of a stalled reader",)


def quantile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def spread(values: list[float]) -> dict[str, float | int]:
    """How values lie."""
    return {
        "n": len(values),
        "p50": round(quantile(values, 0.5), 2),
        "p99": round(quantile(values, 0.99), 2),
        "max": round(max(values), 2),
    }


def slope(samples: list[tuple[float, int, Sample]]) -> float | None:
    """MiB of anonymous memory for 1,000 jobs, by least squares over what follows the warming up; None: too few."""
    if not samples:
        return None
    end = samples[-1][0]
    points = [(jobs, s.anon_kib) for at, jobs, s in samples if at >= WARM_SHARE * end]
    if len(points) < SLOPE_SAMPLES or points[-1][0] - points[0][0] < SLOPE_JOBS:
        return None
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread_x = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread_x * 1000 / 1024


def over_jobs(samples: list[tuple[float, int, Sample]], n: int = 12) -> dict[int, float]:
    """Jobs so far -> MiB of anonymous memory then, at about `n` moments."""
    return {jobs: round(s.anon_kib / 1024, 1) for _, jobs, s in samples[:: max(1, len(samples) // n)]}


@dataclass
class Report:
    """The outcome of a run; `wrong` is empty where all was right."""

    facts: dict[str, Any] = field(default_factory=dict)
    times: dict[str, dict[str, float | int]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def judge(self, shared: Shared, seconds: float, limits: bool) -> None:
        """Gather numbers, and what they have against the limits."""
        counts, worker = shared.counts, shared.worker
        for path, probes in worker.probes.items():
            self.times[path] = spread([ms for _, ms in probes])
            bad = [status for status, _ in probes if status != "200"]
            if bad:
                self.wrong.append(f"{len(bad)} of {len(probes)} probes of {path} were answered {bad[0]}")
        for kind, ms in counts.latencies.items():
            self.times[kind] = spread(ms)
        if worker.log is not None:
            gone = worker.log.gone_ms
            for kind, ms in gone.items():
                self.times[f"leaving: {kind}"] = spread(ms)
            judged = [ms for kind, values in gone.items() if kind not in NOT_JUDGED for ms in values]
            if judged:
                self.times["leaving"] = spread(judged)
            cancels = [ms for kind, values in counts.latencies.items() if kind.startswith("cancel") for ms in values]
            self.facts["outcomes"] = dict(worker.log.outcomes.most_common())
            if cancels:
                self.times["cancel"] = spread(cancels)
            self.wrong += [f"log: {fault}" for fault in worker.log.faults[:20]]
            if worker.log.running:
                self.wrong.append(f"{len(worker.log.running)} jobs have no execute_end: {worker.log.running[:3]}")
        self.facts |= {
            "seconds": round(seconds, 1),
            "jobs": counts.jobs[0],
            "behaviours": dict(counts.done.most_common()),
            "answers_checked": dict(counts.checked),
            "refused": dict(counts.refusals),
            "pieces_per_s": round(counts.pieces / seconds),
            "tokens": counts.tokens,
        }
        if worker.samples:
            rss = [s.rss_kib for _, _, s in worker.samples]
            grows = slope(worker.samples)
            self.facts["memory"] = {
                "rss_mib": [round(rss[0] / 1024, 1), round(max(rss) / 1024, 1), round(rss[-1] / 1024, 1)],
                "mib_per_1000_jobs": None if grows is None else round(grows, 3),
                "over_jobs": over_jobs(worker.samples),
                "threads_at_most": max(s.threads for _, _, s in worker.samples),
                "descriptors_at_most": max(s.descriptors for _, _, s in worker.samples),
            }
            if grows is not None and grows > SLOPE_LIMIT_MIB:
                self.wrong.append(f"memory grows {grows:.2f} MiB in 1,000 jobs (limit {SLOPE_LIMIT_MIB:g})")
        if limits:
            for name, limit in TIME_LIMITS.items():
                if name in self.times and self.times[name]["p99"] > limit:
                    self.wrong.append(f"{name}: p99 is {self.times[name]['p99']} ms (limit {limit:g})")
        self.wrong += [f"{n} times: {kind}" for kind, n in counts.faults.items()] + counts.told

    def table(self) -> str:
        """For people."""
        lines = [f"{name:22} {value}" for name, value in self.facts.items()]
        lines += ["", f"{'milliseconds':32} {'n':>7} {'p50':>9} {'p99':>9} {'max':>9}  limit of p99"]
        for name in sorted(self.times):
            t = self.times[name]
            limit = f"{TIME_LIMITS[name]:g}" if name in TIME_LIMITS else ""
            lines.append(f"{name:32} {t['n']:7} {t['p50']:9.2f} {t['p99']:9.2f} {t['max']:9.2f}  {limit}")
        lines += ["", f"{len(self.wrong)} things were wrong" if self.wrong else "Nothing was wrong."]
        return "\n".join(lines + [f"  {what}" for what in self.wrong])
