"""Storms of signals for a server: any of them, at any moment, to the master, the worker or both, and what came of it.

`python signal_storm.py 100 [MODEL]` runs so many beside each other with a `FakeLLM`, or with a model on the CPU, and
prints how long the ends took.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from service.client import FAKE_APP, Worker

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP)
TARGETS = ("master", "worker", "group")


@dataclass
class Outcome:
    """What a storm did, and what came of it."""

    storm: list[tuple[float, str, str]]
    code: int | None = None
    seconds: float = 0.0
    #: last event of each stream that had begun, None where it was cut
    ends: list[str | None] = field(default_factory=list)
    log: str = ""


def a_storm(rng: random.Random) -> list[tuple[float, str, str]]:
    """[(seconds to wait, name of the signal, target)], one to five of them."""
    return [
        (rng.choice((0.0, 0.001, rng.uniform(0, 0.05), rng.uniform(0, 0.6))), rng.choice(SIGNALS).name, target)
        for target in rng.choices(TARGETS, (3, 1, 2), k=rng.randint(1, 5))
    ]


def send(storm, pid):
    """Send the signals of a storm to the process group `pid`, as far as they find somebody; when the first was sent."""
    began = None
    for wait, name, target in storm:
        time.sleep(wait)
        number = signal.Signals[name]
        try:
            if target == "group":
                os.killpg(pid, number)
            elif target == "master":
                os.kill(pid, number)
            else:
                for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                    os.kill(int(child), number)
                    began = began or time.monotonic()
                continue
        except (ProcessLookupError, FileNotFoundError):
            break
        began = began or time.monotonic()
    if began is None:  # there was no worker yet: it ends as it should all the same
        began = time.monotonic()
        os.kill(pid, signal.SIGTERM)
    return began


def handles_signals(pid):
    """Whether a process has set a handler of SIGTERM."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True
    mask = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(mask >> (signal.SIGTERM - 1) & 1)


def while_serving(command, prompts, rng, storm, max_tokens=2000):
    """Signals to a server with a stream for each of `prompts`, and with clients that come meanwhile."""
    worker = Worker(command)
    outcome = Outcome(storm)

    def follow(stream):
        last = None
        try:
            while (event := stream.next()) is not None:
                last = event[0]
        except (OSError, HTTPException, ValueError):
            last = None
        outcome.ends.append(last if last in ("end", "error") else None)

    def come_late():
        try:
            stream = worker.execute(prompts[0], job_id="late", max_tokens=max_tokens)
        except (OSError, HTTPException):
            return  # nobody listens any more, or nobody took the connection
        if stream.status == 200:
            follow(stream)

    try:
        streams = [worker.execute(p, job_id=f"j{n}", max_tokens=max_tokens) for n, p in enumerate(prompts)]
        threads = [threading.Thread(target=follow, args=(s,)) for s in streams]
        threads.append(threading.Thread(target=come_late))
        for thread in threads[:-1]:
            thread.start()
        time.sleep(rng.uniform(0, 0.3))
        threads[-1].start()
        began = send(storm, worker.process.pid)
        outcome.code = worker.process.wait(15)
        outcome.seconds = time.monotonic() - began
        for thread in threads:
            thread.join(5)
        worker.stop()
        outcome.log = "".join(worker.raw_log)
    finally:
        worker.kill()
    return outcome


def while_starting(command, rng, storm):
    """Signals to a server at a random moment from its first line on: imports, listening, fork, load, ready."""
    outcome = Outcome(storm)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        while not handles_signals(process.pid):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.9))
        began = send(storm, process.pid)
        outcome.log, _ = process.communicate(timeout=15)
        outcome.code, outcome.seconds = process.returncode, time.monotonic() - began
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return outcome


def fake_command(*args):
    """A server of a `FakeLLM`."""
    return [sys.executable, str(FAKE_APP), "0", *map(str, args)]


def serve_command(model, *args):
    """The program with a model on the CPU."""
    command = [sys.executable, "-m", "worker_orcd", "serve", "--device", "cpu", "--port", "0", "--model", str(model)]
    return [*command, *map(str, args)]


def main():
    n, model = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None

    def one(seed):
        rng = random.Random(seed)
        storm = a_storm(rng)
        if seed % 4 == 3:
            return while_starting(serve_command(model) if model else fake_command("--load-seconds", 0.4), rng, storm)
        if model:
            prompts = ["word " * rng.choice((3, 300, 1500)) for _ in range(6)]
            return while_serving(serve_command(model, "--max-tokens-in", 2000), prompts, rng, storm)
        return while_serving(fake_command("--grace", 4), ["slow"] * 6 + ["quiet"] * 2, rng, storm)

    with ThreadPoolExecutor(int(os.environ.get("STORMS_AT_ONCE", "4"))) as pool:
        outcomes = list(pool.map(one, range(n)))
    times = sorted(o.seconds for o in outcomes)
    for seed, o in enumerate(outcomes):
        if o.code != 0 or None in o.ends or o.seconds > 5 or "Traceback" in o.log:
            print(f"storm {seed}: exit {o.code} after {o.seconds:.2f} s, ends {o.ends}, {o.storm}")
            print("\n".join(line[:60] + line[-60:] for line in o.log.splitlines()[-8:]))
    n_streams = sum(len(o.ends) for o in outcomes)
    print(f"{n} storms: median {times[n // 2]:.2f} s, p100 {times[-1]:.2f} s, {n_streams} streams")
    print(f"cut: {sum(o.ends.count(None) for o in outcomes)}; exit codes: {sorted({str(o.code) for o in outcomes})}")


if __name__ == "__main__":
    main()
