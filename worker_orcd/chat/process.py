"""The process that renders chat templates, seen from this one: started apart from all that the caller has set up.

It is a Python of its own that takes nothing from this one but the folders of three packages: no environment but the
time zone and the loader's path, no working directory, no site, no user's modules in front of the standard library. So
a `json.py` beside the user's script, `PYTHONPATH`, `PYTHONSTARTUP`, a folder that was removed or a program that is no
Python and holds one do not reach it. What goes wrong with it is never the fault of who asked.
"""

from __future__ import annotations

import _thread
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import IO, Any, cast

from worker_orcd.errors import InternalError, escaped

#: wall-clock time of one answer, for a renderer that is starved
WALL_SECONDS = 20.0

#: modules are found here and in the standard library only, the library first
_PROGRAM = "import sys; sys.path += sys.argv[1:]; from worker_orcd.chat.renderer import main; main()"
#: a package, and a file that it has and a user's module of that name has not
_PACKAGES = (("jinja2", "sandbox.py"), ("markupsafe", "__init__.py"))
#: the folder that holds this package; looked up now, since a relative one means another folder later
_HOME = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
#: what may be needed to start a program at all, and the local time
_ENVIRONMENT = ("LD_LIBRARY_PATH", "TZ", "TZDIR")
#: signals that a template can bring about: processor time, and what an interpreter dies of
_OF_TEMPLATES = (signal.SIGPROF, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)


class Ended(Exception):
    """The process ended, and no template did that."""


def interpreters() -> Iterator[str]:
    """Paths of Python interpreters of this version, best first.

    `sys.executable` is not always one: it is empty or another program where Python is embedded or frozen.
    """
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    folders = dict.fromkeys(os.path.join(p, "bin") for p in (sys.prefix, sys.exec_prefix, sys.base_prefix))
    named = [] if getattr(sys, "frozen", False) else [sys.executable, getattr(sys, "_base_executable", None)]
    found = [*named, *(os.path.join(f, name) for f in folders for name in (version, "python3", "python"))]
    for path in dict.fromkeys(p for p in found if p):
        name = os.path.basename(path)
        if re.match(r"(python|pypy)[0-9.]*[a-z]*$", name) and os.path.isabs(path) and os.access(path, os.X_OK):
            yield path


def package_folders() -> list[str]:
    """The folders that hold the packages which a renderer imports, without the standard library's.

    A user's `jinja2.py` is no package, so it is passed over.
    """
    known = [_HOME, *(p for p in sys.path if os.path.isabs(p))]
    found = [next((f for f in known if os.path.isfile(os.path.join(f, n, has))), None) for n, has in _PACKAGES]
    return list(dict.fromkeys(f for f in [*found, _HOME] if f is not None))


