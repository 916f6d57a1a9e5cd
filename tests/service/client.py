"""A worker in a subprocess, and a client that shows what really goes over the wire."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

JSON = {"Content-Type": "application/json"}
FAKE_APP = Path(__file__).parent / "fake_app.py"


class Worker:
    """A server process. `log` grows with its events; `raw_log` keeps every line of stderr."""

    def __init__(self, command, wait=True, timeout=60.0):
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, text=True, start_new_session=True
        )
        self.raw_log = []
        self.raw_out = []
        self.port = None
        self._readers = [
            threading.Thread(target=self._read, args=pair, daemon=True)
            for pair in ((self.process.stderr, self.raw_log), (self.process.stdout, self.raw_out))
        ]
        for reader in self._readers:
            reader.start()
        self.port = self.event("startup", timeout)["port"]
        if wait:
            self.event("ready", timeout)

    def _read(self, stream, lines):
        for line in stream:
            lines.append(line)

    @property
    def log(self):
        return [json.loads(line) for line in self.raw_log if line.startswith("{")]

    def events(self, name):
        return [e for e in self.log if e["event"] == name]

    def event(self, name, timeout=10.0, **fields):
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            for e in self.events(name):
                if all(e.get(k) == v for k, v in fields.items()):
                    return e
            if self.process.poll() is not None:
                time.sleep(0.1)
                break
            time.sleep(0.01)
        for e in self.events(name):
            if all(e.get(k) == v for k, v in fields.items()):
                return e
        raise AssertionError(f"no event {name} {fields}; log:\n{''.join(self.raw_log)}")

    def request(self, method, path, body=None, headers=None, timeout=30.0):
        """(status, headers, body) of one request on its own connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        try:
            connection.request(method, path, body, {**({} if body is None else JSON), **(headers or {})})
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def json(self, method, path, body=None, headers=None):
        status, _, data = self.request(method, path, body, headers)
        return status, json.loads(data)

    def execute(self, prompt, job_id="j", headers=None, **fields):
        return Stream(self.port, {"job_id": job_id, "prompt": prompt, **fields}, headers)

    def stop(self, sig=signal.SIGTERM, timeout=10.0):
        """(exit code, seconds until it was gone)."""
        began = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(sig)
        code = self.process.wait(timeout)
        seconds = time.monotonic() - began
        for reader in self._readers:
            reader.join(5)
        return code, seconds

    def kill(self):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


def fake_worker(*args, wait=True):
    return Worker([sys.executable, str(FAKE_APP), "0", *map(str, args)], wait)


class Stream:
    """A streaming POST /execute, read event by event from the socket."""

    def __init__(self, port, body, headers=None, timeout=15.0):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
        self.connection.request("POST", "/execute", json.dumps(body).encode(), {**JSON, **(headers or {})})
        self.response = self.connection.getresponse()
        self.status = self.response.status
        self.headers = self.response.headers

    def next(self):
        """The next (event, data), or None at the end of the stream."""
        name, data = None, None
        while True:
            line = self.response.readline()
            if not line:
                return None
            line = line.decode("utf-8").rstrip("\n")
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                data = json.loads(line[6:])
            elif not line and name is not None:
                return name, data

    def all(self):
        events = []
        while (event := self.next()) is not None:
            events.append(event)
        self.close()
        return events

    def close(self):
        self.response.close()
        self.connection.close()

    def abort(self):
        """Go away without a word: RST."""
        sock = self.connection.sock or self.response.fp.raw._sock
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        self.close()
