"""Streams that no thread belongs to: their bytes, their ends, clients that go or do not read (wsgi.event_writer, sse,
job_record, places, whole_answer). In process, and under a real gunicorn (wsgi.gunicorn_worker)."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import threading
import time
from functools import partial

import pytest

from service.client import fake_worker
from service.in_process import App
from worker_orcd import SamplingParams
from worker_orcd._output import GONE, SENT
from worker_orcd.errors import Cancelled, InvalidRequest, NotReady, QueueFull
from worker_orcd.serving.job import Job
from worker_orcd.wsgi import event_writer, sse
from worker_orcd.wsgi.event_writer import EventWriter
from worker_orcd.wsgi.sse import JobStream
from worker_orcd.wsgi.stream_format import PieceTemplate
from worker_orcd.wsgi.whole_answer import wait_for

pytestmark = pytest.mark.timeout(60)


class Format:
    """Choices in letters: the first by a template, the second by `pieces`."""

    ping = b"<ping>"

    def opening(self):
        return b"<open>"

    def template(self, choice):
        return PieceTemplate(b"<0 ", b" ", b">") if choice == 0 else None

    def pieces(self, choice, pieces):
        return b"".join(b"<%d %s %d>" % (choice, p.text.encode(), p.index) for p in pieces)

    def finished(self, choice, end):
        return b"<end %d %s %d>" % (choice, end.finish_reason.encode(), end.tokens_out)

    def closing(self):
        return b"<close>"

    def failed(self, error):
        return b"<error %s>" % error.code.encode()


@pytest.fixture(scope="module")
def writer():
    writer = EventWriter()
    writer.start()
    return writer


class Rig:
    """A detached stream of some jobs, fed by hand, and its client."""

    def __init__(self, writer, n=1, format=None, chunked=False, before=lambda jobs: None):
        self.app = App()
        self.service, self.writer = self.app.service, writer
        self.ours, self.theirs = socket.socketpair()
        self.theirs.settimeout(5)
        self.jobs = [Job(f"j{i}", i + 1, SamplingParams(), 0, 1, None, lambda job: None) for i in range(n)]
        self.done, self.whole = threading.Event(), []
        self.place = self.service.places.take()
        log = self.service.events
        self.stream = JobStream(self.service, self.place, self.jobs, format or Format(), log, self.ours)
        before(self.jobs)
        self.stream.detach(writer, b"", chunked, self.over)

    def over(self, whole):
        self.whole.append(whole)
        self.done.set()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for job in self.jobs:
            job.cancel()
        self.ours.close()
        self.theirs.close()

    def received(self, until):
        data = b""
        while not data.endswith(until):
            piece = self.theirs.recv(1 << 16)
            assert piece, data
            data += piece
        return data

    def ended(self, whole):
        assert self.done.wait(5) and self.whole == [whole]
        assert not self.service.places and self.ours.fileno() not in self.writer._clients
        return [e for e in self.app.log if e["event"] == "execute_end"]


def test_one_choice_from_opening_to_close(writer):
    with Rig(writer, before=lambda jobs: jobs[0].add_piece("a", [1])) as rig:
        assert rig.received(b"<0 a 0>") == b"<open><0 a 0>"
        rig.jobs[0].add_piece('"', [2, 3])
        rig.jobs[0].finish("length")
        assert rig.received(b"<close>") == b'<0 \\" 1><end 0 length 3><close>'
        (end,) = rig.ended(True)
        assert end["outcome"] == "finished" and end["tokens_out"] == 3 and end["text_chars"] == 2
        assert end["text_sha256"] == hashlib.sha256(b'a"').hexdigest()


def test_several_choices_on_one_connection_end_each_in_its_time(writer):
    with Rig(writer, 3) as rig:
        rig.jobs[1].add_piece("x", [1])
        assert rig.received(b"<1 x 0>") == b"<open><1 x 0>"
        rig.jobs[0].add_piece("a", [1])
        rig.jobs[2].finish("stop")
        rig.jobs[1].add_piece("y", [1])
        rig.jobs[0].finish("stop")
        assert rig.received(b"<end 0 stop 1>") == b"<0 a 0><end 2 stop 0><1 y 1><end 0 stop 1>"
        assert not rig.done.is_set()
        rig.jobs[1].finish("length")
        assert rig.received(b"<close>") == b"<end 1 length 2><close>"
        assert [e["outcome"] for e in rig.ended(True)] == ["finished"] * 3


def test_a_job_that_ended_before_is_told_whole(writer):
    def all_of_it(jobs):
        for text in "abc":
            jobs[0].add_piece(text, [1])
            jobs[1].add_piece(text, [1])
        jobs[0].finish("stop")
        jobs[1].finish("stop")

    with Rig(writer, 2, before=all_of_it, chunked=True) as rig:
        data = rig.received(b"0\r\n\r\n")
        assert data.startswith(b"6\r\n<open>\r\n15\r\n<0 a 0><0 b 1><0 c 2>\r\n") and data.count(b"<close>") == 1
        assert b"<1 a 0><1 b 1><1 c 2>" in data and rig.ended(True)


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_choice_ends_all_after_what_came_before(writer, failing):
    with Rig(writer, 2) as rig:
        rig.jobs[failing].add_piece("x", [1])
        rig.jobs[failing].end(InvalidRequest("no room"))
        data = rig.received(b"<error INVALID_REQUEST>")
        assert data == b"<open><%d x 0><error INVALID_REQUEST>" % failing
        assert [e["code"] for e in rig.ended(True)] == ["INVALID_REQUEST"] * 2
        with pytest.raises(Cancelled):
            rig.jobs[1 - failing].completion()


class Told:
    """What stands in for the log of a job: notes what its client has been sent when the end is logged."""

    def __init__(self, client):
        self._client, self.seen = client, []

    def emit(self, event, *args, **fields):
        assert event == "execute_end"
        self.seen.append(self._client.recv(1 << 16, socket.MSG_PEEK | socket.MSG_DONTWAIT))


@pytest.mark.parametrize("how", ["finish", "error", "cancel", "late"])
@pytest.mark.parametrize("n", [1, 2])
def test_the_end_is_logged_before_the_client_sees_it(writer, how, n):
    """Who has seen the end and sends the next job finds the two in this order in the log."""
    with Rig(writer, n) as rig:
        told = [Told(rig.theirs) for _ in rig.jobs]
        for record, one in zip(rig.stream._records, told, strict=True):
            record._log = one
        for job in rig.jobs:
            job.add_piece("x", [1])
        if how == "finish":
            for job in rig.jobs:
                job.finish("stop")
        elif how == "late":
            rig.service.stop_deadline = time.monotonic() - 1
        else:
            rig.jobs[-1].end(InvalidRequest("no room") if how == "error" else Cancelled("by its id"))
        assert rig.done.wait(5)
        for choice, one in enumerate(told):
            (seen,) = one.seen
            assert b"<%d x 0>" % choice in seen and b"<end %d" % choice not in seen
            assert b"<close>" not in seen and b"<error" not in seen


@pytest.mark.parametrize("part", ["pieces", "finished", "closing"])
def test_a_format_that_fails_ends_its_stream_alone(writer, part):
    format = Format()
    setattr(format, part, lambda *args: 1 / 0)
    with Rig(writer, 2, format) as rig:
        rig.jobs[1].add_piece("x", [1])
        for job in rig.jobs:
            job.finish("stop")
        assert rig.received(b"<error INTERNAL>").startswith(b"<open>")
        rig.ended(True)
    with Rig(writer) as rig:
        rig.jobs[0].finish("stop")
        assert rig.received(b"<close>") and rig.ended(True), "the writer goes on"


def test_a_stream_whose_last_event_cannot_be_made_ends_without_it(writer):
    format = Format()
    format.closing = format.failed = lambda *args: 1 / 0
    with Rig(writer, 2, format, chunked=True) as rig:
        for job in rig.jobs:
            job.finish("stop")
        assert rig.received(b"0\r\n\r\n").startswith(b"6\r\n<open>\r\n") and rig.ended(True)


def test_a_client_that_fails_in_every_way_leaves_the_others_watched(writer):
    """`gone` is what is called when something failed, and fails itself."""

    class Broken:
        def gone(self):
            raise ZeroDivisionError

        tick = writable = gone

    ours, theirs = socket.socketpair()
    with ours, theirs, Rig(writer) as rig:
        writer.watch(ours, Broken())
        theirs.close()
        time.sleep(2 * event_writer.TICK_SEC)
        assert ours.fileno() not in writer._clients, "or the writer would be told of it for ever"
        rig.theirs.close()
        assert rig.done.wait(5)
        writer.forget(ours)


@pytest.mark.parametrize("how", ["close", "shutdown"])
def test_a_client_that_goes_ends_all_jobs(writer, how):
    with Rig(writer, 2) as rig:
        rig.received(b"<open>")
        began = time.monotonic()
        rig.theirs.close() if how == "close" else rig.theirs.shutdown(socket.SHUT_WR)
        assert rig.done.wait(5)
        seconds = time.monotonic() - began
        assert [e["outcome"] for e in rig.ended(False)] == ["disconnected"] * 2 and seconds < 0.5
        assert all(job.finished for job in rig.jobs)


def test_a_connection_that_cannot_be_watched_is_the_callers_again(writer):
    app = App()
    job = Job("j", 1, SamplingParams(), 0, 1, None, lambda job: None)
    ours, theirs = socket.socketpair()
    stream = JobStream(app.service, app.service.places.take(), [job], Format(), app.service.events, ours)
    ours.close()
    theirs.close()
    with pytest.raises(OSError):
        stream.detach(writer, b"", True, lambda whole: None)
    assert not stream.begun
    stream.close()
    assert job.finished and not app.service.places and -1 not in writer._clients


@pytest.mark.parametrize("chunked", [False, True])
def test_the_head_goes_before_the_body_as_it_is(writer, chunked):
    app = App()
    job = Job("j", 1, SamplingParams(), 0, 1, None, lambda job: None)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        stream = JobStream(app.service, app.service.places.take(), [job], Format(), app.service.events, ours)
        stream.detach(writer, b"HTTP/1.1 200 OK\r\n\r\n", chunked, lambda whole: None)
        opening = b"6\r\n<open>\r\n" if chunked else b"<open>"
        assert stream.begun and theirs.recv(1 << 16) == b"HTTP/1.1 200 OK\r\n\r\n" + opening
        job.cancel()


def test_a_client_that_has_gone_before_the_head_is_sent(writer):
    """Whoever sees it first, the thread that sends or the one that watches, ends the stream once."""
    app, left = App(), []
    job = Job("j", 1, SamplingParams(), 0, 1, None, lambda job: None)
    ours, theirs = socket.socketpair()
    with ours:
        stream = JobStream(app.service, app.service.places.take(), [job], Format(), app.service.events, ours)
        theirs.close()
        try:
            stream.detach(writer, b"HTTP/1.1 200 OK\r\n\r\n", True, left.append)
        except BrokenPipeError:
            assert stream.begun and not left
            stream.close()
        else:
            end = time.monotonic() + 5
            while not left and time.monotonic() < end:
                time.sleep(0.001)
            assert left == [False]
        assert ours.fileno() not in writer._clients and job.finished and not app.service.places


def test_silence_is_broken_and_a_stalled_reader_is_cut_off(writer, monkeypatch):
    monkeypatch.setattr(sse, "PING_SEC", 0.2)
    monkeypatch.setattr(event_writer, "MAX_UNSENT_BYTES", 100_000)
    with Rig(writer) as rig:
        assert rig.received(b"<ping><ping>") == b"<open><ping><ping>"
        for n in range(200):
            rig.jobs[0].add_piece("x" * 10_000, [n])
        with pytest.raises(Cancelled, match="does not read"):
            rig.jobs[0].completion()
        assert not rig.done.is_set(), "its last event waits for it"
        data = rig.received(b"<error CANCELLED>")
        assert b"<ping>" not in data and len(data) < 2_000_000
        (end,) = rig.ended(True)
        assert end["code"] == "CANCELLED"


@pytest.mark.parametrize("n_late", [0, 3])
def test_a_job_that_finishes_before_its_stalled_reader_is_seen_has_no_good_end(monkeypatch, n_late):
    """Once a piece was dropped; where all of them wait, the end may follow them."""
    monkeypatch.setattr(event_writer, "MAX_UNSENT_BYTES", 100_000)
    with Rig(EventWriter()) as rig:  # which is not started: nobody looks at the time
        n = 0
        while not rig.stream._body.overflowed:
            rig.jobs[0].add_piece("x" * 10_000, [n])
            n += 1
        for _ in range(n_late):
            rig.jobs[0].add_piece("late", [0])
        rig.jobs[0].finish("stop")
        data = b""
        while not data.endswith((b"<close>", b"<error CANCELLED>")):
            data += rig.theirs.recv(1 << 16)
            rig.stream.writable()
        rig.ended(True)
        assert data.count(b"x" * 10_000) == n and b"late" not in data
        assert data.endswith(b"<error CANCELLED>" if n_late else b"<end 0 stop %d><close>" % n)
        assert (b"<end" in data) == (not n_late)


def test_the_end_of_a_stream_that_nobody_takes_is_given_up(writer, monkeypatch):
    """Or clients that read a byte now and then would hold all places for ever."""
    monkeypatch.setattr(sse, "LAST_BYTES_SEC", 0.3)
    with Rig(writer) as rig:
        rig.jobs[0].add_piece("x" * 900_000, [1])
        rig.jobs[0].finish("stop")
        for _ in range(3):
            assert rig.theirs.recv(1)
        assert not rig.done.is_set()
        (end,) = rig.ended(False)
        assert end["outcome"] == "finished"


def test_who_does_not_take_its_end_keeps_its_place_and_who_takes_it_has_none(writer):
    """However long ago the job ended, or however lately."""
    with Rig(writer) as rig:
        rig.service.places.limit = 1
        rig.jobs[0].add_piece("x" * 900_000, [1])
        rig.jobs[0].finish("stop")
        rig.theirs.recv(1)
        with pytest.raises(QueueFull):
            rig.service.places.take()
        rig.received(b"<close>")
        rig.service.places.leave(rig.service.places.take())


@pytest.mark.parametrize("n_waiting", [0, 900_000])
def test_a_place_is_free_as_soon_as_the_last_byte_can_be_read(writer, n_waiting):
    """The client asks again at once, while the thread that sent its end has yet to see to the rest: the one that ended
    the job, or where bytes waited the writer's."""

    class Late:
        def finish(self, data):
            return after(body.finish(data))

        def writable(self):
            return after(body.writable())

        def __getattr__(self, name):
            return getattr(body, name)

    def after(state):
        if state == SENT:
            assert asked.wait(5)
            time.sleep(0.05)
        return state

    with Rig(writer) as rig:
        body, rig.stream._body = rig.stream._body, Late()
        asked, rig.service.places.limit = threading.Event(), 1
        rig.jobs[0].add_piece("x" * n_waiting, [1])
        thread = threading.Thread(target=rig.jobs[0].finish, args=("stop",))
        thread.start()
        rig.received(b"<close>")
        asked.set()
        rig.service.places.take()
        thread.join()


