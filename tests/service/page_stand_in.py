"""The worker's page and health beside a stand-in for what the page calls: /v1 and /metrics, on a port of its own.

The answers keep to the contract of the OpenAI routes. The last message of a conversation says how it is answered; see
`_StandIn._pieces`. `requests` grows with (path, body, headers) of each call.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import falcon

from service.fake_llm import FakeLLM
from service.in_process import App


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Handler(WSGIRequestHandler):
    def get_environ(self):
        return {**super().get_environ(), "stand_in.socket": self.connection}

    def log_message(self, *args):
        pass


class PageWorker:
    """The real application with routes added.

    Attributes:
        requests: (path, body, headers) of each call of /v1.
        cancelled: set when a client was gone before its answer was complete.
        metrics: what GET /metrics answers, or None where there is no such route.

    Args:
        template: whether the model has a chat template.
        metrics: as above.
        ready: whether the model is loaded at once; else when `loaded` is set.
        health: a status with which GET /health is refused.
        config: fields of `ServeConfig`.
    """

    def __init__(self, template=True, metrics="", ready=True, health=None, **config):
        def load(config, progress, on_fatal, on_plan):
            while not self.loaded.wait(0.01):
                progress(self.percent, 100)
            llm = FakeLLM(config, on_fatal)
            llm.info.chat_template_sha256 = "7e" * 32 if template else None
            return llm

        self.loaded = threading.Event()
        self.percent = 40
        self.requests = []
        self.cancelled = threading.Event()
        self.metrics = metrics
        self.app = App(load, **config)
        if ready:
            self.loaded.set()
            self.app.ready()
        else:
            self.app.service.start()
        falcon_app = self.app.client.app
        falcon_app.add_route("/v1/chat/completions", _StandIn(self, True))
        falcon_app.add_route("/v1/completions", _StandIn(self, False))
        falcon_app.add_route("/metrics", _Metrics(self))
        if health is not None:
            falcon_app.add_route("/health", _Refusal(health))
        self._server = make_server("127.0.0.1", 0, falcon_app, _Server, _Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def bodies(self):
        return [body for _, body, _ in self.requests]

    def stop(self):
        """No connection is taken any more."""
        self._server.shutdown()
        self._server.server_close()

    def close(self):
        self.loaded.set()
        self.stop()
        self.app.service.stop(0)


class _Refusal:
    def __init__(self, status):
        self._status = status

    def on_get(self, req, resp):
        raise falcon.HTTPError(self._status)


class _Metrics:
    def __init__(self, worker):
        self._worker = worker

    def on_get(self, req, resp):
        if self._worker.metrics is None:
            raise falcon.HTTPNotFound
        resp.content_type = falcon.MEDIA_TEXT
        resp.text = self._worker.metrics() if callable(self._worker.metrics) else self._worker.metrics


class _StandIn:
    def __init__(self, worker, chat):
        self._worker = worker
        self._chat = chat

    def on_post(self, req, resp):
        body = json.loads(req.bounded_stream.read())
        self._worker.requests.append((req.path, body, dict(req.headers)))
        words = body["messages"][-1]["content"] if self._chat else body["prompt"]
        verb, _, rest = words.partition(" ")
        if verb == "refuse":
            status, headers = int(rest), {"Retry-After": "3"} if rest in ("429", "503") else {}
            error = {"message": "top_k: no <b>such</b> value", "type": "invalid_request_error", "param": "top_k"}
            resp.status, resp.text = status, json.dumps({"error": {**error, "code": None}})
            resp.set_headers(headers)
            return
        resp.content_type = "text/event-stream; charset=utf-8"
        resp.stream = self._stream(verb, rest, body, req.env["stand_in.socket"])

    def _stream(self, verb, rest, body, sock):
        n = 0
        try:
            for piece in self._pieces(verb, rest, sock):
                n += 1
                yield b": ping\n\n" if piece is None else piece if isinstance(piece, bytes) else self._chunk(piece)
            yield self._chunk("", "length" if n == body.get("max_tokens") else "stop")
            usage = {"prompt_tokens": 40, "completion_tokens": n, "total_tokens": n + 40}
            if body.get("stream_options", {}).get("include_usage"):
                yield _event({"choices": [], "usage": {**usage, "prompt_tokens_details": {"cached_tokens": 12}}})
            yield b"data: [DONE]\n\n"
        except GeneratorExit:
            self._worker.cancelled.set()
            raise

    def _pieces(self, verb, rest, sock):
        """say TEXT: a piece for each three characters; slow: a piece every 20 ms until the client goes; think:
        reasoning first; wait: comments first; refuse STATUS: an error in place of an answer; and after two pieces,
        fail: an error; junk: what is no JSON; end: the connection is closed; reset: it breaks."""
        if verb == "say":
            yield from (rest[i : i + 3] for i in range(0, len(rest), 3))
        elif verb == "slow":
            for i in range(500):
                yield f"w{i} "
                time.sleep(0.02)
        elif verb == "think":
            yield {"reasoning_content": "Let me see <b>this</b>"}
            time.sleep(0.2)
            yield "The answer"
        elif verb == "wait":
            for _ in range(10):
                yield None
                time.sleep(0.05)
            yield "at last"
        else:
            yield "so "
            yield "far"
            if verb == "fail":
                yield _event(
                    {"error": {"message": "no room in the KV cache", "type": "server_error", "code": "VRAM_OOM"}}
                )
            elif verb == "junk":
                yield b"data: {oops\n\n"
            elif verb == "reset":
                time.sleep(0.1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raise ConnectionAbortedError

    def _chunk(self, piece, finish=None):
        delta = piece if isinstance(piece, dict) else {"content": piece}
        choice = {"index": 0, "finish_reason": finish, **({"delta": delta} if self._chat else {"text": piece})}
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return _event({"id": "c-1", "object": kind, "created": 0, "model": "fake", "choices": [choice]})


def _event(data):
    return f"data: {json.dumps(data)}\n\n".encode()
