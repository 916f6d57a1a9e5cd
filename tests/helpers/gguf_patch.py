"""A GGUF file with one number changed in place: for a model that is whole but for one key."""

from __future__ import annotations

import struct
from pathlib import Path


def with_uint32(source: Path, target: Path, key: str, value: int) -> Path:
    """Write `source` to `target` with the uint32 of `key` set to `value`. Returns `target`."""
    raw = bytearray(source.read_bytes())
    name = struct.pack("<Q", len(key)) + key.encode()
    at = raw.index(name) + len(name)
    kind = struct.unpack_from("<I", raw, at)[0]
    assert kind == 4, f"{key} is of type {kind}, not uint32"
    struct.pack_into("<I", raw, at + 4, value)
    target.write_bytes(raw)
    return target
