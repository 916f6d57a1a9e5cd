"""Standard streams that are None, closed or half an object: asked, replaced, and never fatal to a model."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from worker_orcd import LLM, SamplingParams
from worker_orcd.diagnose import demo_model
from worker_orcd.runtime import streams
from worker_orcd.runtime.progress import LoadProgress


class WriteOnly:
    """What a program with windows may put in the place of a standard stream."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


class Gone(WriteOnly):
    """A stream whose window was closed."""

    def _raise(self, *_):
        raise RuntimeError("the window has been deleted")

    isatty = fileno = write = flush = _raise


class Terminal(io.StringIO):
    def isatty(self):
        return True


def closed_stream():
    stream = io.StringIO()
    stream.close()
    return stream


ODD = {"none": lambda: None, "closed": closed_stream, "write only": WriteOnly, "gone": Gone, "memory": io.StringIO}


@pytest.fixture(params=ODD)
def odd(request):
    return ODD[request.param]()


def test_what_is_a_terminal(odd):
    assert streams.is_terminal(odd) is False
    assert streams.is_terminal(Terminal()) is True
    parent, child = os.openpty()
    with os.fdopen(child, "w") as stream:
        assert streams.is_terminal(stream) is True and streams.file_number(stream) == child
    os.close(parent)


def test_the_number_of_a_stream(odd):
    assert streams.file_number(odd) is None


def test_usable_streams_can_be_read_and_written(monkeypatch, odd):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, odd)
    with streams.usable():
        if not isinstance(odd, Gone):  # it is there; what it raises is its own
            print("a", flush=True)
            print("b", file=sys.stderr, flush=True)
        if not isinstance(odd, io.StringIO):
            assert sys.stdin.isatty() is False and sys.stdin.read() == ""
    assert sys.stdin is odd and sys.stdout is odd and sys.stderr is odd
    if isinstance(odd, WriteOnly) and not isinstance(odd, Gone):
        assert odd.text == "a\nb\n"


def test_streams_that_are_there_stay(monkeypatch):
    whole = io.StringIO()
    monkeypatch.setattr(sys, "stdout", whole)
    before = sys.stdin, sys.stderr
    with streams.usable():
        assert sys.stdout is whole and (sys.stdin, sys.stderr) == before


def test_missing_descriptors_are_the_null_device(tmp_path):
    """What is opened next must not become descriptor 2, into which C libraries write."""
    script = (
        "import os, sys; from worker_orcd.runtime import streams; streams.open_missing();"
        "fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT);"
        "links = [os.readlink(f'/proc/self/fd/{n}') for n in range(3)];"
        "inherited = [os.get_inheritable(n) for n in range(3)];"
        "os.write(fd, repr((fd, links, inherited)).encode())"
    )
    for redirection, missing in (("<&-", {0}), (">&-", {1}), ("2>&-", {2}), ("<&- >&- 2>&-", {0, 1, 2}), ("", set())):
        out = tmp_path / "out"
        command = f'"$0" -c "$1" "$2" {redirection}'
        subprocess.run(["bash", "-c", command, sys.executable, script, out], check=True)
        fd, links, inherited = eval(out.read_text())
        assert fd > 2 and inherited == [True] * 3
        assert {n for n in range(3) if links[n] == "/dev/null"} >= missing
        out.unlink()


def test_settle_gives_up_what_nobody_takes():
    script = (
        "import sys; from worker_orcd.runtime import streams; sys.stdout.write('x');"
        "streams.settle(); sys.stderr.close(); streams.settle(); sys.stdout = sys.stderr = None; streams.settle()"
    )
    read_end, write_end = os.pipe()
    os.close(read_end)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # the text must wait
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=write_end, stderr=subprocess.PIPE, env=env, check=False
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, b"")


# -- a model and its bars


def test_a_model_loads_and_generates(monkeypatch, goldens_dir, odd):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, odd)
    with LLM(goldens_dir / "llama-Q4_0.gguf", device="cpu") as llm:
        results = llm.generate(["a", "b"], SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
        assert [len(r.token_ids) for r in results] == [2, 2]


def test_a_bar_is_shown_on_a_terminal_only(monkeypatch):
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        with LoadProgress(True, 100, "reading") as bar:
            bar.next()(50)
        assert ("reading" in stream.getvalue()) == stream.isatty()


def test_what_is_said_of_the_demo_model_never_goes_to_standard_output(monkeypatch, capsys, odd):
    monkeypatch.setattr(sys, "stderr", odd)
    demo_model._say(True, "Fetching")
    assert capsys.readouterr().out == ""
    if type(odd) is WriteOnly:
        assert odd.text == "Fetching\n"
