"""lm-eval's local-completions with log-probabilities: the score that the engine's own logits give."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from target import BASE, KEY

#: by how much a sum of log-probabilities may differ: the worker tells single precision
LOG_PROB = 1e-4
HERE = Path(__file__).parent
PROGRAM = Path(sys.executable).parent / "lm_eval"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(results, samples) of a run."""
    out = tmp_path_factory.mktemp("lm-eval")
    settings = f"base_url={BASE}/completions,model=any,tokenizer_backend=remote,num_concurrent=2,auth_token={KEY}"
    options = ["--model", "local-completions", "--model_args", settings, "--batch_size", "4", "--log_samples"]
    done = subprocess.run(
        [PROGRAM, *options, "--include_path", "tasks", "--tasks", "small_facts", "--output_path", out],
        env={**os.environ, "OPENAI_API_KEY": KEY},
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = out.rglob("results_*.json")
    (samples,) = out.rglob("samples_*.jsonl")
    rows = sorted(map(json.loads, samples.read_text(encoding="utf-8").splitlines()), key=lambda row: row["doc_id"])
    return json.loads(results.read_text())["results"]["small_facts"], rows


def test_each_log_probability_is_the_engines(found):
    expected = json.loads(Path(os.environ["EXPECTED_SCORES"]).read_text())
    worst = 0.0
    for row, scores in zip(found[1], expected, strict=True):
        given = [float(answer[0][0] if isinstance(answer[0], list) else answer[0]) for answer in row["resps"]]
        worst = max(worst, *(abs(g - s) for g, s in zip(given, scores, strict=True)))
    print(f"largest difference of a sum of log-probabilities: {worst:.2e} (limit {LOG_PROB:g})")
    assert worst < LOG_PROB


def test_the_score_is_the_engines(found):
    expected = json.loads(Path(os.environ["EXPECTED_SCORES"]).read_text())
    rows = [
        json.loads(line) for line in (HERE / "tasks" / "small_facts.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    right = [max(range(len(s)), key=s.__getitem__) == row["answer"] for s, row in zip(expected, rows, strict=True)]
    print(f"accuracy {found[0]['acc,none']}, of the engine's logits {sum(right) / len(right)}")
    assert found[0]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert 0.5 < found[0]["acc,none"] <= 1.0
