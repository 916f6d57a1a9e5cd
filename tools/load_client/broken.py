"""Requests that break a rule: of HTTP, of JSON, of a route. Each is refused, and nothing else comes of it."""

from __future__ import annotations

import json
from dataclasses import dataclass

_POST = "POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
_END = "\r\n\r\n"
_GOOD = b'{"job_id":"j","prompt":"p","model":"m","messages":[{"role":"user","content":"p"}]}'


@dataclass(frozen=True)
class Broken:
    """One bad request.

    Attributes:
        data: its bytes; {host} and {path} of its head are filled in.
        statuses: those it may be answered with.
        may_reset: the worker may hang up before all is sent.
    """

    name: str
    head: str
    body: bytes
    statuses: tuple[int, ...]
    may_reset: bool = False

    def data(self, host: str, path: str) -> bytes:
        """What is sent."""
        return self.head.replace("{host}", host).replace("{path}", path).encode("latin-1") + self.body


def _json(name: str, body: bytes, *statuses: int) -> Broken:
    head = _POST + f"Content-Length: {len(body)}\r\n\r\n"
    return Broken(name, head, body, statuses or (400,))


def _head(name: str, head: str, *statuses: int, body: bytes = b"", may_reset: bool = True) -> Broken:
    return Broken(name, head, body, statuses or (400,), may_reset)


