"""The command line: what commands print, and what they say when they cannot."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time

import click
import pytest
from helpers.command_line import one_error_line

from worker_orcd.cli import main, options
from worker_orcd.errors import CudaError, ModelLoadError

PROGRAM = [sys.executable, "-m", "worker_orcd"]


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


def test_doctor_says_what_to_do(call):
    code, out, _ = call("doctor")
    assert code == 0 and "Python" in out
    findings = json.loads(call("doctor", "--json")[1])
    assert {"name", "status", "detail", "advice"} == set(findings[0])
    assert all(f["advice"] for f in findings if f["status"] == "missing")


# -- with a model


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


def test_demo_model_path(call, monkeypatch, tmp_path):
    target = tmp_path / "demo.gguf"
    target.write_bytes(b"x")
    assert stat.S_ISREG(target.stat().st_mode)
    monkeypatch.setattr("worker_orcd.diagnose.demo_model.path", lambda: target)
    assert call("demo-model") == (0, f"{target}\n", "")
