"""How clients behave: the good one, and each way to be a bad one. Each is one coroutine and one row of a table."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from load_client.broken import BAD_BODIES, BAD_HTTP, OVERSIZE, Broken
from load_client.routes import EXECUTE

if TYPE_CHECKING:
    from load_client.client import Client, Job


async def normal(client: Client) -> None:
    """Ask, read to the end, on a connection that is kept or one of its own."""
    job = client.job()
    await client.run(job)


async def slow_sender(client: Client) -> None:
    """Send a request in pieces, over up to three seconds."""
    job = client.job()
    data = client.bytes_of(job)
    cuts = sorted(client.rng.sample(range(1, len(data)), 8))
    await client.open(job)
    for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        await job.connection.send(data[begin:end])
        await asyncio.sleep(client.rng.uniform(0, 0.3))
    await client.finish(job)


async def cancel(client: Client) -> None:
    """Cancel after some events, the same job several times."""
    await _cancel(client, client.job(EXECUTE, client.long_case()), client.rng.randint(0, 40))


async def cancel_prefill(client: Client) -> None:
    """Cancel while a long prompt is read."""
    await _cancel(client, client.job(EXECUTE, client.fresh_case()), 0, prefill=True)


async def _cancel(client: Client, job: Job, events: int, prefill: bool = False) -> None:
    if not await _begin(client, job, events):
        return
    kind = "cancel in prefill" if prefill and not job.reading.n_events else "cancel"
    began = time.monotonic()
    state = await client.cancel(job)
    if not await job.connection.end(client.patience):
        client.fault(job, "no end after a cancel")
    elif state == "cancelling" and job.ended_at is not None:
        client.latency(kind, 1e3 * (job.ended_at - began))
    client.check_cut(job, {"CANCELLED"} if state == "cancelling" else set())
    if client.rng.random() < 0.1 and (again := await client.cancel(job)) not in ("finished", "unknown"):
        client.fault(job, f"a job that has ended is {again!r} when it is cancelled")
    job.connection.close()


async def reset(client: Client) -> None:
    """Leave with RST after some events."""
    await _leave(client, "reset")


async def close(client: Client) -> None:
    """Leave with FIN after some events."""
    await _leave(client, "close")


async def reset_prefill(client: Client) -> None:
    """Leave with RST while a long prompt is read."""
    await _leave(client, "reset", prefill=True)


async def close_prefill(client: Client) -> None:
    """Leave with FIN while a long prompt is read."""
    await _leave(client, "close", prefill=True)


async def half_close(client: Client) -> None:
    """Close the sending half after some events: for the worker that client has gone."""
    await _leave(client, "half-close")


async def _leave(client: Client, how: str, prefill: bool = False) -> None:
    case = client.fresh_case() if prefill else client.long_case()
    job = client.job(case=case)
    if not await _begin(client, job, 0 if prefill else client.rng.randint(0, 40)):
        return
    client.left(job, f"{how} in prefill" if prefill and not job.reading.n_events else how)
    getattr(job.connection, how.replace("-", "_"))()
    if how == "half-close":
        if not await job.connection.end(client.patience):
            client.fault(job, "a half-closed stream goes on")
        client.check_cut(job, {"CANCELLED"}, may_be_silent=True)
        job.connection.close()


async def _begin(client: Client, job: Job, events: int) -> bool:
    """Send a job and wait for its first `events`; for none, a moment that lies in its prefill as a rule."""
    await client.open(job)
    await job.connection.send(client.bytes_of(job))
    if job.route.streamed:
        arrived = await job.connection.until(
            lambda: job.answer.status is not None and job.reading.n_events >= events, client.patience
        )
        if not arrived:
            client.fault(job, f"{events} events have not come")
            job.connection.reset()
            return False
    if events == 0:
        await asyncio.sleep(client.rng.uniform(0, 0.15 if job.case.max_tokens == 64 else 0.03))
    if client.refused(job):
        job.connection.close()
        return False
    return True


async def stalled(client: Client) -> None:
    """Stop to read for some seconds; then read the rest, which must be whole, or leave."""
    job = client.job(case=client.long_case())
    await client.open(job, receive_buffer=4096)
    await job.connection.send(client.bytes_of(job))
    await job.connection.until(lambda: job.reading.n_events >= 3, client.patience)
    job.connection.stall()
    await asyncio.sleep(client.rng.uniform(0.5, 4))
    if client.rng.random() < 0.5:
        job.connection.read_on()
        await client.finish(job)
    else:
        client.left(job, "reset of a stalled reader")
        job.connection.reset()


async def duplicate(client: Client) -> None:
    """Send the id of a running job again: a conflict, and the first goes on."""
    first = client.job(EXECUTE, client.long_case())
    await client.open(first)
    await first.connection.send(client.bytes_of(first))
    await first.connection.until(lambda: first.reading.n_events >= 1, client.patience)
    if client.refused(first):
        first.connection.close()
        return
    second = client.job(EXECUTE)
    second.id = second.reading.job_id = first.id
    await client.open(second)
    await second.connection.send(client.bytes_of(second))
    await second.connection.end(client.patience)
    if second.answer.status == 409:
        client.check_refusal(second.route.path, second.answer, (409,), "a duplicate id")
        second.connection.close()
    elif first.connection.over:
        await client.finish(second)
    elif not client.refused(second):
        client.fault(second, f"status {second.answer.status} for the id of a running job")
        second.connection.close()
    await client.finish(first)


async def deadline(client: Client) -> None:
    """Give a job less time than it takes."""
    job = client.job(case=client.long_case())
    at = int(1000 * (time.time() + client.rng.uniform(0.02, 0.3)))
    await client.open(job)
    await job.connection.send(client.bytes_of(job, {"X-Deadline": str(at)}))
    if not await job.connection.end(client.patience):
        client.fault(job, "no end at its deadline")
    elif job.answer.status == 504:
        client.check_refusal(job.route.path, job.answer, (504,), "a deadline that has passed")
    elif not client.refused(job):
        client.check_cut(job, {"INFERENCE_TIMEOUT"})
    job.connection.close()


async def idle(client: Client) -> None:
    """Connect, send nothing or a beginning, and go away later."""
    connection = await client.connect()
    connection.begin()
    await connection.send(client.rng.choice((b"", b"POST /exe", b"POST /execute HTTP/1.1\r\nHost: x\r\nContent-Le")))
    await asyncio.sleep(client.rng.uniform(0.2, 3))
    client.rng.choice((connection.reset, connection.close))()


async def malformed(client: Client) -> None:
    """Send what is no JSON of a job, or no HTTP."""
    await _broken(client, client.rng.choice(client.rng.choice((BAD_BODIES, BAD_HTTP))))


async def oversize(client: Client) -> None:
    """Send more than is taken."""
    await _broken(client, client.rng.choice(OVERSIZE))


async def _broken(client: Client, bad: Broken) -> None:
    path = client.route().path
    connection = await client.connect()
    answer = connection.begin()
    data = bad.data(client.worker.authority, path)
    if client.worker.api_key is not None:
        key = f"Authorization: Bearer {client.worker.api_key}\r\nContent-Type:".encode()
        data = data.replace(b"Content-Type:", key, 1)
    await connection.send(data)
    ended = await connection.end(client.patience)
    if not ended or (not answer.done and not bad.may_reset):
        client.note(f"{bad.name}: no answer on {path} ({connection.fault or 'it hung up or was silent'})")
    elif answer.done:
        # what is refused before the application sees it ends the connection, and may not be known to belong to a route
        early = answer.headers.get("connection") == "close" or "{path}" not in bad.head
        client.check_refusal(None if early else path, answer, bad.statuses, bad.name)
    connection.close()


@dataclass(frozen=True)
class Behaviour:
    """A way to be a client, and how often it is taken among its like."""

    name: str
    run: Callable[[Client], Awaitable[None]]
    weight: int


NORMAL = Behaviour("normal", normal, 1)
ABUSIVE = tuple(
    Behaviour(run.__name__.replace("_", " "), run, weight)
    for run, weight in (
        (cancel, 5),
        (cancel_prefill, 4),
        (reset, 4),
        (close, 3),
        (reset_prefill, 3),
        (close_prefill, 3),
        (half_close, 3),
        (stalled, 3),
        (slow_sender, 3),
        (duplicate, 2),
        (deadline, 2),
        (idle, 2),
        (malformed, 8),
        (oversize, 2),
    )
)
