"""Rows of a bench report: every figure of it in the record, or none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import plot_benchmarks
import pytest
import record_benchmark

TOOL = Path(record_benchmark.__file__)
KIND = {"kernel": "decode_q4_0_128e", "ops": ["attn_norm", "attn_q"], "launches": 4, "us": 2.5}
REPORT = {
    "model": "Tiny", "rows": "distinct", "load_gb_per_s": 12.3456789,
    "results": [
        {"test": "prefill", "n_tokens": 512, "batch": 1, "tokens_per_s": 7000.0},
        {"test": "decode", "n_tokens": 64, "batch": 1, "tokens_per_s": 900.5},
        {"test": "decode", "n_tokens": 64, "batch": 8, "tokens_per_s": 4000.0},
    ],
    "kernels": {
        "gpu": "NVIDIA H200",
        "steps": [
            {"batch": 1, "n_prompt": 0, "kinds": [KIND, {**KIND, "ops": ["sample"], "launches": 1}]},
            {"batch": 8, "n_prompt": 0, "kinds": [{**KIND, "kernel": "convert_rows", "us": 1.0}, KIND]},
            {"batch": 1, "n_prompt": 512, "kinds": [KIND]},  # `phase_us` is of decode steps
        ],
    },
}  # fmt: skip


def run(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def report(tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(REPORT))
    return path


def test_every_figure_is_a_row(report, tmp_path):
    history = tmp_path / "h.jsonl"
    done = run(report, "--commit", "0e96568", "--driver", "580.1", "--history", history, "--model", "Tiny Q4_0")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout == f"7 rows added to {history}\n"
    rows = [row for _, row in plot_benchmarks.read(history)]
    assert {(row.gpu, row.driver, row.model, row.program) for row in rows} == {
        ("NVIDIA H200", "580.1", "Tiny Q4_0", "worker-orcd")
    }
    assert [(r.measure, r.value, r.batch, r.distinct, r.prompt, r.phase) for r in rows] == [
        ("prefill_tps", 7000, None, None, 512, None),
        ("decode_tps", 900.5, 1, None, None, None),
        ("decode_tps", 4000, 8, True, None, None),
        ("load_gbps", 12.3457, None, None, None, None),
        ("phase_us", 10, 1, None, None, "attn_norm attn_q"),
        ("phase_us", 2.5, 1, None, None, "sample"),
        ("phase_us", 14, 8, True, None, "attn_norm attn_q"),
    ]


def test_a_report_without_kernels_and_of_a_processor(tmp_path):
    plain = {key: value for key, value in REPORT.items() if key not in ("kernels", "load_gb_per_s", "rows")}
    (tmp_path / "bench.json").write_text(json.dumps(plain))
    history = tmp_path / "h.jsonl"
    done = run(
        tmp_path / "bench.json", "--commit", "v0.1", "--cpu", "EPYC, 2 threads", "--note", "n", "--history", history
    )
    assert done.returncode == 0, done.stderr
    rows = [row for _, row in plot_benchmarks.read(history)]
    assert [(r.measure, r.machine, r.distinct, r.note) for r in rows] == [
        ("prefill_tps", "EPYC, 2 threads", None, "n"),
        ("decode_tps", "EPYC, 2 threads", None, "n"),
        ("decode_tps", "EPYC, 2 threads", False, "n"),
    ]


def test_a_bad_row_adds_nothing(report, tmp_path):
    history = tmp_path / "h.jsonl"
    assert run(report, "--commit", "0e96568", "--history", history).returncode == 0
    before = history.read_bytes()
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "none.json").write_text("{}")
    for args, says in (
        ((report, "--commit", "0e96568"), ":8: the same figure as in line 1"),
        ((report, "--commit", "main"), "`$.commit`"),
        ((report, "--commit", "0e96568", "--date", "today"), "`$.date`"),
        ((tmp_path / "absent.json", "--commit", "0e96568"), "absent.json"),
        ((tmp_path / "none.json", "--commit", "0e96568"), "none.json has no 'model'"),
        ((tmp_path / "list.json", "--commit", "0e96568"), "list"),
    ):
        done = run(*args, "--history", history)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and says in done.stderr, done.stderr
        assert history.read_bytes() == before
