"""What tools/load.py takes for wrong: each broken rule of the wire is found, and a right answer is not."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import load
import load_client
import pytest
from load_client.broken import shape_fault
from load_client.client import Client, Counts, Shared
from load_client.mutations import TARGETS, encode, spoiled
from load_client.report import SLOPE_JOBS, Report, quantile, slope
from load_client.routes import EXECUTE, V1_ROUTES, Case, ChatReading, ExecuteReading, OpenAIReading, WholeReading
from load_client.watch import ENDED, Log, Sample, Worker, sample
from load_client.wire import Answer, Malformed

CASE = Case("a prompt", 4, 0.0, 0)


def event(name, **data):
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


STARTED = event("started", job_id="j", tokens_in=3)
TOKENS = event("token", t="a", i=0) + event("token", t="é", i=1)
METRICS = event("metrics", queue_ms=1)
END = event("end", tokens_out=2, finish_reason="stop")
ERROR = event("error", code="CANCELLED", message="m", retriable=False)


def read(kind, data, at=7, n=1):
    """A reading of `data` that came in pieces of `at` bytes."""
    reading = kind("j", n)
    for i in range(0, len(data), at):
        reading.feed(data[i : i + at])
    reading.ended()
    return reading


@pytest.mark.parametrize("at", [1, 7, 10_000])
def test_a_right_stream_has_no_fault(at):
    reading = read(ExecuteReading, STARTED + b": ping\n\n" + TOKENS + METRICS + END, at)
    assert not reading.faults and reading.result() == (("aé",), ("stop",), (3, 2))
    cancelled = read(ExecuteReading, STARTED + TOKENS + ERROR, at)
    assert not cancelled.faults and cancelled.code == "CANCELLED"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (STARTED + TOKENS, "no terminal event"),
        (STARTED + END + END, "end behind the terminal event"),
        (STARTED + ERROR + END, "end behind the terminal event"),
        (TOKENS + END, "token before started"),
        (STARTED + STARTED + END, "started behind started"),
        (STARTED + METRICS + TOKENS + END, "token behind metrics"),
        (STARTED + event("token", t="a", i=1) + END, "token 1 where 0 is due"),
        (STARTED + event("token", t="a", i=0) * 2 + END, "token 0 where 1 is due"),
        (event("started", job_id="other", tokens_in=3) + END, "'other'"),
        (STARTED + b'event: token\ndata: {"t": "\\ud800", "i": 0}\n\n' + END, "UnicodeEncodeError"),
        (STARTED + b'event: token\ndata: {"t": "\xff", "i": 0}\n\n' + END, "UnicodeDecodeError"),
        (STARTED + b"event: token\ndata: {\n\n" + END, "JSONDecodeError"),
        (STARTED + event("surprise") + END, "nobody knows"),
        (STARTED + event("error", code="X", message="", retriable=False), "without message"),
        (STARTED + END + b"event: e", "unfinished event"),
        (b"", "no terminal event"),
    ],
)
def test_a_broken_stream_has_a_fault_that_says_why(data, says):
    assert any(says in fault for fault in read(ExecuteReading, data).faults)


def chunk(text="", reason=None, index=0, id="c", kind="text_completion", **more):
    choice = {"index": index, "text": text, "delta": {"content": text}, "finish_reason": reason}
    return b"data: " + json.dumps({"id": id, "object": kind, "choices": [choice], **more}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
FAILED = b'data: {"error":{"message":"m","type":"t","param":null,"code":"CANCELLED"}}\n\n'
USAGE = chunk(usage={"prompt_tokens": 3, "completion_tokens": 1}).replace(b'"choices": [', b'"choices": [], "x": [')


def test_right_streams_of_v1_have_no_fault():
    reading = read(OpenAIReading, chunk("a") + chunk("b", "stop") + USAGE + DONE)
    assert not reading.faults and reading.result() == (("ab",), ("stop",), (3, 1))
    two = read(OpenAIReading, chunk("a") + chunk("x", "stop", 1) + chunk("b", "length") + DONE, n=2)
    assert not two.faults and two.texts == ["ab", "x"] and two.reasons == ["length", "stop"]
    assert not read(ChatReading, chunk("a", "stop", kind="chat.completion.chunk") + DONE).faults
    failed = read(OpenAIReading, chunk("a") + FAILED)
    assert not failed.faults and failed.terminal == "error" and failed.code == "CANCELLED"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (chunk("a", "stop"), "no terminal event"),
        (chunk("a") + DONE, "before each choice has a finish_reason"),
        (chunk("a", "stop") + DONE + chunk("b"), "behind [DONE]"),
        (chunk("a", "stop") + chunk("b") + DONE, "behind its finish_reason"),
        (chunk("a", id="x") + chunk("b", "stop") + DONE, "a chunk of 'c'"),
        (chunk("a", "stop", kind="chat.completion.chunk") + DONE, "a chunk of"),
        (chunk("a", "stop", index=1) + DONE, "IndexError"),
        (FAILED + chunk("a"), "behind the error"),
        (b"event: token\ndata: {}\n\n", "not one line of data"),
    ],
)
def test_a_broken_stream_of_v1_has_a_fault(data, says):
    assert any(says in fault for fault in read(OpenAIReading, data).faults)


def test_whole_answers():
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    good = {"usage": usage, "choices": [{"index": 0, "text": "ab", "finish_reason": "stop"}]}
    assert read(WholeReading, json.dumps(good).encode()).result() == (("ab",), ("stop",), (3, 2))
    for wrong in (
        {**good, "usage": {**usage, "total_tokens": 6}},
        {**good, "choices": []},
        {**good, "choices": [{"index": 1, "text": "", "finish_reason": "stop"}]},
        {"choices": good["choices"]},
    ):
        assert read(WholeReading, json.dumps(wrong).encode()).faults
    assert read(WholeReading, b"").faults


def test_an_answer_is_read_in_any_pieces():
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    whole = b"HTTP/1.1 404 No\r\nContent-Length: 2\r\n\r\n{}HTTP/1.1 200"
    for at in (1, 3, 1000):
        first, second = Answer(), Answer()
        for answer, data in ((first, chunked), (second, whole)):
            for i in range(0, len(data), at):
                if not answer.done:
                    answer.feed(data[i : i + at])
        assert first.done and bytes(first.body) == b"abcde" and first.status == 200
        assert second.done and second.json() == {} and b"HTTP/1.1 200".startswith(second.rest)
    unchanged = Answer()
    unchanged.feed(b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n")
    assert unchanged.done and not unchanged.body
    for bad in (b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", chunked.replace(b"3\r\n", b"x\r\n"), b"x" * 70_000):
        with pytest.raises(Malformed):
            Answer().feed(bad)


def test_shapes_of_refusals():
    own = b'{"code":"INVALID_REQUEST","message":"no"}'
    openai = b'{"error":{"message":"no","type":"t","param":null,"code":null}}'
    assert shape_fault("/execute", 400, "application/json", own) is None
    assert shape_fault("/v1/completions", 400, "application/json", openai) is None
    for path, kind, body in (
        ("/execute", "application/json", openai),
        ("/v1/completions", "application/json", own),
        ("/execute", "text/html", own),
        ("/execute", "application/json", b"<html>"),
        ("/execute", "application/json", b'{"code":"X","message":"a\\nb"}'),
        ("/execute", "application/json", b"[]"),
    ):
        assert shape_fault(path, 400, kind, body)


def line(event, correlation_id="c", level="info", ts="2026-01-01T00:00:10.050Z", **more):
    return json.dumps({"event": event, "level": level, "ts": ts, "correlation_id": correlation_id, **more}).encode()


def test_the_log_tells_how_soon_a_job_went_and_which_never_did():
    log = Log()
    for each in ("c", "d", "e"):
        log.line(line("execute_start", each))
    log.left("c", "reset", 1767225610.0)  # 00:00:10
    log.line(line("execute_end", "c", outcome="disconnected"))
    log.line(line("execute_end", "d", outcome="finished"))
    log.left("d", "reset", 1767225610.0)
    assert log.gone_ms == {"reset": [pytest.approx(50, abs=0.5)]} and log.running == ["e"] and not log.faults
    log.line(line("execute_end", "d"))
    log.line(line("error", level="error", code="INTERNAL", message="m"))
    log.line(b"Traceback (most recent call last):\n")
    assert len(log.faults) == 3


def test_the_slope_of_memory():
    def samples(kib_a_job):
        return [(i * 0.5, 100 * i, Sample(0, 50_000 + int(kib_a_job * 100 * i), 1, 1)) for i in range(100)]

    assert slope(samples(2)) == pytest.approx(2 * 1000 / 1024, rel=1e-3) and slope(samples(0)) == 0
    assert slope(samples(1)[:10]) is None and SLOPE_JOBS == 1000
    assert [quantile(list(range(1, 101)), share) for share in (0.5, 0.99, 1)] == [50, 99, 100]


def test_requests_are_drawn_from_seed_and_number():
    drawn = [spoiled(3, n, TARGETS).data("h", {}) for n in range(300)]
    assert drawn == [spoiled(3, n, TARGETS).data("h", {}) for n in range(300)] and len(set(drawn)) > 240
    assert not any(d.startswith(b"POST /shutdown") for d in drawn)
    assert all(spoiled(0, n, TARGETS).data("h", {}) for n in range(30_000)), "whatever is spoiled can be spoiled again"
    assert json.loads(encode((("a", [1, {"b": None}]), ("c", "é")))) == {"a": [1, {"b": None}], "c": "é"}


def answer_with(*parts):
    """A server on a free port that answers each connection with the next of `parts`, and closes it."""
    left = list(parts)

    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(left.pop(0))
        writer.close()

    return asyncio.start_server(serve, "127.0.0.1", 0)


def as_stream(body):
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        (as_stream(STARTED + TOKENS + METRICS + END), None),
        (as_stream(STARTED + event("token", t="b", i=0) + END), "wrong text"),
        (as_stream(STARTED + TOKENS + METRICS + END)[:-5], "lost end"),
        (as_stream(STARTED + TOKENS), "wrong answer"),
        (as_stream(STARTED + ERROR), "wrong answer"),
        (b"HTTP/1.1 500 X\r\nContent-Length: 2\r\n\r\n{}", "wrong answer"),
        (b"nonsense\r\n\r\n", "lost end"),
    ],
)
def test_a_client_notes_what_is_wrong_with_an_answer(answer, wrong):
    async def one():
        server = await answer_with(answer)
        shared = Shared(Worker("127.0.0.1", server.sockets[0].getsockname()[1]), [EXECUTE], [CASE], [], 0, 5.0, 0.0)
        shared.expected["execute", CASE] = (("aé",), ("stop",), (3, 2))
        client = Client(shared, 0, 0)
        job = client.job(EXECUTE)
        job.reading.job_id = "j"
        await client.run(job)
        server.close()
        return shared.counts

    counts = asyncio.run(one())
    assert (not counts.faults) if wrong is None else wrong in counts.faults, counts.told
    report = Report()
    report.judge(Shared(Worker("h", 1), [], [], [], 0, 0.0, 0.0, counts), 1.0, True)
    assert bool(report.wrong) == (wrong is not None) and ("Nothing was wrong" in report.table()) == (wrong is None)


def test_routes_ask_for_every_field_that_decides():
    for route in (EXECUTE, *V1_ROUTES):
        body = json.loads(route.ask(CASE, "j"))
        assert body["temperature"] == 0 and body["max_tokens"] == 4 and body["seed"] == 0 and "top_p" in body
        assert ("job_id" in body) == route.has_job_id


def test_only_so_many_faults_are_told():
    counts = Counts()
    for n in range(1000):
        counts.note(str(n))
    assert counts.faults["wrong answer"] == 1000 and len(counts.told) == 60


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_end_leaves_no_traceback(number):
    program = """
