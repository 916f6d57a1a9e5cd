"""Text for a stream that nobody may be reading: never waited for, in order, whole lines, what is lost is counted."""

from __future__ import annotations

import io
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from worker_orcd.observe import unblocked
from worker_orcd.observe.unblocked import UnblockedText, UnblockedWriter

pytestmark = pytest.mark.timeout(30)

MODES = pytest.mark.parametrize("mode", ["thread", "direct", "no thread to be had"])


class Pipe:
    """A pipe, its writer, and a reader that begins when it is told to."""

    def __init__(self, mode, monkeypatch):
        self.read_fd, self.write_fd = os.pipe()
        self.writer = UnblockedWriter(self.write_fd, lambda n: f"lost {n}\n")
        if mode == "thread":
            self.writer.start()
        elif mode != "direct":
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", refuse)
                self.writer.start()
        self.got = b""

    def read(self, until):
        """What was written until `until` has come."""
        os.set_blocking(self.read_fd, False)
        end = time.monotonic() + 10
        while until.encode() not in self.got and time.monotonic() < end:
            with suppress(BlockingIOError):
                self.got += os.read(self.read_fd, 1 << 16)
            self.writer.flush(0.001)
        assert until.encode() in self.got, self.got[-200:]
        return self.got.decode()


def refuse(thread):
    raise RuntimeError("can't start new thread")


@pytest.fixture
def pipe(mode, monkeypatch):
    made = Pipe(mode, monkeypatch)
    yield made
    os.close(made.read_fd)
    made.writer.flush(1)
    os.close(made.write_fd)


@MODES
def test_what_is_read_comes_whole_and_in_order(pipe, mode):
    long = "x" * 50_000
    pipe.writer.put(f"{long}\n")
    for n in range(3000):
        pipe.writer.put(f"line {n}\n")
        if n % 500 == 499:
            pipe.read(f"line {n}\n")
    assert pipe.read("line 2999\n") == f"{long}\n" + "".join(f"line {n}\n" for n in range(3000))
    assert pipe.writer.flush(5) is True


@MODES
def test_nobody_reads_nothing_waits_and_the_lost_lines_are_counted_in_their_place(pipe, mode):
    n_lines = 0

    def put(n):
        nonlocal n_lines
        for _ in range(n):
            pipe.writer.put(f"line {n_lines}\n")
            n_lines += 1

    began = time.monotonic()
    while pipe.writer.flush(0.1):  # until the pipe is full
        put(500)
    assert time.monotonic() - began < 10
    began = time.monotonic()
    put(5 * unblocked.MAX_WAITING)
    assert pipe.writer.flush(0.1) is False
    assert time.monotonic() - began < 2
    pipe.read("lost")
    put(10)
    text = pipe.read(f"line {n_lines - 1}\n")
    expected = 0
    for line in text.splitlines():
        if lost := re.fullmatch(r"lost (\d+)", line):
            expected += int(lost[1])
        else:
            assert line == f"line {expected}"
            expected += 1
    assert expected == n_lines and text.count("lost") == 1
    assert 3 * unblocked.MAX_WAITING < expected - text.count("line") < 5 * unblocked.MAX_WAITING, (
        "the queue has a bound"
    )


@MODES
def test_threads_do_not_mix_their_lines(pipe, mode):
    def work(name):
        for n in range(100):
            pipe.writer.put(f"{name} {n} {name * 50}\n")

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcdefgh"]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    pipe.writer.put("end\n")
    lines = pipe.read("end\n").splitlines()
    for name in "abcdefgh":
        assert [line for line in lines if line[0] == name and line != "end"] == [
            f"{name} {n} {name * 50}" for n in range(100)
        ]


@MODES
def test_a_signal_handler_may_come_at_any_moment(pipe, mode):
    """It writes while its own thread is inside `put`: nothing hangs, nothing is lost."""
    numbers, handled = itertools.count(), []

    def handler(number, frame):
        n = next(numbers)
        pipe.writer.put(f"signal {n}\n")
        handled.append(f"signal {n}")

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
    try:
        for n in range(2000):
            pipe.writer.put(f"line {n}\n")
            if n % 100 == 99:
                pipe.read(f"line {n}\n")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    pipe.writer.put("end\n")
    lines = pipe.read("end\n").splitlines()
    assert [line for line in lines if line.startswith("line")] == [f"line {n}" for n in range(2000)]
    assert sorted(line for line in lines if line.startswith("signal")) == sorted(handled)
    assert len(handled) > 10


