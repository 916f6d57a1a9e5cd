"""SIGTERM at a random moment - a worker loads, idles, reads prompts, generates, or is abused - as often as one likes.

    python tools/signal_storm.py 100 --model model.gguf --device cpu

Each worker must exit with 0 within 5 s, end every open stream with a terminal event and every other answer with a whole
one, and on a GPU give its memory back. Exit code 1 where one did not, with a list of what. Needs nothing but the
standard library.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from load_client import cases
from load_client.client import Client, Counts, Job, Shared
from load_client.report import quantile
from load_client.routes import EXECUTE, V1_ROUTES
from load_client.watch import Worker, run_to_end
from load_client.wire import request

MOMENTS = ("load", "idle", "prefill", "decode", "abuse")
#: seconds within which a worker must be gone
EXIT_SEC = 5.0
#: seconds that streams may take to begin
BEGIN_SEC = 2.0
#: how streams end that the worker could not finish
CODES = {"NOT_READY", "CANCELLED"}
#: MiB of a GPU's memory that may be missing afterwards
VRAM_MIB = 64


@dataclass
class Storm:
    """One worker, and what came of it."""

    number: int
    moment: str
    grace: float
    code: int | None = None
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)


def vram_used() -> int | None:
    """MiB in use on all GPUs; None where that cannot be asked."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        check=False,
    )
    return sum(int(line) for line in asked.stdout.split()) if asked.returncode == 0 else None


async def follow(client: Client, job: Job, storm: Storm) -> None:
    """Read an answer to its end, which comes with the worker's, and check how it ended."""
    if not await job.connection.end(client.patience):
        client.fault(job, "no end")
    elif job.answer.status is None:
        storm.ends["not taken"] += 1  # it came when nobody listened any more
    elif job.answer.status == 503 and not job.answer.done:
        client.fault(job, "a refusal was cut", "lost end")
    elif job.answer.status == 503:
        storm.ends["503"] += 1
        client.check_refusal(job.route.path, job.answer, (503,), "a job while the worker stops")
    elif job.answer.status == 429:
        storm.ends["429"] += 1
    elif job.route.streamed and job.answer.status != 200:
        client.fault(job, f"status {job.answer.status}: {bytes(job.answer.body[:160])!r}")
    elif job.route.streamed:
        storm.ends[job.reading.code or job.reading.terminal or "cut"] += 1
        client.check_cut(job, CODES)
    else:
        storm.ends["whole"] += 1
        if not job.answer.done:
            client.fault(job, "an answer was cut", "lost end")
    job.connection.close()


async def begin(client: Client, prefills: list[bool], storm: Storm) -> list[asyncio.Task[None]]:
    """Send jobs, each with a long prompt or a long answer; follow them. Returns when streams have begun, as a rule."""
    tasks = []
    jobs = [client.job(case=client.fresh_case() if prefill else client.long_case()) for prefill in prefills]
    for job in jobs:
        await client.open(job)
        await job.connection.send(client.bytes_of(job))
        tasks.append(asyncio.create_task(follow(client, job, storm)))
    end = time.monotonic() + BEGIN_SEC
    while time.monotonic() < end and any(j.answer.status is None for j in jobs if j.route.streamed):
        await asyncio.sleep(0.01)
    return tasks


