"""The sinks of jobs and the loop that feeds them: the pieces are those of the Detokenizer, whatever the tokens, the
stop strings and the cuts; bodies of streams are framed and whole, also where their client reads slowly."""

from __future__ import annotations

import os
import random
import select
import socket
import threading
import time
from array import array
from itertools import accumulate

import pytest
from helpers.patience import patient

from worker_orcd import SamplingParams
from worker_orcd._output import (
    GONE,
    MARK,
    OPEN,
    PIECE,
    SENT,
    STOPPED,
    TOKEN,
    WOKEN,
    ClientStream,
    JobSink,
    OutputLoop,
    encode_piece,
)
from worker_orcd._ring import TokenRing
from worker_orcd._text import TextDecoder, TokenTable
from worker_orcd.serving.detokenizer import Detokenizer
from worker_orcd.serving.entry import FAILED, LENGTH, STOP, WAKE
from worker_orcd.serving.job import Finished, Job, TextPiece
from worker_orcd.tokenizer.tokenizer import Tokenizer
from worker_orcd.wsgi.stream_format import PieceTemplate

TOKEN_FORM = (b'{"t":"', b'","i":', b"}\n")


def job_with(stops=(), stop_ids=(), n_unwatched=0):
    params = SamplingParams(stop=tuple(stops), stop_token_ids=tuple(stop_ids), min_tokens=n_unwatched)
    return Job("j", 1, params, 0, 1, None, lambda job: None)


def events(job):
    """What is there: (text, index, tokens) of each piece, and the end."""
    found = []
    while isinstance(event := job.next_event(0), TextPiece):
        found.append((event.text, event.index, event.token_ids))
    return found, event


def by_python(decoder, stops, stop_ids, tokens, reason, n_unwatched):
    """Pieces and completion as the Detokenizer makes them."""
    job = job_with(stops, stop_ids, n_unwatched)
    text = Detokenizer(job, decoder, frozenset(stop_ids))
    for token in tokens:
        if not job.finished:  # past its end nothing comes
            text.push(token)
    if not job.finished:
        text.end(reason)
    return events(job)[0], job.completion()


def by_loop(decoder, stops, stop_ids, tokens, mark, n_unwatched, draw):
    """The same by ring, loop and sink; pieces are taken at odd moments."""
    ring, job, taken = TokenRing(), job_with(stops, stop_ids), []
    loop = OutputLoop(ring, FAILED)
    job.sink.decode_with(decoder, stops, stop_ids, n_unwatched)
    loop.add(1, job.sink)
    for token in [*tokens, mark]:
        ring.put(1, token)
        if draw.random() < 0.3 or token == mark:
            for seq_id, kind, value in loop.run(0.0):
                assert seq_id == 1 and (kind in (STOPPED, PIECE) or (kind == MARK and value == mark))
                if kind != PIECE:
                    text, token = job.sink.ended_by
                    job.finish("stop" if kind == STOPPED or mark == STOP else "length", text or token)
        if draw.random() < 0.3:
            taken += events(job)[0]
    return taken + events(job)[0], job.completion()


def same(vocab, decoder, stops, tokens, draw, stop_ids=()):
    """Both ways agree; `decoder` makes a new one."""
    mark = draw.choice((STOP, LENGTH))
    n_unwatched = draw.choice((0, 0, 1, 5))
    want = by_python(decoder(), stops, stop_ids, tokens, "stop" if mark == STOP else "length", n_unwatched)
    got = by_loop(decoder(), stops, stop_ids, tokens, mark, n_unwatched, draw)
    assert got[0] == want[0], (vocab, stops, tokens)
    for name in ("text", "token_ids", "finish_reason", "stop_reason", "tokens_in", "seed"):
        assert getattr(got[1], name) == getattr(want[1], name), (vocab, stops, tokens, name)


