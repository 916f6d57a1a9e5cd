"""The framing of requests (wsgi.request_buffer): whatever the pieces they come in, and never past their bounds."""

from __future__ import annotations

import time
from collections import Counter
from random import Random

import pytest
from gunicorn.config import Config
from gunicorn.http.errors import ChunkMissingTerminator, NoMoreData, ParseException
from gunicorn.http.parser import RequestParser

from worker_orcd.wsgi.request_buffer import MAX_FRAME_BYTES, MAX_HEAD_BYTES, MAX_LINE_BYTES, RequestBuffer, State

LIMIT = 100
CONFIG = Config()
POST = b"POST /execute HTTP/1.1\r\nHost: x\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"

WHOLE = {
    "get": b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
    "no headers": b"GET / HTTP/1.0\r\n\r\n",
    "an empty line before": b"\r\nGET / HTTP/1.1\r\n\r\n",
    "length": POST + b"Content-Length: 5\r\n\r\nhello",
    "length in another case": POST + b"cOnTent-LENGTH:\t 5 \r\n\r\nhello",
    "length 0": POST + b"Content-Length: 0\r\n\r\n",
    "length at the limit": POST + b"Content-Length: 100\r\n\r\n" + b"x" * 100,
    "a body like a head": POST + b"Content-Length: 8\r\n\r\n\r\n\r\n\r\n\r\n",
    "chunks": CHUNKED + b'5\r\nhello\r\nA;x="y"\r\n0123456789\r\n0\r\n\r\n',
    "chunks like ends": CHUNKED + b"9\r\n0\r\n\r\n0\r\n\r\r\n00\r\n\r\n",
    "a size with many zeros": CHUNKED + b"0" * 30 + b"5\r\nhello\r\n" + b"0" * 30 + b"\r\n\r\n",
    "trailers": CHUNKED + b"1\r\n{\r\n0\r\nX-A: b\r\nX-C: d\r\n\r\n",
    "chunks after gzip": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunks in two headers": POST + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: Chunked\r\n\r\n0\r\n\r\n",
    "chunks at the limit": CHUNKED + b"64\r\n" + b"x" * 100 + b"\r\n0\r\n\r\n",
    "expect": POST + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\nhello",
}

MALFORMED = {
    "bare line feeds": b"GET / HTTP/1.1\nHost: x\n\n",
    "a line feed first": b"\nGET",
    "a bare line feed in a header": b"GET / HTTP/1.1\r\nHost: x\nA: b\r\n",
    "no HTTP": b"\x16\x03\x01\x02",
    "no HTTP after an empty line": b"\r\n\x00",
    "an endless line": b"GET /" + b"a" * MAX_LINE_BYTES,
    "a negative length": POST + b"Content-Length: -1\r\n\r\n",
    "a length with plus": POST + b"Content-Length: +1\r\n\r\n",
    "an empty length": POST + b"Content-Length:\r\n\r\n",
    "a length of many digits": POST + b"Content-Length: " + b"1" * 5000 + b"\r\n\r\n",
    "two lengths": POST + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\n",
    "length and chunks": POST + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    "chunks and length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n",
    "chunks twice": POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n",
    "chunks not last": POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n",
    "an unknown coding": POST + b"Transfer-Encoding: x, chunked\r\n\r\n",
    "another expectation": POST + b"Expect: a miracle\r\nContent-Length: 5\r\n\r\n",
    "no size": CHUNKED + b"\r\n",
    "a size that is none": CHUNKED + b"5x\r\n",
    "a size with sign": CHUNKED + b"+5\r\n",
    "a bare line feed behind a size": CHUNKED + b"5\n",
    "a bare line feed behind an extension": CHUNKED + b"5\r\nhello\r\n5;a=b\nhello",
    "a size with prefix": CHUNKED + b"0x5\r\n",
    "an endless size": CHUNKED + b"0" * (MAX_LINE_BYTES + 1),
    "more than the size": CHUNKED + b"1\r\nab",
    "no line end after a chunk": CHUNKED + b"1\r\na\rb",
    "endless trailers": CHUNKED + b"0\r\n" + b"A: b\r\n" * 11_000,
    "a bare line feed in trailers": CHUNKED + b"0\r\nA: b\n",
}

TOO_LARGE = {
    "announced": POST + b"Content-Length: 101\r\n\r\n",
    "announced with a wish": POST + b"Expect: 100-continue\r\nContent-Length: 101\r\n\r\n",
    "a chunk": CHUNKED + b"65\r\n",
    "a huge chunk": CHUNKED + b"fffffffffffffff\r\n",
    "the sum": CHUNKED + b"64\r\n" + b"x" * 100 + b"\r\n1\r\n",
    "frames": CHUNKED
    + b"1;"
    + b"x" * 8000
    + b"\r\na\r\n"
    + b"".join(b"1;%s\r\na\r\n" % (b"y" * 8000) for _ in range(8)),
}


def fed(pieces):
    """The buffer after the pieces; each is given only as long as more is wanted."""
    buffer = RequestBuffer(LIMIT)
    for piece in pieces:
        assert not buffer.ready, "it was ready before its last byte"
        buffer.feed(piece)
    return buffer


