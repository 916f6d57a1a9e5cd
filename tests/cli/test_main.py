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
        ["generate", "--prompt", "x"],
        ["bench"],
        ["serve"],
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


HOME_PATHS = [
    ["inspect", "~/m.gguf"],
    ["inspect", "~/m.gguf", "--tokenizer=~/t.json"],
    ["generate", "--model=~/m.gguf", "--prompt", "x", "--device", "cpu", "--max-tokens", "1"],
    ["generate", "--model", "~/m.gguf", "--tokenizer", "~/v.gguf", "--prompt", "x", "--device", "cpu"],
    ["generate", "--model", "~/m.gguf", "--trusted-models", "~/l.json", "--prompt", "x", "--device", "cpu"],
    ["logits", "~/m.gguf", "--ids", "1", "--device", "cpu", "--out", "~/out.npy"],
    ["provenance", "~/m.gguf", "--out", "~/l.json"],
    [
        "compare",
        "~/m.gguf",
        "~/m.gguf",
        "--prompts",
        "~/p.txt",
        "--targets",
        "~/t.txt",
        "--out",
        "~/o",
        "--device",
        "cpu",
    ],
]


def test_paths_may_begin_with_the_home(call, golden, monkeypatch, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    for args in HOME_PATHS:  # nothing is there yet: the path is said as it was looked for
        code, out, err = call(*args)
        assert code == 1 and out == "" and str(home) in err and "~" not in err, args
    for name in ("m.gguf", "v.gguf"):
        (home / name).symlink_to(golden)
    (home / "p.txt").write_text("a\n")
    (home / "t.txt").write_text("b\n")
    assert call("provenance", "~/m.gguf", "--out", "~/l.json")[0] == 0 and (home / "l.json").exists()
    for args in HOME_PATHS[2:]:
        assert call(*args)[0] == 0, args
    assert (home / "out.npy").exists() and (home / "o" / "compare.json").exists()
    monkeypatch.setenv("WORKER_ORCD_MODEL", "~/m.gguf")
    assert call("generate", "--prompt", "x", "--device", "cpu", "--max-tokens", "1")[0] == 0
    assert os.listdir(tmp_path) == ["home"], "a folder named ~ was made"


def test_every_option_that_takes_a_file_takes_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = 0
    for command in main.cli.commands.values():
        for parameter in command.params:
            metavar = parameter.metavar or ""
            if metavar.startswith(("FILE", "DIR")) or metavar.endswith(".gguf"):
                assert parameter.type.convert("~/x", parameter, None) == str(tmp_path / "x"), (
                    command.name,
                    parameter.name,
                )
                seen += 1
    assert seen > 15


def test_numbers():
    assert options.Numbers()("1,2, 3") == [1, 2, 3]
    assert options.Numbers(or_none=True)(" ") == []
    for wrong in ("1,,2", "", "a"):
        with pytest.raises(click.BadParameter):
            options.Numbers()(wrong)


@pytest.mark.parametrize("flag", ["--n-prompt", "--batch", "--ids"])
def test_numbers_that_are_none_are_told_with_their_flag(call, flag):
    command = ["logits", "m"] if flag == "--ids" else ["bench", "--model", "m"]
    code, out, err = call(*command, flag, "1,x")
    assert code == 2 and out == "" and flag in err and "whole numbers" in err


@pytest.mark.parametrize("command", ["logits", "provenance"])
def test_a_file_that_cannot_be_written_is_told_before_the_work(call, tmp_path, command):
    rest = ["--ids", "1"] if command == "logits" else []
    for out_file in (tmp_path, tmp_path / "none" / "x"):
        code, out, err = call(command, tmp_path / "no-model", *rest, "--out", out_file)
        assert code == 2 and out == "" and "--out" in err and "no-model" not in err


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
        ["--host", "0.0.0.0"],
        ["--host", "0"],
        ["--host", "::"],
        ["--allowed-host", "http://x"],
        ["--allowed-host", "*"],
        ["--cors-origin", "app.example"],
        ["--cors-origin", "*"],
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


def test_a_reader_that_goes_away_is_141_and_no_word(goldens_dir):
    """As of a program that SIGPIPE ends. The reader has gone before the first byte, or after the first line."""
    golden, llama = goldens_dir / "gpt-oss-MXFP4.gguf", goldens_dir / "llama-Q4_0.gguf"
    ids = ["--ids", ",".join(["1"] * 200), "--top", "50", "--device", "cpu"]
    short = [
        ["--help"],
        ["serve", "--help"],
        ["inspect", golden, "--json"],
        ["provenance", golden],
        ["generate", "--model", llama, "--device", "cpu", "--prompt", "a", "--max-tokens", "3"],
    ]
    read_end, write_end = os.pipe()
    os.close(read_end)
    begun = [
        subprocess.Popen([*PROGRAM, *map(str, args)], stdout=write_end, stderr=subprocess.PIPE, text=True)
        for args in short
    ]
    os.close(write_end)
    for args, process in zip(short, begun, strict=True):
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (141, ""), args
    command = " ".join([*PROGRAM, "logits", *map(str, [golden, *ids])]) + " | head -n 1; exit ${PIPESTATUS[0]}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (141, "", 1)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line(goldens_dir):
    command = [*PROGRAM, "inspect", str(goldens_dir / "gpt-oss-MXFP4.gguf")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    one_error_line((done.returncode, "", done.stderr), "INTERNAL")


def test_an_error_that_nobody_reads_has_its_code():
    read_end, write_end = os.pipe()
    os.close(read_end)
    for args, code in ((["nonsense"], 2), (["inspect", "/nowhere.gguf"], 1)):
        done = subprocess.run([*PROGRAM, *args], stdout=subprocess.PIPE, stderr=write_end, check=False)
        assert (done.returncode, done.stdout) == (code, b""), args
    os.close(write_end)


def test_doctor_says_what_to_do(call):
    code, out, _ = call("doctor")
    assert code == 0 and "Python" in out
    findings = json.loads(call("doctor", "--json")[1])
    assert {"name", "status", "detail", "advice"} == set(findings[0])
    assert all(f["advice"] for f in findings if f["status"] == "missing")


# -- errors as lines of the log

USAGE = [
    (["serve", "--model", "m", "--port", "x"], 2, "port"),
    (["serve", "--port", "1"], 2, "model"),
    (["serve", "--model", "m", "--unknown"], 2, None),
    (["serve", "--model", "m", "extra\n\x1b[31m"], 2, None),
    (["serve", "--model", "m", "--worker-id", "x"], 1, "worker_id"),
    (["serve", "--model", "m", "--device", "cpu", "--gpu-device", "1"], 1, "gpu_device"),
    (["serve", "--model", "m", "--host", "256.1.1.1"], 1, "port"),
    (["serve", "--model", "m", "--host", "0.0.0.0"], 1, "host"),
    (["serve", "--model", "m", "--cors-origin", "x"], 1, "cors_origins"),
]
JSON = ["--log-format", "json"]


def one_error_event(result: tuple[int, str, str], code: int) -> dict[str, object]:
    """The event of a command that failed with this exit code: one line of JSON on stderr, nothing on stdout."""
    status, out, err = result
    assert (status, out, err.count("\n")) == (code, "", 1) and err.endswith("\n"), err
    event = json.loads(err)
    assert (event["level"], event["event"], event["code"]) == ("error", "error", "INVALID_REQUEST")
    assert event["ts"].endswith("Z") and event["retriable"] is False and event["message"]
    return event


@pytest.mark.parametrize(("args", "code", "field"), USAGE, ids=lambda value: str(value)[:40])
def test_errors_on_arguments_are_events_where_the_log_is_json(call, monkeypatch, args, code, field):
    said = call(*args)
    assert said[0] == code and ("Error: " in said[2] if code == 2 else said[2].startswith("error: INVALID_REQUEST"))
    for given in ([*args, *JSON], [args[0], *JSON, *args[1:]], [args[0], "--log-format=json", *args[1:]]):
        assert one_error_event(call(*given), code).get("field") == field
    monkeypatch.setenv("WORKER_ORCD_LOG_FORMAT", "json")
    assert one_error_event(call(*args), code).get("field") == field
    status, _, err = call(*args, "--log-format", "text")
    assert status == code and not err.startswith("{"), "the command line wins"


def test_errors_are_events_only_where_the_log_is_json(call, monkeypatch):
    for args in (["--log-format", "json", "serve"], ["nonsense", *JSON], ["generate", *JSON], [*JSON, "--nonsense"]):
        one_error_event(call(*args), 2)
    for args in (["serve", "--", "--log-format", "json"], ["serve", "--log-format"], ["serve", "--log-format", "xml"]):
        status, _, err = call(*args)
        assert status == 2 and "Error: " in err and not err.startswith("{")
    monkeypatch.setenv("WORKER_ORCD_LOG_FORMAT", "json")
    status, _, err = call("generate")  # has no log
    assert status == 2 and "Error: " in err
    monkeypatch.setenv("WORKER_ORCD_PORT", "x")
    assert one_error_event(call("serve", "--model", "m"), 2)["field"] == "port"


def test_an_error_event_is_written_before_the_process_ends():
    command = [*PROGRAM, "serve", "--model", "m", "--port", "x", *JSON]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    one_error_event((done.returncode, done.stdout, done.stderr), 2)


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
