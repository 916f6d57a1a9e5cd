"""The application without a server, with a model that speaks on command, and how its answers are read."""

from __future__ import annotations

import io
import json
import time

from falcon import testing

from service.fake_llm import FakeLLM
from worker_orcd.config import ServeConfig
from worker_orcd.observe.events import EventLog
from worker_orcd.wsgi.app import create_app
from worker_orcd.wsgi.service import Service

#: what every client of a worker on its own machine says
HEADERS = {"Host": "127.0.0.1:8080", "Content-Type": "application/json"}


class App:
    def __init__(self, load=lambda config, progress, on_fatal, on_plan: FakeLLM(config, on_fatal), **config):
        self.out = io.StringIO()
        config = {"model": "/models/fake.gguf", "device": "cpu", **config}
        self.config = ServeConfig(**config)
        self.terminated = []
        self.service = Service(self.config, EventLog(self.out), load, terminate=lambda: self.terminated.append(1))
        self.client = testing.TestClient(create_app(self.service), headers=HEADERS)

    def ready(self):
        self.service.start()
        end = time.monotonic() + 5
        while self.service.state == "loading" and time.monotonic() < end:
            time.sleep(0.002)
        assert self.service.state == "ready"
        return self

    def execute(self, body=None, headers=None, **fields):
        if body is None:
            body = json.dumps({"job_id": "j", "prompt": "say hi", **fields})
        return self.client.simulate_post("/execute", body=body, headers=headers)

    @property
    def log(self):
        return [json.loads(line) for line in self.out.getvalue().splitlines()]


def error_of(result, status=400, code="INVALID_REQUEST"):
    assert result.status_code == status, result.text
    assert result.headers["content-type"] == "application/json"
    assert result.json["code"] == code and result.json["message"]
    assert "\n" not in result.json["message"] and len(result.json["message"]) < 300
    return result.json


def events_of(result):
    assert result.status_code == 200, result.text
    assert result.headers["content-type"] == "text/event-stream; charset=utf-8"
    blocks = [b.split("\n") for b in result.text.split("\n\n") if b and not b.startswith(":")]
    return [(b[0].removeprefix("event: "), json.loads(b[1].removeprefix("data: "))) for b in blocks]
