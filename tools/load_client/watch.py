"""The worker that is watched: its process, its log, its memory, descriptors and threads, and its answers to probes.

A worker that the tool starts is watched whole. Of one that runs elsewhere, only what HTTP shows is known, and with its
process id what /proc shows.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections import Counter, deque
from collections.abc import Coroutine
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")

#: seconds that a worker may take to load
START_SEC = 300.0
#: seconds between two looks at /proc
SAMPLE_SEC = 0.5
#: lines of the log that are told where a worker fails, and characters of each
LAST_LINES, LINE_CHARS = 12, 400
#: seconds for the end of a worker that answers no more
FAILED_SEC = 2.0
#: exit code of a program that was told to end, as shells say it of Ctrl-C
ENDED = 130

#: what measures how soon a path is answered, in a process of its own, so that the clients' work is not in the figures.
#: It prints "path status milliseconds" for each probe until its stdin ends.
PROBE = """
import http.client, select, sys, time
host, port, key, gap, *paths = sys.argv[1:]
headers = {"Authorization": "Bearer " + key} if key else {}
while not select.select([sys.stdin], [], [], float(gap))[0]:
    for path in paths:
        began = time.perf_counter()
        try:
            c = http.client.HTTPConnection(host, int(port), timeout=10)
            c.request("GET", path, headers=headers)
            r = c.getresponse()
            r.read()
            status = r.status
            c.close()
        except OSError as error:
            status = type(error).__name__
        print(path, status, 1e3 * (time.perf_counter() - began), flush=True)
"""


@dataclass
class Sample:
    """What /proc shows of a worker, all its processes together."""

    rss_kib: int
    anon_kib: int
    threads: int
    descriptors: int


def family(pid: int) -> list[int]:
    """A process and its children."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            for child in task.read_text().split():
                found += family(int(child))
    return found


def sample(pid: int) -> Sample | None:
    """A look at a worker; None where it is gone."""
    total = Sample(0, 0, 0, 0)
    for each in family(pid):
        try:
            lines = Path(f"/proc/{each}/status").read_text().splitlines()
            descriptors = len(os.listdir(f"/proc/{each}/fd"))
        except OSError:
            if each == pid:
                return None
            continue  # a child that has just ended
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        rss = int(fields.get("VmRSS", "0").split()[0])
        total.rss_kib += rss
        total.anon_kib += int(fields["RssAnon"].split()[0]) if "RssAnon" in fields else rss
        total.threads += int(fields["Threads"])
        total.descriptors += descriptors
    return total


@dataclass
class Left:
    """A client that left, and whether its job has."""

    kind: str
    at: float
    prompt_tokens: int = 0


@dataclass
class Log:
    """What the worker's log says of jobs, by correlation id, and what it should not say.

    Attributes:
        gone_ms: by kind of leaving, milliseconds until `execute_end` of those jobs that still ran.
        outcomes: how jobs ended.
        faults: lines of level error, and what is no event.
        last: the last lines.
    """

    gone_ms: dict[str, list[float]] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    last: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))
    events: dict[str, dict[str, Any]] = field(default_factory=dict)
    _left: dict[str, Left] = field(default_factory=dict)
    _running: dict[str, int] = field(default_factory=dict)
    _over: set[str] = field(default_factory=set)
    _seen: dict[str, asyncio.Event] = field(default_factory=dict)

    def left(self, correlation_id: str, kind: str, at: float) -> None:
        """The client of a job has left at the time `at` (of time.time())."""
        if correlation_id not in self._over:
            self._left[correlation_id] = Left(kind, at)

    def line(self, raw: bytes) -> None:
        """Take a line."""
        self.last.append(raw.decode("utf-8", "replace").strip()[:LINE_CHARS])
        try:
            entry = json.loads(raw)
            event, level = entry["event"], entry["level"]
        except (ValueError, KeyError, TypeError):
            self.faults.append(f"no event: {raw[:200].decode('utf-8', 'replace').strip()}")
            return
        if event not in self.events:
            self.events[event] = entry
            self.seen(event).set()
        if level == "error":
            self.faults.append(f"{event} {entry.get('code')}: {entry.get('message')}")
        correlation_id = entry.get("correlation_id")
        if event == "execute_start":
            self._running[correlation_id] = self._running.get(correlation_id, 0) + 1
        elif event == "execute_end":
            self._ended(correlation_id, entry)

    def _ended(self, correlation_id: str, entry: dict[str, Any]) -> None:
        left_over = self._running.get(correlation_id, 0) - 1
        if left_over < 0:
            self.faults.append(f"execute_end without execute_start: {correlation_id}")
        elif left_over:
            self._running[correlation_id] = left_over
        else:
            del self._running[correlation_id]
        outcome = str(entry.get("code") or entry.get("outcome"))
        self.outcomes[outcome] += 1
        self._over.add(correlation_id)
        left = self._left.pop(correlation_id, None)
        if left is not None and entry.get("outcome") == "disconnected":
            ms = 1e3 * (datetime.fromisoformat(entry["ts"]).timestamp() - left.at)
            self.gone_ms.setdefault(left.kind, []).append(max(ms, 0.0))

    def seen(self, event: str) -> asyncio.Event:
        """Set once an event of this name was logged."""
        return self._seen.setdefault(event, asyncio.Event())

    @property
    def running(self) -> list[str]:
        """Correlation ids of jobs whose end is not logged."""
        return list(self._running)


