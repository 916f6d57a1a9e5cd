"""The renderer's process takes nothing from its surroundings, and what is wrong with those is an error of ours."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest

from worker_orcd.chat import process
from worker_orcd.chat.process import Ended, Process, interpreters, package_folders
from worker_orcd.errors import InternalError

SETUP = {"template": "{{ messages[0].content }}{{ strftime_now('%H') }}", "bos_token": "", "eos_token": "",
         "cpu_seconds": 0.2, "max_chars": 99, "extra_bytes": 64 << 20}  # fmt: skip
#: modules that a user may have, whose names the renderer imports from elsewhere
MODULES = ("resource", "jinja2", "markupsafe", "json", "signal", "re", "typing", "sitecustomize", "usercustomize",
           "encodings", "worker_orcd", "datetime", "site")  # fmt: skip


def rendered(template: str = "{{ messages[0].content }}") -> str:
    made = Process(0.2)
    assert made.ask({**SETUP, "template": template}) == {"text": "", "origins": ""}
    answer = made.ask({"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": False})
    text: str = answer["text"]
    made._end()
    return text


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """A folder of modules that must not be imported."""
    for name in MODULES:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the {name} of the user is imported')\n")
    return tmp_path


def test_users_modules_are_not_imported(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", ["", str(folder), *sys.path])
    for name, value in [
        ("PYTHONPATH", str(folder)), ("PYTHONSTARTUP", str(folder / "json.py")), ("PYTHONHOME", str(folder)),
        ("PYTHONUSERBASE", str(folder)), ("PYTHONINSPECT", "1"), ("PYTHONVERBOSE", "1"), ("PYTHONWARNINGS", "error"),
        ("PYTHONIOENCODING", "ascii"), ("PYTHONEXECUTABLE", "/nothing"), ("PYTHONPLATLIBDIR", "nothing"),
    ]:  # fmt: skip
        monkeypatch.setenv(name, value)
    assert rendered() == "hi"


def test_a_program_in_a_folder_of_such_modules_renders(folder, goldens_dir):
    # jinja2.py and resource.py alone: the standard library of the program itself is the user's affair
    for name in set(MODULES) - {"jinja2", "resource", "markupsafe"}:
        (folder / f"{name}.py").unlink()
    script = folder / "script.py"
    script.write_text(
        textwrap.dedent("""
            import sys
            from worker_orcd import Tokenizer
            print(Tokenizer.from_file(sys.argv[1]).apply_chat([{"role": "user", "content": "hi"}]))
        """)
    )
    env = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    done = subprocess.run([sys.executable, str(script), str(goldens_dir / "tokenizers" / "phi-3.gguf")], cwd=folder,
                          env=env, capture_output=True, timeout=60, text=True, check=False)  # fmt: skip
    assert done.stdout.startswith("[1, 32010, 7251"), done.stderr


def test_a_working_directory_that_was_removed_does_not_matter(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    try:
        assert rendered() == "hi"
    finally:
        os.chdir(tmp_path)


@pytest.mark.parametrize("executable", [None, "", "/usr/bin/env", "python3", "/nothing/python3", "/usr/sbin/uwsgi"])
def test_a_program_that_is_no_python_finds_the_interpreter(executable, monkeypatch):
    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.setattr(sys, "_base_executable", executable, raising=False)
    assert executable not in list(interpreters())
    assert rendered() == "hi"


def test_a_frozen_program_is_not_run(monkeypatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", "/opt/python3/python3-app")
    assert all(os.path.basename(p).startswith("python") for p in interpreters())
    assert sys.executable not in list(interpreters())


def test_an_interpreter_that_fails_is_followed_by_the_next(tmp_path, monkeypatch):
    broken = tmp_path / "python3"
    broken.write_text("#!/bin/sh\necho 'Fatal Python error: no codec' >&2\nexit 1\n")
    broken.chmod(0o755)
    silent = tmp_path / "python"
    silent.write_text('#!/bin/sh\nprintf "\\0\\0\\0\\2{}"\n')
    silent.chmod(0o755)
    good = sys.executable
    monkeypatch.setattr(process, "interpreters", lambda: iter([str(broken), str(silent), good]))
    assert rendered() == "hi"
    monkeypatch.setattr(process, "interpreters", lambda: iter([str(broken), str(silent)]))
    with pytest.raises(InternalError) as caught:
        Process(0.2)
    assert "status 1 (Fatal Python error: no codec)" in caught.value.message
    assert "not say what a renderer says" in caught.value.message


def test_without_an_interpreter_the_error_says_so(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/opt/app")
    monkeypatch.setattr(process, "interpreters", lambda: iter(()))
    with pytest.raises(InternalError, match=r"no Python interpreter is known \(sys\.executable is '/opt/app'\)"):
        Process(0.2)


def test_packages_are_found_wherever_they_are_installed(tmp_path, monkeypatch):
    import jinja2
    import markupsafe

    for package in (jinja2, markupsafe):  # as `pip install --target` does, one folder each
        shutil.copytree(package.__path__[0], tmp_path / package.__name__[0] / package.__name__)
    (tmp_path / "jinja2.py").write_text("raise SystemExit('imported')")
    site = os.path.dirname(jinja2.__path__[0])
    home = tmp_path / "home"
    home.mkdir()
    (home / "worker_orcd").symlink_to(os.path.join(process._HOME, "worker_orcd"))
    monkeypatch.setattr(process, "_HOME", str(home))
    others = [p for p in sys.path if p != site]
    monkeypatch.setattr(sys, "path", [str(tmp_path), "relative", str(tmp_path / "j"), str(tmp_path / "m"), *others])
    assert package_folders() == [str(tmp_path / "j"), str(tmp_path / "m"), str(home)]
    assert rendered() == "hi"


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "package_folders", lambda: [str(tmp_path)])
    with pytest.raises(InternalError, match="No module named 'worker_orcd'"):
        Process(0.2)


def test_local_time_is_that_of_the_caller(monkeypatch):
    hours = set()
    for zone in ("UTC0", "AAA-5"):
        monkeypatch.setenv("TZ", zone)
        hours.add(rendered("{{ strftime_now('%H') }}"))
    assert len(hours) == 2


def test_templates_and_others_that_end_it_are_told_apart():
    for ended_by, template_did in [(signal.SIGSEGV, True), (signal.SIGABRT, True), (signal.SIGKILL, False),
                                   (signal.SIGTERM, False)]:  # fmt: skip
        made = Process(0.2)
        made._process.send_signal(ended_by)
        made._process.wait()
        if template_did:
            assert made.ask(SETUP) == {"error": f"made the process that renders it fail ({ended_by.name})"}
        else:
            with pytest.raises(Ended, match=f"status -{ended_by.value}"):
                made.ask(SETUP)
        assert not made.alive
    made = Process(0.2)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    made.ask({**SETUP, "template": endless})
    answer = made.ask({"messages": [{"role": "user", "content": ""}]})
    assert answer == {"error": "needs more than 0.2 s of processor time"}


def test_an_answer_that_is_none_ends_it(monkeypatch):
    made = Process(0.2)
    made.ask(SETUP)
    monkeypatch.setattr(made, "_read", lambda n, _: b"\0\0\0\1" if n == 4 else b"{")
    with pytest.raises(Ended, match="no JSON"):
        made.ask({"messages": []})
    assert not made.alive


def test_the_environment_is_not_handed_on(monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_CALLER", "x")
    made = Process(0.2)
    names = pathlib.Path(f"/proc/{made._process.pid}/environ").read_text().split("\0")
    assert {n.partition("=")[0] for n in names if n} <= {"LD_LIBRARY_PATH", "TZ", "TZDIR", "LC_CTYPE"}
    assert os.readlink(f"/proc/{made._process.pid}/cwd") == "/"
    made._end()