class Process:
    """A running renderer.py. Used by one thread at a time.

    Args:
        cpu_seconds: the limit that it will be given, for messages.

    Raises:
        InternalError: none can be started.
    """

    def __init__(self, cpu_seconds: float) -> None:
        self._cpu_seconds = cpu_seconds
        self.owner = os.getpid()
        self._asked = False
        tried = []
        for python in interpreters():
            try:
                self._start(python)
                return
            except (OSError, Ended) as e:
                tried.append(f"{python}: {e}")
        reason = "; ".join(tried) or f"no Python interpreter is known (sys.executable is {sys.executable!r})"
        raise InternalError(f"the process that renders chat templates cannot be started: {escaped(reason)[:1000]}")

    def _start(self, python: str) -> None:
        self._process = subprocess.Popen(
            [python, "-I", "-S", "-X", "utf8", *(["-B"] * sys.dont_write_bytecode), "-c", _PROGRAM, *package_folders()],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, cwd="/",
            env={k: os.environ[k] for k in _ENVIRONMENT if k in os.environ},
        )  # fmt: skip
        # all are there: they were asked for
        pipes = self._stdin, self._stdout, self._stderr = cast(
            tuple[IO[bytes], IO[bytes], IO[bytes]], (self._process.stdin, self._process.stdout, self._process.stderr)
        )
        self._end = weakref.finalize(self, _end, self._process, pipes, self.owner)
        try:
            ready = self._answer()
        except EOFError:
            said = self._last_words()
            self._end()
            raise Ended(f"it ended with status {self._process.returncode} ({said[:300]})") from None
        if "ready" not in ready:
            self._end()
            raise Ended("it does not say what a renderer says")

    @property
    def alive(self) -> bool:
        """Whether it can be asked again."""
        return self._end.alive

    def ask(self, frame: dict[str, Any]) -> dict[str, Any]:
        """Send a frame and wait for its answer; `{"error": ...}` also where the template ended the process.

        Raises:
            Ended: something else did, or what it answers is no answer.
            TimeoutError: it gave none in time, and was ended.
        """
        if self._asked:  # an interrupt came (Ctrl-C), and the answer that comes next is to the question before
            self._end()
            raise Ended("its last answer was not waited for")
        self._asked = True
        body = json.dumps(frame, ensure_ascii=False).encode()
        try:
            self._stdin.write(len(body).to_bytes(4, "big") + body)
            self._stdin.flush()
            answer = self._answer()
            self._asked = False
            return answer
        except (EOFError, BrokenPipeError):
            self._end()
            status = -cast(int, self._process.returncode)
        if status == signal.SIGPROF:
            return {"error": f"needs more than {self._cpu_seconds:g} s of processor time"}
        if status in _OF_TEMPLATES:
            return {"error": f"made the process that renders it fail ({signal.Signals(status).name})"}
        raise Ended(f"it ended with status {-status}")

    def _last_words(self) -> str:
        os.set_blocking(self._stderr.fileno(), False)
        said = self._stderr.read(10_000) or b""
        return said.decode(errors="replace").strip().rpartition("\n")[2]

    def _answer(self) -> dict[str, Any]:
        deadline = time.monotonic() + WALL_SECONDS
        try:
            n_bytes = int.from_bytes(self._read(4, deadline), "big")
            answer: dict[str, Any] = json.loads(self._read(n_bytes, deadline))
            return answer
        except TimeoutError:
            self._end()
            raise TimeoutError(f"it gave no answer within {WALL_SECONDS:g} s") from None
        except ValueError:
            self._end()
            raise Ended("its answer is no JSON") from None

    def _read(self, n_bytes: int, deadline: float) -> bytes:
        fd, out = self._stdout.fileno(), bytearray()
        poll = select.poll()  # select() fails on file numbers from 1024 on, which a busy server has
        poll.register(fd, select.POLLIN)
        while len(out) < n_bytes:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            part = os.read(fd, n_bytes - len(out))
            if not part:
                raise EOFError
            out += part
        return bytes(out)


def start(cpu_seconds: float) -> Process:
    """A `Process`. The main thread has another one make it: Ctrl-C in `Popen` would lose the child and its pipes.

    Raises:
        InternalError: none can be started, or the system gives no thread.
    """
    if threading.current_thread() is not threading.main_thread():
        return Process(cpu_seconds)
    made: list[Process | Exception] = []
    done = threading.Lock()
    done.acquire()

    def make() -> None:
        try:
            made.append(Process(cpu_seconds))
        except Exception as e:
            made.append(e)
        finally:
            done.release()

    try:
        # one call of C; Thread.start waits in Python code, where an interrupt can turn into a RuntimeError of its lock
        _thread.start_new_thread(make, ())
    except RuntimeError:
        raise InternalError("the system gives no thread for starting the process that renders templates") from None
    done.acquire()
    if isinstance(made[0], Process):
        return made[0]
    raise made[0]


def _end(process: subprocess.Popen[bytes], pipes: tuple[IO[bytes], ...], owner: int) -> None:
    """Close the pipes and reap the process, in the process that started it only."""
    if os.getpid() != owner:
        return
    process.kill()
    for pipe in pipes:
        try:
            pipe.close()
        except OSError:  # what could not be flushed is of no use to a process that ended
            pass
    process.wait()
