"""Load and abuse for a worker: many clients at once, a share of which behaves badly in every way that clients do.

Each answer is compared with the one that the same request gets alone; each stream must have exactly one terminal event.
Beside it run probes of /health and /metrics. Memory, threads and descriptors are watched where the worker was started
here or its process id is known; of one that was started here the log, too, for the end of each job.

    python tools/load.py --model model.gguf --device cpu --seconds 60 --streams 64     starts a worker and ends it
    python tools/load.py --url http://127.0.0.1:8080 --pid 4242                        one that runs

Routes under /v1 are used where the worker has them. Prints a table (--json: to a file as well); exit code 1 where
anything was wrong, with a list of what. Needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent))

from load_client import cases
from load_client.behaviours import NORMAL
from load_client.client import Client, Shared, take_expected
from load_client.report import Report
from load_client.routes import EXECUTE, V1_ROUTES, Case, Route
from load_client.watch import Sample, Worker, run_to_end, sample
from load_client.wire import request

#: seconds for descriptors, threads and memory to come back
BACK_SEC = 15.0
#: how many threads and descriptors more than before the load may be left
SLACK_THREADS, SLACK_DESCRIPTORS = 8, 2


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--model", help="start a worker with this file")
    where.add_argument("--url", help="a worker that runs")
    parser.add_argument("--device", default="cpu", help="of a worker that is started")
    parser.add_argument("--serve", action="append", default=[], metavar="ARG", help="one more argument of its serve")
    parser.add_argument("--pid", type=int, help="process of a worker that runs, to watch its memory")
    parser.add_argument("--api-key", default=os.environ.get("WORKER_ORCD_API_KEY"))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--streams", type=int, default=64, help="clients that are busy all the time")
    parser.add_argument("--abusive", type=float, default=0.35, help="share of what they do that is bad")
    parser.add_argument("--cases", type=int, default=16, help="different requests whose answers are known")
    parser.add_argument("--long", type=int, default=1500, help="tokens of long answers, at most")
    parser.add_argument("--prefill", type=int, default=6000, help="tokens of long prompts")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds after which an end is lost")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-time-limits", action="store_true", help="tell times, and judge none")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there, too")
    return parser.parse_args(argv)


async def get(worker: Worker, path: str) -> tuple[int | None, bytes]:
    """(status, body) of a GET."""
    client = Client(Shared(worker, [], [], [], 0, 30.0, 0.0), -3, 0)
    connection = await client.connect()
    answer = connection.begin()
    await connection.send(request(worker.authority, path, None, client.headers()))
    await connection.end(30)
    connection.close()
    return answer.status, bytes(answer.body)


async def reach(args: argparse.Namespace) -> Worker:
    """The worker of the command line, ready."""
    if args.url is not None:
        url = urlsplit(args.url)
        return Worker(url.hostname or "127.0.0.1", url.port or 80, args.pid, args.api_key)
    command = [sys.executable, "-m", "worker_orcd", "serve", "--model", args.model, "--device", args.device, "--port"]
    command += ["0", "--log-format", "json", "--max-seqs", str(args.streams), "--max-queue", str(2 * args.streams)]
    if args.api_key is not None:
        command += ["--api-key", args.api_key]
    return await Worker.start([*command, *args.serve], args.api_key)


async def prepare(worker: Worker, args: argparse.Namespace) -> Shared:
    """What the clients have to know: the routes, the cases, and each one's answer."""
    status, body = await get(worker, "/health")
    if status != 200:
        raise RuntimeError(f"/health answers {status}: {body[:200]!r}")
    facts: dict[str, Any] = json.loads(body)
    n_context = int(facts["context_length"])
    rng = random.Random(args.seed)
    routes: list[Route] = [EXECUTE]
    if (await get(worker, "/v1/models"))[0] == 200:
        routes += [r for r in V1_ROUTES if "chat" not in r.name or facts.get("chat_template_sha256")]
    prefill = min(args.prefill, n_context - 300)
    shared = Shared(
        worker,
        routes,
        cases.repeated(rng, args.cases, n_context, args.long),
        cases.long_answers(rng, 3, n_context, args.long),
        prefill,
        args.patience,
        args.abusive,
    )
    await take_expected(shared)
    if not shared.expected:
        raise RuntimeError(f"no request is answered: {shared.counts.told[0]}")
    # a prompt of which it is known how many tokens it has
    text = cases.words(rng, min(300, n_context // 16))
    client = Client(shared, -4, 0)
    job = client.job(EXECUTE, Case(text, 1, 0.0, 0))
    await client.run(job)
    shared.chars_per_token = len(text) / (job.reading.tokens[0] or 1)
    client.leave()
    return shared


async def warm_up(shared: Shared, args: argparse.Namespace) -> None:
    """One good job of each client at once: a pool of threads, say, that has grown to its size does not grow back."""
    clients = [Client(shared, -10 - n, args.seed) for n in range(args.streams)]
    await asyncio.gather(*(client.do(NORMAL) for client in clients))
    for client in clients:
        client.leave()
    await asyncio.sleep(1)


def came_back(before: Sample, after: Sample) -> list[str]:
    """What has not."""
    wrong = []
    if after.threads > before.threads + SLACK_THREADS:
        wrong.append(f"{after.threads} threads, in the first half of the load {before.threads}")
    if after.descriptors > before.descriptors + SLACK_DESCRIPTORS:
        wrong.append(f"{after.descriptors} descriptors, before the load {before.descriptors}")
    return wrong


async def settle(pid: int, before: Sample) -> tuple[Sample | None, list[str]]:
    """Wait until what the load took has come back: (what is seen then, what has not)."""
    end = time.monotonic() + BACK_SEC
    while True:
        after = sample(pid)
        if after is None:
            return None, ["the worker is gone"]
        wrong = came_back(before, after)
        if not wrong or time.monotonic() > end:
            return after, wrong
        await asyncio.sleep(0.25)


async def idle_gauges(worker: Worker) -> list[str]:
    """Gauges of /metrics that should be 0 when nothing runs and are not."""
    status, body = await get(worker, "/metrics")
    wrong = []
    for line in body.decode().splitlines() if status == 200 else ():
        name, _, value = line.rpartition(" ")
        if name.startswith(("worker_orcd_num_requests_running", "worker_orcd_num_requests_waiting")) and float(value):
            wrong.append(f"with nothing to do {line}")
    return wrong


async def run(args: argparse.Namespace) -> Report:
    """All of it."""
    report = Report()
    worker = await reach(args)
    try:
        shared = await prepare(worker, args)
        metrics = (await get(worker, "/metrics"))[0] == 200
        print(
            f"{args.streams} clients, {args.abusive:.0%} abusive, {len(shared.routes)} routes, {len(shared.expected)} "
            f"known answers, long prompts of {shared.prefill_tokens} tokens; {args.seconds:g} s ...",
            file=sys.stderr,
        )
        await warm_up(shared, args)
        before = None if worker.pid is None else sample(worker.pid)
        began = asyncio.get_running_loop().time()
        worker.watch(shared.counts.jobs, began)
        await worker.probe(["/health", "/metrics"] if metrics else ["/health"])
        clients = [Client(shared, n, args.seed + 1) for n in range(args.streams)]
        end = time.monotonic() + args.seconds
        await asyncio.gather(*(client.work(end) for client in clients))
        seconds = asyncio.get_running_loop().time() - began
        await worker.stop_watching()
        jobs = shared.counts.jobs[0]
        if before is not None and worker.pid is not None:
            # a pool of threads may grow to its size; what still grows when it has is a leak
            early = [s.threads for at, _, s in worker.samples if at < seconds / 2]
            allowed = replace(before, threads=max([before.threads, *early]))
            after, wrong = await settle(worker.pid, allowed)
            report.wrong += wrong
            if after is not None:
                worker.samples.append((seconds, jobs, after))
                report.facts["back"] = {
                    "threads": [before.threads, after.threads],
                    "descriptors": [before.descriptors, after.descriptors],
                }
        try:
            report.wrong += await idle_gauges(worker)
            await take_expected(shared, again=True)
        except OSError as error:
            report.wrong.append(f"after the load nobody answers ({error}); {await worker.last_words()}")
        ended = await worker.stop()
        if ended is not None and (ended[0] != 0 or ended[1] > 5):
            report.wrong.append(f"after SIGTERM: exit code {ended[0]}, {ended[1]:.1f} s (0 within 5 s)")
        await asyncio.sleep(0.2)  # the last lines of the log
        report.judge(shared, seconds, not args.no_time_limits)
        report.facts["exit"] = ended and [ended[0], round(ended[1], 2)]
    except (RuntimeError, OSError) as error:
        raise RuntimeError(f"{type(error).__name__}: {error}\n{await worker.last_words()}") from error
    finally:
        await worker.kill()
    return report


def main(argv: list[str] | None = None) -> int:
    """The program; its exit code."""
    args = options(argv)
    try:
        report = run_to_end(run(args))
    except (RuntimeError, OSError) as error:
        print(f"load: {error}", file=sys.stderr)
        return 1
    print(report.table())
    if args.json is not None:
        args.json.write_text(json.dumps({**report.facts, "ms": report.times, "wrong": report.wrong}, indent=1) + "\n")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
