"""Who may import whom: one table, held against every module, compiled ones and C++ too.

A room is a folder of worker_orcd/, wsgi/ or csrc/; a compiled module is a room of its own. The diagram of
docs/how-it-works.md is drawn from the same table.
"""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: folders of worker_orcd/, each importing only what stands below it
ROOMS = (
    "cli",
    "compare",
    "diagnose",
    "runtime",
    "serving",
    "cuda",
    "engine",
    "tokenizer",
    "models",
    "chat",
    "gguf",
    "observe",
)
#: modules that every room may import, and that import nothing of ours
LEAVES = ("errors", "config", "machine")
#: compiled module -> the modules of ours that it may import, beside `errors`; rooms by their folder
COMPILED = {
    "_driver": ("machine",),
    "_gguf": (),
    "_output": ("_ring", "_text"),
    "_ring": (),
    "_spm": (),
    "_text": (),
    "_upload": ("_driver", "_gguf", "machine"),
    "_nodes": ("_driver", "_params"),
    "_engine": ("_driver", "_nodes", "_params", "_ring", "_upload", "cuda", "engine", "gguf", "models"),
    "_cpu": ("_params", "_ring", "engine", "machine", "models", "gguf"),
}
#: room -> the compiled modules that it may import
USES_COMPILED = {
    "diagnose": ("_ring",),
    "runtime": ("_cpu", "_driver", "_engine", "_ring"),
    "cuda": ("_nodes",),
    "serving": ("_output", "_ring", "_text"),
    "tokenizer": ("_gguf", "_spm", "_text"),
    "gguf": ("_gguf",),
    "wsgi": ("_output",),
}
#: what HTTP may import of worker_orcd, by the longest name that fits
WSGI = ("runtime", "serving.job", "chat", "config", "errors", "machine", "observe", "wsgi", "_output")
#: room -> libraries of others, beside NumPy, that it may import; the driver's bindings are for `_driver` alone
LIBRARIES = {
    "cli": {"click", "tqdm"},
    "runtime": {"tqdm"},
    "diagnose": {"tqdm", "cuda"},
    "tokenizer": {"tokenizers"},
    "chat": {"jinja2"},
    "observe": {"prometheus_client"},
    "wsgi": {"falcon", "gunicorn", "msgspec"},
}
#: folder of csrc/ -> folders whose headers it may include
CSRC = {
    "params": ("params",),
    "host": ("host",),
    "cpu": ("cpu", "host", "params"),
    "cuda": ("cuda", "params"),
}


@cache
def python_imports(path: Path) -> dict[str, set[str]]:
    """{"always": full names of imported modules, "typing": those under TYPE_CHECKING}."""
    tree = ast.parse(path.read_text())
    typing = {
        id(n)
        for i in ast.walk(tree)
        if isinstance(i, ast.If) and ast.unparse(i.test) == "TYPE_CHECKING"
        for n in ast.walk(i)
    }
    out: dict[str, set[str]] = {"always": set(), "typing": set()}
    for node in ast.walk(tree):
        names: set[str] = set()
        if isinstance(node, ast.Import):
            names = {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = {f"{node.module}.{a.name}" for a in node.names}
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "_module"
            and isinstance(node.args[0], ast.Constant)
        ):
            names = {f"worker_orcd.{node.args[0].value}"}  # runtime/devices.py opens compiled modules by name
        out["typing" if id(node) in typing else "always"] |= names
    return out


def cython_imports(module: str) -> set[str]:
    """Full names that the sources of a compiled module import or cimport."""
    names: set[str] = set()
    folder = ROOT / "pyx" / "worker_orcd"
    text = "\n".join(p.read_text() for p in sorted(folder.glob(f"{module}.p*")))
    for included in re.findall(r'^include "([^"]+)"', text, re.M):
        text += (folder / included).read_text()
    text = re.sub(r"\(\s*\n(.*?)\)", lambda m: m[1].replace("\n", " "), text, flags=re.S)
    for line in text.splitlines():
        if m := re.match(r"\s*from\s+([\w.]+)\s+c?import\s+(.+)", line):
            names |= {f"{m[1]}.{n.split(' as ')[0].strip(' ()')}" for n in m[2].split("#")[0].split(",")}
        elif m := re.match(r"\s*c?import\s+([\w.]+)", line):
            names.add(m[1])
    return names


def ours(names: set[str]) -> set[str]:
    """Rooms, leaves and compiled modules among full names of imports."""
    return {n.split(".")[1] for n in names if n.startswith("worker_orcd.")} - {"__version__"}


def files_of(room: str) -> list[Path]:
    folder = ROOT / "wsgi" if room == "wsgi" else ROOT / "worker_orcd" / room
    found = sorted(folder.rglob("*.py"))
    assert found, f"{folder} holds no module"
    return found


