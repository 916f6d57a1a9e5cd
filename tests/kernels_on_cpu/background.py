"""Processes in the background: a few at a time, in the time that everybody else leaves the processor."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

Done = subprocess.CompletedProcess[str]
#: runs a command as leader of a group of its own
IN_IDLE_TIME = Path(__file__).resolve().parents[2] / "tools" / "in_idle_time.sh"
#: seconds that a process may take, most of which it may have to wait
LIMIT_SEC = 1800


class Background:
    """Builds the kernels for the CPU, then runs commands, two at a time, from now on until `close`.

    Args:
        commands: name -> command and its environment. The slowest should come first.
    """

    def __init__(self, commands: Mapping[object, tuple[list[str], dict[str, str]]]) -> None:
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[str]] = set()
        self._closed = False
        self._pool = ThreadPoolExecutor(2)
        build = [sys.executable, str(Path(__file__).with_name("build.py"))]
        self._built = self._pool.submit(self._run, build, dict(os.environ))
        self._runs: dict[object, Future[Done]] = {
            name: self._pool.submit(self._after_build, *how) for name, how in commands.items()
        }

    def result(self, name: object) -> Done:
        """What has come of a command. Waits for its end.

        Raises:
            RuntimeError: the kernels cannot be built; says what the compiler did.
            subprocess.TimeoutExpired: it took longer than `LIMIT_SEC`.
        """
        return self._runs[name].result()

    def close(self) -> None:
        """End what still runs."""
        with self._lock:
            self._closed = True
            for process in self._processes:
                _end(process)
        self._pool.shutdown(cancel_futures=True)

    def _after_build(self, command: list[str], environment: dict[str, str]) -> Done:
        built = self._built.result()
        if built.returncode:
            raise RuntimeError(built.stderr)
        return self._run(command, environment)

    def _run(self, command: list[str], environment: dict[str, str]) -> Done:
        with self._lock:
            if self._closed:
                raise RuntimeError("it was closed")
            process = subprocess.Popen(
                [str(IN_IDLE_TIME), *command],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            self._processes.add(process)
        try:
            out, err = process.communicate(timeout=LIMIT_SEC)
        finally:
            with self._lock:
                self._processes.discard(process)
            if process.poll() is None:
                _end(process)
                process.wait()
        return subprocess.CompletedProcess(command, process.returncode, out, err)


def _end(process: subprocess.Popen[str]) -> None:
    """End a process and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