def test_an_end_that_the_system_refuses_to_send_gives_the_connection_back(writer):
    """Nothing is known to be wrong with the client, so no event tells of it."""

    class Refused:
        def finish(self, data):
            return GONE

        def __getattr__(self, name):
            return getattr(body, name)

    with Rig(writer) as rig:
        body, rig.stream._body = rig.stream._body, Refused()
        rig.jobs[0].finish("stop")
        rig.ended(False)


def test_a_writer_that_sleeps_is_woken_by_each_first_client():
    """Also where the last one was forgotten meanwhile: it looks at the time while there is somebody."""
    writer, ticks = EventWriter(), threading.Event()

    class Client:
        def tick(self):
            ticks.set()

    writer.start()
    for _ in range(3):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ticks.clear()
            writer.watch(ours, Client())
            assert ticks.wait(5)
            writer.forget(ours)
            writer.forget(ours)
    with pytest.raises(OSError, match="Bad file descriptor"):
        writer.watch(ours, Client())
    assert not writer._clients


def test_who_is_told_of_an_end_and_fails_loses_no_end(writer):
    def fail(job):
        raise ZeroDivisionError

    with Rig(writer) as rig:
        rig.jobs[0]._on_end = fail
        with pytest.raises(ZeroDivisionError):
            rig.jobs[0].finish("stop")
        assert rig.received(b"<close>") and rig.ended(True)


