"""Write a GGUF model with its matrices in another type: MXFP4, Q4_0 or Q8_0.

Usage: python tools/requantize.py IN.gguf OUT.gguf --type MXFP4|Q4_0|Q8_0

Matrices, token embedding, output and experts whose rows are whole blocks are dequantized (exactly) and quantized; the
rest stays as it is: norms, biases, routers, position tables, rows that do not fit, and what has the type already.
Metadata and vocabulary are kept, `general.file_type` is set, the parts of a split model become one file. The output
appears under its name when it is complete. Memory: the output of one tensor and a chunk of its values.

The input is read through `ModelFile`, which is safe with files from anywhere. Q4_0 and Q8_0 are quantized by the gguf
package, MXFP4 by `mxfp4.py`.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import time
from collections.abc import Iterable

import gguf
import numpy as np
from gguf.quants import dequantize
from gguf.quants import quantize as gguf_quantize

from worker_orcd.errors import InvalidRequest, WorkerError
from worker_orcd.gguf import quants
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import ops, plan

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import mxfp4

#: type -> `general.file_type` of a file of it
FILE_TYPE = {"MXFP4": 38, "Q4_0": 2, "Q8_0": 7}
#: keys that say how the file is laid out, which is the writer's business
_LAYOUT_KEYS = ("general.architecture", "general.alignment", "general.file_type", "general.quantization_version",
                "split.no", "split.count", "split.tensors.count")  # fmt: skip
#: elements dequantized at a time
_CHUNK = 1 << 20
_QUANTIZATION_VERSION = 2


def requantize(source: str | os.PathLike[str], target: str | os.PathLike[str], type_name: str) -> dict[str, int]:
    """Write `target`, a version of `source` with matrices of `type_name`.

    Returns:
        type name -> number of tensors of it in the file written.

    Raises:
        ModelLoadError: `source` is no good model, or holds NaN or infinity.
        InvalidRequest: a type that cannot be written, `target` is `source`, values that the type cannot hold.
        OSError: `target` cannot be written.
    """
    if type_name not in FILE_TYPE:
        raise InvalidRequest(f"type {type_name!r} cannot be written; {', '.join(FILE_TYPE)} can", field="type")
    with ModelFile(source) as model:
        if any(os.path.exists(target) and os.path.samefile(part.path, target) for part in model.parts):
            raise InvalidRequest(f"{target} is the input itself", field="target")
        model.check_tensors()
        types = chosen_types(model, quants.BY_NAME[type_name])
        work = pathlib.Path(f"{os.fspath(target)}.{os.getpid()}.part")
        try:
            _write(model, work, types, FILE_TYPE[type_name])
            model.check_unchanged()
            os.replace(work, target)
        finally:
            work.unlink(missing_ok=True)
    counts: dict[str, int] = {}
    for kind in types.values():
        counts[kind.name] = counts.get(kind.name, 0) + 1
    return counts


def chosen_types(model: ModelFile, wanted: quants.QuantType) -> dict[str, quants.QuantType]:
    """The type of each tensor of the file to be written, by name, in the order of the input."""
    the_plan = plan.build(model)
    kept = {op.weight for op in the_plan.ops if isinstance(op, ops.Route)}
    kept |= {op.positions for op in the_plan.ops if isinstance(op, ops.Embed)}
    types = {}
    for name, info in model.tensors.items():
        weight = the_plan.weights.get(name)
        fits = weight is not None and weight.kind in ("matrix", "embedding", "experts") and name not in kept
        fits = fits and info.shape[0] % wanted.block_size == 0
        types[name] = wanted if fits else quants.TYPES[info.type_id]
    return types


def _write(model: ModelFile, path: pathlib.Path, types: dict[str, quants.QuantType], file_type: int) -> None:
    writer = gguf.GGUFWriter(path, model.arch)
    try:
        copy_metadata(model, writer)
        writer.add_file_type(file_type)
        writer.add_quantization_version(_QUANTIZATION_VERSION)
        for name, kind in types.items():
            shape = _byte_shape(model.tensors[name].shape, kind)
            writer.add_tensor_info(
                name, shape, np.dtype(np.uint8), int(np.prod(shape)), gguf.GGMLQuantizationType(kind.id)
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, kind in types.items():
            writer.write_tensor_data(_converted(model, name, kind))
    finally:
        writer.close()


def copy_metadata(model: ModelFile, writer: gguf.GGUFWriter) -> None:
    """All keys with their types. An empty array means the same as no key, and the writer has no way to write one."""
    kinds = {kind.name.lower(): kind for kind in gguf.GGUFValueType}
    for key in model.metadata:
        name = model.metadata.value_type(key)
        if key in _LAYOUT_KEYS:
            continue
        if not name.startswith("array"):
            writer.add_key_value(key, model.metadata[key], kinds[name])
            continue
        element = kinds.get(name.removeprefix("array[").removesuffix("]"))
        if element is None:
            raise model.error(key, f"is {name}; arrays of arrays cannot be written")
        if model.metadata.array_len(key):
            writer.add_key_value(key, model.metadata[key], gguf.GGUFValueType.ARRAY, element)


def _byte_shape(shape: tuple[int, ...], kind: quants.QuantType) -> tuple[int, ...]:
    """Shape of a tensor as bytes, rows last, from its shape in GGUF order (row length first)."""
    return (*reversed(shape[1:]), kind.row_bytes(shape[0]))


def _converted(model: ModelFile, name: str, kind: quants.QuantType) -> np.ndarray:
    """The tensor in blocks of `kind`: uint8 of `_byte_shape`."""
    info = model.tensors[name]
    rows = np.frombuffer(model.view(name), np.uint8).reshape(-1, quants.TYPES[info.type_id].row_bytes(info.shape[0]))
    if info.type_id == kind.id:
        return rows.reshape(_byte_shape(info.shape, kind))
    out = np.empty((len(rows), kind.row_bytes(info.shape[0])), np.uint8)
    step = max(1, _CHUNK // info.shape[0])
    for start in range(0, len(rows), step):
        values = dequantize(rows[start : start + step], gguf.GGMLQuantizationType(info.type_id))
        out[start : start + step] = quantized(values, kind, name)
    return out.reshape(_byte_shape(info.shape, kind))


def quantized(values: np.ndarray, kind: quants.QuantType, name: str) -> np.ndarray:
    """float32 [n_rows, n] in blocks of `kind`, uint8 [n_rows, row bytes]; `name` is the tensor's, for the error."""
    if kind.name == "MXFP4":
        return mxfp4.quantize(values)
    with np.errstate(over="ignore"):
        blocks = gguf_quantize(values, gguf.GGMLQuantizationType(kind.id))
    scales = blocks.reshape(-1, kind.type_size)[:, :2].copy().view(np.float16)
    if not np.isfinite(scales).all():
        raise InvalidRequest(f"tensor {name!r} holds values too large for a scale of {kind.name}", field=name)
    return blocks


def main(args: Iterable[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN.gguf")
    parser.add_argument("target", metavar="OUT.gguf")
    parser.add_argument("--type", required=True, choices=sorted(FILE_TYPE))
    options = parser.parse_args(args)
    began = time.perf_counter()
    try:
        counts = requantize(options.source, options.target, options.type)
    except (WorkerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    held = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
    print(
        f"{options.target}: {os.path.getsize(options.target) / 1e6:.0f} MB ({held}), "
        f"{time.perf_counter() - began:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