@MODES
def test_a_reader_that_goes_and_a_descriptor_that_is_closed_are_no_error(mode, monkeypatch):
    pipe = Pipe(mode, monkeypatch)
    os.close(pipe.read_fd)
    for n in range(2 * unblocked.MAX_WAITING):
        pipe.writer.put(f"line {n}\n")
    assert pipe.writer.flush(5)
    os.close(pipe.write_fd)
    pipe.writer.put("line\n")
    assert pipe.writer.flush(5)


@MODES
def test_a_descriptor_that_another_process_made_non_blocking(pipe, mode):
    os.set_blocking(pipe.write_fd, False)
    for n in range(12_000):
        pipe.writer.put(f"line {n}\n")
    assert "lost" in pipe.read("lost")


FORKED = """
import os, sys, threading
from worker_orcd.observe.unblocked import UnblockedWriter
writer = UnblockedWriter(1)
if sys.argv[1] == "thread":
    writer.start()
for n in range(20):
    writer.put(f"parent {n}\\n")
if sys.argv[2] == "locked":  # another thread is inside while this one forks
    for lock in (writer._lock, writer._writing):
        threading.Thread(target=lock.acquire, kwargs={"timeout": 1}).start()
else:
    writer.flush(5)
if os.fork() == 0:
    for n in range(20):
        writer.put(f"child {n}\\n")
    os._exit(0 if writer.flush(5) else 3)
print(os.waitstatus_to_exitcode(os.wait()[1]), file=sys.stderr)
os._exit(0)
"""


@pytest.mark.parametrize("mode", ["thread", "direct"])
@pytest.mark.parametrize("locks", ["free", "locked"])
def test_a_forked_child_begins_anew(mode, locks):
    done = subprocess.run(
        [sys.executable, "-c", FORKED, mode, locks], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.stderr == "0\n"
    child = [line for line in done.stdout.splitlines() if line.startswith("child")]
    assert child == [f"child {n}" for n in range(20)]
    if locks == "free":
        assert done.stdout.splitlines() == [f"parent {n}" for n in range(20)] + child


def test_print_and_traceback_go_through_it_as_lines():
    read_fd, write_fd = os.pipe()
    stream = UnblockedText(UnblockedWriter(write_fd), write_fd)
    print("one", 2, file=stream)
    print("no line end", end="", file=stream)
    assert os.read(read_fd, 100) == b"one 2\n"
    print("\nrest", end="", file=stream, flush=True)
    assert os.read(read_fd, 100) == b"no line end\nrest"
    stream.write("\udcff é\n")
    assert os.read(read_fd, 100) == b"\\udcff \xc3\xa9\n"
    assert stream.writable() and not stream.isatty() and stream.fileno() == write_fd and stream.encoding == "utf-8"
    assert isinstance(stream, io.TextIOBase)
    os.close(read_fd)
    os.close(write_fd)


STREAMS = """
import os, sys
from worker_orcd.observe.unblocked import open_closed_descriptors, unblock_standard_streams
open_closed_descriptors()
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
out, err = unblock_standard_streams()
print("to stdout")
print("to stderr", file=sys.stderr)
assert file > 2 and os.path.getsize(file) == 0
"""


@pytest.mark.parametrize("closed", ["", "2>&-", ">&-", "<&- >&- 2>&-"])
def test_no_file_takes_the_place_of_a_closed_stream(closed, tmp_path):
    command = f'"$0" -c "$1" "$2" {closed}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, STREAMS, str(tmp_path / "file")],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout == ("" if ">&-" in closed.replace("2>&-", "") else "to stdout\n")
    assert done.stderr == ("" if "2>&-" in closed else "to stderr\n")


def test_a_stream_that_was_closed_from_the_start_leads_nowhere(tmp_path):
    """What has its number by now is something else: here a file of the program."""
    code = """
import os, sys
assert sys.stderr is None and os.open(sys.argv[1], os.O_RDWR | os.O_CREAT) == 2
from worker_orcd.observe.unblocked import unblock_standard_streams
unblock_standard_streams()
print("a line", file=sys.stderr)
assert os.path.getsize(2) == 0
"""
    command = ["sh", "-c", '"$0" -c "$1" "$2" 2>&-', sys.executable, code, str(tmp_path / "file")]
    assert subprocess.run(command, timeout=20, check=False).returncode == 0