def test_jobs_that_outlive_the_grace_time_are_ended(writer):
    with Rig(writer) as rig:
        rig.service.stop_deadline = time.monotonic() - 1
        assert rig.received(b"<error NOT_READY>") and rig.ended(True)


# -- answers given whole


@pytest.fixture
def waiting(writer):
    app = App()
    app.service.writer = writer
    jobs = [Job(f"j{n}", n + 1, SamplingParams(), 0, 1, None, lambda job: None) for n in range(2)]
    ours, theirs = socket.socketpair()
    place = app.service.places.take()
    yield app, jobs, theirs, partial(wait_for, app.service, place, jobs, app.service.events, ours)
    assert not app.service.places and ours.fileno() not in writer._clients
    ours.close()
    theirs.close()


def later(call, *args):
    threading.Timer(0.05, call, args).start()


def test_jobs_are_answered_whole(waiting):
    app, jobs, _, wait = waiting
    jobs[1].add_piece("b", [1, 2])
    jobs[1].finish("length")
    later(jobs[0].finish, "stop")
    assert [(c.text, c.finish_reason, c.token_ids) for c in wait()] == [("", "stop", ()), ("b", "length", (1, 2))]
    assert [e["outcome"] for e in app.log if e["event"] == "execute_end"] == ["finished"] * 2


