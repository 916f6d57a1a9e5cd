"""What an engine launches on the stand-in driver: kernel, grid, block, shared memory and every field of its parameters.

An address is told as (start of its allocation, offset), so that two runs can be compared.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gpu.kernel_harness import STRUCTS

FAKE = ctypes.CDLL("libcuda.so.1")
FAKE.fake_block_of.argtypes, FAKE.fake_block_of.restype = [ctypes.c_uint64], ctypes.c_uint64
_WATCHER = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint * 7), ctypes.c_uint, ctypes.c_uint64, ctypes.c_int
)

#: beginning of a kernel's name -> its parameter struct
PARAMS = {
    "repack_": "RepackParams", "rows_": "RowsParams", "convert_": "ConvertParams", "decode_": "DecodeParams",
    "matvec_": "MatvecParams", "matmul_": "MatmulParams", "wgmma_experts_": "ManyExpertRowsParams",
    "wgmma_": "ManyRowsParams", "norm_": "NormParams", "rope_kv": "RopeKvParams",
    "attention_decode_": "AttentionDecodeParams", "attention_prefill_": "AttentionPrefillParams",
    "attention_warpgroup_": "AttentionPrefillParams",
    "glu": "PointwiseParams", "act_": "PointwiseParams", "add": "PointwiseParams", "gather_rows": "PointwiseParams",
    "sample_": "SampleParams", "route_few_": "RouteFewParams", "route_": "RouteParams",
    "expert_few_": "ExpertFewParams", "expert_matvec_": "ExpertMatvecParams",
    "expert_matmul_": "ExpertMatmulParams", "expert_sum": "ExpertSumParams",
}  # fmt: skip


@dataclass
class Launch:
    """One launch; `fields` by the name that C gives them, for example ``"m[0].out"``."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    smem: int
    pdl: bool
    captured: bool
    fields: dict[str, Any]


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, ctypes.Structure):
        for field, *_ in value._fields_:
            yield from _flat(getattr(value, field), f"{name}.{field}" if name else field)
    elif isinstance(value, ctypes.Array):
        for i, item in enumerate(value):
            yield from _flat(item, f"{name}[{i}]")
    elif isinstance(value, int) and (start := FAKE.fake_block_of(value & (1 << 64) - 1)):
        yield name, (start, value - start)
    else:
        yield name, value


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches made inside, in order."""
    launches: list[Launch] = []

    def watch(kernel: bytes, config: Any, n_attributes: int, params: int, captured: int) -> None:
        name = kernel.decode()
        struct = STRUCTS[next(s for prefix, s in PARAMS.items() if name.startswith(prefix))]
        fields = dict(_flat(struct.from_address(params), ""))
        c = config.contents
        launches.append(Launch(name, tuple(c[:3]), tuple(c[3:6]), c[6], bool(n_attributes), bool(captured), fields))

    callback = _WATCHER(watch)
    FAKE.fake_watch_launches(callback)
    try:
        yield launches
    finally:
        FAKE.fake_watch_launches(None)
