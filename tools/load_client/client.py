"""Client: one of the many, which does one thing after another; and Shared, what all of them know and count."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field

from load_client import cases
from load_client.behaviours import ABUSIVE, NORMAL, Behaviour
from load_client.broken import shape_fault
from load_client.routes import EXECUTE, LIKE_EXECUTE, Case, Reading, Result, Route
from load_client.watch import Worker
from load_client.wire import Answer, Connection, connect, request

#: faults that are told one by one; all are counted
MAX_TOLD = 60
#: seconds until a client that was told 429 asks again, at most, and how often it does
RETRY_SEC, RETRIES = 1.0, 60
#: clients that ask for known answers at once
AT_ONCE = 8
CORRELATION = "X-Correlation-Id"


@dataclass
class Counts:
    """What happened.

    Attributes:
        done: behaviours that were gone through, by name.
        latencies: milliseconds, by what was waited for.
    """

    done: Counter[str] = field(default_factory=Counter)
    checked: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    latencies: dict[str, list[float]] = field(default_factory=dict)
    pieces: int = 0
    tokens: int = 0
    jobs: list[int] = field(default_factory=lambda: [0])
    faults: Counter[str] = field(default_factory=Counter)
    told: list[str] = field(default_factory=list)

    def note(self, what: str, kind: str = "wrong answer") -> None:
        """Count a fault, and tell it where not too many were told."""
        self.faults[kind] += 1
        if len(self.told) < MAX_TOLD:
            self.told.append(f"{kind}: {what}")

    def latency(self, kind: str, ms: float) -> None:
        """Count a time."""
        self.latencies.setdefault(kind, []).append(ms)


@dataclass
class Shared:
    """What all clients share.

    Attributes:
        routes: those that the worker has.
        expected: what each route answered to each case alone.
        chars_per_token: of prompts made of `cases.WORDS`.
    """

    worker: Worker
    routes: list[Route]
    repeated: list[Case]
    long: list[Case]
    prefill_tokens: int
    patience: float
    abusive: float
    counts: Counts = field(default_factory=Counts)
    expected: dict[tuple[str, Case], Result] = field(default_factory=dict)
    chars_per_token: float = 4.0


@dataclass
class Job:
    """One job that a client has asked for, and what has come of it."""

    id: str
    route: Route
    case: Case
    behaviour: str
    reading: Reading
    connection: Connection = field(default_factory=Connection)
    answer: Answer = field(default_factory=Answer)
    sent_at: float = 0.0
    first_at: float | None = None
    ended_at: float | None = None

    def feed(self, data: bytes) -> None:
        """Take a piece of the answer's body."""
        self.reading.feed(data)
        if self.first_at is None and self.reading.n_events:
            self.first_at = time.monotonic()
        if self.ended_at is None and self.reading.terminal is not None:
            self.ended_at = time.monotonic()


