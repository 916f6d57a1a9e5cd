"""A model as files: one GGUF file or all parts of a split one, with typed access to its keys.

`ModelFile` is what the rest of the project reads models through. It knows how parts are named and belong together and
what a model file must have beyond being GGUF.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Final, TypeVar

from worker_orcd._gguf import GgufFile, Metadata, TensorInfo, check_ranges
from worker_orcd.errors import ModelLoadError, excerpt, quoted
from worker_orcd.gguf import quants
from worker_orcd.machine import usable_cores


class Required(Enum):
    """The default of a key that a file must have."""

    REQUIRED = "required"


REQUIRED: Final = Required.REQUIRED

D = TypeVar("D")

_PART_NAME: Final = re.compile(r"(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
#: bytes that `check_tensors` looks at before Python has a word again (signals, the caller's progress)
_CHECK_BATCH: Final = 128 << 20
#: elements of a per-layer array; more layers than any model has
_MAX_PER_LAYER: Final = 4096

_INTEGERS: Final = frozenset({"uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"})
_FLOATS: Final = frozenset({"float32", "float64"})


class ModelFile:
    """An open model.

    Args:
        path: the file; of a split model (``...-00001-of-0000N.gguf``) its first part.
        for_report: open also what cannot be loaded, to be looked at: tensors of types that are not supported, a file
            without an architecture.

    Attributes:
        path: as given.
        parts: the open files, one or more.
        metadata: key-values, those of the first part.
        tensors: tensor records by name over all parts; `part_of` says which file an offset belongs to.
        arch: `general.architecture`; "" where a file opened `for_report` has none.
        quantized: whether a tensor holds blocks of several elements.
        unsupported_types: ids of the types of tensors that are not in `quants.TYPES`, which only a report meets.
        name: `general.name`, else the file's name without its ending.
        file_type: `general.file_type`, or None.
        quant_kind: what the matrices are (`quants.quant_kind`), for example "Q4_K_M".
        size: bytes of all parts.

    Raises:
        ModelLoadError: a part is missing or no good GGUF file, or parts contradict each other.
    """

    def __init__(self, path: str | os.PathLike[str], for_report: bool = False) -> None:
        self.path = os.fsdecode(path)
        self._block_sizes = quants.REPORT_BLOCK_SIZES if for_report else quants.BLOCK_SIZES
        self.parts: tuple[GgufFile, ...] = (GgufFile(self.path, self._block_sizes),)
        try:
            self.metadata: Metadata = self.parts[0].metadata
            self._open_parts()
            self._part_of = {name: part for part in self.parts for name in part.tensors}
            self.tensors: dict[str, TensorInfo] = {n: t for part in self.parts for n, t in part.tensors.items()}
            self.size = sum(part.size for part in self.parts)
            self.quantized = any(self._block_sizes[t.type_id][0] > 1 for t in self.tensors.values())
            self.unsupported_types = tuple(sorted({t.type_id for t in self.tensors.values()} - quants.TYPES.keys()))
            stem = Path(self.path).stem
            self.arch: str = self._told(lambda: self.get_str("general.architecture"), "", for_report)
            self.name: str = self._told(lambda: self.get_str("general.name", stem), stem, for_report)
            self.file_type: int | None = self._told(
                lambda: self.get_int("general.file_type", 0, 2**32 - 1, None), None, for_report
            )
            if not for_report:
                self._check_keys_of_other_parts()
            self.quant_kind = quants.quant_kind(
                ((t.type_id, t.nbytes) for t in self.tensors.values() if len(t.shape) >= 2), self.file_type
            )
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _told(read: Callable[[], D], otherwise: D, for_report: bool) -> D:
        """What `read` gives; where the file says it wrongly, `otherwise` in a report and the error in a load."""
        try:
            return read()
        except ModelLoadError:
            if not for_report:
                raise
            return otherwise

    def _open_parts(self) -> None:
        """Open the other parts of a split model and check that all parts are of one split."""
        count = self.get_int("split.count", 0, 65535, 1)
        if count <= 1:
            return
        number = self.get_int("split.no", 0, 65535)
        named = _PART_NAME.fullmatch(self.path)
        if named is None or int(named["count"]) != count:
            raise self.error("split.count", f"is {count}, but the file is not named ...-0000N-of-{count:05d}.gguf")

        def part_path(i: int) -> str:
            return f"{named['stem']}-{i + 1:05d}-of-{count:05d}.gguf"

        if number != 0 or int(named["no"]) != 1:
            raise ModelLoadError(
                f"is part {int(named['no'])} of a split model; load it by its first, {part_path(0)}", self.path
            )
        for i in range(1, count):
            path = part_path(i)
            if not os.path.exists(path):
                raise ModelLoadError(f"part {i + 1} of {count} of the model is missing", path)
            part = GgufFile(path, self._block_sizes)
            self.parts += (part,)
            _integer(part.metadata, "split.no", i, i, REQUIRED)
            _integer(part.metadata, "split.count", count, count, REQUIRED)
        names: set[str] = set()
        for part in self.parts:
            twice = names & part.tensors.keys()
            if twice:
                raise ModelLoadError(f"tensor {quoted(min(twice))} is in an earlier part too", part.path)
            names |= part.tensors.keys()
        self.get_int("split.tensors.count", len(names), len(names))

    def _check_keys_of_other_parts(self) -> None:
        """Refuse a key of the architecture that a later part says otherwise: only those of the first are read."""

        def stored(metadata: Metadata, key: str) -> tuple[str, bytes]:
            return metadata.value_type(key), metadata.raw(key)

        for part in self.parts[1:]:
            for key in part.metadata:
                if not key.startswith(f"{self.arch}."):
                    continue
                if key not in self.metadata or stored(part.metadata, key) != stored(self.metadata, key):
                    raise _key_error(part.metadata, key, "is not what the first part says")

    def part_of(self, name: str) -> GgufFile:
        """The file that holds tensor `name`."""
        return self._part_of[name]

    def view(self, name: str) -> memoryview:
        """The bytes of a tensor, read-only and zero-copy; valid as long as the view is kept."""
        return self._part_of[name].view(name)

    def get_int(self, key: str, lo: int, hi: int, default: D | Required = REQUIRED) -> int | D:
        """The integer `key` of any width, lo <= value <= hi; `default` where the file lacks it.

        Raises:
            ModelLoadError: missing without a default, of another type, or out of range; names key and byte offset.
        """
        value: int | D = _integer(self.metadata, key, lo, hi, default)
        return value

    def get_float(self, key: str, lo: float, hi: float, default: D | Required = REQUIRED) -> float | D:
        """The finite float `key`, lo <= value <= hi; else as `get_int`."""
        found = _typed(self.metadata, key, _FLOATS, default)
        if key in self.metadata and not (math.isfinite(found) and lo <= found <= hi):
            raise self.error(key, f"is {found}, must be from {lo} to {hi}")
        value: float | D = found
        return value

    def get_str(self, key: str, default: D | Required = REQUIRED) -> str | D:
        """The string `key`; else as `get_int`."""
        value: str | D = _typed(self.metadata, key, {"string"}, default)
        return value

    def get_ints(self, key: str, lo: int, hi: int, n: int, default: D | Required = REQUIRED) -> list[int] | D:
        """`n` integers, one for each layer, each lo <= value <= hi; a file may give one integer for all of them."""
        if key not in self.metadata or not self.metadata.value_type(key).startswith("array"):
            single = _integer(self.metadata, key, lo, hi, default)
            whole: list[int] | D = single if key not in self.metadata else [single] * n
            return whole
        kind = self.metadata.value_type(key)
        if kind.removeprefix("array[").removesuffix("]") not in _INTEGERS:
            raise self.error(key, f"is {kind}, must be integers")
        if self.metadata.array_len(key) != n or n > _MAX_PER_LAYER:
            raise self.error(key, f"has {self.metadata.array_len(key)} elements, must have {n}")
        values: list[int] = self.metadata[key]
        for i, value in enumerate(values):
            if not lo <= value <= hi:
                raise self.error(key, f"[{i}] is {value}, must be from {lo} to {hi}")
        return values

    def get_int_of_layers(self, key: str, lo: int, hi: int, n: int, default: D | Required = REQUIRED) -> int | D:
        """The integer that all `n` layers share, given once or as an array; else as `get_ints`.

        Raises:
            ModelLoadError: also where layers differ; names the first that does.
        """
        values = self.get_ints(key, lo, hi, n, default)
        if key not in self.metadata or not isinstance(values, list):
            return values  # type: ignore[return-value]
        for i, value in enumerate(values):
            if value != values[0]:
                raise self.error(key, f"[{i}] is {value}, but [0] is {values[0]}: layers that differ are not supported")
        return values[0]

    def error(self, key: str, reason: str) -> ModelLoadError:
        """The error that refuses the file for `key`, to be raised: names the key and its byte offset."""
        return _key_error(self.metadata, key, reason)

    def check_tensors(
        self, n_threads: int = 0, progress: Callable[[int], object] | None = None, names: Iterable[str] | None = None
    ) -> None:
        """Refuse NaN and infinity in unquantized tensors and block scales, and E8M0 scales of 255.

        Args:
            n_threads: 0: all cores, at most 8.
            progress: called with the bytes checked so far now and then; what it raises ends the check.
            names: the tensors to check; None: all.

        Raises:
            ModelLoadError: names tensor and byte offset; also if a file was cut or changed meanwhile.
        """
        n_threads = n_threads or min(usable_cores(), 8)
        done = 0
        for batch in self._check_batches(self.tensors if names is None else names):
            rules = [quants.TYPES[tensor.type_id].check_rule for _, tensor, _, _ in batch]
            found = check_ranges(
                [(part.fileno(), rule, offset, n) for (part, _, offset, n), rule in zip(batch, rules, strict=True)],
                n_threads,
            )
            if found is not None:
                index, offset, reason = found
                part, tensor, _, _ = batch[index]
                raise ModelLoadError(f"tensor {quoted(tensor.name)} {reason}", part.path, offset, tensor=tensor.name)
            done += sum(n for _, _, _, n in batch)
            if progress is not None:
                progress(done)
        self.check_unchanged()

    def _check_batches(self, names: Iterable[str]) -> Iterator[list[tuple[GgufFile, TensorInfo, int, int]]]:
        """(part, tensor, offset, nbytes) runs of whole blocks over the tensors, about `_CHECK_BATCH` bytes a batch."""
        batch: list[tuple[GgufFile, TensorInfo, int, int]] = []
        room = _CHECK_BATCH
        for name in names:
            tensor = self.tensors[name]
            step = _CHECK_BATCH // quants.TYPES[tensor.type_id].type_size * quants.TYPES[tensor.type_id].type_size
            for start in range(0, tensor.nbytes, step):
                n = min(step, tensor.nbytes - start)
                batch.append((self._part_of[name], tensor, tensor.offset + start, n))
                room -= n
                if room <= 0:
                    yield batch
                    batch, room = [], _CHECK_BATCH
        yield batch

    def check_unchanged(self, same_path: bool = True) -> None:
        """Raise ModelLoadError if a part was cut, written to or (`same_path`) replaced since it was opened."""
        for part in self.parts:
            part.check_unchanged(same_path)

    def close(self) -> None:
        """Close all parts; views that are still held stay valid. Idempotent."""
        for part in self.parts:
            part.close()

    def __enter__(self) -> ModelFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _key_error(metadata: Metadata, key: str, reason: str) -> ModelLoadError:
    offset = metadata.offset(key) if key in metadata else None
    gap = "" if reason.startswith("[") else " "
    return ModelLoadError(f"{excerpt(key)}{gap}{reason}", metadata.path, offset, field=excerpt(key))


def _typed(metadata: Metadata, key: str, types: frozenset[str] | set[str], default: object) -> Any:
    """The value of `key` if it is stored as one of `types`, which say its type; `default` where the file lacks it."""
    if key not in metadata:
        if default is REQUIRED:
            raise _key_error(metadata, key, "is missing")
        return default
    if metadata.value_type(key) not in types:
        wanted = "an integer" if types is _INTEGERS else "a float" if types is _FLOATS else f"a {min(types)}"
        raise _key_error(metadata, key, f"is {metadata.value_type(key)}, must be {wanted}")
    return metadata[key]


def _integer(metadata: Metadata, key: str, lo: int, hi: int, default: object) -> Any:
    value = _typed(metadata, key, _INTEGERS, default)
    if key in metadata and not lo <= value <= hi:
        raise _key_error(metadata, key, f"is {value}, must be {lo}" + (f" to {hi}" if hi != lo else ""))
    return value
