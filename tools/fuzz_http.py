"""Bad requests, as many as one likes, for every route of a worker: none may end it, none may be an error of its own.

    python tools/fuzz_http.py 100000 --model tiny.gguf        starts a worker on the CPU and ends it
    python tools/fuzz_http.py 100000 --url http://127.0.0.1:8080
    python tools/fuzz_http.py --only 4711 --model tiny.gguf   one of them, and what came of it

Requests go many at once over connections that are kept. Each must be answered, with a status that is the client's fault
or one that the documentation of the API names, and a refusal has the body that its route's clients expect. A model with
a small context makes it quick: some of the requests are good.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent))

from load_client.broken import shape_fault
from load_client.mutations import TARGETS, Spoiled, spoiled
from load_client.watch import Worker, run_to_end, sample
from load_client.wire import Answer, Malformed, connect, request

#: statuses past 499 that are no fault of the worker, with the codes that go with them
NAMED = {501: ("INVALID_REQUEST",), 503: ("NOT_READY",), 504: ("INFERENCE_TIMEOUT",), 500: ("VRAM_OOM",)}
Make = Callable[[int], Spoiled]
Headers = dict[str, str]

#: requests on their way on one connection
DEPTH = 16
#: seconds for one answer
PATIENCE = 60.0
#: MiB that the worker may have taken for good after the first share of requests
MEMORY_MIB, WARM_SHARE = 32.0, 0.1


@dataclass
class Outcome:
    """What came of all requests."""

    has_v1: bool = True
    latest: deque[int] = field(default_factory=lambda: deque(maxlen=8 * DEPTH))
    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    n_faults: int = 0
    ended: list[str] = field(default_factory=list)
    n_answered: int = 0
    lost: int = 0

    def fault(self, number: int, made: Spoiled, what: str) -> None:
        """Note what is wrong with an answer."""
        self.n_faults += 1
        if len(self.faults) < 40:
            body = b"" if made.body is None else made.body[:150]
            head = f"{made.method} {made.path[:80]} {made.headers[:3]} {made.framing or ''}"
            self.faults.append(f"request {number}: {what}\n      {head} {body!r}")


class Pipe(asyncio.Protocol):
    """One connection with several requests on their way; answers come in their order."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[int, Spoiled, Answer]] = deque()
        self.done: deque[tuple[int, Spoiled, Answer]] = deque()
        self.lost = self.closes = False
        self.fault: str | None = None
        self.changed = asyncio.Event()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Give bytes to the answer whose turn it is."""
        while data and self.fault is None:
            if not self.waiting:
                self.fault = f"bytes that belong to no answer: {data[:60]!r}"
                break
            answer = self.waiting[0][2]
            try:
                answer.feed(data)
            except (Malformed, ValueError) as error:
                self.fault = str(error)
                break
            if not answer.done:
                break
            data, answer.rest = answer.rest, b""
            self.closes = answer.headers.get("connection") == "close"
            self.done.append(self.waiting.popleft())
        self.changed.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wake who waits."""
        self.lost = True
        self.changed.set()

    @property
    def gone(self) -> bool:
        """Whether nothing more should be sent."""
        return self.lost or self.transport is None or self.transport.is_closing()


async def open_pipe(worker: Worker) -> Pipe:
    """A new connection for several requests."""
    sock = socket.create_connection((worker.host, worker.port), timeout=10)
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    _, pipe = await asyncio.get_running_loop().create_connection(Pipe, sock=sock)
    return pipe


class HeadAnswer(Answer):
    """The answer to HEAD: a length, and no body."""

    def _whole(self) -> bool:
        self.done = True
        return False


