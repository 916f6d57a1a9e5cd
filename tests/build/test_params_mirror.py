"""The kernel harness reads parameter structs from the headers: its ctypes mirror must be what the C compiler sees."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
harness = pytest.importorskip("gpu.kernel_harness")


@pytest.mark.parametrize(
    "header",
    [
        "params/experts_params.h",
        "params/matmul_params.h",
        "params/ops_params.h",
        str(harness.TEST_KERNELS / "dequant_params.h"),
    ],
)
def test_structs_are_laid_out_as_in_c(header, tmp_path):
    if not shutil.which("gcc"):
        pytest.skip("no gcc")
    structs = harness.structs(header)
    assert structs
    lines = [f'#include "{header}"', "#include <stddef.h>", "#include <stdio.h>", "int main(void) {"]
    want = []
    for name, struct in structs.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        want.append(f"{name} {ctypes.sizeof(struct)}")
        for field, _ in struct._fields_:
            lines.append(f'printf("{name}.{field} %zu\\n", offsetof({name}, {field}));')
            want.append(f"{name}.{field} {getattr(struct, field).offset}")
    source, program = tmp_path / "sizes.c", tmp_path / "sizes"
    source.write_text("\n".join([*lines, "return 0; }"]))
    subprocess.run(["gcc", "-I", str(ROOT / "csrc"), "-o", str(program), str(source)], check=True)
    assert subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.split("\n")[:-1] == want
