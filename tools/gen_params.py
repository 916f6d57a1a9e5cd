"""Reads the parameter headers in csrc/params: for Cython, and as ctypes for the kernel tests.

    python tools/gen_params.py [FILE]       writes pyx/worker_orcd/_params.pxd

The .pxd declares all structs, integer constants and rules of the headers, and for each struct a function that fills it
from a dict, by field names. Every field must be named: one that a header gains cannot be forgotten. What was read here
is held against the C compiler by static_assert. setup.py calls this before it translates the modules.
"""

from __future__ import annotations

import ctypes
import re
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
OUT = ROOT / "pyx" / "worker_orcd" / "_params.pxd"

_SCALARS: dict[str, Any] = {
    "uint8_t": ctypes.c_uint8, "uint16_t": ctypes.c_uint16, "int32_t": ctypes.c_int32, "uint32_t": ctypes.c_uint32,
    "int64_t": ctypes.c_int64, "uint64_t": ctypes.c_uint64, "float": ctypes.c_float,
}  # fmt: skip
#: members that only fill a gap; nobody sets them
_PADDING = ("unused", "reserved")


@dataclass(frozen=True)
class Field:
    """A member: `type` without const; an array of `length`, or 0."""

    name: str
    type: str
    is_const: bool
    is_pointer: bool
    length: int


@dataclass(frozen=True)
class Header:
    """What a header defines.

    Attributes:
        name: as it is included, for example ``"params/norm_params.h"``.
        constants: every #define of a whole number.
        structs: by name.
        rules: functions of numbers that host and device share: name -> (result type, ((type, name), ...)).
    """

    name: str
    constants: dict[str, int]
    structs: dict[str, tuple[Field, ...]]
    rules: dict[str, tuple[str, tuple[tuple[str, str], ...]]]


def read(paths: Iterable[Path] | None = None) -> list[Header]:
    """The headers `paths` (default: csrc/params/*_params.h) and those of csrc/params that they include, these first."""
    found: dict[Path, Header] = {}

    def visit(path: Path) -> None:
        if path not in found:
            text = path.read_text()
            for included in re.findall(r'^#include "(params/\w+\.h)"', text, re.M):
                visit(CSRC / included)
            constants = {name: value for header in found.values() for name, value in header.constants.items()}
            found[path] = _parse(path, text, constants)
            if twice := sorted(set(found[path].constants) & set(constants)):
                raise ValueError(f"{path.name}: {', '.join(twice)} is defined by another header")

    for path in sorted((CSRC / "params").glob("*_params.h")) if paths is None else paths:
        visit(path)
    return list(found.values())


def _parse(path: Path, text: str, known: dict[str, int]) -> Header:
    constants = {m[1]: int(m[2], 0) for m in re.finditer(r"^#define\s+(\w+)\s+(\d\w*)\s*(?://.*)?$", text, re.M)}
    text = re.sub(r"//[^\n]*|^#[^\n]*", "", text, flags=re.M)
    structs, rules = {}, {}
    for m in re.finditer(r"typedef struct \{([^{}]*)\} (\w+);", text):
        members = (_fields(s.strip(), known | constants) for s in m[1].split(";") if s.strip())
        structs[m[2]] = tuple(field for member in members for field in member)
    for m in re.finditer(r"static HOST_DEVICE (\w+) (\w+)\(([^)]*)\)", text):
        arguments = [a.split() for a in m[3].split(",")]
        if all(len(a) == 2 and a[1].isidentifier() for a in arguments):  # else of arrays
            rules[m[2]] = m[1], tuple((kind, name) for kind, name in arguments)
    if len(structs) != len(re.findall(r"\bstruct\b", text)):
        raise ValueError(f"{path.name}: a struct that is not `typedef struct {{ ... }} Name;`")
    name = path.relative_to(CSRC) if path.is_relative_to(CSRC) else path.name
    return Header(str(name), constants, structs, rules)


def _fields(member: str, constants: dict[str, int]) -> list[Field]:
    """The fields that one declaration makes, for example ``const float* x`` or ``Part m[4]`` or ``int32_t n, k``."""
    m = re.fullmatch(r"(const )?(\w+)(\*?) (\w+(?:\[\w+\])?(?:, \w+)*)", member)
    if not m:
        raise ValueError(f"a member that is not understood: {member!r}")
    out = []
    for part in m[4].split(", "):
        name, _, length = part.rstrip("]").partition("[")
        n = constants[length] if length in constants else int(length or 0)
        out.append(Field(name, m[2], bool(m[1]), bool(m[3]), n))
    return out


def mirror(headers: Iterable[Header]) -> dict[str, type[ctypes.Structure]]:
    """The structs as ctypes types, by name. Pointers become uint64."""
    found: dict[str, type[ctypes.Structure]] = {}
    for header in headers:
        for name, fields in header.structs.items():
            members = []
            for f in fields:
                kind = ctypes.c_uint64 if f.is_pointer else _SCALARS.get(f.type) or found[f.type]
                members.append((f.name, kind * f.length if f.length else kind))
            found[name] = type(name, (ctypes.Structure,), {"_fields_": members})
    return found


