"""The command line: what commands print, and what they say when they cannot."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time

import click
import pytest

from worker_orcd.cli import main, options
from worker_orcd.engine.sampling import RULES, SamplingParams
from worker_orcd.errors import CudaError, ModelLoadError

PROGRAM = [sys.executable, "-m", "worker_orcd"]


@pytest.fixture
def call(capsys):
    """A function: arguments -> (exit code, stdout, stderr)."""

    def run(*args):
        code = main.run([str(a) for a in args])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def one_error_line(result, code):
    status, out, err = result
    assert status == 1 and out == ""
    assert err.startswith(f"error: {code}: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err


# -- help and options

COMMANDS = ["serve", "generate", "inspect", "bench", "compare", "doctor", "demo-model", "logits", "provenance"]


def test_help_lists_every_command(call):
    code, out, _ = call("--help")
    assert code == 0 and all(f"  {name} " in out for name in COMMANDS) and set(COMMANDS) == set(main.cli.commands)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help_and_its_variable(call, name):
    code, out, _ = call(name, "--help")
    assert code == 0
    for parameter in main.cli.commands[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            flags = [o for o in parameter.opts if o.startswith("--")]
            variables = ["WORKER_ORCD_" + flag[2:].replace("-", "_").upper() for flag in flags]
            assert parameter.envvar == (variables[0] if len(flags) == 1 else variables)
            assert flags and all(text in out for text in [*flags, *variables])


def test_help_is_quick_and_needs_no_compiled_module():
    script = (
        "import sys; from worker_orcd.cli import main; code = main.run(['serve', '--help']);"
        "assert not [m for m in sys.modules if m.startswith('worker_orcd._')], 'a compiled module was loaded';"
        "assert 'gunicorn' not in sys.modules and 'numpy' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version(call):
    code, out, _ = call("--version")
    assert code == 0 and "worker-orcd" in out


@pytest.mark.parametrize(
    "args",
    [
        ["generate"],
        ["nonsense"],
        ["serve", "--model", "m", "--port", "x"],
        ["serve", "--model", "m", "--port", "70000"],
        ["generate", "--modle", "x"],
        ["logits", "m", "--ids", "a,b"],
        ["serve", "--model", "m", "--log-format", "xml"],
    ],
)
def test_wrong_usage_is_2_and_says_what(call, args):
    code, out, err = call(*args)
    assert code == 2 and out == "" and "Error" in err and "Traceback" not in err


def test_a_flag_can_come_from_the_environment(call, monkeypatch, tmp_path):
    monkeypatch.setenv("WORKER_ORCD_MODEL", str(tmp_path / "from-env.gguf"))
    monkeypatch.setenv("WORKER_ORCD_DEVICE", "cpu")
    assert "from-env.gguf" in one_error_line(call("generate", "--prompt", "x"), "MODEL_LOAD_FAILED")


def test_parse_ids():
    assert options.parse_ids("1,2, 3") == [1, 2, 3]
    with pytest.raises(click.BadParameter):
        options.parse_ids("1,,2")


# -- one readable line


def _bad_files(tmp_path):
    (tmp_path / "text.gguf").write_text("this is no model\n" * 10)
    (tmp_path / "empty.gguf").write_bytes(b"")
    os.mkfifo(tmp_path / "fifo.gguf")
    locked = tmp_path / "locked.gguf"
    locked.write_bytes(b"GGUF")
    locked.chmod(0)
    names = ["missing.gguf", "text.gguf", "empty.gguf", "fifo.gguf", "."]
    return names if os.geteuid() == 0 else [*names, "locked.gguf"]  # nothing is locked to root


@pytest.mark.parametrize("command", ["generate", "inspect", "bench", "logits"])
def test_a_file_that_is_no_model_is_one_line(call, tmp_path, command):
    for name in _bad_files(tmp_path):
        path = tmp_path / name
        args = {
            "generate": ["--model", path, "--prompt", "x", "--device", "cpu"],
            "inspect": [path],
            "bench": ["--model", path, "--device", "cpu"],
            "logits": [path, "--ids", "1", "--device", "cpu"],
        }
        began = time.monotonic()
        assert str(path) in one_error_line(call(command, *args[command]), "MODEL_LOAD_FAILED")
        assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "args",
    [
        ["--temperature", "3"],
        ["--top-p", "-1"],
        ["--top-k", "-1"],
        ["--seed", "-1"],
        ["--max-tokens", "0"],
        ["--repetition-penalty", "0"],
        ["--min-p", "nan"],
        [*["--stop", "x"] * 5],
        ["--stop", ""],
        ["--prompt", ""],
        ["--device", "tpu"],
    ],
)
def test_a_value_that_breaks_its_rule_is_one_line(call, args):
    base = ["generate", "--model", "m.gguf", "--prompt", "x", "--device", "cpu"]
    one_error_line(call(*base, *args), "INVALID_REQUEST")


@pytest.mark.parametrize(
    "args",
    [
        ["--worker-id", "x"],
        ["--device", "cuda:x"],
        ["--inference-timeout-sec", "-1"],
        ["--expect-sha256", "abc"],
        ["--api-key", ""],
        ["--host", ""],
        ["--device", "cpu", "--gpu-device", "1"],
        ["--device", "cpu", "--vram-limit-mb", "9"],
        ["--host", "256.1.1.1"],
    ],
)
def test_serve_refuses_before_it_starts(call, args):
    one_error_line(call("serve", "--model", "m.gguf", *args), "INVALID_REQUEST")


def test_an_error_message_cannot_break_the_line(call, monkeypatch):
    def fail(*args, **kwargs):
        raise ModelLoadError("bad \x1b[31mkey\n\x00", path="m\n.gguf")

    monkeypatch.setattr("worker_orcd.diagnose.inspect.inspect", fail)
    err = one_error_line(call("inspect", "m.gguf"), "MODEL_LOAD_FAILED")
    assert err.rstrip("\n").isprintable()


def test_a_device_that_is_not_there_is_one_line(call, monkeypatch):
    def fail(device):
        raise CudaError("libcuda.so.1 was not found", device=device)

    monkeypatch.setattr("worker_orcd.runtime.devices.resolve", fail)
    one_error_line(call("generate", "--model", "m", "--prompt", "x", "--device", "cuda:0"), "CUDA_ERROR")


def test_a_reader_that_goes_away_is_no_error(goldens_dir):
    command = " ".join([*PROGRAM, "inspect", str(goldens_dir / "gpt-oss-MXFP4.gguf")])
    done = subprocess.run(["bash", "-c", f"{command} | head -n 1"], capture_output=True, text=True, check=False)
    assert done.stderr == "" and done.stdout.count("\n") == 1


# -- inspect


def test_inspect_shows_every_file(call, goldens_dir):
    for path in sorted(goldens_dir.glob("*.gguf")):
        code, out, err = call("inspect", path)
        assert code == 0 and err == ""
        assert all(f"\n{part}:" in out for part in ("metadata", "types", "tokenizer", "hparams", "plan", "memory"))
        assert "token_embd.weight" in out and "KV cache, 1,000 tokens" in out
        code, out, _ = call("inspect", path, "--json")
        facts = json.loads(out)
        assert facts["quant_kind"] == path.stem.split("-")[-1] or path.stem.startswith(("gpt-oss", "phi3"))
        assert facts["memory"]["weight_bytes"] <= facts["bytes"] and facts["plan"]["ops"] > 20
        assert {t["name"] for t in facts["tensors"]} >= {"token_embd.weight"}


def test_inspect_of_a_vocabulary_goes_as_far_as_it_goes(call, goldens_dir):
    for path in sorted((goldens_dir / "tokenizers").glob("*.gguf")):
        code, out, _ = call("inspect", path, "--json")
        facts = json.loads(out)
        assert code == 0 and facts["tensors"] == [] and facts["quant_kind"] is None
        assert facts["tokenizer"]["kind"] in ("gguf-bpe", "gguf-spm") and "error" in facts["plan"]
    assert "no tensors" in call("inspect", goldens_dir / "tokenizers" / "phi-3.gguf")[1]


def test_inspect_escapes_what_a_file_says():
    from worker_orcd.diagnose import inspect

    facts = {
        "path": "a\x1b[2J",
        "name": "b\n",
        "arch": "llama",
        "quant_kind": "F16",
        "version": 3,
        "bytes": 10,
        "parts": ["a"],
        "metadata": {"k\r": "v\x07" * 100},
        "types": {},
        "tensors": [],
        "tokenizer": {"error": "x\n"},
        "hparams": {"error": "x"},
        "plan": {"error": "x"},
        "memory": {"error": "\x1b"},
    }
    text = inspect.as_text(facts)
    assert all(line.isprintable() for line in text.split("\n"))


def test_doctor_says_what_to_do(call):
    code, out, _ = call("doctor")
    assert code == 0 and "Python" in out
    findings = json.loads(call("doctor", "--json")[1])
    assert {"name", "status", "detail", "advice"} == set(findings[0])
    assert all(f["advice"] for f in findings if f["status"] == "missing")


# -- with a model


@pytest.fixture(scope="session")
def golden(goldens_dir):
    return goldens_dir / "llama-Q4_0.gguf"


def test_logits(call, golden, tmp_path):
    import numpy as np

    out_file = tmp_path / "x.npy"
    code, out, _ = call("logits", golden, "--ids", "1,2,3", "--device", "cpu", "--json", "--out", out_file)
    rows = json.loads(out)
    values = np.load(out_file)
    assert code == 0 and values.shape == (3, 512) and values.dtype == np.float32
    assert [r["id"] for r in rows] == [1, 2, 3]
    assert [t["id"] for t in rows[2]["top"]] == list(np.argsort(-values[2], kind="stable")[:5])
    code, out, _ = call("logits", golden, "--ids", "1,2,3", "--device", "cpu", "--top", "2")
    assert code == 0 and out.count("\n") == 3
    one_error_line(call("logits", golden, "--ids", "512", "--device", "cpu"), "INVALID_REQUEST")


def test_bench_measures_what_was_asked(call, golden):
    args = ["bench", "--model", golden, "--device", "cpu", "-p", "16,32", "-n", "70", "--batch", "1,3", "--repeat", "2"]
    code, out, err = call(*args, "--json")
    assert code == 0 and err == ""
    report = json.loads(out)
    assert [(r["test"], r["n_tokens"], r["batch"]) for r in report["results"]] == [
        ("prefill", 16, 1),
        ("prefill", 32, 1),
        ("decode", 70, 1),
        ("decode", 70, 3),
    ]
    assert all(
        r["slowest"] <= r["tokens_per_s"] * 1.0001 and r["tokens_per_s"] <= r["fastest"] * 1.0001
        for r in report["results"]
    )
    assert report["bandwidth_gb_per_s"] > 1 and report["results"][2]["percent_of_bandwidth"] > 0
    code, out, _ = call(*args)
    assert code == 0 and "decode 70 x 3" in out and "tokens/s" in out
    assert "256" in one_error_line(call(*args, "-p", "257"), "INVALID_REQUEST")


def test_bytes_per_step_counts_what_is_read(goldens_dir):
    from worker_orcd.diagnose import bench
    from worker_orcd.engine import kv_blocks
    from worker_orcd.gguf.model_file import ModelFile
    from worker_orcd.models import plan

    with ModelFile(goldens_dir / "qwen2-Q8_0.gguf") as mf:
        p = plan.build(mf)
        tied = "output.weight" not in mf.tensors
        all_weights = sum(mf.tensors[n].nbytes for n in p.weights)
        embedding = mf.tensors["token_embd.weight"]
        expected = all_weights - (0 if tied else embedding.nbytes - embedding.nbytes // embedding.shape[1])
        assert bench.bytes_per_step(p, mf, 1, 0) == expected
        kv = bench.bytes_per_step(p, mf, 2, 10) - bench.bytes_per_step(p, mf, 2, 0)
        assert kv == 20 * p.n_layer * kv_blocks.position_bytes(p)
    with ModelFile(goldens_dir / "gpt-oss-MXFP4.gguf") as mf:  # 4 of 8 experts
        p = plan.build(mf)
        experts = sum(mf.tensors[n].nbytes for n, w in p.weights.items() if w.kind.startswith("expert"))
        one, many = (bench.bytes_per_step(p, mf, b, 0) for b in (1, 100))
        assert experts * 0.49 < many - one < experts * 0.51 + 100 * 1000


def test_generate_is_the_same_every_time_and_streams_what_json_tells(call, model_path):
    args = [
        "generate",
        "--model",
        model_path("smollm2"),
        "--device",
        "cpu",
        "--temperature",
        "0",
        "--max-tokens",
        "12",
        "--prompt",
        "The capital of France is",
    ]
    runs = {call(*args)[1] for _ in range(3)}
    assert len(runs) == 1
    (text,) = runs
    code, out, err = call(*args, "--json")
    facts = json.loads(out)
    assert code == 0 and err == "" and facts["text"] + "\n" == text and "Paris" in text
    assert facts["tokens_out"] == len(facts["token_ids"]) == 12 and facts["finish_reason"] == "length"
    assert 0 <= facts["seed"] < 2**64 and facts["device"] == "cpu"


def test_generate_seed_is_made_up_told_and_enough_to_repeat(call, model_path):
    args = [
        "generate",
        "--model",
        model_path("smollm2"),
        "--device",
        "cpu",
        "--max-tokens",
        "10",
        "--prompt",
        "Once",
        "--json",
    ]
    first, second = (json.loads(call(*args)[1]) for _ in range(2))
    assert first["seed"] != second["seed"]
    again = json.loads(call(*args, "--seed", first["seed"])[1])
    assert again["token_ids"] == first["token_ids"]


def test_generate_chat_stop_and_limits(call, model_path):
    base = ["generate", "--model", model_path("smollm2"), "--device", "cpu", "--temperature", "0"]
    code, out, _ = call(*base, "--chat", "--max-tokens", "8", "--prompt", "Say hello.", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["tokens_in"] > 8  # the template is there
    whole = json.loads(call(*base, "--max-tokens", "12", "--prompt", "One, two, three,", "--json")[1])["text"]
    stop = whole[4:7]
    cut = json.loads(call(*base, "--max-tokens", "12", "--prompt", "One, two, three,", "--stop", stop, "--json")[1])
    assert cut["finish_reason"] == "stop" and cut["text"] == whole[: whole.index(stop)]
    one_error_line(call(*base, "--max-tokens", "9000", "--prompt", "x"), "INVALID_REQUEST")
    one_error_line(call(*base, "--context-length", "9000", "--prompt", "x"), "INVALID_REQUEST")
    one_error_line(call(*base, "--expect-sha256", "0" * 64, "--prompt", "x"), "MODEL_LOAD_FAILED")


def test_ctrl_c_is_130_without_a_traceback(model_path):
    process = subprocess.Popen(
        [
            *PROGRAM,
            "generate",
            "--model",
            str(model_path("smollm2")),
            "--device",
            "cpu",
            "--prompt",
            "Count: 1 2 3",
            "--max-tokens",
            "2000",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in err


def test_prompt_from_standard_input(model_path):
    command = [
        *PROGRAM,
        "generate",
        "--model",
        str(model_path("smollm2")),
        "--device",
        "cpu",
        "--prompt",
        "-",
        "--max-tokens",
        "3",
        "--temperature",
        "0",
    ]
    done = subprocess.run(command, input="The capital of France is", capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Paris" in done.stdout and done.stderr == ""


def test_demo_model_path(call, monkeypatch, tmp_path):
    target = tmp_path / "demo.gguf"
    target.write_bytes(b"x")
    assert stat.S_ISREG(target.stat().st_mode)
    monkeypatch.setattr("worker_orcd.diagnose.demo_model.path", lambda: target)
    assert call("demo-model") == (0, f"{target}\n", "")


def test_generate_has_a_flag_for_each_sampling_field_that_names_one():
    defaults = SamplingParams()
    options_of = {p.name: p for p in main.cli.commands["generate"].params}
    for name, rule in RULES.items():
        assert (name in options_of) == bool(rule.flag), name
        if rule.flag:
            option = options_of[name]
            assert option.opts == [f"--{name.replace('_', '-')}"] and option.help == rule.flag
            assert option.multiple == (rule.kind is list)
            if getattr(defaults, name) not in (None, ()):
                assert option.default == getattr(defaults, name)