@pytest.mark.parametrize("seed", range(4))
def test_pieces_are_those_of_the_detokenizer_on_odd_vocabularies(seed):
    draw = random.Random(seed)
    parts = [
        b"a",
        b"b",
        b"ab",
        b" ",
        b"\n",
        "é".encode(),
        "漢".encode(),
        b"\xe6\xbc",
        b"\xa2",
        b"\xc3",
        b"\xa9",
        b"\xff",
        b"",
    ]
    for _ in range(200):
        tokens = parts + [b"".join(draw.choices(parts, k=draw.randrange(1, 4))) for _ in range(6)]
        table = TokenTable(b"".join(tokens), array("I", [0, *accumulate(map(len, tokens))]), [3], draw.random() < 0.5)
        skip, continues = draw.random() < 0.5, draw.random() < 0.5
        ids = draw.choices(range(len(tokens) + 1), k=draw.randrange(60))
        text = b"".join(tokens[i] for i in ids if i < len(tokens)).decode("utf-8", "replace")
        stops = ["".join(draw.choices("ab é漢\n\ufffd", k=draw.randrange(1, 5))) for _ in range(draw.randrange(4))]
        if text and draw.random() < 0.5:
            at = draw.randrange(len(text))
            stops.append(text[at : at + draw.randrange(1, 6)])
        stop_ids = draw.sample(range(len(tokens)), draw.choice((0, 0, 1)))
        same(tokens, lambda t=table, s=skip, c=continues: TextDecoder(t, s, c), stops, ids, draw, stop_ids)


@pytest.mark.parametrize("name", ["qwen2", "llama-spm", "phi-3", "gpt-2"])
def test_pieces_are_those_of_the_detokenizer_on_real_vocabularies(name, goldens_dir):
    tokenizer, draw = Tokenizer.from_file(goldens_dir / "tokenizers" / f"{name}.gguf"), random.Random(1)
    texts = ["Hello wörld, 日本語 \U0001f600 and so on.\n\n", "def f(x):\n    return x\n" * 3, "السلام عليكم"]
    for n in range(120):
        ids = tokenizer.encode(draw.choice(texts), add_bos=False)
        ids[draw.randrange(len(ids)) :] = draw.choices(range(tokenizer.n_vocab), k=draw.randrange(20))
        text = tokenizer.decode(ids)
        at = draw.randrange(max(len(text), 1))
        stops = [s for s in (text[at : at + draw.randrange(1, 8)], "\n\n", "zzz")[: n % 4] if s]
        continues = draw.random() < 0.5
        same(name, lambda t=tokenizer, c=continues: t.stream(continues=c), stops, ids, draw, tokenizer.stop_ids)


def test_without_a_decoder_every_token_is_a_piece():
    draw = random.Random(3)
    for n in range(20):
        same("none", lambda: None, (), [draw.randrange(9) for _ in range(n)], draw, [4])


def test_reports_come_back_only_for_those_who_wait():
    ring = TokenRing()
    loop, sinks = OutputLoop(ring, FAILED), {n: JobSink() for n in (1, 2, 3)}
    for n, sink in sinks.items():
        loop.add(n, sink)
    sinks[1].decode_with(None, (), ())
    sinks[2].decode_with(None, (), ())
    assert not sinks[2].ready(), "asks to be told"
    for seq_id, token in ((1, 5), (2, 6), (2, 7), (3, 8), (9, 9), (1, -1), (3, STOP), (0, WAKE), (1, FAILED)):
        ring.put(seq_id, token)
    assert loop.run(1.0) == [
        (3, TOKEN, 8),
        (3, MARK, STOP),
        (0, WOKEN, WAKE),
        (1, MARK, FAILED),
        (2, PIECE, 0),
    ]
    assert sinks[1].take() == ("", 0, (5,)) and sinks[1].take() is None
    assert [sinks[2].take() for _ in range(3)] == [("", 0, (6,)), ("", 1, (7,)), None]
    loop.remove(2)
    ring.put(2, 8)
    began = time.monotonic()
    assert loop.run(0.02) == [] and time.monotonic() - began >= 0.02
    ring.close()
    assert loop.run(5.0) == [] and sinks[2].n_tokens == 2


def test_a_closed_sink_takes_nothing():
    sink = JobSink()
    assert sink.add_piece("a", [1]) is False and not sink.decodes
    sink.close()
    sink.add_piece("b", [2])
    sink.add_silent([3])
    assert (sink.text, sink.token_ids, sink.n_tokens) == ("a", (1,), 1)
    with pytest.raises(OverflowError):
        JobSink().add_piece("a", [1 << 40])
    with pytest.raises(TypeError):
        JobSink().add_piece(None, [1])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain",
        'q " \\ / \u2028 \u2029 \u0085',
        "é漢\U0001f600\x7f\u0080\u0084\u0086\u2027\u202a",
        "".join(map(chr, range(32))),
    ],
)
@pytest.mark.parametrize("end", [None, b"}\n"])
def test_a_template_is_filled_in_as_in_python(text, end):
    form = PieceTemplate(b'{"t":"', b'","i":', end)
    for index in (0, 7, 123456):
        assert encode_piece(form.before, form.after, form.end, text, index) == form.encode(text, index)


