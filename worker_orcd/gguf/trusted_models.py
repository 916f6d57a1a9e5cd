"""The list of trusted models: which bytes may be loaded, and whether a model's bytes are among them. Fails closed.

The file is JSON: an entry, or a list of entries, each
    {"name", "source", "sha256", "chunk_bytes" (64 MiB if absent), "chunks": [digest of each chunk]}
where the last two are optional. A model is trusted for its bytes alone; names are for people. Digests of chunks let
many threads verify a file at the speed at which it loads; the list vouches that they and `sha256` are of one file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from worker_orcd.config import SHA256_RULE, is_sha256
from worker_orcd.errors import InvalidRequest, ModelLoadError, excerpt, quoted
from worker_orcd.gguf.digests import CHUNK_BYTES, chunk_ranges, file_sha256, range_digests
from worker_orcd.gguf.regular_file import read_regular_file

if TYPE_CHECKING:
    from worker_orcd.gguf.model_file import ModelFile

#: a model of 1 TB has 16,000 chunks, which take 1.1 MB
MAX_LIST_BYTES = 16 << 20
MAX_NAME_CHARS, MAX_SOURCE_CHARS = 256, 2048
_MIN_CHUNK, _MAX_CHUNK = 64 << 10, 1 << 30
_FIELDS = ("name", "source", "sha256", "chunk_bytes", "chunks")


@dataclass(frozen=True)
class TrustedModel:
    """One entry; `chunks` is empty where the entry has none."""

    name: str
    source: str
    sha256: str
    chunk_bytes: int
    chunks: tuple[str, ...]


@dataclass(frozen=True)
class Verified:
    """What is known of a model's bytes before they are loaded.

    Attributes:
        sha256: of the model's bytes; None where nobody asked.
        by: "sha256" or "chunks": what was compared; None where nobody asked.
        entry: of the list of trusted models, None without a list.
    """

    sha256: str | None = None
    by: str | None = None
    entry: TrustedModel | None = None

    def facts(self) -> dict[str, str | None]:
        """The same as arguments of `ModelInfo`."""
        return {
            "sha256": self.sha256,
            "verified_by": self.by,
            "trusted_name": None if self.entry is None else self.entry.name,
            "trusted_source": None if self.entry is None else self.entry.source,
        }


class TrustedModels:
    """The entries of a list.

    Args:
        path: the JSON file.

    Raises:
        ModelLoadError: it cannot be read, is too large, is not such a list, or lists a name or a file twice; names the
            entry and the field.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fsdecode(path)
        data = read_regular_file(self.path, MAX_LIST_BYTES)
        try:
            listed = json.loads(data, object_pairs_hook=self._once)
        except (ValueError, RecursionError) as e:
            raise ModelLoadError(f"is no JSON: {excerpt(str(e))}", self.path) from None
        if isinstance(listed, dict):
            listed = [listed]
        if not isinstance(listed, list):
            raise ModelLoadError("must be a list of entries with name, source and sha256", self.path)
        self.entries = tuple(self._entry(i, entry) for i, entry in enumerate(listed))
        self._check_distinct()

    def _once(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
            raise ModelLoadError(f"has the field {quoted(twice)} twice in one entry", self.path)
        return fields

    def _entry(self, i: int, value: Any) -> TrustedModel:
        def bad(field: str, rule: str) -> ModelLoadError:
            return ModelLoadError(f"entry {i}: {field} {rule}", self.path, field=field)

        if not isinstance(value, dict):
            raise ModelLoadError(f"entry {i} must be an object with name, source and sha256", self.path)
        for field in value:
            if field not in _FIELDS:
                raise bad(quoted(field), f"is no field of an entry; those are {', '.join(_FIELDS)}")
        for field in ("name", "source"):
            rule = _text_rule(field, value.get(field))
            if rule:
                raise bad(field, rule)
        if not is_sha256(value.get("sha256")):
            raise bad("sha256", SHA256_RULE)
        chunk_bytes, chunks = value.get("chunk_bytes", CHUNK_BYTES), value.get("chunks", [])
        if type(chunk_bytes) is not int or not _MIN_CHUNK <= chunk_bytes <= _MAX_CHUNK:
            raise bad("chunk_bytes", f"must be a whole number, {_MIN_CHUNK} to {_MAX_CHUNK}")
        if "chunks" in value and (not isinstance(chunks, list) or not chunks or not all(map(is_sha256, chunks))):
            raise bad("chunks", "must be a list of digests, each 64 lowercase hexadecimal digits")
        if "chunk_bytes" in value and not chunks:
            raise bad("chunk_bytes", "is there without chunks")
        return TrustedModel(value["name"], value["source"], value["sha256"], chunk_bytes, tuple(chunks))

    def _check_distinct(self) -> None:
        for field in ("name", "sha256", "chunks"):
            seen: dict[object, int] = {}
            for i, entry in enumerate(self.entries):
                value = getattr(entry, field)
                if value and value in seen:
                    raise ModelLoadError(
                        f"entry {i}: {field} is that of entry {seen[value]} too", self.path, field=field
                    )
                seen[value] = i

    def by_chunks(self, model_file: ModelFile, progress: Callable[[int], object]) -> tuple[TrustedModel | None, str]:
        """The entry whose chunks are those of the model, or None and a remark on what differs ("" if there is none)."""
        left = [e for e in self.entries if len(e.chunks) == -(-model_file.size // e.chunk_bytes) and e.chunks]
        remark = ""
        for chunk_bytes in sorted({e.chunk_bytes for e in left}):
            ranges = chunk_ranges(model_file.size, chunk_bytes)
            of_size = [e for e in left if e.chunk_bytes == chunk_bytes]
            first = range_digests(model_file, ranges[:1])  # a file that is not listed is refused at once
            alike = [e for e in of_size if e.chunks[0] == first[0]]
            if not alike:
                remark = remark or _differs(of_size[0], 0, ranges)
                continue
            found = tuple(first + range_digests(model_file, ranges[1:], progress))
            for entry in alike:
                if entry.chunks == found:
                    return entry, ""
            wrong = next(i for i, pair in enumerate(zip(alike[0].chunks, found, strict=True)) if pair[0] != pair[1])
            remark = _differs(alike[0], wrong, ranges)
        return None, remark


def entry_of(
    model_file: ModelFile, name: str, source: str, progress: Callable[[int], object] = lambda done: None
) -> dict[str, Any]:
    """The entry of a list that trusts this model, with the digests of its chunks, ready for JSON.

    Args:
        name, source: what the model is called and where it comes from; for people.
        progress: called with the bytes hashed; what it raises ends the work.

    Raises:
        InvalidRequest: a name or source that no list may have.
        ModelLoadError: the file cannot be read, or was written to meanwhile.
    """
    for field, value in (("name", name), ("source", source)):
        rule = _text_rule(field, value)
        if rule:
            raise InvalidRequest(f"{field} {rule}", field=field)
    whole, *chunks = range_digests(model_file, [(0, model_file.size), *chunk_ranges(model_file.size)], progress)
    return {"name": name, "source": source, "sha256": whole, "chunk_bytes": CHUNK_BYTES, "chunks": chunks}


def verify(
    model_file: ModelFile,
    trusted: TrustedModels | None,
    expect_sha256: str | None,
    progress: Callable[[int], object] = lambda done: None,
) -> Verified:
    """Compare the model's bytes with what is demanded of them, before they are loaded.

    Args:
        trusted: the list of what may be loaded, or None.
        expect_sha256: the digest it must have, or None.
        progress: called with the bytes looked at, ascending; what it raises ends the work.

    Raises:
        ModelLoadError: another digest than expected, or not in the list.
    """
    if trusted is None and expect_sha256 is None:
        return Verified()
    furthest = 0

    def ascending(done: int) -> None:
        nonlocal furthest
        furthest = max(furthest, done)
        progress(furthest)

    remark = ""
    if trusted is not None and expect_sha256 is None:
        entry, remark = trusted.by_chunks(model_file, ascending)
        if entry is not None:
            return Verified(entry.sha256, "chunks", entry)
        if all(e.chunks for e in trusted.entries):
            raise _untrusted(model_file, trusted, remark)
    sha256 = file_sha256(model_file, ascending)
    if expect_sha256 is not None and sha256 != expect_sha256:
        raise ModelLoadError(f"SHA-256 is {sha256}, not {expect_sha256}", model_file.path, sha256=sha256)
    if trusted is None:
        return Verified(sha256, "sha256")
    for entry in trusted.entries:
        # an entry whose chunks are another file's contradicts itself
        if entry.sha256 == sha256 and (expect_sha256 is not None or not entry.chunks):
            return Verified(sha256, "sha256", entry)
    raise _untrusted(model_file, trusted, remark or f"its SHA-256 is {sha256}", sha256)


def _untrusted(model_file: ModelFile, trusted: TrustedModels, remark: str, sha256: str | None = None) -> ModelLoadError:
    n = len(trusted.entries)
    listed = "which lists nothing" if n == 0 else f"which lists {n} model{'s' if n > 1 else ''}"
    name = os.path.basename(model_file.path)
    under_name = (
        ", one of them under this name with another digest" if any(e.name == name for e in trusted.entries) else ""
    )
    remark = f": {remark}" if remark else ""
    return ModelLoadError(
        f"is not trusted by {trusted.path}, {listed}{under_name}{remark}",
        model_file.path,
        trusted_models=trusted.path,
        sha256=sha256,
    )


def _differs(entry: TrustedModel, i: int, ranges: list[tuple[int, int]]) -> str:
    start, end = ranges[i]
    return f"chunk {i} (bytes {start} to {end - 1}) is not that of {quoted(entry.name)}"


def _text_rule(field: str, value: object) -> str | None:
    """What a name or source must be, where it is not."""
    least, most = (1, MAX_NAME_CHARS) if field == "name" else (0, MAX_SOURCE_CHARS)
    if isinstance(value, str) and value.isprintable() and least <= len(value) <= most:
        return None
    return f"must be a text of {least} to {most} printable characters"