def test_the_table_names_every_room_and_every_compiled_module():
    folders = {p.parent.name for p in (ROOT / "worker_orcd").glob("*/__init__.py")}
    assert folders == set(ROOMS)
    assert {p.stem for p in (ROOT / "pyx" / "worker_orcd").glob("_*.pyx")} == set(COMPILED)
    assert {p.name for p in (ROOT / "csrc").iterdir() if p.is_dir()} == set(CSRC)
    flat = {p.stem for p in (ROOT / "worker_orcd").glob("*.py")}
    assert flat == {"__init__", "__main__", *LEAVES}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_stands_below_it(room: str):
    below = {*ROOMS[ROOMS.index(room) :], *LEAVES}
    for path in files_of(room):
        found = python_imports(path)
        wrong = ours(found["always"]) - below - set(USES_COMPILED.get(room, ()))
        if room == "cli":  # the one command that starts the server
            wrong -= {"wsgi"} if path.name == "serve.py" else set()
        assert not wrong, f"{path.name} imports {sorted(wrong)}"
        wrong = ours(found["typing"]) - below - set(USES_COMPILED.get(room, ()))
        assert not wrong, f"{path.name} names types of {sorted(wrong)}"


@pytest.mark.parametrize("module", LEAVES)
def test_leaves_import_nothing_of_ours_but_errors(module: str):
    found = python_imports(ROOT / "worker_orcd" / f"{module}.py")["always"]
    assert ours(found) <= ({"errors"} if module == "config" else set())


def test_http_imports_what_the_table_lists():
    for path in files_of("wsgi"):
        for names in python_imports(path).values():
            for name in (n.removeprefix("worker_orcd.") for n in names if n.startswith("worker_orcd.")):
                assert any(f"{name}.".startswith(f"{w}.") for w in WSGI), f"{path.name} imports worker_orcd.{name}"


@pytest.mark.parametrize("module", COMPILED)
def test_a_compiled_module_imports_what_the_table_lists_and_no_more(module: str):
    assert ours(cython_imports(module)) - {module, "errors"} == set(COMPILED[module])


@pytest.mark.parametrize("room", [*ROOMS, *LEAVES, "wsgi"])
def test_libraries_stay_in_their_rooms(room: str):
    allowed = LIBRARIES.get(room, set()) | {"numpy", "worker_orcd"}
    for path in [ROOT / "worker_orcd" / f"{room}.py"] if room in LEAVES else files_of(room):
        for names in python_imports(path).values():
            foreign = {n.split(".")[0] for n in names} - sys.stdlib_module_names - allowed
            assert not foreign, f"{path.name} imports {sorted(foreign)}"


def test_only_the_driver_layer_calls_the_driver():
    """Others may name cydriver's types (a stream, an address); a call of it must be checked, and only one place is."""
    for path in sorted((ROOT / "pyx" / "worker_orcd").glob("*.p*")):
        if path.stem != "_driver" and not path.stem.startswith("driver_"):
            assert not re.findall(r"\bcu\.cu[A-Z]\w*\(", path.read_text()), path.name


def test_sources_include_only_what_the_table_lists():
    csrc = ROOT / "csrc"
    for path in sorted(csrc.rglob("*")):
        if path.suffix not in (".cu", ".cuh", ".h", ".cpp"):
            continue
        room = path.relative_to(csrc).parts[0]
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.M):
            found = [h.resolve() for h in (path.parent / name, csrc / name, csrc / "cuda" / name) if h.exists()]
            assert found, f"{path.name} includes {name}, which is nowhere"
            assert found[0].relative_to(csrc).parts[0] in CSRC[room], f"{path.name} includes {name}"
        assert not re.search(r"#\s*include\s+<(Python|cuda_runtime|torch|cublas)", path.read_text()), path.name


def test_nothing_imports_tests_or_tools():
    outside = {"tests", "tools", "oracle", "helpers", "gpu", "service", "build_cuda"}
    paths = [*(ROOT / "worker_orcd").rglob("*.py"), *(ROOT / "wsgi").rglob("*.py")]
    for path in paths:
        assert not {n.split(".")[0] for n in python_imports(path)["always"]} & outside, path.name
    for module in COMPILED:
        assert not {n.split(".")[0] for n in cython_imports(module)} & outside, module


def actual_imports() -> dict[str, set[str]]:
    """{room or compiled module: those that it imports}, without the leaves."""
    found = {room: set().union(*(ours(python_imports(p)["always"]) for p in files_of(room))) for room in ROOMS}
    found["wsgi"] = set().union(*(ours(python_imports(p)["always"]) for p in files_of("wsgi")))
    found |= {module: ours(cython_imports(module)) for module in COMPILED}
    return {room: names - {room, *LEAVES} for room, names in found.items()}


def diagram() -> str:
    """The import graph as Mermaid, without the arrows that follow from others."""
    graph = actual_imports()

    @cache
    def reach(room: str) -> set[str]:
        return set().union(*({n} | reach(n) for n in graph.get(room, ())))

    lines = ["```mermaid", "flowchart TD"]
    for room in graph:
        implied = set().union(*(reach(n) for n in graph[room]))
        lines += [f"    {room} --> {n}" for n in sorted(graph[room] - implied)]
    return "\n".join([*lines, "```"])


def test_the_diagram_shows_the_imports_that_there_are():
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    assert diagram() in page, f"docs/how-it-works.md should hold:\n{diagram()}"


def test_the_page_names_only_files_that_there_are():
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    paths = set(re.findall(r"`((?:worker_orcd|wsgi|csrc|pyx|tests|tools|docs)/[\w./-]*\w)`", page))
    assert len(paths) > 20
    for path in paths:
        assert (ROOT / path).exists(), path
