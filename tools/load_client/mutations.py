"""Good requests, spoiled in one to three places: values, JSON, headers, methods, paths. Each is drawn from a seed and
its number, so that it can be made again alone.

Whether the result breaks a rule is not known here: some are good again. None of them stops a worker.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

Pairs = list[tuple[str, object]]


class Raw(str):
    """Text that stands in JSON as it is."""


@dataclass(frozen=True)
class Target:
    """A route: its method and path, and the fields of a good body with values for each."""

    method: str
    path: str
    needed: dict[str, object] = field(default_factory=dict)
    optional: dict[str, tuple[object, ...]] = field(default_factory=dict)


_SAMPLING: dict[str, tuple[object, ...]] = {
    "max_tokens": (1, 4, 8),
    "temperature": (0, 0.7, 2),
    "top_p": (0.5, 1.0),
    "seed": (0, 1, (1 << 64) - 1),
    "stop": (["a"], ["\n\n", "zz"]),
    "top_k": (0, 5),
    "min_p": (0, 0.1),
    "repetition_penalty": (1, 1.3),
}
_OPENAI: dict[str, tuple[object, ...]] = {
    **_SAMPLING,
    "stop": ("a", ["a", "b"]),
    "stream": (True, False),
    "stream_options": ({"include_usage": True}, {}),
    "n": (1, 2),
    "presence_penalty": (-2, 0.5),
    "frequency_penalty": (2, 0.0),
    "logit_bias": ({"5": 10, "7": -100}, {}),
    "min_tokens": (0, 2),
    "ignore_eos": (True,),
    "stop_token_ids": ([5, 7], []),
    "bad_words": (["a"], []),
    "user": ("somebody",),
    "return_token_ids": (True,),
}
_MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "one two three"}]
TARGETS = (
    Target("POST", "/execute", {"job_id": "j", "prompt": "one two three"}, _SAMPLING),
    Target("POST", "/cancel", {"job_id": "nobody"}),
    Target(
        "POST",
        "/v1/completions",
        {"model": "m", "prompt": "one two three", "max_tokens": 4},
        {**_OPENAI, "echo": (True,), "logprobs": (0, 5), "suffix": ("x",), "prompt": ([5, 6], ["a", "b"], [[5], [6]])},
    ),
    Target(
        "POST",
        "/v1/chat/completions",
        {"model": "m", "messages": _MESSAGES, "max_tokens": 4},
        {
            **_OPENAI,
            "logprobs": (True,),
            "top_logprobs": (0, 20),
            "max_completion_tokens": (3,),
            "tools": ([], [{"type": "function", "function": {"name": "f"}}]),
            "tool_choice": ("auto",),
            "response_format": ({"type": "json_object"}, {"type": "text"}),
            "chat_template_kwargs": ({"a": 1},),
            "continue_final_message": (True,),
            "messages": ([{"role": "user", "content": [{"type": "text", "text": "a"}]}],),
        },
    ),
    Target("POST", "/tokenize", {"prompt": "one two"}, {"add_special_tokens": (True, False), "messages": (_MESSAGES,)}),
    Target("POST", "/detokenize", {"tokens": [5, 6, 7]}),
    Target("POST", "/apply-template", {"messages": _MESSAGES}),
    *(Target("GET", p) for p in ("/health", "/ready", "/metrics", "/v1/models", "/openapi.json", "/", "/v1", "/docs")),
    Target("GET", "/shutdown"),
)
#: values that are wrong nearly everywhere
_VALUES: tuple[object, ...] = (
    None, True, False, 0, -1, 1, 5, 0.5, -0.0, 1e308, 1 << 31, 1 << 53, (1 << 64) - 1, 1 << 64, -(1 << 63), -(1 << 70),
    Raw("1e999"), Raw("-1e999"), Raw("NaN"), Raw("Infinity"), Raw("9" * 5000), Raw("-" + "9" * 400), Raw("1e-400"),
    Raw("0x10"), Raw("01"), Raw("1."), Raw("+1"), Raw('"\\ud800"'), Raw('"\\udfff\\ud800"'), Raw('"\\u0000"'),
    Raw('"\\x"'), Raw('"a\nb"'), Raw("'a'"), Raw("nul"), Raw("[1,]"), Raw('{"a":1,}'), Raw("[" * 300 + "]" * 300),
    Raw("[" * 20_000 + "]" * 20_000), Raw('{"a":' * 300 + "1" + "}" * 300), "", " ", "a", "5", "1.0", "true", "\u2028",
    "\x7f\x1b[31m", "é" * 300, "😀" * 40, "x" * 257, "x" * 32_769, "a\u0000b", "../../etc/passwd", "{{7*7}}",
    "{% for i in range(10**9) %}x{% endfor %}", "<|im_start|>system", [], [[]], [None], [0], [-1], [1 << 40], [1.5],
    [True], [""], ["a"] * 5, ["x" * 1000], [["a"]], [5] * 3000, list(range(600)), {}, {"a": 1}, {"": ""},
    {"-1": 1}, {"5": 1e9}, {"99999999999999999999": 1}, {"x": "y"}, {str(i): 1 for i in range(600)},
    [{"role": "user", "content": "a"}], [{"role": 5}], [{"role": "nobody", "content": "a"}], [{"content": "a"}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://localhost/"}}]}],
    [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": None}],
    [{"role": "assistant", "content": "a"}] * 50, [{"role": "tool", "content": "a", "tool_call_id": "x"}],
)  # fmt: skip
_NAMES = ("x", "", "prompt", "job_id", "messages", "__class__", "constructor", "a" * 5000, "é", "\u0000", "$ref", "n")
_METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "PROPFIND", "get", "X-Y", "CONNECT")
_TYPES = (
    None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/json; x=y",
    "application/JSON;charset=utf-8", "application/json; charset=utf-16", "*/*", "", "application/xml", "a" * 200, "é",
)  # fmt: skip
_HEADERS: tuple[tuple[str, str], ...] = (
    ("X-Correlation-Id", "é"), ("X-Correlation-Id", "x" * 129), ("X-Correlation-Id", "x" * 7000),
    ("X-Correlation-Id", ""), ("X-Correlation-Id", "a\tb"), ("X-Correlation-Id", "fine"), ("X-Deadline", "0"),
    ("X-Deadline", "1"), ("X-Deadline", "-5"), ("X-Deadline", "9" * 400), ("X-Deadline", "9999999999999"),
    ("X-Deadline", "NaN"),
    ("X-Deadline", "2026-01-01"), ("X-Deadline", "9999-12-31T23:59:59Z"), ("X-Deadline", "2020-01-01T00:00:00+25:00"),
    ("Authorization", "Bearer x"), ("Authorization", "é"), ("Authorization", "Bearer " + "x" * 7000),
    ("Origin", "http://evil.example"), ("Origin", "null"), ("Accept", "image/png"), ("Accept", "é;q=NaN"),
    ("Accept-Encoding", "gzip, br;q=x"), ("Content-Encoding", "gzip"), ("Cookie", "a" * 4000), ("Range", "bytes=0-1"),
    ("If-None-Match", "*"), ("Upgrade", "websocket"), ("Expect", "100-continue"), ("Expect", "cake"),
    ("TE", "trailers"),
    ("X-Forwarded-For", "1.2.3.4"), ("X-HTTP-Method-Override", "DELETE"), ("Forwarded", "for=x;host=y"),
)  # fmt: skip
_HOSTS = ("", "evil.example", "localhost", "127.0.0.1", "[::1]", "a b", "é", "127.0.0.1:99999", "x" * 300)


@dataclass(frozen=True)
class Spoiled:
    """A request in the making.

    Attributes:
        body: None for none.
        split: the body travels in chunks of so many bytes; 0: with its length.
        framing: the number of its bytes is told wrongly, so that no other request can follow it.
    """

    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    host: str | None
    content_type: str | None
    pairs: tuple[tuple[str, object], ...] | None
    body: bytes | None = None
    split: int = 0
    framing: str | None = None

    @property
    def alone(self) -> bool:
        """Whether it needs a connection of its own."""
        return self.framing is not None or any(n in ("Expect", "Upgrade") for n, _ in self.headers)

    def data(self, host: str, extra: dict[str, str]) -> bytes:
        """The bytes of the request."""
        lines = [f"{self.method} {self.path} HTTP/1.1", f"Host: {host if self.host is None else self.host}"]
        lines += [f"{n}: {v}" for n, v in (*extra.items(), *self.headers)]
        body = self.body
        if body is not None:
            if self.content_type is not None:
                lines.append(f"Content-Type: {self.content_type}")
            if self.framing is not None:
                lines.append(self.framing)
            elif self.split:
                lines.append("Transfer-Encoding: chunked")
                cuts = [body[i : i + self.split] for i in range(0, len(body), self.split)]
                body = b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in cuts) + b"0\r\n\r\n"
            else:
                lines.append(f"Content-Length: {len(body)}")
        return "\r\n".join([*lines, "", ""]).encode("utf-8") + (body or b"")


def encode(value: object) -> str:
    """JSON, in which `Raw` stands as it is and an object is a dict or a tuple of pairs."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        value = tuple(value.items())
    if isinstance(value, tuple):
        return "{" + ",".join(f"{json.dumps(n)}:{encode(v)}" for n, v in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(encode, value)) + "]"
    return json.dumps(value)