def check(outcome: Outcome, number: int, made: Spoiled, answer: Answer) -> None:
    """Look at one answer."""
    status = answer.status or 0
    outcome.statuses[status] += 1
    outcome.n_answered += 1
    if status < 400 or made.method == "HEAD":
        return
    body = bytes(answer.body)
    if status >= 500 and not any(f'"{code}"'.encode() in body for code in NAMED.get(status, ())):
        outcome.fault(number, made, f"status {status}: {body[:200]!r}")
    kind = answer.headers.get("content-type", "")
    own, openai, either = (shape_fault(path, status, kind, body) for path in ("", "/v1/", None))
    # what is refused before the application sees it ends the connection, and may not be known to belong to a route
    early = (
        made.alone
        or not outcome.has_v1
        or made.method not in ("GET", "POST")
        or answer.headers.get("connection") == "close"
    )
    wrong = either if early else {"/v1": openai, "/execute": own}.get("/" + made.path.split("/")[1], either)
    if wrong is not None:
        outcome.fault(number, made, wrong)
    if "x-correlation-id" not in answer.headers:
        outcome.fault(number, made, f"{status} without a correlation id")


async def send_in_turn(worker: Worker, numbers: deque[int], make: Make, outcome: Outcome, extra: Headers) -> None:
    """Take numbers until there are none; requests that cannot be followed go over connections of their own."""
    pipe: Pipe | None = None
    tries: Counter[int] = Counter()
    while numbers or (pipe is not None and pipe.waiting):
        if pipe is None:
            try:
                pipe = await open_pipe(worker)
            except OSError as error:
                outcome.ended.append(f"no connection: {error}")
                return
        while numbers and len(pipe.waiting) < DEPTH and not pipe.gone:
            number = numbers.popleft()
            made = make(number)
            outcome.latest.append(number)
            if made.alone:
                try:
                    await send_alone(worker, number, made, outcome, extra)
                except OSError as error:
                    outcome.ended.append(f"no connection: {error}")
                    return
                continue
            assert pipe.transport is not None
            pipe.waiting.append((number, made, HeadAnswer() if made.method == "HEAD" else Answer()))
            pipe.transport.write(made.data(worker.authority, extra))
        if pipe.waiting and not pipe.done and not pipe.gone and pipe.fault is None:
            pipe.changed.clear()
            try:
                await asyncio.wait_for(pipe.changed.wait(), PATIENCE)
            except TimeoutError:
                pipe.fault = f"no answer within {PATIENCE:g} s"
        while pipe.done:
            check(outcome, *pipe.done.popleft())
        if pipe.gone or pipe.fault is not None:
            if pipe.waiting and (pipe.fault is not None or not pipe.closes):
                number, made, answer = pipe.waiting[0]
                tries[number] += 1
                if pipe.fault is not None or answer.status is not None or tries[number] > 1:
                    outcome.fault(number, made, pipe.fault or f"the connection ended in its answer ({answer.status})")
                    outcome.lost += 1
                    pipe.waiting.popleft()
            # what stood behind it was not looked at: an answer that closes its connection may come first
            numbers.extendleft(n for n, _, _ in reversed(pipe.waiting))
            if pipe.transport is not None:
                pipe.transport.abort()
            pipe = None
    if pipe is not None and pipe.transport is not None:
        pipe.transport.abort()


async def send_alone(worker: Worker, number: int, made: Spoiled, outcome: Outcome, extra: Headers) -> None:
    """Send a request of which nobody can tell where it ends, and then nothing more."""
    connection = await connect(worker.host, worker.port)
    answer = connection.answer = HeadAnswer() if made.method == "HEAD" else Answer()
    await connection.send(made.data(worker.authority, extra))
    connection.half_close()
    ended = await connection.end(PATIENCE)
    if answer.status is not None:
        check(outcome, number, made, answer)  # what follows it is the answer to the rest of its bytes
    elif not ended:
        outcome.fault(number, made, f"no answer within {PATIENCE:g} s")
    else:
        outcome.lost += 1  # it hung up: a client that has half-closed is gone
        outcome.n_answered += 1
    connection.close()


