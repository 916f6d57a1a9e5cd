"""Errors in OpenAI's shape, the ends of streams, cancelling by an answer's id: http_errors.py, formats.py, ids.py."""

from __future__ import annotations

import http.client
import json
import threading
import time

import pytest

from service.in_process import App
from service.in_process import error_of as native_error_of
from service.openai.asking import CHAT, COMPLETIONS, chunks_of, error_of, joined, ok, post, refused
from worker_orcd.errors import InferenceTimeout, QueueFull
from worker_orcd.wsgi import raw_answers
from worker_orcd.wsgi.http_errors import is_openai, openai_details
from worker_orcd.wsgi.openai.ids import COMPLETION, MAX_JOBS, is_answer, job_ids, new_id

SLOW = {"prompt": "slow", "max_tokens": 1000}


def begun(app, n):
    """The jobs of the fake model once `n` run."""
    end = time.monotonic() + 5
    while len(app.service.llm().jobs) < n and time.monotonic() < end:
        time.sleep(0.005)
    assert len(app.service.llm().jobs) == n
    return app.service.llm().jobs


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1", 404),
        ("PUT", "/v1/models", 405),
        ("GET", "/v1/completions", 405),
        ("GET", "/tokenize", 405),
        ("POST", "/v1/models/x", 405),
    ],
)
def test_what_the_router_refuses_has_openais_shape_too(app, method, path, status):
    error = error_of(app.client.simulate_request(method, path), status)
    assert error["type"] == "invalid_request_error" and error["param"] is None


def test_other_paths_keep_the_workers_shape(app):
    native_error_of(app.client.simulate_get("/nothing"), 404)
    native_error_of(app.client.simulate_get("/v1x"), 404)
    assert is_openai("/v1/x") and is_openai("/tokenize") and not is_openai("/tokenizer") and not is_openai("")


def test_a_loading_worker_is_503_with_retry_after():
    app = App()
    for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize", "/apply-template"):
        result = post(app, path, {})
        assert error_of(result, 503)["type"] == "server_error" and result.headers["retry-after"]
    result = app.client.simulate_get("/v1/models")
    assert error_of(result, 503)["code"] == "NOT_READY"


def test_a_key_is_asked_for():
    app = App(api_key="secret").ready()
    error = error_of(post(app, COMPLETIONS, {"prompt": "say hi"}), 401)
    assert error["type"] == "authentication_error"
    assert post(app, COMPLETIONS, {"prompt": "say hi"}, Authorization="Bearer secret").status_code == 200
    app.service.stop(0)


def test_a_full_queue_is_429_with_retry_after_and_nothing_of_the_request_runs():
    app = App(max_seqs=4, max_queue=2).ready()
    holder = threading.Thread(target=lambda: post(app, COMPLETIONS, {**SLOW, "n": 4}))
    holder.start()
    begun(app, 4)
    result = post(app, COMPLETIONS, {"prompt": "say hi", "n": 3})
    assert error_of(result, 429)["type"] == "rate_limit_error" and result.headers["retry-after"]
    assert len(app.service.llm().jobs) == 4, "all or none"
    assert ok(app, COMPLETIONS, prompt="say hi", n=2)["choices"][1]["text"] == "hi"
    app.service.stop(0)
    holder.join()


def test_deadlines_are_those_of_execute(smollm2):
    for left_ms, max_tokens in ((-1000, 1), (300, 2000)):
        deadline = {"X-Deadline": str(int(1000 * time.time()) + left_ms)}
        body = {"prompt": "Once", "max_tokens": max_tokens, "ignore_eos": True}
        assert error_of(post(smollm2, COMPLETIONS, body, **deadline), 504)["code"] == "INFERENCE_TIMEOUT"
    error = error_of(post(smollm2, COMPLETIONS, {"prompt": "Once"}, **{"X-Deadline": "soon"}))
    assert error["param"] == "X-Deadline"


