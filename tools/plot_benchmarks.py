"""Check the recorded benchmarks and draw them: an SVG a measure, a panel a machine and model, a point a row.

Usage: python tools/plot_benchmarks.py [docs/benchmarks/history.jsonl] [--out DIR] [--check]

The fields of a row are described in docs/benchmarks/README.md. A row that breaks a rule is told with its line and
field, and the program exits with 1; `--check` stops there. Drawing needs matplotlib.
"""

from __future__ import annotations

import argparse
import datetime
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

HISTORY = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "history.jsonl"
#: columns of panels in a drawing
COLUMNS = 2
MARKERS = "osD^vP*Xhd<>p8H"


@dataclass(frozen=True)
class Measure:
    """What is measured: its unit, and the field of a row that says how much ran at once, if one does."""

    title: str
    unit: str
    size: str | None = None


MEASURES = {
    "decode_tps": Measure("Decode, all sequences together", "tokens/s", "batch"),
    "prefill_tps": Measure("Prefill of one prompt", "tokens/s", "prompt"),
    "phase_us": Measure("Launches of a decode step by what they are for", "us", "batch"),
    "load_gbps": Measure("Load of the weights", "GB/s"),
    "first_token_s": Measure("From the start of the process to the first token", "s"),
    "logits_nmse": Measure("Normalized mean squared error of the logits", "1"),
    "logits_kl": Measure("Mean KL divergence of the logits to the reference", "nat"),
}