class Client:
    """One client of many.

    Args:
        number: tells it from the others; seeds what it draws.
    """

    def __init__(self, shared: Shared, number: int, seed: int) -> None:
        self.shared = shared
        self.worker = shared.worker
        self.patience = shared.patience
        self.rng = random.Random(f"{seed} {number}")
        self._name = f"{seed}-{number}"
        self._n_jobs = 0
        self._doing = ""
        self._kept: Connection | None = None

    async def work(self, until: float) -> None:
        """Do one thing after another until the time `until`."""
        while time.monotonic() < until:
            await self.do(self._choose())
        self.leave()

    def leave(self) -> None:
        """Close the connection that was kept for the next job."""
        if self._kept is not None:
            self._kept.close()

    def _choose(self) -> Behaviour:
        if self.rng.random() >= self.shared.abusive:
            return NORMAL
        return self.rng.choices(ABUSIVE, [b.weight for b in ABUSIVE])[0]

    async def do(self, behaviour: Behaviour) -> None:
        """Go through one behaviour; whatever goes wrong is noted."""
        self._doing = behaviour.name
        try:
            await behaviour.run(self)
        except (OSError, TimeoutError) as error:
            self.note(f"{type(error).__name__} {error}", "no connection")
            await asyncio.sleep(0.2)
        self.shared.counts.done[behaviour.name] += 1

    # -- what behaviours use

    def route(self) -> Route:
        """One of the worker's routes."""
        return self.rng.choices(self.shared.routes, [r.weight for r in self.shared.routes])[0]

    def long_case(self) -> Case:
        """A case with a long answer."""
        return self.rng.choice(self.shared.long)

    def fresh_case(self) -> Case:
        """A long prompt that nobody has sent before."""
        return cases.fresh(self.rng, self.shared.prefill_tokens, self.shared.chars_per_token)

    def job(self, route: Route | None = None, case: Case | None = None) -> Job:
        """A job that is not yet sent."""
        route = route or self.route()
        case = case or self.rng.choice(self.shared.repeated)
        self._n_jobs += 1
        job_id = f"load-{self._name}-{self._n_jobs}"
        self.shared.counts.jobs[0] += 1
        return Job(job_id, route, case, self._doing, route.reading(job_id, route.n))

    async def connect(self, receive_buffer: int | None = None) -> Connection:
        """A new connection."""
        return await connect(self.worker.host, self.worker.port, receive_buffer)

    async def open(self, job: Job, receive_buffer: int | None = None, connection: Connection | None = None) -> None:
        """Give a job a connection, and expect its answer."""
        job.connection = connection or await self.connect(receive_buffer)
        job.answer = job.connection.begin(job.feed)
        job.sent_at = time.monotonic()

    def headers(self) -> dict[str, str]:
        """Those of every request."""
        key = self.worker.api_key
        return {} if key is None else {"Authorization": f"Bearer {key}"}

    def bytes_of(self, job: Job, headers: dict[str, str] | None = None) -> bytes:
        """The request of a job; its correlation id is its id."""
        more = {CORRELATION: job.id, **self.headers(), **(headers or {})}
        return request(self.worker.authority, job.route.path, job.route.ask(job.case, job.id), more)

    async def run(self, job: Job) -> None:
        """Ask and read to the end; ask again where the queue is full."""
        for _ in range(RETRIES):
            kept, self._kept = self._kept, None
            await self.open(job, connection=None if kept is None or kept.lost else kept)
            await job.connection.send(self.bytes_of(job))
            if not await job.connection.end(self.patience):
                self.fault(job, f"no end after {self.patience:g} s", "lost end")
                job.connection.reset()
                return
            if kept is job.connection and job.answer.status is None:
                continue  # it was closed for having been idle while the request was on its way
            if job.answer.status != 429:
                break
            self.refused(job)
            job.connection.close()
            await asyncio.sleep(min(RETRY_SEC, float(job.answer.headers["retry-after"])) * self.rng.uniform(0.1, 1))
            job.reading = job.route.reading(job.id, job.route.n)
        else:
            self.fault(job, f"refused {RETRIES} times")
            return
        await self.finish(job)
        if job.first_at is not None:
            self.shared.counts.latency("first text", 1e3 * (job.first_at - job.sent_at))
        if self.rng.random() < 0.5 and not job.connection.lost:
            self._kept = job.connection

    async def finish(self, job: Job) -> None:
        """Read an answer to its end and compare it with the expected one."""
        if not await job.connection.end(self.patience):
            self.fault(job, f"no end after {self.patience:g} s", "lost end")
            job.connection.reset()
        elif not self.refused(job):
            self._check_whole(job)
        if job.connection is not self._kept and job.behaviour != "normal":
            job.connection.close()

    async def cancel(self, job: Job) -> str | None:
        """POST /cancel; the state that it tells."""
        connection = await self.connect()
        answer = connection.begin()
        body = b'{"job_id":"%s"}' % job.id.encode()
        await connection.send(request(self.worker.authority, "/cancel", body, self.headers()))
        await connection.end(self.patience)
        connection.close()
        if answer.status != 202:
            self.fault(job, f"/cancel answers {answer.status}: {bytes(answer.body[:100])!r}")
            return None
        state: str = answer.json()["state"]
        return state

    def left(self, job: Job, kind: str) -> None:
        """The client is about to leave while its job may run."""
        if self.worker.log is not None and not job.connection.over:
            self.worker.log.left(job.id, kind, time.time())

    def latency(self, kind: str, ms: float) -> None:
        """Count a time."""
        self.shared.counts.latency(kind, ms)

    # -- what is wrong

    def note(self, what: str, kind: str = "wrong answer") -> None:
        """Note a fault that belongs to no job."""
        self.shared.counts.note(f"{what} [{self._doing}]", kind)

    def fault(self, job: Job, what: str, kind: str = "wrong answer") -> None:
        """Note a fault of a job."""
        self.shared.counts.note(f"{what} [{job.behaviour}, {job.route.name}, {job.id}]", kind)

    def refused(self, job: Job) -> bool:
        """Whether a job was refused: because the queue is full, which may be, or for no good reason, which is noted."""
        answer = job.answer
        if answer.status is None or answer.status == 200:
            return False
        if not answer.done:
            return True
        self.shared.counts.refusals[str(answer.status)] += 1
        if answer.status == 429:
            self.check_refusal(job.route.path, answer, (429,), "a full queue")
            if not answer.headers.get("retry-after", "").isdigit():
                self.fault(job, "429 without Retry-After")
        else:
            self.fault(job, f"status {answer.status}: {bytes(answer.body[:160])!r}")
        return True

    def check_refusal(self, path: str | None, answer: Answer, statuses: tuple[int, ...], what: str) -> None:
        """Check how a bad request was refused."""
        assert answer.status is not None
        if answer.status not in statuses:
            self.note(f"{what} on {path or 'no route'} is answered {answer.status}: {bytes(answer.body[:120])!r}")
            return
        body = bytes(answer.body)
        if fault := shape_fault(path, answer.status, answer.headers.get("content-type", ""), body):
            self.note(f"{what}: {fault}")
        if CORRELATION.lower() not in answer.headers:
            self.note(f"{what}: {answer.status} without a correlation id")

    def check_cut(self, job: Job, codes: set[str], may_be_silent: bool = False) -> None:
        """Check a stream that was ended before its time: one terminal event, one of `codes` or the regular end, and of
        the text what would have come."""
        reading = job.reading
        if not job.route.streamed or job.answer.status != 200:
            return
        if reading.terminal == "end":
            self._check_whole(job)
            return
        if reading.terminal == "error" and reading.code not in codes:
            self.fault(job, f"ended by {reading.code}, not by {' or '.join(sorted(codes))}")
        elif reading.terminal is None and not may_be_silent:
            self.fault(job, f"no terminal event ({job.connection.fault or 'it was cut'})", "lost end")
        for fault in reading.faults:
            self.fault(job, fault)
        expected = self.shared.expected.get((job.route.name, job.case))
        if expected is not None:
            for text, whole in zip(reading.texts, expected[0], strict=True):
                if not whole.startswith(text):
                    self.fault(job, f"{text[-60:]!r} is no beginning of {whole[:80]!r}", "wrong text")
        self.shared.counts.checked["cut"] += 1
        self.shared.counts.pieces += reading.n_events

    def _check_whole(self, job: Job) -> None:
        reading = job.reading
        if job.connection.fault is not None or not job.answer.done:
            self.fault(job, f"the answer is not whole: {job.connection.fault or 'it was cut'}", "lost end")
            return
        reading.ended()
        for fault in reading.faults:
            self.fault(job, fault)
        if reading.terminal == "error":
            self.fault(job, f"ended by {reading.code}")
            return
        expected = self.shared.expected.get((job.route.name, job.case))
        if expected is not None and reading.result() != expected:
            self.fault(job, f"{shown(reading.result())} where alone it was {shown(expected)}", "wrong text")
        self.shared.counts.checked["whole"] += 1
        self.shared.counts.pieces += reading.n_events
        self.shared.counts.tokens += reading.tokens[1] or 0


