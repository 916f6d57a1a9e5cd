"""Everything that is to be shown on a GPU, unattended: tests, reference values, sanitizers, benches, a table last.

    python tools/gpu_check.py --out DIR [--model FILE.gguf]... [--parts tests,goldens,sanitize,bench,calls,kernels]

Builds nothing: it runs what the interpreter that runs it finds as worker_orcd. Each part is a process of its own with a
time limit; what it says goes to DIR/<part>.log, the figures to DIR/gpu_check.json. A part that fails does not keep the
next from running. Exits 1 where one failed. docs/gpu-check.md and docs/performance.md get their figures from here.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: failures that the table names
MOST_LINES = 25
PARTS = ("tests", "goldens", "sanitize", "bench", "calls", "kernels")


@dataclass
class Result:
    """What came of a part: `lines` are for people, `figures` for machines."""

    part: str
    ok: bool
    seconds: float
    lines: list[str] = field(default_factory=list)
    figures: Any = None


def run(command: list[str], log: Path, limit: float, env: dict[str, str]) -> tuple[int | None, float]:
    """Run a process, with what it says appended to `log` and shown.

    Returns:
        (exit code, None where it ran past `limit` seconds and was ended; seconds it took).
    """
    print(f"$ {' '.join(command)}", flush=True)
    began = time.monotonic()
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env={**os.environ, **env}, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit)
        except BaseException as error:
            os.killpg(process.pid, 9)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code = None
    return code, time.monotonic() - began


def said(code: int | None) -> str:
    """An exit code in words."""
    return "ran past its time" if code is None else f"exit {code}"


def check_tests(args: argparse.Namespace, log: Path) -> Result:
    """The GPU tests."""
    report = args.out / "tests.xml"
    code, seconds = run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "-q",
            "-rA",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            *args.pytest,
        ],
        log,
        args.limit,
        {"WORKER_ORCD_REQUIRE_GPU": "1"},
    )
    counts: dict[str, int] = {}
    lines = []
    if report.exists():
        suite = next(ElementTree.parse(report).iter("testsuite"))
        counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
        for case in suite.iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                lines.append(f"failed: {case.get('classname')}::{case.get('name')}")
        if len(lines) > MOST_LINES:
            lines[MOST_LINES:] = [f"and {len(lines) - MOST_LINES} more, see {report}"]
    passed = counts.get("tests", 0) - sum(counts.get(name, 0) for name in ("failures", "errors", "skipped"))
    lines.insert(
        0,
        f"{passed} passed, {counts.get('failures', 0) + counts.get('errors', 0)} failed, "
        f"{counts.get('skipped', 0)} skipped ({said(code)})",
    )
    return Result("tests", code == 0, seconds, lines, counts)


def check_goldens(args: argparse.Namespace, log: Path) -> Result:
    """Logits against the reference files."""
    report = args.out / "goldens.json"
    command = [
        sys.executable,
        "tools/check_goldens.py",
        str(args.goldens),
        "--device",
        args.device,
        "--only",
        args.cases,
        "--json",
        str(report),
    ]
    if args.models_dir is not None:
        command += ["--models", str(args.models_dir)]
    code, seconds = run(command, log, args.limit, {})
    rows = json.loads(report.read_text()) if report.exists() else []
    bad = [
        f"past its limit: {r['case']} {r['what']} {r['measured']:.3g} (limit {r['limit']:.3g})"
        for r in rows
        if not r["ok"]
    ]
    missing = re.findall(r"^missing model: (.*)$", log.read_text(errors="replace"), re.MULTILINE)
    lines = [
        f"{len(rows) - len(bad)} of {len(rows)} within their limits ({said(code)})",
        *bad,
        *(f"missing model, not compared: {path}" for path in missing),
    ]
    return Result("goldens", bool(rows) and not bad and (code == 0 or bool(missing)), seconds, lines, rows)


def check_sanitize(args: argparse.Namespace, log: Path) -> Result:
    """compute-sanitizer's four tools."""
    code, seconds = run(
        ["tools/sanitize_gpu.sh"],
        log,
        args.sanitize_limit,
        {"PYTHON": sys.executable, "WORKER_ORCD_GOLDENS": str(args.goldens)},
    )
    tools = re.findall(r"^(\w+check +\w+ +\d+ s  .*)$", log.read_text(errors="replace"), re.MULTILINE)
    return Result("sanitize", code == 0, seconds, [f"{said(code)}", *tools], tools)


def check_bench(args: argparse.Namespace, log: Path) -> Result:
    """worker-orcd bench on each model file."""
    total, ok, lines, figures = 0.0, True, [], []
    for model in args.model:
        one = args.out / f"bench-{model.stem}.log"
        one.unlink(missing_ok=True)
        code, seconds = run(
            [
                sys.executable,
                "-m",
                "worker_orcd",
                "bench",
                "--model",
                str(model),
                "--device",
                args.device,
                "-p",
                args.prompts,
                "-n",
                str(args.n_gen),
                "--batch",
                args.batch,
                "--repeat",
                "5",
                "--json",
            ],
            one,
            args.limit,
            {},
        )
        total += seconds
        text = one.read_text(errors="replace")
        log.open("a").write(text)
        found = next((line for line in reversed(text.splitlines()) if line.startswith("{")), None)
        if code != 0 or found is None:
            ok = False
            lines.append(f"{model.name}: {said(code)}: {text.strip().splitlines()[-1] if text.strip() else ''}")
            continue
        r = json.loads(found)
        figures.append({"file": str(model), **r})
        load = f" at {r['load_gb_per_s']:.1f} GB/s" if r.get("load_gb_per_s") else ""
        lines.append(
            f"{model.name}: loaded in {r['load_s']:.2f} s{load}, VRAM {r['vram_bytes'] / 1e6:,.0f} MB, copy "
            f"bandwidth {r['bandwidth_gb_per_s'] or 0:,.0f} GB/s"
        )
        for m in r["results"]:
            rate = "" if m["gb_per_s"] is None else f"  {m['gb_per_s']:8,.1f} GB/s"
            share = "" if m["percent_of_bandwidth"] is None else f"  {m['percent_of_bandwidth']:4.0f} %"
            name = f"{m['test']} {m['n_tokens']}" + (f" x {m['batch']}" if m["test"] == "decode" else "")
            distinct = f"  {100 * m['distinct']:3.0f} % of the tokens of a step differ" if m["batch"] > 1 else ""
            lines.append(f"  {name:18s} {m['tokens_per_s']:12,.1f} tokens/s{rate}{share}{distinct}")
    if not args.model:
        lines.append("no --model was given")
    return Result("bench", ok, total, lines, figures)