async def status_of(worker: Worker, path: str, extra: Headers) -> int | None:
    """The status of a GET, or of an empty POST where that is not allowed."""
    for body in (None, b""):
        connection = await connect(worker.host, worker.port)
        answer = connection.begin()
        await connection.send(request(worker.authority, path, body, extra))
        await connection.end(30)
        connection.close()
        if answer.status != 405:
            break
    return answer.status


async def run(args: argparse.Namespace) -> int:
    """All of it; the exit code."""
    if args.url is not None:
        url = urlsplit(args.url)
        worker = Worker(url.hostname or "127.0.0.1", url.port or 80, args.pid, args.api_key)
    else:
        command = [sys.executable, "-m", "worker_orcd", "serve", "--model", args.model, "--device", args.device]
        worker = await Worker.start([*command, "--port", "0", "--log-format", "json", *args.serve])
    extra = {} if args.api_key is None else {"Authorization": f"Bearer {args.api_key}"}
    outcome = Outcome()
    try:
        known = {t.path: await status_of(worker, t.path, extra) for t in TARGETS if t.path != "/shutdown"}
        outcome.has_v1 = known["/v1/models"] == 200
        targets = tuple(t for t in TARGETS if known.get(t.path, 405) != 404)
        numbers = [args.only] if args.only is not None else list(range(args.number))

        def make(number: int) -> Spoiled:
            return spoiled(args.seed, number, targets)

        if args.only is not None:
            print(make(args.only).data(worker.authority, extra)[:3000])
        began, warm, before = time.monotonic(), int(WARM_SHARE * len(numbers)), None
        for part in (numbers[:warm], numbers[warm:]):
            left = deque(part)
            async with asyncio.TaskGroup() as tasks:
                for _ in range(args.connections):
                    tasks.create_task(send_in_turn(worker, left, make, outcome, extra))
            before = before or (sample(worker.pid) if worker.pid is not None else None)
        seconds = time.monotonic() - began
        wrong = [f"{outcome.n_faults} answers were wrong", *outcome.faults] if outcome.n_faults else []
        if outcome.n_answered + outcome.lost < len(numbers):
            wrong.append(f"{len(numbers) - outcome.n_answered} requests have no answer")
        if outcome.ended:
            wrong.append(f"{outcome.ended[0]}; the latest requests: {list(outcome.latest)}")
        elif (status := await status_of(worker, "/health", extra)) != 200:
            wrong.append(f"/health answers {status}")
        after = None if worker.pid is None else sample(worker.pid)
        grown = None if before is None or after is None else (after.anon_kib - before.anon_kib) / 1024
        if grown is not None and grown > MEMORY_MIB:
            wrong.append(f"the worker has {grown:.0f} MiB more than after the first {warm} requests")
        if worker.pid is not None and after is None:
            wrong.append("the worker is gone")
        ended = await worker.stop()
        if ended is not None and ended[0] != 0:
            wrong.append(f"exit code {ended[0]}")
        await asyncio.sleep(0.2)
        wrong += [f"log: {fault}" for fault in (worker.log.faults[:10] if worker.log is not None else ())]
    finally:
        await worker.kill()
    routes = ", ".join(t.path for t in targets)
    print(f"{len(numbers)} requests in {seconds:.1f} s to {routes}")
    print(f"statuses {dict(sorted(outcome.statuses.items()))}, hung up on {outcome.lost}, memory +{grown or 0:.1f} MiB")
    print("\n".join(["wrong:", *(f"  {w}" for w in wrong)] if wrong else ["Nothing was wrong."]))
    return 1 if wrong else 0


def main(argv: list[str] | None = None) -> int:
    """The program; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("number", type=int, nargs="?", default=1000, help="requests")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--model", help="start a worker with this file")
    where.add_argument("--url", help="a worker that runs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--serve", action="append", default=[], metavar="ARG", help="one more argument of its serve")
    parser.add_argument("--pid", type=int, help="process of a worker that runs, to watch its memory")
    parser.add_argument("--api-key", default=os.environ.get("WORKER_ORCD_API_KEY"))
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="N", help="send the request of this number alone")
    return run_to_end(run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
