"""How tests of the OpenAI API ask, and how they read answers."""

from __future__ import annotations

import json

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Say hello"}]


def post(app, path, body, **headers):
    """The result of a POST; `body` may be bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return app.client.simulate_post(path, body=data, headers={"Content-Type": "application/json", **headers})


def ok(app, path, **body):
    """The JSON of an answer that is 200 and whole."""
    result = post(app, path, body)
    assert result.status_code == 200, result.text
    assert result.headers["content-type"] == "application/json"
    return result.json


def refused(app, path, status=400, **body):
    """The error of an answer in OpenAI's shape."""
    return error_of(post(app, path, body), status)


def error_of(result, status=400):
    assert result.status_code == status, result.text
    assert result.headers["content-type"] == "application/json" and list(result.json) == ["error"]
    error = result.json["error"]
    assert list(error) == ["message", "type", "param", "code"] and error["message"]
    assert "\n" not in error["message"] and len(error["message"]) < 300
    return error


def chunks_of(result):
    """The chunks of a stream that came to its good end."""
    assert result.status_code == 200, result.text
    assert result.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = result.text.split("\n\n")
    assert events.pop() == "" and events.pop() == "data: [DONE]"
    assert all(event.startswith("data: {") and "\n" not in event for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def streamed(app, path, **body):
    """The chunks of a stream."""
    return chunks_of(post(app, path, {**body, "stream": True}))


def joined(chunks):
    """Of each choice what its chunks say together: text, reason, ids, log-probabilities."""
    choices = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            one = choices.setdefault(
                choice["index"], {"text": "", "finish_reason": None, "token_ids": [], "logprobs": {}}
            )
            one["text"] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            assert one["finish_reason"] is None, "nothing follows the reason"
            one["finish_reason"] = choice["finish_reason"]
            one["token_ids"] += choice.get("token_ids", [])
            for name, values in (choice["logprobs"] or {}).items():
                if values is not None:
                    one["logprobs"].setdefault(name, []).extend(values)
    return [choices[index] for index in sorted(choices)]