def test_when_one_fails_all_end(waiting):
    app, jobs, _, wait = waiting
    later(jobs[0].end, InvalidRequest("no room"))
    with pytest.raises(InvalidRequest):
        wait()
    assert jobs[1].finished
    assert [e.get("code") for e in app.log if e["event"] == "execute_end"] == ["INVALID_REQUEST"] * 2


def test_when_the_client_goes_all_end(waiting):
    app, jobs, theirs, wait = waiting
    began = time.monotonic()
    later(theirs.close)
    with pytest.raises(Cancelled, match="gone"):
        wait()
    assert time.monotonic() - began < 0.5 and jobs[1].finished
    assert [e["outcome"] for e in app.log if e["event"] == "execute_end"] == ["disconnected"] * 2


def test_without_a_thread_to_keep_nothing_goes_on(waiting):
    app, jobs, _, wait = waiting

    def refuse():
        raise RuntimeError("can't start new thread")

    app.service.keep_thread = refuse
    with pytest.raises(RuntimeError):
        wait()
    assert all(job.finished for job in jobs)
    (first, _) = [e for e in app.log if e["event"] == "execute_end"]
    assert first["code"] == NotReady.code


# -- under gunicorn


@pytest.fixture(scope="module")
def worker():
    worker = fake_worker("--max-seqs", 40)
    yield worker
    code, _ = worker.stop()
    worker.kill()
    assert code == 0


