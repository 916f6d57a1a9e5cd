"""Adds what `worker-orcd bench --json` measured to the record of benchmarks: a row a figure.

    worker-orcd bench --model model.gguf --device cuda:0 --kernels --json > bench.json
    python tools/record_benchmark.py bench.json --commit 0e96568 --gpu "NVIDIA H200" --driver 580.159.04 --model "NAME"

Prefill, decode, load, and of `--kernels` what the launches of a decode step take by what they are for (`phase_us`). All
rows go in or, where one breaks a rule (docs/benchmarks/README.md), none.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools")]

import plot_benchmarks  # noqa: E402


def rows_of(report: dict[str, Any], common: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a report, each with the fields `common`."""
    rows: list[dict[str, Any]] = []

    def add(measure: str, value: float, batch: int | None = None, **fields: Any) -> None:
        if batch is not None:
            fields = {"batch": batch} | ({"distinct": report.get("rows") == "distinct"} if batch > 1 else {}) | fields
        unit = plot_benchmarks.MEASURES[measure].unit
        rows.append({**common, "measure": measure, **fields, "value": float(f"{value:.6g}"), "unit": unit})

    for result in report["results"]:
        if result["test"] == "decode":
            add("decode_tps", result["tokens_per_s"], result["batch"])
        else:
            add("prefill_tps", result["tokens_per_s"], prompt=result["n_tokens"])
    if report.get("load_gb_per_s"):
        add("load_gbps", report["load_gb_per_s"])
    steps = (report.get("kernels") or {}).get("steps", ())
    for step in (step for step in steps if not step["n_prompt"]):
        phases: dict[str, float] = {}
        for kind in step["kinds"]:  # a conversion is for what its products are for
            name = " ".join(kind["ops"])
            phases[name] = phases.get(name, 0.0) + kind["us"] * kind["launches"]
        for name, us in phases.items():
            add("phase_us", us, step["batch"], phase=name)
    return rows


def record(history: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to the record.

    Raises:
        BadRow: one of them breaks a rule, and nothing was added.
    """
    before = history.read_text() if history.exists() else ""
    text = before + "".join(json.dumps(row) + "\n" for row in rows)
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / history.name
        trial.write_text(text)
        plot_benchmarks.read(trial)
    history.write_text(text)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="what `worker-orcd bench --json` wrote")
    parser.add_argument("--commit", required=True, help="of worker-orcd, or v and its version")
    parser.add_argument("--model", help="name of the model; default: as the report has it")
    parser.add_argument("--gpu", help="name of the GPU; default: as `bench --kernels` has it")
    parser.add_argument("--driver", help="version of the GPU's driver")
    parser.add_argument("--cpu", help="processor and threads, where no GPU was used")
    parser.add_argument("--date", default=datetime.datetime.now(datetime.UTC).date().isoformat(), help="YYYY-MM-DD")
    parser.add_argument("--note", help="what else must be known to repeat it")
    parser.add_argument("--history", type=Path, default=plot_benchmarks.HISTORY)
    args = parser.parse_args()
    try:
        report = json.loads(args.report.read_text())
        gpu = args.gpu or (report.get("kernels") or {}).get("gpu")
        common = {"date": args.date, "program": "worker-orcd", "commit": args.commit,
                  "gpu": None if args.cpu else gpu, "driver": args.driver, "model": args.model or report["model"],
                  **({"cpu": args.cpu} if args.cpu else {}), **({"note": args.note} if args.note else {})}  # fmt: skip
        rows = rows_of(report, common)
        record(args.history, rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, plot_benchmarks.BadRow) as e:
        sys.exit(f"error: {e}" if not isinstance(e, KeyError) else f"error: {args.report} has no {e}")
    print(f"{len(rows)} rows added to {args.history}")


if __name__ == "__main__":
    main()