import asyncio, os, sys
sys.path.insert(0, sys.argv[1])
from load_client.watch import run_to_end
async def work():
    os.kill(os.getpid(), int(sys.argv[2]))
    try:
        await asyncio.sleep(20)
    finally:
        print("tidied", flush=True)
run_to_end(work())
"""
    tools = Path(load_client.__file__).parents[1]
    command = [sys.executable, "-c", program, str(tools), str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stdout) == (ENDED, "tidied\n")
    assert done.stderr == "told to end before its time\n"


def test_a_worker_that_dies_is_told_with_its_last_words(monkeypatch, capsys):
    program = """
import json, socket, sys
server = socket.create_server(("127.0.0.1", 0))
for event in ({"event": "startup", "port": server.getsockname()[1]}, {"event": "ready"}):
    print(json.dumps({"level": "info", **event}), file=sys.stderr, flush=True)
server.accept()
print(json.dumps({"level": "error", "event": "error", "code": "INTERNAL", "message": "no more"}), file=sys.stderr)
sys.exit(3)
"""
    start = Worker.start
    monkeypatch.setattr(Worker, "start", lambda command, key: start([sys.executable, "-c", program], key))
    assert load.main(["--model", "m.gguf", "--seconds", "1"]) == 1
    told = capsys.readouterr().err
    assert "it ended with 3" in told and "no more" in told and "/health answers None" in told


def test_a_worker_that_answers_nothing_is_left_at_once(monkeypatch, capsys):
    program = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self, status, body):
        body = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.answer(200 if self.path == "/health" else 404, {"context_length": 1000})
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(400, {"code": "INVALID_REQUEST", "message": "no tokenizer", "retriable": False, "field": "prompt"})
    def log_message(self, *args):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
for event in ({"event": "startup", "port": server.server_address[1]}, {"event": "ready"}):
    print(json.dumps({"level": "info", **event}), file=sys.stderr, flush=True)
server.serve_forever()
"""
    start = Worker.start
    monkeypatch.setattr(Worker, "start", lambda command, key: start([sys.executable, "-c", program], key))
    assert load.main(["--model", "m.gguf", "--seconds", "600"]) == 1
    told = capsys.readouterr().err
    assert "no request is answered" in told and "no tokenizer" in told


def test_what_proc_shows_of_a_process_and_its_children():
    alone = sample(os.getpid())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        both, one = sample(os.getpid()), sample(child.pid)
        child.communicate(b"\n")
    assert alone is not None and both is not None and one is not None
    assert both.threads >= alone.threads + 1 and both.rss_kib >= one.rss_kib and one.descriptors >= 3
    assert sample(child.pid) is None