class Worker:
    """A running worker.

    Attributes:
        pid: of its first process, None where it is not known.
        log: None where it was not started here.
        samples: (seconds, jobs so far, what /proc showed).
    """

    def __init__(self, host: str, port: int, pid: int | None = None, api_key: str | None = None) -> None:
        self.host, self.port, self.pid, self.api_key = host, port, pid, api_key
        self.log: Log | None = None
        self.samples: list[tuple[float, int, Sample]] = []
        self.probes: dict[str, list[tuple[str, float]]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._watches = True
        self._tasks: list[asyncio.Task[None]] = []
        self._prober: asyncio.subprocess.Process | None = None

    @property
    def authority(self) -> str:
        """HOST:PORT."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def exit_code(self) -> int | None:
        """That of a worker that was started here and has ended, else None."""
        return None if self._process is None else self._process.returncode

    @classmethod
    async def start(cls, command: list[str], api_key: str | None = None, until: str = "ready") -> Worker:
        """Start a worker and wait for the event `until` of its log.

        Raises:
            RuntimeError: it ended before, or took more than `START_SEC`.
        """
        process = await asyncio.create_subprocess_exec(
            *command,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            limit=1 << 20,
            start_new_session=True,
        )
        log = Log()
        assert process.stderr is not None
        reading = asyncio.create_task(_read(process.stderr, log))
        seen = asyncio.create_task(log.seen(until).wait())
        try:
            await asyncio.wait((reading, seen), timeout=START_SEC, return_when=asyncio.FIRST_COMPLETED)
            if not seen.done():
                raise RuntimeError(f"the worker's log has no {until!r}: " + "; ".join(log.faults[:3]))
        except BaseException:
            seen.cancel()
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
            raise
        worker = cls("127.0.0.1", log.events["startup"]["port"], process.pid, api_key)
        worker.log, worker._process = log, process
        worker._tasks.append(reading)
        return worker

    def watch(self, jobs: list[int], began: float) -> None:
        """Begin to look at /proc; `jobs[0]` is the number of jobs so far."""

        async def look() -> None:
            while self._watches and self.pid is not None and (seen := sample(self.pid)) is not None:
                self.samples.append((asyncio.get_running_loop().time() - began, jobs[0], seen))
                await asyncio.sleep(SAMPLE_SEC)

        self._tasks.append(asyncio.create_task(look()))

    async def probe(self, paths: list[str], gap: float = 0.05) -> None:
        """Begin to ask for `paths`, all of them every `gap` seconds, from a process of its own."""
        arguments = [self.host, str(self.port), self.api_key or "", str(gap), *paths]
        self._prober = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-c", PROBE, *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us; it ends when its stdin does
        )

        async def take(prober: asyncio.subprocess.Process) -> None:
            assert prober.stdout is not None
            async for line in prober.stdout:
                path, status, ms = line.decode().split()
                self.probes.setdefault(path, []).append((status, float(ms)))

        self._tasks.append(asyncio.create_task(take(self._prober)))

    async def stop_watching(self) -> None:
        """Ask no more, and look no more."""
        self._watches = False
        if self._prober is not None and self._prober.stdin is not None:
            self._prober.stdin.close()
            await self._prober.wait()

    async def stop(self, group: bool = False) -> tuple[int, float] | None:
        """End a worker that was started here with SIGTERM: (exit code, seconds). None where it was not.

        Args:
            group: every process of it gets the signal, not only the first.
        """
        if self._process is None:
            return None
        began = asyncio.get_running_loop().time()
        if self._process.returncode is None:
            (os.killpg if group else os.kill)(self._process.pid, signal.SIGTERM)
        try:
            code = await asyncio.wait_for(self._process.wait(), 20)
        except TimeoutError:
            os.killpg(self._process.pid, signal.SIGKILL)
            code = await self._process.wait()
        return code, asyncio.get_running_loop().time() - began

    async def last_words(self) -> str:
        """How a worker that was started here and answers no more has ended, and what its log says last."""
        if self._process is None or self.log is None:
            return ""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), FAILED_SEC)
        ended = "it still runs" if self.exit_code is None else f"it ended with {self.exit_code}"
        return "\n".join([f"the worker: {ended}; its log ends with", *(f"  {line}" for line in self.log.last)])

    async def kill(self) -> None:
        """Leave nothing behind, whatever happened."""
        for task in self._tasks:
            task.cancel()
        for process in (self._process, self._prober):
            if process is not None and process.returncode is None:
                try:
                    process.kill() if process is self._prober else os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                await process.wait()  # while there is a loop that its pipes can be closed in


def run_to_end(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a program; SIGTERM ends it as Ctrl-C does, so that it leaves no worker behind.

    Raises:
        SystemExit: it was told to end before its time.
    """

    async def guarded() -> Result:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await work

    try:
        return asyncio.run(guarded())
    except (asyncio.CancelledError, KeyboardInterrupt):
        print("told to end before its time", file=sys.stderr)
        raise SystemExit(ENDED) from None


async def _read(stream: asyncio.StreamReader, log: Log) -> None:
    async for line in stream:
        log.line(line)
