"""Types of pyx/worker_orcd/_gguf.pyx: GGUF files, mapped read-only and parsed with bounds checked."""

import os
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any, Self

#: what `check_ranges` says of a fault, by its kind
CHECK_REASONS: dict[int, str]

class FileMapping:
    """Bytes of an open file, mapped read-only until the last view of them is gone."""

class TensorInfo:
    """One record of the tensor table."""

    __slots__ = ("name", "nbytes", "offset", "shape", "type_id")
    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    nbytes: int
    def __init__(self, name: str, shape: tuple[int, ...], type_id: int, offset: int, nbytes: int) -> None: ...

# Any: an untrusted file says what its values are, and whoever reads one looks at `value_type` first
class Metadata(Mapping[str, Any]):
    """The key-values of a file, in file order, decoded on each access."""

    @property
    def path(self) -> str:
        """The file."""

    def head(self, key: str, n: int) -> Any:
        """As `self[key]`, but of an array only the first `n` elements are decoded."""

    def __getitem__(self, key: str, /) -> Any: ...
    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`, or `default` where the file lacks it."""

    def __contains__(self, key: object, /) -> bool: ...
    def __iter__(self) -> Iterator[str]: ...
    def __len__(self) -> int: ...
    def keys(self) -> KeysView[str]:
        """The keys."""

    def values(self) -> ValuesView[Any]:
        """The values, decoded while they are iterated over."""

    def items(self) -> ItemsView[str, Any]:
        """(key, value) pairs, decoded while they are iterated over."""

    def value_type(self, key: str) -> str:
        """The type a value is stored as: "uint32", "string", "array[string]", ..."""

    def array_len(self, key: str) -> int:
        """Elements of an array; TypeError where the value is none."""

    def offset(self, key: str) -> int:
        """Byte offset of a value in the file; of an array that of its first element."""

    def raw(self, key: str) -> bytes:
        """A value as it is stored."""

class GgufFile:
    """One open GGUF file."""

    def __init__(self, path: str | bytes | os.PathLike[str], block_sizes: Mapping[int, tuple[int, int]]) -> None: ...
    @property
    def path(self) -> str:
        """The file."""

    @property
    def version(self) -> int:
        """Of the format: 2 or 3."""

    @property
    def alignment(self) -> int:
        """Of tensor data, in bytes."""

    @property
    def size(self) -> int:
        """Bytes of the file."""

    @property
    def stat(self) -> os.stat_result:
        """Of the file when it was opened."""

    @property
    def data_offset(self) -> int:
        """Byte offset of tensor data."""

    @property
    def metadata(self) -> Metadata:
        """Its key-values."""

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Its tensors by name, in file order."""

    def view(self, name: str) -> memoryview:
        """The bytes of a tensor, read-only; the view keeps the mapping alive."""

    def fileno(self) -> int:
        """The file descriptor, which belongs to this object."""

    def check_unchanged(self, same_path: bool = True) -> None:
        """Raise ModelLoadError if the file was cut, written to or (`same_path`) replaced since it was opened."""

    def close(self) -> None:
        """Let go of file and mapping. Idempotent."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...

def check_ranges(
    ranges: Iterable[tuple[int, tuple[int, str, tuple[int, ...]] | tuple[int, str, tuple[int, ...], str], int, int]],
    n_threads: int,
) -> tuple[int, int, str] | None:
    """The first number that no weight may be in (descriptor, rule, offset, nbytes) runs: (index of the run, offset,
    what)."""
