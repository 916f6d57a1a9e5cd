"""The first bodies of all come at the same time: no thread meets a structure that another one is still making."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

#: paths whose bodies are taken in, and one that is
BODIES = {
    "/execute": b'{"job_id":"j","prompt":"hi","max_tokens":1}',
    "/cancel": b'{"job_id":"j"}',
    "/v1/completions": b'{"prompt":"hi","max_tokens":1}',
    "/v1/chat/completions": b'{"messages":[{"role":"user","content":"hi"}],"max_tokens":1}',
    "/tokenize": b'{"prompt":"hi"}',
    "/detokenize": b'{"tokens":[1]}',
    "/apply-template": b'{"messages":[{"role":"user","content":"hi"}]}',
}
PROGRAM = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
from service.in_process import App
app = App().ready()
app.client.simulate_get("/health")
start = threading.Barrier(8)
def in_no_hurry(frame, event, arg):
    if frame.f_code.co_filename.endswith("/typing.py") and frame.f_code.co_name == "__hash__":
        time.sleep(0.01)  # asked of each field of a structure that is being made
def ask():
    start.wait()
    sys.settrace(in_no_hurry)
    app.client.simulate_post(sys.argv[2], body=sys.argv[3])
threads = [threading.Thread(target=ask) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("answered")
"""


@pytest.mark.parametrize("path", BODIES)
def test_the_first_bodies_of_a_route_come_at_once(path):
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parents[1]), path, BODIES[path].decode()]
    env = os.environ | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env)
    assert (done.returncode, done.stdout) == (0, "answered\n"), done.stderr