def check_calls(args: argparse.Namespace, log: Path) -> Result:
    """Driver calls of a generation with the first model: one graph launch a step, hardly a wait."""
    if not args.model:
        return Result("calls", True, 0.0, ["no --model was given"])
    report = args.out / "calls.json"
    code, seconds = run(
        [sys.executable, "tools/trace_calls.py", "--model", str(args.model[0]), "--json", str(report)],
        log,
        args.limit,
        {},
    )
    figures = json.loads(report.read_text()) if report.exists() else None
    lines = log.read_text(errors="replace").rstrip().splitlines()
    return Result("calls", code == 0, seconds, [said(code), *lines], figures)


def check_kernels(args: argparse.Namespace, log: Path) -> Result:
    """Single kernels on the shapes of real models."""
    report = args.out / "kernels.json"
    command = [sys.executable, "tools/bench_kernels.py", "--quick", "--json", str(report)]
    code, seconds = run(command, log, args.limit, {})
    figures = json.loads(report.read_text()) if report.exists() else None
    table = log.read_text(errors="replace").rstrip().splitlines()[-60:] if code == 0 else []
    return Result("kernels", code == 0, seconds, [said(code), *table], figures)


CHECKS: dict[str, Callable[[argparse.Namespace, Path], Result]] = {
    "tests": check_tests,
    "goldens": check_goldens,
    "sanitize": check_sanitize,
    "bench": check_bench,
    "calls": check_calls,
    "kernels": check_kernels,
}


def machine(device: str) -> dict[str, object]:
    """What the figures hold for: GPU, driver, commit, date."""
    from worker_orcd.diagnose import doctor

    found = {f.name: f.detail for f in doctor.check()}
    git = subprocess.run(["git", "log", "-1", "--format=%h"], capture_output=True, text=True, check=False, cwd=ROOT)
    changed = subprocess.run(
        ["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device,
        "commit": git.stdout.strip() or None,
        "changed_since": bool(changed.stdout.strip()),
        "doctor": found,
    }


def main() -> int:
    """Run the parts, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for logs and figures")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, in this order")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--model", type=Path, action="append", default=[], help="a GGUF file to bench; may be repeated")
    parser.add_argument(
        "--goldens",
        type=Path,
        help="the reference files (WORKER_ORCD_GOLDENS, ../shared/goldens)",
        default=Path(os.environ.get("WORKER_ORCD_GOLDENS") or ROOT.parent / "shared" / "goldens"),
    )
    parser.add_argument("--models-dir", type=Path, help="the real models that the reference values are of")
    parser.add_argument("--cases", default="*", help="shell pattern of the reference cases")
    parser.add_argument("--prompts", default="512,2048", help="prompt lengths of the bench")
    parser.add_argument("--n-gen", type=int, default=128, help="tokens that the bench decodes")
    parser.add_argument("--batch", default="1,8,64", help="numbers of sequences of the bench")
    parser.add_argument("--limit", type=float, default=600, help="seconds for each process")
    parser.add_argument("--sanitize-limit", type=float, default=2000, help="seconds for the sanitizers")
    parser.add_argument("pytest", nargs="*", help="more options for pytest, after --")
    args = parser.parse_args()
    parts = [p for p in args.parts.split(",") if p]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    args.goldens = args.goldens.resolve()
    args.models_dir = args.models_dir and args.models_dir.resolve()
    args.model = [m.resolve() for m in args.model]
    facts = machine(args.device)
    results = []
    for part in (p for p in PARTS if p in parts):
        log = args.out / f"{part}.log"
        log.unlink(missing_ok=True)
        try:
            results.append(CHECKS[part](args, log))
        except Exception as error:
            results.append(Result(part, False, 0.0, [f"{type(error).__name__}: {error}"]))
        # after every part, so that a run that is cut off leaves what it has
        (args.out / "gpu_check.json").write_text(
            json.dumps({"machine": facts, "parts": [asdict(r) for r in results]}, indent=1)
        )
    print(f"\n{facts['date']}, commit {facts['commit']}{' and changes' if facts['changed_since'] else ''}")
    for name, detail in facts["doctor"].items():
        if "gpu" in name.lower() or "driver" in name.lower():
            print(f"{name}: {detail}")
    for r in results:
        print(f"\n{r.part}: {'ok' if r.ok else 'FAILED'} in {r.seconds:.0f} s")
        for line in r.lines:
            print(f"  {line}")
    return 0 if results and all(r.ok for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