def shown(result: Result) -> str:
    """A result, short."""
    return repr(result)[-160:]


async def take_expected(shared: Shared, again: bool = False) -> None:
    """Ask each route for each case; `again`: compare with the first time.

    What /execute answers comes first, one job after another and nothing beside it. The other routes follow with a few
    jobs at once, or a run would long be busy with these. Streamed and not, a route answers the same, and completions
    what /execute does.
    """
    texts: dict[tuple[str, Case], Result] = {}
    cases_of = [*shared.repeated, *shared.long]
    alone = [] if again else [(EXECUTE, case) for case in cases_of]
    others = [(route, case) for route in shared.routes for case in cases_of if again or route is not EXECUTE]
    for todo, n_clients in ((alone, 1), (others, AT_ONCE)):
        todo.reverse()
        await asyncio.gather(*(_take(shared, n, again, todo, texts) for n in range(n_clients)))


async def _take(
    shared: Shared, number: int, again: bool, todo: list[tuple[Route, Case]], texts: dict[tuple[str, Case], Result]
) -> None:
    """One client's part of it: takes its jobs from the end of `todo`."""
    client = Client(shared, -100 - number - (AT_ONCE if again else 0), 0)
    client._doing = "again" if again else "for the first time"
    while todo:
        route, case = todo.pop()
        job = client.job(route, case)
        await client.run(job)
        if job.reading.terminal != "end":
            client.fault(job, f"no answer: {job.answer.status} {bytes(job.answer.body[:120])!r} {job.reading.code}")
        elif not again:
            shared.expected[route.name, case] = job.reading.result()
        text = job.reading.result()
        kin = "execute" if route.name in LIKE_EXECUTE else route.name.partition(",")[0]
        if route.n == 1 and texts.setdefault((kin, case), text) != text:
            client.fault(job, f"{shown(text)}, elsewhere {shown(texts[kin, case])}", "wrong text")
    client.leave()
