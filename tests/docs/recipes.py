"""Performs what docs/adding-*.md say, in a copy of the tree.

A recipe is a section of a page. Each of its fenced blocks with `file=` in the info string is one edit:

    ```python file=a/new.py                      a file that is not there yet
    ```python file=a/b.py after="a piece"        lines that go below the one line that holds the piece
    ```python file=a/b.py before="a piece"       above it
    ```python file=a/b.py instead="a piece"      in its place

A page that no longer fits the tree is an error: a file or a line that is not there, or a piece that two lines hold.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import worker_orcd

ROOT = Path(__file__).resolve().parents[2]
#: what of the tree a copy holds
PARTS = ("csrc", "docs", "pyx", "tests", "tools", "worker_orcd", "wsgi", "pyproject.toml", "setup.py", "README.md")
_FENCE = re.compile(r"^(?P<indent> *)```\w+ file=(?P<file>\S+)(?: (?P<how>\w+)=([\"'])(?P<piece>.+)\4)?$")
_BUILT = "build/temp*/objects"


@dataclass(frozen=True)
class Edit:
    """One block: `how` and `piece` are "" where it is a file of its own."""

    file: str
    how: str
    piece: str
    text: str


def edits(page: Path, heading: str) -> list[Edit]:
    """The edits of the section under `heading`, for example "## A route: three places"."""
    lines = page.read_text().splitlines()
    first = lines.index(heading)
    level = heading.split(" ")[0]
    found, block = [], None
    for line in lines[first + 1 :]:
        if block is None:
            if re.match(rf"#{{1,{len(level)}}} ", line):
                break
            if m := _FENCE.match(line):
                block, body = m, []
            elif " file=" in line and line.lstrip().startswith("```"):
                raise ValueError(f"{page.name}: an info string that is not understood: {line}")
        elif line == f"{block['indent']}```":
            text = "".join(f"{ln}\n" for ln in body)
            found.append(Edit(block["file"], block["how"] or "", block["piece"] or "", text))
            block = None
        else:
            body.append(line.removeprefix(block["indent"]))
    return found


def perform(edit: Edit, root: Path) -> None:
    """Make one edit in the tree at `root`."""
    path = root / edit.file
    if not edit.how:
        assert not path.exists(), f"{edit.file} is there already"
        path.write_text(edit.text)
        return
    lines = path.read_text().splitlines(keepends=True)
    at = [i for i, line in enumerate(lines) if edit.piece in line]
    assert len(at) == 1, f"{len(at)} lines of {edit.file} hold {edit.piece!r}"
    first, last = {"before": (at[0], at[0]), "after": (at[0] + 1, at[0] + 1), "instead": (at[0], at[0] + 1)}[edit.how]
    lines[first:last] = [edit.text]
    path.write_text("".join(lines))


class Tree:
    """A copy of the sources at `root` that Python can import, with the compiled modules of the package tested here."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for part in PARTS:
            if (ROOT / part).is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.so", "fatbins", "_params.pxd", "wsgi", "benchmarks")
                shutil.copytree(ROOT / part, root / part, ignore=ignored)
            else:
                shutil.copy2(ROOT / part, root / part)
        (root / "worker_orcd" / "wsgi").symlink_to(root / "wsgi")
        for compiled in Path(worker_orcd.__file__).parent.glob("*.so"):
            shutil.copy2(compiled, root / "worker_orcd")

    def perform(self, page: str, heading: str, leave_out: str = "") -> set[str]:
        """Make the edits of a section, but for those of the file `leave_out`; returns the files that changed."""
        made = [e for e in edits(ROOT / "docs" / page, heading) if e.file != leave_out]
        for edit in made:
            perform(edit, self.root)
        return {e.file for e in made}

    def run(self, *args: str, timeout: float = 100, fails: bool = False) -> str:
        """Run this Python with `args` in the copy and its packages; returns what it printed."""
        paths = (self.root, self.root / "tests", self.root / "tools")
        # what a copy runs says nothing of how much of the tree is tested
        outside = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
        env = {**outside, "PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONSAFEPATH": "1"}
        done = subprocess.run(
            [sys.executable, *args],
            cwd=self.root,
            env=env,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        print(done.stdout)
        assert (done.returncode != 0) == fails, f"{args}:\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def prove(self, name: str, *args: str) -> str:
        """Call the function `name` of proofs.py in the copy."""
        return self.run("-c", f"from docs import proofs; proofs.{name}(*{args!r})")

    def pytest(self, *args: str, fails: bool = False) -> str:
        """Run tests of the copy."""
        return self.run("-m", "pytest", "-q", "-p", "no:cacheprovider", *args, fails=fails)

    def rebuild_cpu(self) -> None:
        """Build `_cpu` from the copy's sources, by its own setup.py; of the objects that were built here before, those
        that no edit made stale are used again."""
        for built in sorted(ROOT.glob(_BUILT)):
            here = self.root / built.relative_to(ROOT)
            shutil.copytree(built, here)
            for path in (*here.glob("*.d"), *here.glob("*.stamp")):
                path.write_text(path.read_text().replace(str(ROOT), str(self.root)))
        self.run("-c", _REBUILD, timeout=300)


_REBUILD = """
from pathlib import Path

import setuptools  # which brings the distutils that Python no longer has
from distutils.core import run_setup

dist = run_setup("setup.py", ["build_ext", "--inplace"], stop_after="commandline")
dist.ext_modules = [e for e in dist.ext_modules if e.name == "worker_orcd._cpu"]
build = dist.get_command_obj("build_ext")
build.kernels, build.kernel_compiler = None, lambda: None
build._cuda_root = Path("/there is none")
module_flags = build.module_flags
build.module_flags = lambda ext: [*module_flags(ext), "-O0"]  # of the glue alone: it takes a third of the time
dist.run_command("build_ext")
"""
