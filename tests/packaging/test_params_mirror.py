"""csrc/params is read by a parser of our own: it must find what the C compiler sees, and Python what it finds."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import gen_params
import pytest

from worker_orcd.cuda import expert_layout, layout, memory
from worker_orcd.engine import protocol

ROOT = Path(__file__).resolve().parents[2]
HEADERS = gen_params.read()
STRUCTS = gen_params.mirror(HEADERS)


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: header.name)
def test_headers_are_read_as_c_reads_them(header: gen_params.Header, tmp_path: Path):
    if not shutil.which("gcc"):
        pytest.skip("no gcc")
    lines = [f'#include "{header.name}"', "#include <stddef.h>", "#include <stdio.h>", "int main(void) {"]
    want = []
    for name in header.structs:
        struct = STRUCTS[name]
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        want.append(f"{name} {ctypes.sizeof(struct)}")
        for field, _ in struct._fields_:
            lines.append(f'printf("{name}.{field} %zu\\n", offsetof({name}, {field}));')
            want.append(f"{name}.{field} {getattr(struct, field).offset}")
    for name, value in header.constants.items():
        lines.append(f'printf("{name} %d\\n", {name});')
        want.append(f"{name} {value}")
    source, program = tmp_path / "sizes.c", tmp_path / "sizes"
    source.write_text("\n".join([*lines, "return 0; }"]))
    subprocess.run(["gcc", "-I", str(ROOT / "csrc"), "-o", str(program), str(source)], check=True)
    assert subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.split("\n")[:-1] == want


def test_every_header_and_every_struct_is_found():
    names = {p.name for p in (ROOT / "csrc" / "params").glob("*_params.h")}
    assert names <= {Path(header.name).name for header in HEADERS}
    assert {"NormParams", "ConvertParams", "DecodeParams", "MatvecParams", "ExpertMatvecParams", "SlotSampling"} <= set(
        STRUCTS
    )


def test_numbers_that_python_repeats():
    constants = {name: value for header in HEADERS for name, value in header.constants.items()}
    assert constants["KV_BLOCK"] == protocol.BLOCK_SIZE
    assert ctypes.sizeof(STRUCTS["SlotSampling"]) == memory.SLOT_SAMPLING_BYTES
    assert constants["SAMPLING_HISTORY_WORDS"] == memory.HISTORY_WORDS
    assert constants["PRODUCT_THREADS"] == 32 * layout.DECODE_WARPS
    assert constants["PRODUCT_FEW_THREADS"] == 32 * layout.DECODE_FEW_WARPS
    assert constants["EXPERT_FEW_THREADS"] == expert_layout.FEW_THREADS
    assert constants["EXPERT_LONG_THREADS"] == expert_layout.FEW_LONG_THREADS
    assert constants["EXPERT_FEW_BATCH"] == expert_layout.FEW_BATCH


@pytest.mark.parametrize(
    "text",
    [
        "typedef struct { int32_t a : 4; } Bits;",
        "typedef struct { float (*f)(int); } Call;",
        "typedef struct { int32_t a[2][3]; } Table;",
        "struct Tag { int32_t a; };",
    ],
)
def test_what_is_not_understood_is_refused(text: str, tmp_path: Path):
    path = tmp_path / "odd_params.h"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"struct|member"):
        gen_params.read([path])


def test_two_headers_that_define_one_constant_are_refused(tmp_path: Path):
    """Which of the two the other language sees would depend on the order of reading."""
    first, second = tmp_path / "a_params.h", tmp_path / "b_params.h"
    first.write_text("#define ROWS 8\n#define COLUMNS 4\n")
    second.write_text("#define ROWS 8\n#define DEPTH 2\n")
    with pytest.raises(ValueError, match=r"^b_params\.h: ROWS is defined by another header$"):
        gen_params.read([first, second])
    second.write_text("#define DEPTH 2\n")
    assert [header.constants for header in gen_params.read([first, second])] == [
        {"ROWS": 8, "COLUMNS": 4}, {"DEPTH": 2}]  # fmt: skip


def test_a_field_that_a_header_gains_is_asked_for(tmp_path: Path):
    path = tmp_path / "new_params.h"
    fields = ("const float* x;  // [n]", "int32_t n, unused;", "float m[2];")
    path.write_text("\n    ".join(["typedef struct {", *fields]) + "\n} NewParams;\n")
    with pytest.raises(ValueError, match="array of numbers"):
        gen_params.pxd(gen_params.read([path]))
    path.write_text("typedef struct {\n    const float* x;  // [n]\n    int32_t n, unused;\n} NewParams;\n")
    text = gen_params.pxd(gen_params.read([path]))
    assert '"x", "n",))' in text and "    p.n = values" in text and 'values["unused"]' not in text
