"""The record of benchmarks: what a row must keep, and that a drawing shows every row."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import plot_benchmarks
import pytest

TOOL = Path(plot_benchmarks.__file__)
DECODE = {
    "date": "2026-11-21",
    "program": "worker-orcd",
    "commit": "9bbafff",
    "gpu": "NVIDIA H100 80GB HBM3",
    "driver": "580.159",
    "model": "Qwen2.5-0.5B Q4_K_M",
    "measure": "decode_tps",
    "batch": 8,
    "distinct": True,
    "value": 7310,
    "unit": "tokens/s",
}
PREFILL = {k: v for k, v in DECODE.items() if k not in ("batch", "distinct")} | {
    "measure": "prefill_tps",
    "prompt": 512,
}
PHASE = DECODE | {"measure": "phase_us", "unit": "us", "phase": "attn_norm attn_q attn_k attn_v"}
#: (what is changed in a good row, what the error must say besides the line)
FAULTS = [
    ({"date": "yesterday"}, r"`\$\.date`"),
    ({"date": "2026-13-01"}, r"`\$\.date`"),
    ({"program": ""}, r"`\$\.program`"),
    ({"commit": "main"}, r"`\$\.commit`"),
    ({"gpu": 100}, r"`\$\.gpu`"),
    ({"value": "7310"}, r"`\$\.value`"),
    ({"value": 0}, r"`\$\.value`"),
    ({"value": -1.5}, r"`\$\.value`"),
    ({"batch": 8.5}, r"`\$\.batch`"),
    ({"batch": 0}, r"`\$\.batch`"),
    ({"speed": 1}, "`speed`"),
    ({"measure": "decode"}, "`measure` 'decode'"),
    ({"unit": "GB/s"}, "`unit` of decode_tps is 'tokens/s', not 'GB/s'"),
    ({"batch": None}, "`batch` is missing from decode_tps"),
    ({"prompt": 512}, "`prompt` does not belong to decode_tps"),
    ({"distinct": None}, "`distinct`"),
    ({"batch": 1}, "`distinct`"),
    ({"gpu": None}, "`gpu` or `cpu`"),
    ({"cpu": "AMD EPYC"}, "`gpu` or `cpu`"),
    ({"phase": "attn_q"}, "`phase` does not belong to decode_tps"),
    ({"measure": "phase_us", "unit": "us"}, "`phase` is missing from phase_us"),
    (PHASE | {"phase": ""}, r"`\$\.phase`"),
    (PHASE | {"batch": None}, "`batch` is missing from phase_us"),
    *(({field: ...}, f"`{field}`") for field in DECODE if field not in ("batch", "distinct")),
]


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def changed(change: dict) -> dict:
    """A good row with another value of a field, or without it where the value is `...`."""
    return {k: v for k, v in {**DECODE, **change}.items() if v is not ...}


@pytest.mark.parametrize(("change", "says"), FAULTS, ids=[json.dumps(c, default=lambda _: "absent") for c, _ in FAULTS])
def test_a_bad_row_is_told_with_its_line_and_field(tmp_path, change, says):
    path = write(tmp_path / "h.jsonl", PREFILL, changed(change), PREFILL)
    with pytest.raises(plot_benchmarks.BadRow, match=rf"^{re.escape(str(path))}:2: .*{says}"):
        plot_benchmarks.read(path)


@pytest.mark.parametrize("line", ["", "{", "[]", '{"value": NaN}', "nonsense"])
def test_a_line_that_is_no_object_is_told(tmp_path, line):
    path = write(tmp_path / "h.jsonl", PREFILL, DECODE, line)
    with pytest.raises(plot_benchmarks.BadRow, match=":3: "):
        plot_benchmarks.read(path)


def test_the_same_figure_twice_is_told_with_both_lines(tmp_path):
    path = write(tmp_path / "h.jsonl", DECODE, PREFILL, {**DECODE, "value": 1})
    with pytest.raises(plot_benchmarks.BadRow, match=":3: the same figure as in line 1"):
        plot_benchmarks.read(path)


def test_rows_keep_their_line_and_values(tmp_path):
    on_cpu = {
        **PREFILL,
        "gpu": None,
        "driver": None,
        "cpu": "AMD EPYC",
        "commit": "v0.3.36",
        "note": "beside other work",
    }
    rows = plot_benchmarks.read(write(tmp_path / "h.jsonl", DECODE, PREFILL, on_cpu))
    assert [number for number, _ in rows] == [1, 2, 3]
    assert [(r.measure, r.value, r.machine, r.series) for _, r in rows] == [
        ("decode_tps", 7310, "NVIDIA H100 80GB HBM3", "batch 8"),
        ("prefill_tps", 7310, "NVIDIA H100 80GB HBM3", "prompt 512"),
        ("prefill_tps", 7310, "AMD EPYC", "prompt 512"),
    ]


def test_phases_of_one_step_are_drawn_apart(tmp_path):
    rows = [PHASE, PHASE | {"phase": "ffn_down", "value": 3}, PHASE | {"batch": 1, "distinct": None}]
    read = plot_benchmarks.read(write(tmp_path / "h.jsonl", *rows))
    assert [row.series for _, row in read] == [
        "batch 8, attn_norm attn_q attn_k attn_v",
        "batch 8, ffn_down",
        "batch 1, attn_norm attn_q attn_k attn_v",
    ]
    (file,) = plot_benchmarks.draw(read, tmp_path / "out")
    assert file.stem == "phase_us" and set(re.findall(r'id="row-(\d+)"', file.read_text())) == {"1", "2", "3"}
    with pytest.raises(plot_benchmarks.BadRow, match=":2: the same figure as in line 1"):
        plot_benchmarks.read(write(tmp_path / "h.jsonl", PHASE, PHASE | {"value": 9}))


def test_check_judges_the_recorded_history():
    done = subprocess.run([sys.executable, TOOL, "--check"], capture_output=True, text=True, timeout=60, check=False)
    n_line = len(plot_benchmarks.HISTORY.read_bytes().splitlines())
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(f"{n_line} rows of ")


def test_check_exits_with_1_and_one_line(tmp_path):
    path = write(tmp_path / "h.jsonl", changed({"commit": "main"}))
    for bad in (path, tmp_path / "absent.jsonl"):
        command = [sys.executable, TOOL, bad, "--check"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and bad.name in done.stderr


def test_without_matplotlib_the_error_says_what_to_do(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')\n")
    code = (
        f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['plot', '--out', {str(tmp_path)!r}]\n"
    )
    code += f"runpy.run_path({str(TOOL)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: drawing needs matplotlib")


def test_a_drawing_has_one_point_for_each_row(tmp_path):
    rows = plot_benchmarks.read(plot_benchmarks.HISTORY)
    files = plot_benchmarks.draw(rows, tmp_path)
    assert {file.stem for file in files} == {row.measure for _, row in rows}
    for file in files:
        drawn = re.findall(r'<g id="row-(\d+)">(.*?)</g>\s*</g>', file.read_text(), re.DOTALL)
        assert sorted(int(n) for n, _ in drawn) == [n for n, row in rows if row.measure == file.stem]
        for _, group in drawn:
            assert group.count("<use ") == 1  # a marker