def post(job_id, prompt, version="1.1", **fields):
    body = json.dumps({"job_id": job_id, "prompt": prompt, **fields}).encode()
    head = b"POST /execute HTTP/%s\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % (version.encode(), len(body)) + body


def read_until(sock, mark):
    data = b""
    while mark not in data:
        piece = sock.recv(1 << 16)
        assert piece, data
        data += piece
    return data


def test_streams_and_short_answers_follow_each_other_on_one_connection(worker):
    """Also where all requests were sent before the first answer came."""
    health = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    last = health.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    requests = [post("k1", "slow", max_tokens=5), health, post("k2", "say hi"), post("k3", "fail"), last]
    with socket.create_connection(("127.0.0.1", worker.port), timeout=10) as sock:
        sock.sendall(b"".join(requests))
        data = b""
        while piece := sock.recv(1 << 16):
            data += piece
    answers = data.split(b"HTTP/1.1 200 OK\r\n")[1:]
    assert len(answers) == 5 and all(b"\r\n0\r\n\r\n" in answers[n] for n in (0, 2, 3))
    assert answers[0].count(b"event: token") == 5 and b"event: end" in answers[0] and b"event: end" in answers[2]
    assert b"event: error" in answers[3] and answers[3].endswith(b"0\r\n\r\n")
    assert b"healthy" in answers[1] and b"healthy" in answers[4]
    assert all(b"Connection: keep-alive" in answer for answer in answers[:4]) and b"Connection: close" in answers[4]


