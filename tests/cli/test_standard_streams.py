"""Commands whose standard streams are not there: run by a program without a terminal, or with `2>&-`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from worker_orcd.cli import main

PROGRAM = [sys.executable, "-m", "worker_orcd"]
CLOSED = ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"]


def closed(command: str, *args: object) -> subprocess.Popen[str]:
    """Start a line of bash in which $@ is the program with `args`."""
    return subprocess.Popen(
        ["bash", "-c", command, "bash", *PROGRAM, *map(str, args)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def commands(goldens_dir, tmp_path) -> dict[str, list[object]]:
    """Every command that prints, on a tiny model."""
    llama, cpu = goldens_dir / "llama-Q4_0.gguf", ["--device", "cpu"]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": [1, 2, 3]}\n')
    return {
        "generate": ["--model", llama, *cpu, "--prompt", "a", "--max-tokens", "3", "--verbose"],
        "bench": ["--model", llama, *cpu, "-p", "8", "-n", "2", "--repeat", "1"],
        "inspect": [llama],
        "compare": [llama, llama, *cpu, "--prompts", prompts, "--max-tokens", "2"],
        "doctor": [],
        "logits": [llama, "--ids", "1,2", *cpu],
        "provenance": [llama],
    }


def test_commands_work_with_all_streams_closed(goldens_dir, tmp_path):
    """They end with 0, and `--out` holds what it should: nothing was written into a file that took a number."""
    asked = commands(goldens_dir, tmp_path)
    asked["provenance"] += ["--out", tmp_path / "entry.json"]
    asked["compare"] += ["--out", tmp_path / "report"]
    asked["logits"] += ["--out", tmp_path / "logits.npy"]
    begun = {name: closed('"$@" <&- >&- 2>&-', name, *args) for name, args in asked.items()}
    for name, process in begun.items():
        assert process.communicate(timeout=60) == ("", "") and process.returncode == 0, name
    assert json.loads((tmp_path / "entry.json").read_text())["name"] == "llama-Q4_0.gguf"
    assert json.loads((tmp_path / "report" / "compare.json").read_text())
    assert (tmp_path / "logits.npy").stat().st_size > 2 * 512 * 4


@pytest.mark.parametrize("redirection", CLOSED)
def test_generate_with_a_stream_closed(goldens_dir, tmp_path, redirection):
    args = ["generate", *commands(goldens_dir, tmp_path)["generate"], "--temperature", "0"]
    process = closed(f'"$@" {redirection}', *args)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == "" and bool(out.strip()) == (">&-" not in redirection.split())


def test_an_error_keeps_its_code_where_it_cannot_be_said():
    for args, code in ((["generate", "--nonsense"], 2), (["inspect", "/nowhere.gguf"], 1)):
        process = closed('"$@" 2>&-', *args)
        assert process.communicate(timeout=60) == ("", "") and process.returncode == code


def test_a_prompt_from_an_input_that_is_closed(goldens_dir):
    process = closed('"$@" <&-', "generate", "--model", goldens_dir / "llama-Q4_0.gguf", "--prompt", "-")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err == "error: INVALID_REQUEST: the prompt is empty\n"


def test_a_prompt_that_is_no_text(goldens_dir):
    model = str(goldens_dir / "llama-Q4_0.gguf")
    command = [*PROGRAM, "generate", "--model", model, "--device", "cpu", "--prompt", "-"]
    for errors, reason in (("strict", b"standard input is no utf-8 text"), ("surrogateescape", b"at character 1")):
        env = {**os.environ, "PYTHONIOENCODING": f"utf-8:{errors}"}  # which of them is Python's, the locale decides
        done = subprocess.run(command, input=b"a\xff", capture_output=True, env=env, check=False)
        assert done.returncode == 1 and done.stderr.startswith(b"error: INVALID_REQUEST: ") and reason in done.stderr


def test_serve_with_all_streams_closed(goldens_dir):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    model = goldens_dir / "llama-Q4_0.gguf"
    process = closed(
        'exec "$@" <&- >&- 2>&-', "serve", "--model", model, "--device", "cpu", "--port", port, "--print-curl"
    )
    try:
        limit = time.monotonic() + 30
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as answer:
                    assert json.load(answer)["ready"] is True
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < limit
                time.sleep(0.05)
        body = json.dumps({"job_id": "a", "prompt": "a", "max_tokens": 3}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/execute", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert "event: end" in answer.read().decode()
        # neither the master nor the worker may hold anything but the null device there
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert children
        for pid in (process.pid, *children):
            assert {os.readlink(f"/proc/{pid}/fd/{n}") for n in range(3)} == {"/dev/null"}
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == 0


class WriteOnly:
    """A stream of a program with windows: no `flush`, no `isatty`, no file."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


@pytest.mark.parametrize("name", ["generate", "inspect", "doctor", "logits", "provenance"])
def test_commands_inside_a_program_without_streams(goldens_dir, tmp_path, monkeypatch, name):
    args = [name, *map(str, commands(goldens_dir, tmp_path)[name])]
    for out, err in ((None, None), (WriteOnly(), WriteOnly())):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", None)
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            assert main.run(args) == 0
            assert main.run([name, "--nonsense"]) == 2
    assert out.text and "--nonsense" in err.text