async def one(args: argparse.Namespace, number: int) -> Storm:
    """One worker's life."""
    rng = random.Random(f"{args.seed} {number}")
    grace = args.grace if args.grace is not None else rng.choice((0.2, 1, 4))
    storm = Storm(number, MOMENTS[number % len(MOMENTS)], grace)
    command = [sys.executable, "-m", "worker_orcd", "serve", "--model", args.model, "--device", args.device, "--port"]
    command += ["0", "--log-format", "json", "--grace-sec", str(storm.grace), *args.serve]
    began = time.monotonic()
    worker = await Worker.start(command, until="startup" if storm.moment == "load" else "ready")
    tasks: list[asyncio.Task[None]] = []
    abuse: list[asyncio.Task[None]] = []
    try:
        if storm.moment == "load":
            await asyncio.sleep(rng.uniform(0, max(0.05, args.load_seconds)))
        else:
            args.load_seconds = max(args.load_seconds, time.monotonic() - began)
            shared = await prepare(worker, args, rng)
            client = Client(shared, number, args.seed)
            if storm.moment in ("prefill", "decode"):
                tasks = await begin(client, [storm.moment == "prefill"] * args.streams, storm)
                await asyncio.sleep(rng.uniform(0, 0.3))
            elif storm.moment == "abuse":
                # what these find when the worker goes is no fault; the streams of the other client are looked at
                crowd = replace(shared, counts=Counts())
                clients = [Client(crowd, 1000 * number + n, args.seed) for n in range(args.streams)]
                abuse = [asyncio.create_task(c.work(time.monotonic() + 60)) for c in clients]
                await asyncio.sleep(rng.uniform(0.2, 1.5))
                tasks = await begin(client, [n % 2 == 0 for n in range(args.streams)], storm)
        ended = await worker.stop(group=rng.random() < 0.3)
        assert ended is not None
        storm.code, storm.seconds = ended
        await asyncio.gather(*tasks)
        await asyncio.sleep(0.1)  # the last lines of the log
        if storm.moment != "load":
            storm.wrong += shared.counts.told
        assert worker.log is not None
        storm.wrong += [f"log: {fault}" for fault in worker.log.faults]
        if worker.log.running:
            storm.wrong.append(f"no execute_end of {len(worker.log.running)} jobs")
    finally:
        await worker.kill()
        while abuse := [task for task in abuse if not task.done()]:
            for task in abuse:
                task.cancel()
            await asyncio.sleep(0.05)
    if storm.code != 0 or storm.seconds > EXIT_SEC:
        storm.wrong.append(f"exit code {storm.code} after {storm.seconds:.2f} s")
    return storm


async def prepare(worker: Worker, args: argparse.Namespace, rng: random.Random) -> Shared:
    """What the clients must know of a worker that is ready."""
    client = Client(Shared(worker, [], [], [], 0, 30.0, 0.0), -1, 0)
    bodies = []
    for path in ("/health", "/v1/models"):
        connection = await client.connect()
        answer = connection.begin()
        await connection.send(request(worker.authority, path, None))
        await connection.end(30)
        connection.close()
        bodies.append((answer.status, bytes(answer.body)))
    facts = json.loads(bodies[0][1])
    n_context = int(facts["context_length"])
    routes = [EXECUTE]
    if bodies[1][0] == 200:
        routes += [r for r in V1_ROUTES if "chat" not in r.name or facts.get("chat_template_sha256")]
    prefill = min(args.prefill, 2 * n_context // 3)  # how many tokens a text has is not known exactly
    shared = Shared(
        worker,
        routes,
        cases.repeated(rng, 8, n_context, 1500),
        cases.long_answers(rng, 2, n_context, 1500),
        max(prefill, n_context // 2),
        30.0,
        0.5,
    )
    shared.chars_per_token = args.chars_per_token
    return shared


async def run(args: argparse.Namespace) -> int:
    """All of it; the exit code."""
    args.load_seconds = 0.0
    before = vram_used()
    places = asyncio.Semaphore(args.at_once)

    async def in_place(number: int) -> Storm:
        async with places:
            return await one(args, number)

    storms = await asyncio.gather(*(in_place(n) for n in range(args.number)))
    wrong = [f"{s.number} ({s.moment}, grace {s.grace:g} s): {what}" for s in storms for what in s.wrong]
    after = vram_used()
    if before is not None and after is not None and after > before + VRAM_MIB:
        wrong.append(f"{after - before} MiB of the GPU's memory have not come back")
    for moment in MOMENTS:
        those = [s for s in storms if s.moment == moment]
        if those:
            seconds = [s.seconds for s in those]
            ends = sum((s.ends for s in those), Counter[str]())
            print(
                f"{moment:8} {len(those):4} times, gone after {quantile(seconds, 0.5):.2f} s (median), "
                f"{max(seconds):.2f} s (slowest); ends {dict(ends)}"
            )
    print("Nothing was wrong." if not wrong else f"{len(wrong)} things were wrong")
    print("".join(f"  {w}\n" for w in wrong[:60]), end="")
    return 1 if wrong else 0


def main(argv: list[str] | None = None) -> int:
    """The program; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("number", type=int, nargs="?", default=100, help="workers")
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--serve", action="append", default=[], metavar="ARG", help="one more argument of serve")
    parser.add_argument("--at-once", type=int, default=3, help="workers that run beside each other")
    parser.add_argument("--streams", type=int, default=12, help="of each worker")
    parser.add_argument("--grace", type=float, help="seconds of grace; default: drawn from 0.2, 1 and 4")
    parser.add_argument("--prefill", type=int, default=6000, help="tokens of long prompts")
    parser.add_argument("--chars-per-token", type=float, default=2.0, help="of the tokenizer, about")
    parser.add_argument("--seed", type=int, default=0)
    return run_to_end(run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
