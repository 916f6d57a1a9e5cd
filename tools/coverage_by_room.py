"""Line coverage of the last `make test`, a row a room: a folder of the package, or the modules beside the folders.

Usage: python tools/coverage_by_room.py [--lines ROOM]

`--lines` names the lines of a room that no test ran, a file a row. Compiled modules are not measured.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import coverage

ROOT = Path(__file__).resolve().parent.parent


def room_of(path: str) -> str:
    """The room of a measured file: `worker_orcd/chat/template.py` is in "chat", `wsgi/app.py` in "wsgi"."""
    folder = Path(path).resolve().parent.name
    return "errors, config, ..." if folder == "worker_orcd" else folder


def main() -> None:
    """Print the table, or the lines of one room."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", metavar="ROOM", help="name the lines of a room that no test ran")
    options = parser.parse_args()
    measured = coverage.Coverage(config_file=str(ROOT / "pyproject.toml"))
    measured.load()
    n_lines: dict[str, int] = defaultdict(int)
    n_missed: dict[str, int] = defaultdict(int)
    for path in sorted(measured.get_data().measured_files()):
        _, lines, _, missed, text = measured.analysis2(path)
        room = room_of(path)
        n_lines[room] += len(lines)
        n_missed[room] += len(missed)
        if room == options.lines and missed:
            print(f"{path}: {text}")
    if options.lines:
        return
    print(f"{'room':20s} {'lines':>6s} {'missed':>7s} {'run':>6s}")
    rows = [*sorted(n_lines), "all"]
    n_lines["all"], n_missed["all"] = sum(n_lines.values()), sum(n_missed.values())
    for room in rows:
        share = 1 - n_missed[room] / n_lines[room] if n_lines[room] else 1
        print(f"{room:20s} {n_lines[room]:6d} {n_missed[room]:7d} {share:6.1%}")


if __name__ == "__main__":
    main()