@pytest.mark.parametrize("data", WHOLE.values(), ids=WHOLE)
def test_a_request_is_whole_at_its_last_byte_however_it_comes(data):
    assert fed([data]).state is State.WHOLE
    one_by_one = fed([data[i : i + 1] for i in range(len(data))])
    assert one_by_one.state is State.WHOLE and one_by_one.data == data
    for a in range(1, len(data)):
        assert fed([data[:a], data[a:]]).state is State.WHOLE
        for b in range(a + 1, len(data), 7):
            assert fed([data[:a], data[a:b], data[b:]]).state is State.WHOLE


@pytest.mark.parametrize("data", WHOLE.values(), ids=WHOLE)
def test_what_follows_a_request_is_kept(data):
    buffer = fed([data + b"\x00GET / HTTP/1.1\n\n"])
    assert buffer.state is State.WHOLE and buffer.data == data + b"\x00GET / HTTP/1.1\n\n"


@pytest.mark.parametrize(
    ("data", "state"),
    [(d, State.MALFORMED) for d in MALFORMED.values()] + [(d, State.BODY_TOO_LARGE) for d in TOO_LARGE.values()],
    ids=[*MALFORMED, *TOO_LARGE],
)
def test_what_breaks_a_rule_is_ready_at_once_however_it_comes(data, state):
    assert fed([data]).state is state and not fed([data]).wants_continue
    buffer = RequestBuffer(LIMIT)
    for i in range(len(data)):
        buffer.feed(data[i : i + 1])
    assert buffer.state is state
    for a in range(1, len(data), 1 + len(data) // 200):
        buffer = RequestBuffer(LIMIT)
        buffer.feed(data[:a])
        buffer.feed(data[a:])
        assert buffer.state is state, a


def test_a_head_without_end_is_too_large():
    line = b"X: " + b"y" * 1000 + b"\r\n"
    assert fed([POST, *[line] * (MAX_HEAD_BYTES // len(line) + 1)]).state is State.HEAD_TOO_LARGE
    whole = POST + line * (MAX_HEAD_BYTES // len(line)) + b"\r\n"
    assert fed([whole]).state is State.WHOLE
    assert fed([POST + line * 70 + b"\r\n"]).state is State.HEAD_TOO_LARGE


def test_who_waits_for_100_is_told_only_while_nothing_of_the_body_came():
    expect = POST + b"Expect: 100-Continue\r\n"
    assert fed([expect + b"Content-Length: 5\r\n\r\n"]).wants_continue
    assert fed([expect + b"Transfer-Encoding: chunked\r\n\r\n"]).wants_continue
    assert not fed([expect + b"Content-Length: 5\r\n\r\nh"]).wants_continue
    assert not fed([expect + b"Content-Length: 0\r\n\r\n"]).wants_continue
    assert not fed([expect + b"\r\n"]).wants_continue
    assert not fed([expect.replace(b"1.1", b"1.0") + b"Content-Length: 5\r\n\r\n"]).wants_continue
    assert not fed([POST + b"Content-Length: 5\r\n\r\n"]).wants_continue


def test_the_smallest_chunks_and_bytes_one_by_one_take_little_time():
    data = CHUNKED + b"1\r\na\r\n" * 100 + b"0\r\n\r\n"
    began = time.monotonic()
    for _ in range(20):
        fed([data[i : i + 1] for i in range(len(data))])
    buffer = RequestBuffer(1 << 20)
    buffer.feed(CHUNKED)
    while not buffer.ready:
        buffer.feed(b"1\r\na\r\n" * 1000)
    assert buffer.state is State.BODY_TOO_LARGE and len(buffer.data) < 2 * MAX_FRAME_BYTES
    seconds = time.monotonic() - began
    print(f"{seconds:.3f} s (limit 2)")
    assert seconds < 2


# -- beside gunicorn's parser


def parsed(data):
    """What gunicorn's parser makes of `data` with nothing behind it: "whole", "short" or "refused"."""
    parser = RequestParser(CONFIG, iter([data]), ("127.0.0.1", 1))
    try:
        body = next(parser).body.read()
        declared = [int(value) for name, value in parser.mesg.headers if name == "CONTENT-LENGTH"]
        return "short" if declared and len(body) < declared[0] else "whole"
    except (NoMoreData, StopIteration, ChunkMissingTerminator):
        return "short"
    except ParseException:
        return "refused"


def damaged(data, random):
    """`data` with one to three small changes."""
    data = bytearray(data)
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(data))
        match random.randrange(5):
            case 0:
                del data[at : at + random.randint(1, 4)]
            case 1:
                data[at:at] = random.choice([b"\r", b"\n", b"\r\n", b"0", b" ", b";", b":", b"\r\n\r\n"])
            case 2:
                data[at] = random.choice(b"\r\n 019afAF;:,\x00\xff-+x")
            case 3:
                del data[at:]
            case _:
                data[at:at] = data[random.randrange(len(data)) :][: random.randint(1, 12)]
        if not data:
            return b"G"
    return bytes(data)


def test_the_parser_never_misses_what_is_called_whole_and_nobody_waits_for_what_it_does_not_miss():
    random = Random(1)
    counts = Counter()
    for n in range(4000):
        data = damaged(random.choice([*WHOLE.values(), *MALFORMED.values()])[:2000], random)
        buffer = RequestBuffer(1 << 20)
        buffer.feed(data)
        verdict = parsed(data)
        counts[buffer.state.name, verdict] += 1
        if buffer.state is State.WHOLE:
            assert verdict != "short", (n, data)
        else:
            assert verdict != "whole", (n, data)
    print(counts)
    assert counts["WHOLE", "whole"] > 200 and counts["BODY", "short"] > 200 and counts["MALFORMED", "refused"] > 300