_PROLOGUE = """# Made by tools/gen_params.py from csrc/params; not to be edited.
#
# fill_<Struct>(p, fields, later): every field of a struct by name; addresses and numbers are Python ints and floats,
# a struct is a dict, an array a list of dicts, whose rest is zeros. `later` names the fields that the caller sets for
# each step; they become zeros here. TypeError unless `fields` and `later` together are the struct's fields, each once.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memset


cdef inline dict all_fields(str struct, dict fields, tuple later, tuple names):
    if sorted((*fields, *later)) != sorted(names):
        raise TypeError(f"{struct} takes the fields {', '.join(names)}; not {', '.join((*fields, *later))}")
    return {**fields, **dict.fromkeys(later, 0)}
"""


def _declarations(header: Header, mirrored: dict[str, type[ctypes.Structure]]) -> list[str]:
    """A header for Cython, with assertions that the C compiler has the same layout."""
    out = [f'cdef extern from "{header.name}" nogil:']
    if header.structs:
        out += ['    """', "    #include <stddef.h>"]
        for name in header.structs:
            struct = mirrored[name]
            out.append(f'    static_assert(sizeof({name}) == {ctypes.sizeof(struct)}, "{name}");')
            for field, _ in struct._fields_:
                offset = getattr(struct, field).offset
                out.append(f'    static_assert(offsetof({name}, {field}) == {offset}, "{name}.{field}");')
        out.append('    """')
    out += [f"    enum: {name}" for name in header.constants]
    for name, fields in header.structs.items():
        out.append(f"    ctypedef struct {name}:")
        for f in fields:
            star, length = "*" if f.is_pointer else "", f"[{f.length}]" if f.length else ""
            out.append(f"        {'const ' if f.is_const else ''}{f.type}{star} {f.name}{length}")
    for name, (result, arguments) in header.rules.items():
        out.append(f"    {result} {name}({', '.join(' '.join(a) for a in arguments)})")
    return out


def _fill(name: str, fields: tuple[Field, ...]) -> list[str]:
    """The function that fills a struct."""
    wanted = [f for f in fields if f.name not in _PADDING]
    names = textwrap.wrap(", ".join(f'"{f.name}"' for f in wanted) + ",", 100)
    out = [f"cdef inline int fill_{name}({name}* p, dict fields, tuple later) except -1:"]
    out.append(f'    cdef dict values = all_fields("{name}", fields, later, (')
    out += [f"        {line}" for line in names]
    out[-1] += "))"
    out.append(f"    memset(p, 0, sizeof({name}))")
    for f in wanted:
        value = f'values["{f.name}"]'
        is_number = f.is_pointer or f.type in _SCALARS
        if f.length and is_number:
            raise ValueError(f"{name}.{f.name}: an array of numbers, which no function here fills")
        if f.length:
            out.append(f"    if len({value}) > {f.length}:")
            out.append(f'        raise TypeError("{name}.{f.name} holds {f.length}")')
            out.append(f"    for i, item in enumerate({value}):")
            out.append(f"        fill_{f.type}(&p.{f.name}[i], item, ())")
        elif f.is_pointer:
            out.append(f"    p.{f.name} = <{'const ' if f.is_const else ''}{f.type}*><uintptr_t>{value}")
        elif is_number:
            out.append(f"    p.{f.name} = {value}")
        else:
            out.append(f"    fill_{f.type}(&p.{f.name}, {value}, ())")
    return [*out, "    return 0"]


def pxd(headers: list[Header]) -> str:
    """The text of _params.pxd."""
    mirrored = mirror(headers)
    parts = [_PROLOGUE]
    headers = [h for h in headers if h.constants or h.structs or h.rules]
    parts += ["\n".join(_declarations(header, mirrored)) + "\n" for header in headers]
    parts += ["\n".join(_fill(name, fields)) + "\n" for h in headers for name, fields in h.structs.items()]
    kernels = [name for name in mirrored if name.endswith("Params")]
    words = max(-(-ctypes.sizeof(mirrored[name]) // 8) for name in kernels)
    any_of = ["cdef enum:", f"    MAX_PARAMS_WORDS = {words}", "", ""]
    any_of += ["cdef inline int fill(str struct, void* p, dict fields) except -1:"]
    any_of += ['    """The parameters of a kernel, a struct by its name; at most MAX_PARAMS_WORDS of 8 bytes."""']
    for name in kernels:
        any_of += [f'    if struct == "{name}":', f"        return fill_{name}(<{name}*>p, fields, ())"]
    any_of += ['    raise TypeError(f"csrc/params has no struct {struct}")']
    return "\n\n".join([*parts, "\n".join(any_of) + "\n"])


def write(path: Path = OUT) -> None:
    """Write _params.pxd, if it changes: what depends on it is rebuilt by its time."""
    text = pxd(read())
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


if __name__ == "__main__":
    write(*map(Path, sys.argv[1:]))