# -- bodies of streams


class Client:
    """Both ends of a connection, and what watches one of them."""

    def __init__(self, chunked=True, limit=1 << 20, buffer=None):
        self.ours, self.theirs = socket.socketpair()
        if buffer:
            self.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        self.theirs.settimeout(patient(5))
        self.epoll, self.wake = select.epoll(), os.eventfd(0, os.EFD_NONBLOCK)
        self.epoll.register(self.ours, select.EPOLLRDHUP)
        self.stream = ClientStream(self.ours.fileno(), chunked, self.epoll.fileno(), self.wake, limit)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.stream.release()
        for file in (self.ours, self.theirs, self.epoll):
            file.close()
        os.close(self.wake)

    def told(self):
        return [event for _, event in self.epoll.poll(0)]

    def received(self, n=1 << 20):
        return self.theirs.recv(n)

    def all(self):
        """Until the end, while the system says when there is room again."""
        data, state = b"", OPEN
        self.theirs.setblocking(False)
        end = time.monotonic() + patient(10)
        while state == OPEN:
            assert time.monotonic() < end
            try:
                data += self.received()
            except BlockingIOError:
                pass
            if self.told():
                state = self.stream.writable()
        self.theirs.settimeout(0.05)
        try:
            while piece := self.received():
                data += piece
        except TimeoutError:
            pass
        return data


def unframed(data):
    body = b""
    while data:
        size, data = data.split(b"\r\n", 1)
        n = int(size, 16)
        body, behind = body + data[:n], data[n : n + 2]
        assert behind == b"\r\n"
        data = data[n + 2 :]
        if not n:
            assert not data
            return body
    raise AssertionError("no last chunk")


def test_pieces_go_to_the_client_by_the_template_one_chunk_a_step():
    with Client() as client:
        ring, sink = TokenRing(), JobSink()
        loop = OutputLoop(ring, FAILED)
        table = TokenTable(b"abc\n", array("I", [0, 1, 2, 3, 4]), [], False)
        sink.decode_with(TextDecoder(table, False, True), (), ())
        loop.add(1, sink)
        ring.put(1, 0)
        loop.run(0.0)
        assert client.stream.write(b"first\n") == OPEN
        sink.attach(client.stream, *TOKEN_FORM)
        for token in (1, 3):
            ring.put(1, token)
        assert loop.run(0.0) == [] and sink.take() is None
        ring.put(1, LENGTH)
        assert loop.run(1.0) == [(1, MARK, LENGTH)]
        assert client.stream.write(b"end") == OPEN and client.stream.finish() == SENT == client.stream.finish()
        data = client.received()
        assert data.count(b"\r\n") == 2 * 4 + 2, "opening, what was there, one step, the end; and the last chunk"
        assert unframed(data) == b'first\n{"t":"a","i":0}\n{"t":"b","i":1}\n{"t":"\\n","i":2}\nend'
        assert (sink.text, sink.token_ids) == ("ab\n", (0, 1, 3))


@pytest.mark.parametrize("chunked", [True, False])
def test_what_a_slow_client_does_not_take_waits_and_comes_whole(chunked):
    with Client(chunked, limit=1 << 24, buffer=4096) as client:
        sink, want = JobSink(), b""
        sink.attach(client.stream, *TOKEN_FORM)
        for n in range(2000):
            sink.add_piece("x" * (n % 700), [n])
            want += b'{"t":"%s","i":%d}\n' % (b"x" * (n % 700), n)
        assert client.told() == [] or client.told() == [select.EPOLLOUT]
        assert client.stream.silent_seconds == 0.0 and not client.stream.overflowed
        assert client.stream.finish() == OPEN
        data = client.all()
        assert (unframed(data) if chunked else data) == want
        assert client.stream.write(b"more") == SENT and client.told() == [], "nothing follows the end"


