"""The programs of examples/, each run as its reader would run it, on a real model on the CPU."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from service.client import Worker, fake_worker

import worker_orcd
from worker_orcd import LLM, SamplingParams

pytestmark = pytest.mark.timeout(120)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROMPTS = [json.loads(line) for line in (EXAMPLES / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
PROGRAMS = sorted(path.name for path in EXAMPLES.glob("*.py"))


def run(name: str, *args: object, text: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """An example, run with `text` on its standard input."""
    command = [sys.executable, EXAMPLES / name, *map(str, args)]
    return subprocess.run(
        command, input=text, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **env}
    )


def said(name: str, *args: object, text: str = "", **env: str) -> str:
    """What an example printed; it must end well and warn of nothing."""
    done = run(name, *args, text=text, **env)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture(scope="module")
def smollm2(model_path):
    return model_path("smollm2")


@pytest.fixture(scope="module")
def llm(smollm2):
    with LLM(smollm2, device="cpu", progress=False) as llm:
        yield llm


@pytest.fixture(scope="module")
def worker(smollm2):
    program = str(Path(sys.executable).with_name("worker-orcd"))
    worker = Worker([program, "serve", "--device", "cpu", "--port", "0", "--model", str(smollm2)])
    yield worker
    code, _ = worker.stop()
    worker.kill()
    assert code == 0


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_example_is_short_and_imports_public_names_only(name):
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert not [a.name for a in node.names if a.name.startswith("worker_orcd")], "from worker_orcd import NAME"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "worker_orcd":
            assert node.module == "worker_orcd" and {a.name for a in node.names} <= set(worker_orcd.__all__)


@pytest.mark.parametrize("name", ["serve_client.py", "chat_client.py"])
def test_a_client_of_the_worker_needs_the_standard_library_only(name):
    tree = ast.parse((EXAMPLES / name).read_text(encoding="utf-8"))
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {n.split(".")[0] for n in names} <= set(sys.stdlib_module_names)


def test_the_readme_names_every_file():
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert PROGRAMS and set(re.findall(r"\((\w+\.(?:py|jsonl))\)", readme)) == {*PROGRAMS, "prompts.jsonl"}


def test_batch_gives_each_prompt_what_it_gets_alone(smollm2, llm):
    lines = said("batch.py", smollm2).splitlines()
    assert len(lines) == 2 * len(PROMPTS)
    for line, counts, prompt in zip(lines[::2], lines[1::2], PROMPTS, strict=True):
        settings = {"temperature": 0.0, "max_tokens": 16, **prompt}
        alone = llm.generate([settings.pop("prompt")], SamplingParams(**settings))[0]
        assert line == f"{prompt['prompt']!r} -> {alone.text!r}"
        assert counts.strip().startswith(f"{len(alone.token_ids)} tokens, ended by {alone.finish_reason}, seed ")
    assert "Paris" in lines[0] and lines[5].strip().startswith("11 tokens, ended by stop")


def test_batch_takes_other_prompts_and_the_demo_model(smollm2, tmp_path):
    prompts = tmp_path / "one.jsonl"
    prompts.write_text('{"prompt": "The capital of France is", "max_tokens": 2}\n')
    # the demo model is this very file: nothing is fetched
    text = said("batch.py", "--prompts", prompts, WORKER_ORCD_MODELS=str(smollm2.parent))
    assert text.splitlines()[0] == "'The capital of France is' -> ' Paris.'"


def test_stream_is_what_generate_gives_up_to_the_text_it_is_left_at(smollm2, llm):
    prompt = "Once upon a time, there was a little robot who"
    whole = llm.generate([prompt], SamplingParams(max_tokens=64, temperature=0.0))[0].text
    assert said("stream.py", smollm2, "--until", "never said") == f"{prompt}{whole}\n"
    assert "people" in whole
    left = said("stream.py", smollm2, "--until", "people").removesuffix("\n")
    assert left.endswith("people") and f"{prompt}{whole}".startswith(left) and len(left) < len(f"{prompt}{whole}")


def test_chat_remembers_what_was_said(smollm2):
    text = said("chat.py", smollm2, text="What is the capital of France?\nAnd of Italy?\n")
    answers = re.findall(r"^assistant: (.*)$", text, re.MULTILINE)
    assert len(answers) == 2 and "Paris" in answers[0] and "Rome" in answers[1]
    tokens = [int(n) for n in re.findall(r"^    (\d+) tokens in", text, re.MULTILINE)]
    out = [int(n) for n in re.findall(r" in, (\d+) out$", text, re.MULTILINE)]
    assert tokens[1] > tokens[0] + out[0], "the second question was asked without the first answer"


def test_chat_tells_the_code_of_an_error(smollm2):
    done = run("chat.py", smollm2, text="word " * 9000)
    assert done.returncode == 1 and done.stderr.startswith("INVALID_REQUEST: ") and "Traceback" not in done.stderr


def test_logits_are_those_of_the_library(smollm2, llm):
    lines = said("logits.py", smollm2, "--text", "The capital of France is Paris.").splitlines()
    ids = llm.tokenizer.encode("The capital of France is Paris.")
    logits = llm.logits(ids).astype(np.float64)
    assert lines[0] == f"logits: float32 [{len(ids)}, {llm.info.n_vocab}]"
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    chosen = probabilities[np.arange(len(ids) - 1), ids[1:]]
    shown = [float(line.split("p = ")[1].split()[0]) for line in lines[1:-1]]
    assert np.abs(np.array(shown) - chosen).max() < 1e-4
    assert next(line for line in lines if line.startswith("' Paris'")).endswith("likeliest: ' Paris'")
    perplexity = float(lines[-1].removeprefix("perplexity: "))
    assert abs(perplexity / np.exp(-np.log(chosen).mean()) - 1) < 1e-3


def test_the_client_prints_the_text_and_the_end(worker, llm):
    url = f"http://127.0.0.1:{worker.port}"
    args = (url, "--prompt", "Once upon a time", "--max-tokens", 12, "--seed", 7)
    first = said("serve_client.py", *args)
    expected = llm.generate(["Once upon a time"], SamplingParams(max_tokens=12, seed=7))[0]
    assert first == f"{expected.text}\n{len(expected.token_ids)} tokens, ended by {expected.finish_reason}\n"
    assert said("serve_client.py", *args) == first
    assert said("serve_client.py", *args[:-1], 8) != first


def test_the_client_exits_with_1_where_the_request_is_refused(worker):
    done = run("serve_client.py", f"http://127.0.0.1:{worker.port}/", "--max-tokens", 0)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("400: ") and json.loads(done.stderr[5:])["field"] == "max_tokens"


def test_the_chat_client_says_what_the_library_says_and_what_was_cached(smollm2, worker):
    questions = "What is the capital of France?\nAnd of Italy?\n"
    text = said("chat_client.py", f"http://127.0.0.1:{worker.port}/", text=questions)
    counts = re.findall(r"^    (\d+) tokens in, (\d+) of them cached, (\d+) out$", text, re.MULTILINE)
    expected = said("chat.py", smollm2, text=questions)
    shown = re.sub(r"^(    \d+ tokens in), \d+ of them cached,", r"\1,", text, flags=re.MULTILINE)
    assert shown == expected and "Paris" in text and "Rome" in text
    # the second prompt begins with the first one and its answer
    (first, _, out), (second, cached, _) = counts
    assert int(second) > int(cached) >= int(first) + int(out) - 1 > int(first)


def test_the_chat_client_tells_of_a_refusal(worker):
    done = run("chat_client.py", f"http://127.0.0.1:{worker.port}", text="word " * 9000)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    error = json.loads(done.stderr.removeprefix("400: "))["error"]
    assert error["code"] == "context_length_exceeded"


@pytest.fixture(scope="module")
def fake():
    worker = fake_worker("--api-key", "secret", "--ping-sec", 0.2)
    yield worker
    worker.kill()


def test_the_client_exits_with_1_where_the_job_ends_in_an_error(fake):
    url = f"http://127.0.0.1:{fake.port}"
    done = run("serve_client.py", url, "--prompt", "fail", WORKER_ORCD_API_KEY="secret")
    assert (done.returncode, done.stdout) == (1, "x")
    assert done.stderr == "\nINVALID_REQUEST: no room in the cache\n"


def test_the_chat_client_gives_its_key_and_tells_of_an_error_in_a_stream(fake):
    url = f"http://127.0.0.1:{fake.port}"
    text = "a\u2028b: \u65e5\u672c \U0001f600"
    out = said("chat_client.py", url, text=f"say {text}\n", WORKER_ORCD_API_KEY="secret")
    n = len(text.encode())
    assert out == f"user: say {text}\nassistant: {text}\n    {n + 4} tokens in, 0 of them cached, {n} out\n"
    done = run("chat_client.py", url, text="fail\n", WORKER_ORCD_API_KEY="secret")
    assert (done.returncode, done.stdout) == (1, "user: fail\nassistant: x")
    assert done.stderr == "\nINVALID_REQUEST: no room in the cache\n"
    done = run("chat_client.py", url, text="say x\n", WORKER_ORCD_API_KEY="wrong")
    assert done.returncode == 1 and done.stderr.startswith("401: ")


def test_the_client_gives_its_key_and_reads_every_character(fake):
    url = f"http://127.0.0.1:{fake.port}"
    text = "a\u2028b: \u65e5\u672c \U0001f600"
    out = said("serve_client.py", url, "--prompt", f"say {text}", WORKER_ORCD_API_KEY="secret")
    assert out == f"{text}\n{len(text.encode())} tokens, ended by stop\n"
    done = run("serve_client.py", url, WORKER_ORCD_API_KEY="wrong")
    assert done.returncode == 1 and done.stderr.startswith("401: ")


def test_the_client_sees_that_the_worker_is_gone(fake):
    """Last of its module: it kills the worker, after some silence that comments break."""
    url = f"http://127.0.0.1:{fake.port}"
    env = {**os.environ, "WORKER_ORCD_API_KEY": "secret"}
    command = [sys.executable, EXAMPLES / "serve_client.py", url, "--prompt", "quiet"]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    fake.event("execute_start")
    with pytest.raises(subprocess.TimeoutExpired):
        client.wait(1)
    os.killpg(fake.process.pid, signal.SIGKILL)
    out, err = client.communicate(timeout=30)
    assert (client.returncode, out) == (1, "") and err == "\nthe connection was cut\n"