def spoiled(seed: int, number: int, targets: tuple[Target, ...]) -> Spoiled:
    """The request of that number."""
    rng = random.Random(f"{seed} {number}")
    target = rng.choice(targets)
    pairs: Pairs = list(target.needed.items())
    if "job_id" in target.needed:
        pairs[0] = ("job_id", f"f{number}")
    for name in rng.sample(sorted(target.optional), min(len(target.optional), rng.choice((0, 0, 1, 3)))):
        pairs = [(n, v) for n, v in pairs if n != name] + [(name, rng.choice(target.optional[name]))]
    kind = "application/json"
    made = Spoiled(target.method, target.path, (), None, kind, tuple(pairs) if target.needed else None)
    at_values = [f for f in _SPOILERS if f in (_value, _field)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        spoil = rng.choice(at_values) if target.needed and rng.random() < 0.6 else rng.choice(_SPOILERS)
        made = spoil(rng, made)
    if made.pairs is not None and made.body is None:
        made = replace(made, body=encode(made.pairs).encode("utf-8", "surrogatepass"))
    if made.body is not None:
        made = _bytes(rng, made) if rng.random() < 0.15 else made
    if "shutdown" in made.path.lower() and made.method == "POST":
        made = replace(made, method="PUT")  # it would do as it is told
    return made


def _value(rng: random.Random, made: Spoiled) -> Spoiled:
    """Another value of a field."""
    if not made.pairs:
        return _header(rng, made)
    pairs = list(made.pairs)
    i = rng.randrange(len(pairs))
    name, value = pairs[i]
    new: object = rng.choice(_VALUES)
    if isinstance(value, list) and value and rng.random() < 0.4:  # inside of it
        inner = list(value)
        k = rng.randrange(len(inner))
        item = inner[k]
        one_field = isinstance(item, dict) and bool(item) and rng.random() < 0.7
        inner[k] = {**item, rng.choice(sorted(item)): new} if one_field else new
        new = inner
    elif isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.4:
        new = rng.choice((-value - 1, value + 0.5, value * 1e6, str(value), [value]))
    elif isinstance(value, str) and rng.random() < 0.3:
        new = value + rng.choice(("\u0000", "\u2028", "é", "😀", " ", "\r\n")) * rng.choice((1, 3, 200))
    pairs[i] = (name, new)
    return replace(made, pairs=tuple(pairs))


def _field(rng: random.Random, made: Spoiled) -> Spoiled:
    """A field too few, too many, twice, or under another name."""
    if not made.pairs:
        return _header(rng, made)
    pairs = list(made.pairs)
    i = rng.randrange(len(pairs))
    how = rng.randrange(4)
    if how == 0:
        del pairs[i]
    elif how == 1:
        pairs.insert(i, (rng.choice(_NAMES), rng.choice(_VALUES)))
    elif how == 2:
        pairs.append((pairs[i][0], rng.choice(_VALUES)))
    else:
        pairs[i] = (rng.choice((pairs[i][0].upper(), pairs[i][0] + " ", rng.choice(_NAMES))), pairs[i][1])
    return replace(made, pairs=tuple(pairs))


def _header(rng: random.Random, made: Spoiled) -> Spoiled:
    """One more header, or sixty, or another Host."""
    how = rng.randrange(8)
    if how == 0:
        return replace(made, host=rng.choice(_HOSTS))
    if how == 1:
        return replace(made, headers=(*made.headers, *((f"X-H{n}", "y") for n in range(rng.choice((30, 70))))))
    return replace(made, headers=(*made.headers, rng.choice(_HEADERS)))


def _content_type(rng: random.Random, made: Spoiled) -> Spoiled:
    return replace(made, content_type=rng.choice(_TYPES))


def _method(rng: random.Random, made: Spoiled) -> Spoiled:
    return replace(made, method=rng.choice(_METHODS))


def _path(rng: random.Random, made: Spoiled) -> Spoiled:
    p = made.path
    ways = (p + "/", "/" + p, p + "?a=b&a=%00", p + "%2f", p.upper(), p + "/../execute", p + "/" + "a" * 300,
            p[:-1] or "/", "/%ff%fe", p + "#x", "/*", p + ";x=y", p + "/%2e%2e/", "/v1" + p,
            p.replace("e", "%65"), "/é")  # fmt: skip
    return replace(made, path=rng.choice(ways))


def _chunks(rng: random.Random, made: Spoiled) -> Spoiled:
    return replace(made, split=rng.choice((1, 7, 1000)))


def _framing(rng: random.Random, made: Spoiled) -> Spoiled:
    """A length that is not the body's."""
    ways = ("Content-Length: 1", "Content-Length: 100000", "Content-Length: -1", "Content-Length: 99999999999999999999",
            "Content-Length: 1\r\nContent-Length: 2", "Content-Length: x", "Transfer-Encoding: chunked", "X-Nothing: 1",
            "Transfer-Encoding: gzip", "Content-Length: 3\r\nTransfer-Encoding: chunked", "Content-Length: +5",
            "Transfer-Encoding: chunked, chunked", "Content-Length : 5", "Content-Length: 1048577")  # fmt: skip
    return replace(made, framing=rng.choice(ways))


def _bytes(rng: random.Random, made: Spoiled) -> Spoiled:
    """Other bytes of the body."""
    assert made.body is not None
    body = bytearray(made.body)
    how = rng.randrange(8)
    if how == 0:
        del body[rng.randrange(len(body) + 1) :]
    elif how == 1:
        for _ in range(rng.choice((1, 4))):
            if body:
                body[rng.randrange(len(body))] = rng.randrange(256)
    elif how == 2:
        body = bytearray(bytes(body).decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-32", "utf-8-sig"))))
    elif how == 3:
        body *= 2
    elif how == 4:
        body = bytearray(b"[" + body + b"]")
    elif how == 5:
        body = bytearray(rng.choice((b"", b" " * 1000, b"null", b"\x1f\x8b\x08\x00", b"a=b&c=d", b'"', b"\xff" * 50)))
    elif how == 6:
        at = rng.randrange(len(body) + 1)
        body[at:at] = rng.choice((b"\x00", b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b",", b"//x\n", b"\\", b"\r\n\r\n"))
    else:
        body += rng.choice((b"x", b"\x00" * 10, b" " * 5, b"{}", b"\r\n"))
    return replace(made, body=bytes(body))


_SPOILERS: tuple[Callable[[random.Random, Spoiled], Spoiled], ...] = (
    _value, _field, _header, _header, _content_type, _method, _path, _chunks, _framing,
)  # fmt: skip
