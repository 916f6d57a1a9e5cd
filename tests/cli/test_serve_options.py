"""What `serve` can be told: made from ServeConfig's fields, with the older names, and as docs/cli.md lists it."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from worker_orcd.cli import main
from worker_orcd.config import FLAGS, ServeConfig
from worker_orcd.errors import InvalidRequest

DOCS = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
DEFAULTS = {f.name: f.default for f in dataclasses.fields(ServeConfig)}


@pytest.fixture
def served(monkeypatch):
    """A function: arguments of `serve` -> the ServeConfig it would serve."""
    configs: list[ServeConfig] = []
    monkeypatch.setattr("worker_orcd.wsgi.server.serve", configs.append)

    def run(*args: str) -> ServeConfig:
        assert main.run(["serve", "--model", "m.gguf", *args]) == 0
        return configs.pop()

    return run


def rows_of_docs() -> list[tuple[str, ...]]:
    """The cells of the table under the heading `## serve`."""
    section = DOCS.read_text().split("\n## serve\n", 1)[1].split("\n## ", 1)[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `--")]
    return [tuple(cell.strip() for cell in row) for row in rows]


def row_of(name: str) -> tuple[str, ...]:
    """The row that a field's flag must have: names, default, help."""
    flag, default = FLAGS[name], DEFAULTS[name]
    flags = [f"--{n}" for n in (flag.name or name.replace("_", "-"), *flag.aliases)]
    if flag.kind is bool and default is True:
        flags = ["--check-tensors", "--no-check-tensors"]
    value = f" {flag.metavar or ' or '.join(flag.choices)}" if flag.kind is not bool else ""
    if name == "model":
        shown = "required"
    elif flag.kind is bool or flag.chosen or flag.many or default is None:
        shown = ""
    else:
        shown = f"`{default}`"
    return ", ".join(f"`{f}{value}`" for f in flags), shown, flag.help


def test_docs_list_every_flag_as_it_is():
    rows = [row for row in rows_of_docs() if not row[0].startswith("`--gpu-device")]
    assert rows == [row_of(name) for name in FLAGS]
    assert len(rows_of_docs()) == len(rows) + 1, "--gpu-device"


def test_every_field_has_a_flag_and_a_rule_that_its_default_keeps():
    assert set(DEFAULTS) - set(FLAGS) == {"progress_bar"}
    ServeConfig(model="m.gguf").check()
    for name, flag in FLAGS.items():
        assert (flag.least is None) == (flag.kind not in (int, float)), name
        if flag.least is not None:
            for value in (flag.least - 1, flag.most + 1):
                with pytest.raises(InvalidRequest) as caught:
                    ServeConfig(**{"model": "m.gguf", name: value}).check()
                assert caught.value.fields["field"] == name and re.match(
                    rf"{name} must be .* to ", caught.value.message
                )


def test_a_flag_reaches_its_field(served):
    default = ServeConfig(model="m.gguf", worker_id="w")
    config = served()
    given = dataclasses.replace(config, worker_id="w")
    assert given == default
    assert served("--kv-cache-size-mb", "3").kv_cache_bytes == 3 << 20
    assert served("--vram-limit-mb", "5").vram_limit_bytes == 5 << 20
    assert served().gpu_memory_utilization == 0.92
    assert served("--gpu-memory-utilization", "0.5").gpu_memory_utilization == 0.5
    assert served("--threads", "2").n_threads == 2 and served("--no-check-tensors").check_tensors is False
    assert served("--device", "cuda").device == "cuda"
    assert served("--gpu-device", "3").device == "cuda:3" and served("--print-curl").print_curl is True
    home = os.path.expanduser("~")
    assert served("--tokenizer", "~/t.json").tokenizer == f"{home}/t.json"
    assert served("--trusted-models=~/l.json", "--model=~/m.gguf").trusted_models == f"{home}/l.json"
    assert served("--log-format", "text").log_format == "text" and served("--port", "0").port == 0


def test_hosts_and_origins_may_be_given_several_times(served, monkeypatch):
    assert served().allowed_hosts == served().cors_origins == ()
    config = served("--allowed-host", "a", "--cors-origin", "http://b", "--allowed-host", "c:1")
    assert config.allowed_hosts == ("a", "c:1") and config.cors_origins == ("http://b",)
    monkeypatch.setenv("WORKER_ORCD_ALLOWED_HOST", "a b:2")
    monkeypatch.setenv("WORKER_ORCD_CORS_ORIGIN", "")
    assert served().allowed_hosts == ("a", "b:2") and served().cors_origins == ()
    assert served("--allow-unauthenticated").allow_unauthenticated is True


@pytest.mark.parametrize("name", ["SEQS", "STREAMS"])
def test_max_seqs_has_an_older_name(served, monkeypatch, name):
    assert served(f"--max-{name.lower()}", "7").max_seqs == 7
    monkeypatch.setenv(f"WORKER_ORCD_MAX_{name}", "9")
    assert served().max_seqs == 9
    assert served("--max-seqs", "3").max_seqs == served("--max-streams", "3").max_seqs == 3


@pytest.fixture
def removed(tmp_path, monkeypatch):
    """The working directory, removed."""
    folder = tmp_path / "removed"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    yield folder
    os.chdir(tmp_path)


def test_a_working_directory_that_was_removed_is_left(removed):
    # in a process of its own: here gunicorn may have been imported before
    script = (
        "import os; from worker_orcd.cli import main; "
        "main.run(['serve', '--model', '/none/m.gguf', '--host', '203.0.113.1', '--api-key', 'k']); print(os.getcwd())"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "/\n"
    assert "cannot listen on 203.0.113.1" in done.stderr


@pytest.mark.parametrize("name", ["model", "tokenizer", "trusted-models"])
def test_files_named_from_a_removed_directory_are_refused(name, removed, capsys):
    files = {"model": "/none/m.gguf", name: "../m.gguf"}
    args = [a for flag, path in files.items() for a in (f"--{flag}", path)]
    assert main.run(["serve", *args]) == 1
    assert "../m.gguf is named from the working directory, which was removed" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name, flag in FLAGS.items() if flag.guard])
@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_variable_that_should_protect_is_refused(monkeypatch, capsys, name, value):
    variable = f"WORKER_ORCD_{name.upper()}"
    monkeypatch.setattr("worker_orcd.wsgi.server.serve", lambda config: pytest.fail("it was served"))
    monkeypatch.setenv(variable, value)
    assert main.run(["serve", "--model", "m.gguf"]) == 1
    assert f"INVALID_REQUEST: the environment variable {variable} is empty" in capsys.readouterr().err


def test_the_guards_are_the_key_and_what_is_demanded_of_the_file(served, monkeypatch):
    assert {name for name, flag in FLAGS.items() if flag.guard} == {"api_key", "expect_sha256", "trusted_models"}
    monkeypatch.setenv("WORKER_ORCD_API_KEY", "")
    assert served("--api-key", "k").api_key == "k", "the command line wins"
    monkeypatch.delenv("WORKER_ORCD_API_KEY")
    monkeypatch.setenv("WORKER_ORCD_SERVED_MODEL_NAME", "fast")
    assert served().served_model_name == "fast"
