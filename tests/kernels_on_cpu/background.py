"""Commands in the background: a few at a time, in the time that everybody else leaves the processor.

They are started by a process of its own (this file, run as a program), so that tests that count their process's open
files, threads and children find what they would find without it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

Done = subprocess.CompletedProcess[str]
#: runs a command as leader of a group of its own
IN_IDLE_TIME = Path(__file__).resolve().parents[2] / "tools" / "in_idle_time.sh"
#: seconds that a command may take, most of which it may have to wait
LIMIT_SEC = 1800


class Background:
    """Builds the kernels for the CPU, then runs commands, two at a time, from now on until `close`.

    Args:
        commands: name -> command and its environment. The slowest should come first.
    """

    def __init__(self, commands: Mapping[object, tuple[list[str], dict[str, str]]]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="on-cpu-")
        self._numbers = {name: n for n, name in enumerate(commands)}
        folder = Path(self._folder.name)
        (folder / "commands.json").write_text(json.dumps(list(commands.values())))
        with (folder / "log").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, folder], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def result(self, name: object) -> Done:
        """What has come of a command. Waits for its end.

        Raises:
            RuntimeError: it was not run: the kernels cannot be built, or it took longer than `LIMIT_SEC`; says why.
        """
        folder = Path(self._folder.name)
        file = folder / f"{self._numbers[name]}.json"
        while not file.exists():
            if self._process.poll() is not None and not file.exists():
                raise RuntimeError((folder / "log").read_text())
            time.sleep(0.05)
        said = json.loads(file.read_text())
        if "error" in said:
            raise RuntimeError(said["error"])
        return subprocess.CompletedProcess(**said)

    def close(self) -> None:
        """End what still runs."""
        self._process.terminate()
        self._process.wait()
        self._folder.cleanup()


class _Runs:
    """The commands, in the process that starts them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[str]] = set()
        self._closed = False

    def run(self, command: list[str], environment: dict[str, str]) -> Done:
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

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for process in self._processes:
                _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """End a process and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def main(folder: Path) -> None:
    """Run the commands of `commands.json`, and leave in a file each what has come of them."""
    runs = _Runs()

    def run(n: int, command: list[str], environment: dict[str, str]) -> None:
        try:
            said = vars(runs.run(command, environment))
        except Exception as error:
            said = {"error": repr(error)}
        part = folder / f"{n}.part"
        part.write_text(json.dumps(said))
        part.rename(folder / f"{n}.json")

    def end(*_: object) -> None:
        sys.exit(1)

    signal.signal(signal.SIGTERM, end)
    built = runs.run([sys.executable, str(Path(__file__).with_name("build.py"))], dict(os.environ))
    if built.returncode:
        sys.exit(built.stdout + built.stderr)
    commands = json.loads((folder / "commands.json").read_text())
    with ThreadPoolExecutor(2) as pool:
        try:
            for done in [pool.submit(run, n, *how) for n, how in enumerate(commands)]:
                done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            runs.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