Text = Annotated[str, msgspec.Meta(min_length=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One figure, as a line of the history has it."""

    date: datetime.date
    program: Text
    commit: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{7,40}|v\d[\w.]*)$")]
    gpu: Text | None
    driver: Text | None
    model: Text
    measure: str
    value: Annotated[float, msgspec.Meta(gt=0)]
    unit: str
    batch: Count | None = None
    distinct: bool | None = None
    prompt: Count | None = None
    phase: Text | None = None
    cpu: Text | None = None
    note: Text | None = None

    @property
    def machine(self) -> str:
        """What it ran on."""
        return self.gpu or self.cpu or ""

    @property
    def panel(self) -> str:
        """The panel it is drawn in: models that ran in several sizes have their own."""
        return f"{self.model}, {self.machine}" if MEASURES[self.measure].size else self.machine

    @property
    def series(self) -> str:
        """What it is comparable with inside its panel, whichever program ran."""
        size = MEASURES[self.measure].size
        alike = ", all alike" if self.distinct is False else ""
        phase = f", {self.phase}" if self.phase else ""
        return f"{size} {getattr(self, size)}{alike}{phase}" if size else self.model


class BadRow(Exception):
    """A row breaks a rule; the message names line and field."""


def read(path: Path) -> list[tuple[int, Row]]:
    """(line number from 1, row) of each line of `path`.

    Raises:
        BadRow: the first line that breaks a rule, with the field.
    """
    rows: list[tuple[int, Row]] = []
    seen: dict[tuple[object, ...], int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = msgspec.json.decode(line, type=Row)
        except msgspec.MsgspecError as e:  # ends with "at `$.field`" where it knows one
            raise BadRow(f"{path}:{number}: {e}") from None
        if fault := fault_of(row):
            raise BadRow(f"{path}:{number}: {fault}")
        key = (row.date, row.program, row.commit, row.machine, row.model)
        key += (row.measure, row.batch, row.prompt, row.distinct, row.phase)
        if key in seen:
            raise BadRow(f"{path}:{number}: the same figure as in line {seen[key]}: only `value` could differ")
        seen[key] = number
        rows.append((number, row))
    return rows


def fault_of(row: Row) -> str | None:
    """What is wrong between the fields of a row; None where nothing is."""
    if row.measure not in MEASURES:
        return f"`measure` {row.measure!r} is none of {', '.join(MEASURES)}"
    measure = MEASURES[row.measure]
    if row.unit != measure.unit:
        return f"`unit` of {row.measure} is {measure.unit!r}, not {row.unit!r}"
    for field in ("batch", "prompt"):
        given = getattr(row, field) is not None
        if given != (field == measure.size):
            return f"`{field}` {'does not belong to' if given else 'is missing from'} {row.measure}"
    if (row.phase is not None) != (row.measure == "phase_us"):
        return f"`phase` {'does not belong to' if row.phase is not None else 'is missing from'} {row.measure}"
    if (row.distinct is not None) != ((row.batch or 1) > 1):
        return "`distinct` belongs to rows with a batch above 1, and to no other"
    if (row.gpu is None) == (row.cpu is None):
        return "`gpu` or `cpu` must name the machine, and the other be null or left out"
    if not math.isfinite(row.value):
        return "`value` is no finite number"
    return None


def draw(rows: list[tuple[int, Row]], out: Path) -> list[Path]:
    """Draw each measure that occurs to `out`/MEASURE.svg. A point has the id `row-LINE` in the drawing.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    out.mkdir(parents=True, exist_ok=True)
    files = []
    for name, measure in MEASURES.items():
        panels: dict[str, list[tuple[int, Row]]] = {}
        for number, row in sorted(rows, key=lambda r: r[1].date):  # rows of one day stay in their order
            if row.measure == name:
                panels.setdefault(row.panel, []).append((number, row))
        if not panels:
            continue
        n_row = math.ceil(len(panels) / COLUMNS)
        figure, axes = pyplot.subplots(
            n_row, COLUMNS, squeeze=False, figsize=(7 * COLUMNS, 3.8 * n_row), layout="constrained"
        )
        figure.suptitle(f"{measure.title} ({measure.unit})" if measure.unit != "1" else measure.title)
        for panel, where in zip(panels, axes.flat, strict=False):
            draw_panel(where, panels[panel])
            where.set_title(panel, fontsize=9)
        for where in axes.flat[len(panels) :]:
            where.remove()
        files.append(out / f"{name}.svg")
        figure.savefig(files[-1], metadata={"Date": None})
        pyplot.close(figure)
    return files


def draw_panel(where, rows: list[tuple[int, Row]]) -> None:
    """Draw a line for each program and series, over the runs in the order of their dates."""
    runs = list(dict.fromkeys((r.date, r.program, r.commit) for _, r in rows))
    programs = sorted({r.program for _, r in rows}, key=lambda p: (p != "worker-orcd", p))
    series = list(dict.fromkeys(r.series for _, r in rows))
    lines: dict[tuple[int, int], list[tuple[int, Row]]] = {}
    for number, row in rows:
        lines.setdefault((series.index(row.series), programs.index(row.program)), []).append((number, row))
    for (of_series, of_program), points in sorted(lines.items()):
        # programs are told apart by colour; where there are many series and hardly a program, series are
        by_program = MEASURES[rows[0][1].measure].size and rows[0][1].phase is None
        color = f"C{of_program if by_program else of_series}"
        marker = MARKERS[of_series % len(MARKERS)]
        label = f"{programs[of_program]}, {series[of_series]}"
        x = [runs.index((r.date, r.program, r.commit)) for _, r in points]
        where.plot(x, [r.value for _, r in points], color=color, linewidth=0.8)
        for at, (number, row) in zip(x, points, strict=True):
            where.plot(at, row.value, gid=f"row-{number}", linestyle="", color=color, marker=marker, label=label)
            label = None  # one entry of the legend for the whole line
    where.set_xticks(range(len(runs)), [f"{date}\n{program}\n{commit}" for date, program, commit in runs], fontsize=6)
    where.margins(x=0.1, y=0.15)
    where.set_yscale("log")
    where.grid(axis="y", which="both", linewidth=0.3)
    where.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))


def main() -> None:
    """Check, and draw where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("history", nargs="?", type=Path, default=HISTORY)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder of the drawings")
    parser.add_argument("--check", action="store_true", help="only check the rows")
    args = parser.parse_args()
    try:
        rows = read(args.history)
    except (BadRow, OSError) as e:
        sys.exit(f"error: {e}")
    print(f"{len(rows)} rows of {args.history} keep the rules")
    if not args.check:
        try:
            files = draw(rows, args.out)
        except ImportError:
            sys.exit("error: drawing needs matplotlib (pip install matplotlib); --check does not")
        print(*files, sep="\n")


if __name__ == "__main__":
    main()
