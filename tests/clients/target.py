"""The worker that the clients talk to, which run.py names in variables, and small things that their tests share."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request

URL = os.environ["WORKER_URL"]
BASE = f"{URL}/v1"
KEY = os.environ["WORKER_KEY"]
PROMPT = "Once upon a time, there was a little robot who"
MESSAGES = [{"role": "user", "content": "Say a short sentence about the sea."}]


def ask(path: str, body: object = None) -> dict:
    """The object that a plain request is answered with."""
    return json.loads(read(path, body))


def read(path: str, body: object = None) -> str:
    """The text that a plain request is answered with; no client library knows of it."""
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(URL + path, data, headers), timeout=60) as answer:
        return answer.read().decode("utf-8")


def metric(name: str) -> float | None:
    """The value of a metric without labels, None where the worker has none of that name."""
    try:
        lines = read("/metrics").splitlines()
    except urllib.error.HTTPError:
        return None
    values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name]
    return sum(values) if values else None


def nothing_runs(within: float = 2.0) -> bool:
    """Whether the worker comes to have no job within some seconds; also True where it does not tell."""
    end = time.monotonic() + within
    while metric("worker_orcd_num_requests_running"):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