def test_too_much_that_waits_is_told_once_and_pieces_are_dropped():
    with Client(limit=10_000, buffer=4096) as client:
        sink = JobSink()
        sink.attach(client.stream, *TOKEN_FORM)
        for n in range(500):
            sink.add_piece("y" * 1000, [n])
        assert client.stream.overflowed and os.eventfd_read(client.wake) == 1
        assert client.stream.write(b"the end is never dropped") == OPEN and client.stream.finish() == OPEN
        body = unframed(client.all())
        assert body.endswith(b"the end is never dropped") and len(body) < 200_000
        assert sink.n_tokens == 500


@pytest.mark.parametrize("how", ["close", "shutdown", "release"])
def test_a_client_that_has_gone_is_seen_and_written_to_no_more(how):
    with Client() as client:
        sink = JobSink()
        sink.attach(client.stream, *TOKEN_FORM)
        if how == "release":
            client.stream.release()
        else:
            client.theirs.close() if how == "close" else client.theirs.shutdown(socket.SHUT_WR)
            assert client.told()[0] & select.EPOLLRDHUP
        sink.add_piece("a", [1])
        state = client.stream.write(b"x")
        assert state == (OPEN if how == "shutdown" else GONE)
        assert client.stream.finish() == (SENT if how == "shutdown" else GONE)


def test_many_threads_feed_read_and_end():
    """Sinks are fed, read, attached and closed at once: nothing is lost, doubled or out of order."""
    ring = TokenRing(256)
    loop, jobs = OutputLoop(ring, FAILED), 16
    sinks = [JobSink() for _ in range(jobs)]
    for n, sink in enumerate(sinks):
        sink.decode_with(None, (), ())
        loop.add(n + 1, sink)
    taken, done = [[] for _ in range(jobs)], threading.Event()

    def feed():
        for token in range(200):
            for n in range(jobs):
                ring.put(n + 1, token)
        for n in range(jobs):
            ring.put(n + 1, LENGTH)

    def read(n):
        while not done.is_set() or sinks[n].ready():
            piece = sinks[n].take()
            if piece is not None:
                taken[n].append(piece)
            sinks[n].ready()

    threads = [threading.Thread(target=feed), *(threading.Thread(target=read, args=(n,)) for n in range(4))]
    with Client() as client:
        for thread in threads:
            thread.start()
        ended, until = 0, time.monotonic() + patient(20)
        while ended < jobs and time.monotonic() < until:
            ended += sum(kind == MARK for _, kind, _ in loop.run(0.5))
            if sinks[5].n_tokens > 10:
                sinks[5].attach(client.stream, *TOKEN_FORM)
        done.set()
        for thread in threads:
            thread.join(patient(10))
    assert ended == jobs
    for n, sink in enumerate(sinks):
        assert sink.token_ids == tuple(range(200))
        if n < 4:
            assert taken[n] == [("", i, (i,)) for i in range(200)]


def test_each_of_256_jobs_gets_its_tokens():
    """Of a decode step each has one; the ring does not hold a step."""
    ring, jobs, steps = TokenRing(100), 256, 40
    loop, sinks = OutputLoop(ring, FAILED), [JobSink() for _ in range(jobs)]
    for n, sink in enumerate(sinks):
        sink.decode_with(None, (), ())
        loop.add(n + 1, sink)

    def feed():
        for step in range(steps):
            ring.put_many(range(1, jobs + 1), [jobs * step + n for n in range(jobs)])
        ring.put_many(range(1, jobs + 1), [LENGTH] * jobs)

    feeder = threading.Thread(target=feed)
    feeder.start()
    ended: list[int] = []
    until = time.monotonic() + patient(20)
    while len(ended) < jobs and time.monotonic() < until:
        ended += [seq_id for seq_id, kind, _ in loop.run(0.5) if kind == MARK]
    feeder.join(patient(10))
    assert ended == list(range(1, jobs + 1))
    for n, sink in enumerate(sinks):
        assert sink.token_ids == tuple(range(n, jobs * steps, jobs))


def test_finished_is_seen_after_all_pieces():
    job = job_with()
    job.add_piece("a", [1])
    job.add_silent_tokens([2])
    assert job.finish("length") and not job.finish("stop")
    found, end = events(job)
    assert found == [("a", 0, (1,))] and isinstance(end, Finished) and end.tokens_out == 2
