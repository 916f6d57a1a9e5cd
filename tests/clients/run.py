"""Start a worker, let every client's tests talk to it, end it. Runs in the environment that has the package.

The clients run in theirs (--clients). What lm-eval must find is computed here first, from the engine's own logits.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from worker_orcd import LLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import tiny_chat

HERE = Path(__file__).resolve().parent
KEY = "the-key-of-the-clients"
#: of the worker that schemathesis talks to: short answers, and room for as many choices as a request may want
SMALL = ("--max-tokens-out", "16", "--max-queue", "128")
#: seconds that the worker may take to load, and to end
LOAD_SEC, EXIT_SEC = 120, 5


def expected_scores(model: str, device: str) -> list[list[float]]:
    """The log-probability of each choice of each question of the task, from the logits of the engine."""
    lines = (HERE / "tasks" / "small_facts.jsonl").read_text(encoding="utf-8").splitlines()
    scores = []
    with LLM(model, device=device, progress=False) as llm:
        for row in map(json.loads, lines):
            n_context = len(llm.tokenizer.encode(row["question"], add_bos=False))
            scores.append([])
            for choice in row["choices"]:
                ids = llm.tokenizer.encode(row["question"] + choice, add_bos=False)
                logits = np.asarray(llm.logits(ids), np.float64)[n_context - 1 : -1]
                top = logits.max(axis=1)
                log_sum = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
                chosen = logits[np.arange(len(logits)), ids[n_context:]]
                scores[-1].append(float((chosen - log_sum).sum()))
    return scores


def small_model(folder: Path) -> str | None:
    """A tiny model, for clients that ask a thousand times; None where there are no reference files to make it of."""
    goldens = Path(os.environ.get("WORKER_ORCD_GOLDENS") or HERE.parents[2] / "shared" / "goldens")
    return str(tiny_chat.write(goldens, folder, 256)) if goldens.is_dir() else None


class Worker:
    """One that runs until it is stopped.

    Args:
        log: its file.
        options: of `serve`.
    """

    def __init__(self, model: str, device: str, log: Path, *options: str) -> None:
        command = [sys.executable, "-m", "worker_orcd", "serve", "--model", model, "--device", device]
        command += ["--port", "0", "--log-format", "json", *options]
        self._log = log
        with log.open("wb") as out:
            self._process = subprocess.Popen(command, stderr=out, env={**os.environ, "WORKER_ORCD_API_KEY": KEY})

    def url(self) -> str:
        """Where it is, once it takes jobs."""
        end = time.monotonic() + LOAD_SEC
        while time.monotonic() < end and self._process.poll() is None:
            *lines, _ = self._log.read_text().split("\n")
            events = {e["event"]: e for e in map(json.loads, lines)}
            if "ready" in events:
                return f"http://127.0.0.1:{events['startup']['port']}"
            time.sleep(0.05)
        raise SystemExit(f"the worker is not ready:\n{self._log.read_text()}")

    def stop(self) -> list[str]:
        """End it; what was wrong with it."""
        began = time.monotonic()
        self._process.terminate()
        try:
            code: int | None = self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = None
        seconds = time.monotonic() - began
        wrong = [line for line in self._log.read_text().splitlines() if '"level":"error"' in line]
        if code != 0 or seconds > EXIT_SEC:
            wrong.append(f"exit code {code} after {seconds:.1f} s")
        return wrong


def main() -> int:
    """The program; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clients", required=True, help="the Python that has the clients")
    args, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "expected.json").write_text(json.dumps(expected_scores(args.model, args.device)))
        small = small_model(folder) or args.model
        workers = [
            Worker(args.model, args.device, folder / "log"),
            Worker(small, args.device, folder / "small-log", "--context-length", "96", *SMALL),
        ]
        try:
            env = {
                **os.environ,
                "WORKER_URL": workers[0].url(),
                "SMALL_WORKER_URL": workers[1].url(),
                "WORKER_KEY": KEY,
                "EXPECTED_SCORES": str(folder / "expected.json"),
                # nothing is fetched, nothing is told to anybody
                "HF_HUB_OFFLINE": "1",
                "HF_DATASETS_OFFLINE": "1",
                "HF_HOME": str(folder / "hf"),
                "LITELLM_LOCAL_MODEL_COST_MAP": "True",
                "LANGSMITH_TRACING": "false",
            }
            env.pop("PYTHONSAFEPATH", None)
            every = [] if any(not a.startswith("-") for a in more) else sorted(map(str, HERE.glob("*_client.py")))
            pytest = [Path(args.clients).absolute(), "-m", "pytest", "-q", "-c", HERE / "pytest.ini", "--durations=8"]
            code = subprocess.run(
                [*pytest, *every, *more],
                env=env,
                cwd=HERE,
                check=False,
            ).returncode
        finally:
            wrong = [what for worker in workers for what in worker.stop()]
    for what in wrong:
        print(f"a worker: {what}", file=sys.stderr)
    return code or bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