#: bodies that no route takes
BAD_BODIES = (
    _json("empty", b""),
    _json("no JSON", b"{not json"),
    _json("cut short", _GOOD[:-5]),
    _json("a list", b"[1, 2]"),
    _json("null", b"null"),
    _json("deep", b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    _json("deep objects", b'{"a":' * 5_000 + b"1" + b"}" * 5_000),
    _json("invalid UTF-8", b'{"job_id":"j","prompt":"\xff\xfe","messages":"\xff"}'),
    _json("UTF-16", '{"job_id":"j","prompt":"p"}'.encode("utf-16")),
    _json("BOM", b"\xef\xbb\xbf{}"),
    _json("NUL", b'{"job_id":"j","prompt":"a\\u0000b","messages":1}'),
    _json("lone surrogate", b'{"job_id":"j","prompt":"\\ud800","messages":1}'),
    _json("5,000 digits", b'{"job_id":"j","prompt":"p","messages":1,"max_tokens":' + b"9" * 5000 + b"}"),
    _json("1e999", b'{"job_id":"j","prompt":"p","messages":1,"temperature":1e999}'),
    _json("NaN", b'{"job_id":"j","prompt":"p","messages":1,"temperature":NaN}'),
    _json("a string for a number", b'{"job_id":"j","prompt":"p","messages":1,"max_tokens":"5"}'),
    _json("true for a number", b'{"job_id":"j","prompt":"p","messages":1,"max_tokens":true}'),
    _json("negative", b'{"job_id":"j","prompt":"p","messages":1,"max_tokens":-1}'),
    _json("an empty prompt", b'{"job_id":"j","prompt":"","messages":[]}'),
    # past the characters of one route, and the context of the others
    _json("a long prompt", json.dumps({"job_id": "j", "prompt": "1 " * 400_000, "messages": 1}).encode()),
    _json("five stops", b'{"job_id":"j","prompt":"p","messages":1,"stop":["a","b","c","d","e"]}'),
    _json("an empty stop", b'{"job_id":"j","prompt":"p","messages":1,"stop":[""]}'),
)
#: what is no HTTP, or not such as is spoken here
BAD_HTTP = (
    _head("garbage", "GARBAGE\r\n\r\n"),
    _head("zeros", "\0" * 100 + "\r\n\r\n"),
    _head("TLS", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + "a" * 200 + "\r\n\r\n"),
    _head("another version", "GET /health HTTP/9.9\r\nHost: {host}\r\n\r\n"),
    _head("a long line", "GET /" + "a" * 10_000 + " HTTP/1.1\r\nHost: {host}\r\n\r\n", 414),
    _head("a long header", "GET /health HTTP/1.1\r\nHost: {host}\r\nX-A: " + "y" * 10_000 + "\r\n\r\n", 431),
    _head(
        "100 headers of 8 KB",
        "GET /health HTTP/1.1\r\nHost: {host}\r\n" + "".join(f"X-{n}: {'y' * 8000}\r\n" for n in range(100)) + "\r\n",
        431,
    ),
    _head("a bare CR in a header", "GET /health HTTP/1.1\r\nHost: {host}\r\nX-Correlation-Id: a\rb\r\n\r\n"),
    _head("a header without a name", "GET /health HTTP/1.1\r\nHost: {host}\r\n: a\r\n\r\n"),
    _head("a long correlation id", "GET /health HTTP/1.1\r\nHost: {host}\r\nX-Correlation-Id: " + "y" * 200 + _END),
    _head("a negative length", _POST + "Content-Length: -1\r\n\r\n", body=b"{}"),
    _head("two lengths", _POST + "Content-Length: 2\r\nContent-Length: 3\r\n\r\n", body=b"{}"),
    _head("length and chunks", _POST + "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n", body=b"{}"),
    _head("bad chunks", _POST + "Transfer-Encoding: chunked\r\n\r\n", body=b"zz\r\n{}\r\n0\r\n\r\n"),
    _head("another coding", _POST + "Transfer-Encoding: rot13\r\n\r\n", 400, 501),
    _head("another expectation", _POST + "Expect: more\r\nContent-Length: 2\r\n\r\n", 417, body=b"{}"),
    _head("no such route", "GET /nowhere HTTP/1.1\r\nHost: {host}\r\n\r\n", 404, may_reset=False),
    _head("no such method", "DELETE {path} HTTP/1.1\r\nHost: {host}\r\n\r\n", 405, may_reset=False),
    _head(
        "a bad deadline",
        _POST + f"X-Deadline: yesterday\r\nContent-Length: {len(_GOOD)}\r\n\r\n",
        body=_GOOD,
        may_reset=False,
    ),
)
#: more than is taken
OVERSIZE = (
    _head("2 GiB announced", _POST + "Content-Length: 2147483648\r\n\r\n", 413, body=b"{"),
    _head("over 1 MiB", _POST + f"Content-Length: {(1 << 20) + 1}\r\n\r\n", 413, body=b" " * ((1 << 20) + 1)),
    _head(
        "chunks without end",
        _POST + "Transfer-Encoding: chunked\r\n\r\n",
        413,
        body=b"".join(b"%x\r\n%s\r\n" % (65536, b"[" * 65536) for _ in range(20)),
    ),
)


def shape_fault(path: str | None, status: int, content_type: str, body: bytes) -> str | None:
    """What is wrong with the body of a refusal: OpenAI's shape on /v1, the worker's own elsewhere; None: nothing.

    Where `path` is None it may be either: what is refused before anybody knows the route.
    """
    if path is None:
        faults = [shape_fault(each, status, content_type, body) for each in ("/v1/", "")]
        return faults[1] if all(faults) else None
    try:
        values = json.loads(body.decode("utf-8"))
    except ValueError:
        return f"{status} with a body that is no JSON: {body[:80]!r}"
    if not content_type.startswith("application/json"):
        return f"{status} as {content_type!r}"
    if path.startswith("/v1/"):
        error = values.get("error") if isinstance(values, dict) else None
        if not isinstance(error, dict) or not {"message", "type", "param", "code"} <= set(error):
            return f"{status} without OpenAI's error: {body[:120]!r}"
        message = error["message"]
    else:
        if not isinstance(values, dict) or not isinstance(values.get("code"), str):
            return f"{status} without a code: {body[:120]!r}"
        message = values.get("message")
    if not isinstance(message, str) or not message or "\n" in message or len(message) > 1000:
        return f"{status} without a readable message: {body[:120]!r}"
    return None