def test_http_1_0_gets_the_bytes_as_they_are_and_an_end(worker):
    with socket.create_connection(("127.0.0.1", worker.port), timeout=10) as sock:
        sock.sendall(post("old", "say hi", "1.0"))
        data = b""
        while piece := sock.recv(1 << 16):
            data += piece
    head, body = data.split(b"\r\n\r\n", 1)
    assert b"Connection: close" in head and b"hunked" not in head
    assert body.startswith(b"event: started\n") and body.endswith(b"}\n\n") and b"event: end" in body


def test_a_stream_takes_no_thread(worker):
    children = subprocess.run(["pgrep", "-P", str(worker.process.pid)], capture_output=True, text=True, check=True)
    tasks = f"/proc/{children.stdout.split()[0]}/task"
    worker.json("GET", "/health")
    before, n = len(os.listdir(tasks)), 32
    streams = [worker.execute("quiet", job_id=f"quiet{i}") for i in range(n)]
    assert all(stream.next()[0] == "started" for stream in streams)
    more = len(os.listdir(tasks)) - before
    print(f"{n} streams: {more} threads more, of which {n} are the fake's own")
    assert more <= n + 4
    for stream in streams:
        stream.abort()
    for i in range(n):
        worker.event("execute_end", job_id=f"quiet{i}", outcome="disconnected")


def test_a_stalled_reader_is_cut_off_and_told_so_when_it_reads(start):
    """Of 8 MB the buffers of the two sockets take little."""
    worker = start("--send-buffer", 1 << 16)
    with socket.socket() as sock:
        sock.settimeout(20)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        sock.connect(("127.0.0.1", worker.port))
        sock.sendall(post("deaf", "flood", max_tokens=2048))
        assert worker.execute("slow", job_id="beside", max_tokens=50).all()[-1][0] == "end"
        data = read_until(sock, b"\r\n0\r\n\r\n")  # a header may end with a 0, too
        assert data.count(b"event: error") == 1 and b"does not read" in data and b"event: end" not in data
    end = worker.event("execute_end", job_id="deaf")
    assert end["outcome"] == "error" and end["code"] == "CANCELLED"