def test_an_error_that_ends_a_job_is_a_status_where_nothing_was_sent(app):
    error = refused(app, COMPLETIONS, prompt="fail", n=2)
    assert error["param"] == "max_tokens"
    app.service.llm().limit = 0
    assert refused(app, CHAT, 429, messages=[{"role": "user", "content": "say hi"}])["code"] == "QUEUE_FULL"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_an_error_in_a_stream_is_its_last_chunk(app, path):
    body = {"prompt": "fail"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "fail"}]}
    result = post(app, path, {**body, "stream": True})
    events = [json.loads(e.removeprefix("data: ")) for e in result.text.split("\n\n") if e]
    assert result.status_code == 200 and "[DONE]" not in result.text
    assert [("error" in e) for e in events] == [False] * (len(events) - 1) + [True]
    assert events[-1]["error"]["param"] == "max_tokens" and "choices" not in events[-1]
    assert joined(events[:-1])[0]["text"] == "x"


@pytest.mark.parametrize("stream", [False, True])
def test_cancel_takes_the_id_of_an_answer_and_ends_all_its_jobs(app, stream):
    answers = []
    thread = threading.Thread(target=lambda: answers.append(post(app, COMPLETIONS, {**SLOW, "n": 3, "stream": stream})))
    thread.start()
    jobs = begun(app, 3)
    first = next(iter(jobs))
    assert list(jobs) == job_ids(first, 3) and first.startswith("cmpl-")
    time.sleep(0.2)
    jobs[first].finish("stop")
    assert app.client.simulate_post("/cancel", json={"job_id": first}).json["state"] == "cancelling"
    thread.join(5)
    assert all(job.finished for job in jobs.values())
    if stream:
        assert json.loads(answers[0].text.split("\n\n")[-2].removeprefix("data: "))["error"]["code"] == "CANCELLED"
        assert {chunk["id"] for chunk in map(json.loads, _data(answers[0].text)) if "id" in chunk} == {first}
    else:
        assert error_of(answers[0], 499)["code"] == "CANCELLED"
    assert app.client.simulate_post("/cancel", json={"job_id": first}).json["state"] == "finished"


def _data(text):
    return [event.removeprefix("data: ") for event in text.split("\n\n") if event]


def test_answers_of_what_never_reaches_the_application_have_the_shape_of_their_path():
    for path, kind in (("/v1/completions?x=1", "error"), ("/execute", "code")):
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        answer = raw_answers.encode(raw_answers.too_slow(20), "c", raw_answers.path_of(head))
        assert kind in json.loads(answer.split(b"\r\n\r\n", 1)[1])
    assert raw_answers.path_of(b"\x16\x03\x01") == raw_answers.path_of(b"") == ""


def test_ids():
    assert new_id(COMPLETION) != new_id(COMPLETION) and is_answer(new_id(COMPLETION)) and not is_answer("j")
    assert len(set(job_ids("a", MAX_JOBS))) == MAX_JOBS


def test_types_of_errors():
    assert openai_details(QueueFull("full"))["error"]["type"] == "rate_limit_error"
    assert openai_details(InferenceTimeout("late"))["error"]["type"] == "server_error"


def test_line_breaks_of_unicode_never_cut_a_chunk(app):
    text = "a\u2028b\u0085c\r\nd\u2029"
    chunks = chunks_of(post(app, COMPLETIONS, {"prompt": f"say {text}", "stream": True}))
    assert joined(chunks)[0]["text"] == text
    whole = post(app, COMPLETIONS, {"prompt": f"say {text}"})
    assert whole.json["choices"][0]["text"] == text and "\u2028" not in whole.text


def test_a_client_that_goes_ends_all_choices(start):
    worker = start()
    for stream in (False, True):
        body = json.dumps({"prompt": "slow" if stream else "quiet", "n": 2, "stream": stream}).encode()
        connection = http.client.HTTPConnection("127.0.0.1", worker.port, timeout=5)
        connection.request("POST", COMPLETIONS, body, {"Content-Type": "application/json"})
        if stream:
            assert connection.getresponse().status == 200
        end = time.monotonic() + 5
        while len(worker.events("execute_start")) < 2 * (1 + stream) and time.monotonic() < end:
            time.sleep(0.01)
        began = time.monotonic()
        connection.close()
        for started in worker.events("execute_start")[-2:]:
            ended = worker.event("execute_end", job_id=started["job_id"])
            assert ended["outcome"] in ("disconnected", "error") and started["route"] == ended["route"] == COMPLETIONS
        assert time.monotonic() - began < 2
        assert {e["answer_id"] for e in worker.events("execute_start")[-2:]} == {
            worker.events("execute_start")[-2]["job_id"]
        }
    assert worker.json("GET", "/health")[0] == 200
