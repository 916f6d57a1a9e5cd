"""The table of handcrafted hostile files: id, file, where it must be refused, and what the message must say.

Ids are those of the list of attacks the project answers (G1 truncation ... T5 merges). `stage` is the step that must
refuse: "open" (ModelFile); or with the file open "plan" (plan.build), "vocab" (metadata.validate) or "check"
(check_tensors). Each builder spoils one thing of a good file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from helpers import gguf_forge as g
from helpers.gguf_forge import (
    ARR,
    BOOL,
    F32,
    F64,
    I8,
    I32,
    I64,
    STR,
    U8,
    U16,
    U32,
    U64,
    Forge,
    Tensor,
    tiny_llama,
    tiny_vocab,
)

from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import plan
from worker_orcd.tokenizer import metadata


@dataclass(frozen=True)
class Case:
    id: str
    build: Callable[[], bytes]
    stage: str
    says: str


def _forge(make: Callable[[], Forge], spoil: Callable[[Forge], object]) -> Callable[[], bytes]:
    def build() -> bytes:
        forge = make()
        spoil(forge)
        return forge.build()

    return build


def _llama(id: str, stage: str, says: str, spoil: Callable[[Forge], object]) -> Case:
    return Case(id, _forge(tiny_llama, spoil), stage, says)


def _head(n_tensors: int, n_keys: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + rest


def _raw(id: str, data: bytes, says: str) -> Case:
    return Case(id, lambda: data, "open", says)


HUGE = (2**60, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def structure() -> Iterator[Case]:
    for n in range(24):
        yield _raw(f"G1-{n}-bytes", _head(0, 0)[:n], "is empty" if n == 0 else "truncated")
    yield _raw("G1-one-key-missing", _head(0, 1), "truncated: a key")
    yield _raw("G1-one-tensor-missing", _head(1, 0), "truncated: a tensor's name")
    for cut in (1, 31, 8192, 30000):
        yield _llama(
            f"G1-data-short-by-{cut}", "open", "ends at byte .* the file has", lambda f, c=cut: setattr(f, "cut", c)
        )

    for magic in (b"GGML", b"ggjt", b"FUGG", b"\0\0\0\0", b"gguf", b"\x80\x02}q", b"\xff\xff\xff\xff"):
        yield _llama(f"G2-magic-{magic.hex()}", "open", "not a GGUF file", lambda f, m=magic: setattr(f, "magic", m))
    for version in (0, 1, 4, 5, 2**31, 2**32 - 1):
        says = "big-endian" if version == 2**31 else f"version {version} is not supported"
        yield _llama(f"G2-version-{version}", "open", says, lambda f, v=version: setattr(f, "version", v))
    for version in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        yield _llama(f"G2-byte-swapped-{version}", "open", "big-endian", lambda f, v=swapped: setattr(f, "version", v))

    for n in (65536, 2**32, *HUGE):
        yield _raw(f"G3-tensors-{n}", _head(n, 0, bytes(64)), f"claims {n} tensors")
        yield _raw(f"G3-keys-{n}", _head(0, n, bytes(64)), f"claims {n} keys")
    yield _llama("G3-one-key-too-many", "open", "a tensor.s name", lambda f: setattr(f, "n_keys", len(f.keys) + 1))
    yield _llama("G3-one-key-too-few", "open", "tensor", lambda f: setattr(f, "n_keys", len(f.keys) - 1))
    yield _llama("G3-one-tensor-too-many", "open", "tensor", lambda f: setattr(f, "n_tensors", 13))

    for n in (2**32, *HUGE):
        yield _raw(f"G4-key-length-{n}", _head(0, 1, struct.pack("<Q", n) + b"abcd"), f"a key has {n} bytes")
        value = g.string("k") + struct.pack("<IQ", STR, n) + bytes(8)
        yield _raw(f"G4-string-length-{n}", _head(0, 1, value), f"a string value needs {n} bytes")
        name = struct.pack("<Q", n) + bytes(40)
        yield _raw(f"G4-tensor-name-length-{n}", _head(1, 0, name), f"tensor's name has {n} bytes")
        inner = g.string("k") + struct.pack("<IIQQ", ARR, STR, 1, n)
        yield _raw(f"G4-string-in-array-length-{n}", _head(0, 1, inner), f"in an array needs {n} bytes")

    for n in (2**24 + 1, *HUGE):
        for kind in (U8, I32, F64, STR, ARR):
            value = g.string("abcdef") + struct.pack("<IIQ", ARR, kind, n)
            yield _raw(f"G5-array-count-{n}-of-type-{kind}", _head(0, 1, value[:43]), f"array of {n} elements")
    for kind in (13, 14, 255, 2**31, 2**32 - 1):
        value = g.string("k") + struct.pack("<IIQ", ARR, kind, 2**20)
        yield _raw(f"G5-element-type-{kind}", _head(0, 1, value), f"unknown element type {kind}")
    for n in (5, 100, 2**20):
        value = g.string("k") + struct.pack("<IIQ", ARR, U32, n) + bytes(16)
        yield _raw(f"G5-count-{n}-in-16-bytes", _head(0, 1, value), "truncated: array of")

    for depth in (3, 10, 1000, 100_000):
        nest = b"".join(struct.pack("<IQ", ARR, 1) for _ in range(depth - 1)) + g.array(U8, [1])
        yield _llama(
            f"G6-arrays-{depth}-deep", "open", "nested more than one deep", lambda f, n=nest: f.raw("x", ARR, n)
        )
    for n in (2**20, 2**63):
        nest = struct.pack("<IQ", ARR, 1) + struct.pack("<IQ", U8, n)
        yield _raw(f"G6-inner-count-{n}", _head(0, 1, g.string("k") + struct.pack("<I", ARR) + nest), "array of")
    nest = struct.pack("<IQ", ARR, 1) + struct.pack("<IQ", 99, 1) + bytes(8)
    yield _llama("G6-inner-type-99", "open", "unknown element type 99", lambda f: f.raw("x", ARR, nest))

    yield _llama("G7-empty", "open", "a key is empty", lambda f: f.put("", U32, 1))
    yield _llama("G7-65536-bytes", "open", "a key has 65536 bytes", lambda f: f.put("k" * 65536, U32, 1))
    bad_keys = {
        "non-ascii": "k\u00e9y",
        "invalid-utf8": b"\xff\xfe",
        "nul": b"a\0b",
        "newline": b"a\nb",
        "del": b"a\x7f",
    }
    for name, key in bad_keys.items():
        yield _llama(f"G7-{name}", "open", "not printable ASCII", lambda f, k=key: f.put(k, U32, 1))
    again = g.string("general.architecture") + struct.pack("<I", STR) + g.string("llama")
    yield _llama("G7-duplicate", "open", "'general.architecture' occurs twice", lambda f: f.extra_keys.append(again))
    many = [g.string("k" + "x" * 65500 + str(i)) + struct.pack("<IB", U8, 0) for i in range(80)]
    yield _llama("G7-5-MB-of-keys", "open", "names of the keys take more than", lambda f: f.extra_keys.extend(many))

    for kind in (13, 14, 255, 2**31, 2**32 - 1):
        yield _llama(
            f"G8-type-{kind}", "open", f"unknown value type {kind}", lambda f, k=kind: f.raw("x", k, bytes(16))
        )
    for byte in (2, 0x80, 255):
        yield _llama(f"G8-bool-{byte}", "open", f"bool byte is {byte}", lambda f, b=byte: f.raw("x", BOOL, bytes([b])))
        array = struct.pack("<IQ", BOOL, 3) + bytes([1, 0, byte])
        yield _llama(f"G8-bool-{byte}-in-array", "open", f"bool byte is {byte}", lambda f, a=array: f.raw("x", ARR, a))

    for n in (0, 1, 3, 4, 24, 33, 2**21, 2**31, 2**32 - 1):
        yield _llama(
            f"G9-alignment-{n}", "open", f"alignment is {n}, must", lambda f, n=n: f.put("general.alignment", U32, n)
        )
    for kind, value in ((U16, 32), (I32, 32), (U64, 32), (F32, 32.0), (STR, "32"), (BOOL, True)):
        yield _llama(f"G9-alignment-of-type-{kind}", "open", "must be uint32",
                     lambda f, k=kind, v=value: f.put("general.alignment", k, v))  # fmt: skip


def tensor_table() -> Iterator[Case]:
    def spoil(id: str, says: str, **changes: object) -> Case:
        def change(f: Forge) -> None:
            tensor = f.tensor("output_norm.weight")
            for key, value in changes.items():
                setattr(tensor, key, value)

        return _llama(id, "open", says, change)

    for n in (0, 5, 2**31, 2**32 - 1):
        yield spoil(f"G10-n_dims-{n}", f"has {n} dimensions", n_dims=n)
    for dims in ((0,), (32, 0), (0, 32), (32, 1, 1, 0)):
        yield spoil(f"G11-zero-{'x'.join(map(str, dims))}", "dimension . is 0", dims=dims)
    wraps = (
        (2**32, 2**32),
        (2**63, 2),
        (2**62, 4),
        (2**33, 2**33),
        (2**16, 2**16, 2**16, 2**16),
        (2**64 - 1, 2**64 - 1),
        (2**64 - 1,),
        (2**63,),
        (2**21, 2**21, 2**21, 2),
    )
    for dims in wraps:
        yield spoil(f"G11-product-{'x'.join(map(str, dims))}", "number of elements overflows", dims=dims)
    for type_id, row in ((2, 33), (2, 16), (8, 1), (10, 255), (12, 128), (14, 257), (39, 48), (13, 896)):
        yield spoil(f"G11-row-{row}-of-type-{type_id}", "no multiple of the", type_id=type_id, dims=(row, 32))

    yield spoil("G12-f32-2^63/4", "ends at byte|overflows", dims=(2**61,))
    yield spoil("G12-f32-2^62", "size in bytes overflows", dims=(2**62,))
    yield spoil("G12-f32-2^63-1", "size in bytes overflows", dims=(2**63 - 1,))
    yield spoil("G12-f16-2^62", "size in bytes overflows", type_id=1, dims=(2**62,))
    yield spoil("G12-q6k-2^62", "ends at byte|overflows", type_id=14, dims=(2**62,))
    yield spoil("G12-end-wraps", "overflows|ends at byte", offset=2**64 - 32)
    yield spoil("G12-end-wraps-to-header", "overflows|ends at byte", offset=2**64 - 4096)
    yield spoil("G12-padding-wraps-to-0", "overflows|ends at byte", offset=0xFFFFFFFFFFFFFFC0, dims=(15,))

    def sums(f: Forge, n: int) -> None:
        f.tensors = [Tensor(f"t{i}", (2**60,), 0, offset=i * 2**62) for i in range(n)]

    for n in (1, 2, 4):
        yield _llama(f"G12-sum-of-{n}-wraps", "open", "ends at byte|overflows", lambda f, n=n: sums(f, n))

    for type_id in (4, 5, 9, 15, 16, 17, 24, 26, 28, 31, 32, 33, 34, 36, 37, 38, 40, 41, 100, 2**31, 2**32 - 1):
        yield spoil(f"G13-type-{type_id}", f"removed tensor type {type_id}", type_id=type_id, dims=(256,))

    for offset in (1, 4, 31, 33, 769):
        yield spoil(f"G14-unaligned-{offset}", "no multiple of the alignment", offset=offset)
    yield spoil("G14-overlap", "before the end of the tensor before", offset=736)
    yield spoil("G14-same-place", "before the end of the tensor before", offset=0)
    for offset in (2**20, 2**40, 2**63, 2**64 - 64):
        yield spoil(f"G14-past-the-end-{offset}", "ends at byte|overflows", offset=offset)

    def swap(f: Forge) -> None:
        f.tensors[0].offset, f.tensors[1].offset = 768, 0

    yield _llama("G14-out-of-order", "open", "before the end of the tensor before", swap)

    yield spoil("G15-duplicate", "'token_embd.weight' occurs twice", name="token_embd.weight")
    for n in (64, 65, 1000):
        yield spoil(f"G15-name-of-{n}", f"tensor's name has {n} bytes", name="x" * n)
    yield spoil("G15-empty", "tensor's name is empty", name="")
    for id, raw in (
        ("nul", b"a\0b"),
        ("not-utf8", b"\xff\xfe"),
        ("newline", b"a\nb"),
        ("non-ascii", "\u00e9".encode()),
    ):
        yield spoil(f"G15-{id}", "not printable ASCII", name=raw)


def model() -> Iterator[Case]:
    def key(id: str, name: str, kind: int, value: object, says: str | None = None) -> Case:
        full = f"llama.{name}"
        return _llama(f"G16-{id}", "plan", says or full, lambda f: f.put(full, kind, value))

    for n in (0, 513, 2**31, 2**32 - 1):
        yield key(f"block_count-{n}", "block_count", U32, n)
    yield key("block_count-negative", "block_count", I32, -1)
    yield key("head_count-0", "attention.head_count", U32, 0)
    yield key("head_count-2^31", "attention.head_count", U32, 2**31)
    for n in (0, 3, 8, 2**31):
        yield key(f"head_count_kv-{n}", "attention.head_count_kv", U32, n)
    for n in (0, 1, 7, 10, 2**31):
        yield key(f"rope-width-{n}", "rope.dimension_count", U32, n)
    for n in (0, 2**31):
        yield key(f"embedding_length-{n}", "embedding_length", U32, n)
        yield key(f"feed_forward_length-{n}", "feed_forward_length", U32, n)
    for name in ("attention.layer_norm_rms_epsilon", "rope.freq_base"):
        for value in (float("nan"), float("inf"), float("-inf"), -1.0):
            yield key(f"{name}-{value}", name, F32, value)
    for value in (float("nan"), 1e-9, -2.0, float("inf")):
        yield key(f"rope-scale-{value}", "rope.scaling.factor", F32, value)
    yield key("context-0", "context_length", U32, 0)
    yield key("context-2^40", "context_length", U64, 2**40)
    yield key("vocab-0", "vocab_size", U32, 0)
    yield key("vocab-7", "vocab_size", U32, 7)
    yield key("experts", "expert_count", U32, 8)
    for kind, value in ((F32, 1.0), (STR, "1"), (BOOL, True)):
        yield key(f"block_count-of-type-{kind}", "block_count", kind, value)
    yield _llama(
        "G16-block_count-array", "plan", "llama.block_count", lambda f: f.put_array("llama.block_count", U32, [1])
    )
    for kind, value in ((U32, 1), (STR, "1e-5"), (BOOL, True)):
        yield key(f"eps-of-type-{kind}", "attention.layer_norm_rms_epsilon", kind, value)
    for name in ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "context_length",
                 "attention.layer_norm_rms_epsilon"):  # fmt: skip
        yield _llama(f"G16-no-{name}", "plan", f"llama.{name} is missing", lambda f, n=name: f.drop(f"llama.{n}"))
    yield _llama(
        "G16-no-architecture", "open", "general.architecture is missing", lambda f: f.drop("general.architecture")
    )
    yield _llama("G16-architecture-number", "open", "general.architecture is uint32",
                 lambda f: f.put("general.architecture", U32, 1))  # fmt: skip
    yield _llama("G16-architecture-unknown", "plan", "mamba", lambda f: f.put("general.architecture", STR, "mamba"))
    yield _llama("G16-architecture-not-utf8", "open", "'general.architecture' is not UTF-8",
                 lambda f: f.put("general.architecture", STR, b"\xff"))  # fmt: skip
    yield _llama(
        "G16-file_type-string", "open", "general.file_type is string", lambda f: f.put("general.file_type", STR, "Q4")
    )
    yield _llama(
        "G16-file_type-negative", "open", "general.file_type is -1", lambda f: f.put("general.file_type", I8, -1)
    )

    for name in [t.name for t in tiny_llama().tensors if t.name != "output.weight"]:
        yield _llama(f"G17-missing-{name}", "plan", f"{name}.*missing", lambda f, n=name: f.drop(n))
    for extra in ("blk.1.attn_norm.weight", "blk.0.attn_q_norm.weight", "surprise"):
        yield _llama(f"G17-extra-{extra}", "plan", extra, lambda f, n=extra: f.tensors.append(g.f32(n, 32)))
    for name, dims in (
        ("blk.0.attn_q.weight", (32, 31)),
        ("blk.0.attn_k.weight", (32, 32)),
        ("token_embd.weight", (16, 6)),
        ("output.weight", (32, 5)),
        ("output_norm.weight", (31,)),
        ("output_norm.weight", (1, 32)),
        ("blk.0.ffn_down.weight", (32, 64)),
        ("token_embd.weight", (192,)),
    ):

        def reshape(f: Forge, name: str = name, dims: tuple[int, ...] = dims) -> None:
            f.tensors = [g.f32(name, *dims) if t.name == name else t for t in f.tensors]

        yield _llama(f"G17-{name}-{'x'.join(map(str, dims))}", "plan", name, reshape)
    norm = Tensor("output_norm.weight", (32,), 8, 34)
    yield _llama("G17-norm-of-Q8_0", "plan", "output_norm.weight", lambda f: f.tensors.__setitem__(1, norm))


#: type id -> (bytes of a block, elements of it, offsets of its scales)
SCALES = {2: (18, 32, (0,)), 3: (20, 32, (0, 2)), 6: (22, 32, (0,)), 7: (24, 32, (0, 2)), 8: (34, 32, (0,)),
          10: (84, 256, (80, 82)), 11: (110, 256, (108,)), 12: (144, 256, (0, 2)), 13: (176, 256, (0, 2)),
          14: (210, 256, (208,))}  # fmt: skip
HALVES = {"nan": b"\x01\x7e", "inf": b"\x00\x7c", "-inf": b"\x00\xfc", "snan": b"\x01\xfd"}


def numbers() -> Iterator[Case]:
    def planted(id: str, type_id: int, row: int, data: bytes, at: int, bad: bytes) -> Case:
        spoiled = data[:at] + bad + data[at + len(bad) :]

        def spoil(f: Forge) -> None:
            f.tensors.append(Tensor("planted", (row, 300), type_id, data=spoiled))

        return _llama(f"G18-{id}", "check", "'planted' holds", spoil)

    for type_id, (size, elements, scales) in SCALES.items():
        for at in scales:
            for (name, bad), block in zip(HALVES.items(), (0, 299, 150, 64), strict=True):
                yield planted(
                    f"type-{type_id}-scale-{at}-{name}", type_id, elements, bytes(size * 300), block * size + at, bad
                )
    for block in (0, 63, 64, 299):
        yield planted(f"mxfp4-255-in-block-{block}", 39, 32, bytes(17 * 300), block * 17, b"\xff")
    floats = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}
    for name, value in floats.items():
        raw = struct.pack("<f", value)
        yield planted(f"f32-{name}", 0, 1, bytes(4 * 300), 4 * 123, raw)
        yield planted(f"f16-{name}", 1, 1, bytes(2 * 300), 2 * 299, struct.pack("<e", value))
        yield planted(f"bf16-{name}", 30, 1, bytes(2 * 300), 0, raw[2:])
    norm = struct.pack("<32f", *[1.0] * 31, float("nan"))
    yield _llama("G18-norm-nan", "check", "'output_norm.weight' holds NaN",
                 lambda f: setattr(f.tensor("output_norm.weight"), "data", norm))  # fmt: skip


def vocabulary() -> Iterator[Case]:
    p = "tokenizer.ggml."

    def vocab(id: str, says: str, spoil: Callable[[Forge], object], model: str = "gpt2") -> Case:
        return Case(id, _forge(lambda: tiny_vocab(model=model), spoil), "vocab", says)

    for name, kind, model in (("token_type", I32, "gpt2"), ("scores", F32, "llama"), ("token_type", I32, "llama")):
        n = 6 if model == "gpt2" else 262
        for length in (0, 1, n - 1, n + 1, 4 * n):
            yield vocab(f"T1-{model}-{name}-{length}-of-{n}", f"{name} has {length} elements",
                        lambda f, a=(p + name, kind, [1] * length): f.put_array(*a), model)  # fmt: skip
        for wrong in (U8, U16, U64, I64, F64, STR, BOOL):
            value = "x" if wrong == STR else 1
            yield vocab(f"T1-{model}-{name}-of-type-{wrong}", f"{name} is array",
                        lambda f, a=(p + name, wrong, [value] * n): f.put_array(*a), model)  # fmt: skip
        yield vocab(f"T1-{model}-{name}-scalar", f"{name} is uint32", lambda f, k=p + name: f.put(k, U32, 1), model)
    for name in ("scores", "token_type"):
        yield vocab(f"T1-llama-no-{name}", f"{name} is missing", lambda f, k=p + name: f.drop(k), "llama")
    for value in (float("nan"), float("inf")):
        yield vocab(f"T1-score-{value}", f"scores.261. is {value}",
                    lambda f, v=value: f.put_array(p + "scores", F32, [0.0] * 261 + [v]), "llama")  # fmt: skip
    for value in (-1, 7, 2**31 - 1):
        yield vocab(
            f"T1-type-{value}", f"is {value}", lambda f, v=value: f.put_array(p + "token_type", I32, [1] * 5 + [v])
        )
    yield vocab("T1-tokens-missing", "tokens is missing", lambda f: f.drop(p + "tokens"))
    yield vocab("T1-tokens-empty", "tokens is empty", lambda f: f.put_array(p + "tokens", STR, []))
    yield vocab("T1-tokens-numbers", "tokens is array.uint32", lambda f: f.put_array(p + "tokens", U32, [1, 2]))
    yield vocab("T1-tokens-string", "tokens is string", lambda f: f.put(p + "tokens", STR, "abc"))
    yield vocab("T1-tokens-nested", "tokens is array.array",
                lambda f: f.raw(p + "tokens", ARR, struct.pack("<IQ", ARR, 1) + g.array(STR, ["a"])))  # fmt: skip
    yield vocab(
        "T1-tokens-2^19+1",
        "more than the 524288",
        lambda f: f.raw(p + "tokens", ARR, struct.pack("<IQ", STR, 2**19 + 1) + bytes(8 * (2**19 + 1))),
    )
    yield vocab("T1-model-unknown", "model is 'rwkv'.*supported", lambda f: f.put(p + "model", STR, "rwkv"))
    yield vocab("T1-model-number", "model is uint32", lambda f: f.put(p + "model", U32, 1))
    yield vocab("T1-pre-number", "pre is uint32", lambda f: f.put(p + "pre", U32, 1))
    yield vocab("T1-template-number", "chat_template is uint32", lambda f: f.put("tokenizer.chat_template", U32, 1))
    yield vocab("T1-template-2-MB", "limit 1048576", lambda f: f.put("tokenizer.chat_template", STR, "x" * 2**21))

    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        for value in (6, 2**31, 2**32 - 2):  # 2**32 - 1 is none
            yield vocab(f"T2-{name}-{value}", f"{name}_token_id is {value}",
                        lambda f, k=f"{p}{name}_token_id", v=value: f.put(k, U32, v))  # fmt: skip
    yield vocab("T2-bos-negative", "bos_token_id is -1", lambda f: f.put(p + "bos_token_id", I32, -1))
    yield vocab("T2-bos-string", "bos_token_id is string", lambda f: f.put(p + "bos_token_id", STR, "<s>"))
    yield vocab("T2-bos-bool", "bos_token_id is bool", lambda f: f.put(p + "bos_token_id", BOOL, True))

    def one_token(f: Forge) -> None:
        f.drop(p + "bos_token_id", p + "eos_token_id").put_array(p + "tokens", STR, ["a"])
        f.put_array(p + "token_type", I32, [1]).put_array(p + "scores", F32, [0.0])

    yield vocab("T2-default-bos-outside", "bos_token_id is missing and would be 1", one_token, "llama")

    def no_bos(f: Forge) -> None:
        f.drop(p + "bos_token_id").put(p + "add_bos_token", BOOL, True)

    yield vocab("T2-add-bos-without-bos", "add_bos_token is true", no_bos)
    yield vocab("T2-add-bos-number", "add_bos_token is uint32", lambda f: f.put(p + "add_bos_token", U32, 1))

    tokens = ["a", "b", "c", "ab", "<s>", "</s>"]
    yield vocab(
        "T3-duplicate", "'a' twice, as ids 0 and 5", lambda f: f.put_array(p + "tokens", STR, [*tokens[:5], "a"])
    )
    for id, raw in (
        ("lone-byte", b"\xff"),
        ("overlong", b"\xc0\x80"),
        ("surrogate", b"\xed\xa0\x80"),
        ("cut", b"\xe2\x96"),
    ):
        yield vocab(f"T3-{id}", r"\[2\] is not UTF-8",
                    lambda f, r=raw: f.put_array(p + "tokens", STR, ["a", "b", r, *tokens[3:]]))  # fmt: skip
        yield vocab(f"T3-merge-{id}", r"\[0\] is not UTF-8", lambda f, r=raw: f.put_array(p + "merges", STR, [r]))
    for n in (4097, 2**20):
        yield vocab(f"T3-token-of-{n}", f"has {n} characters",
                    lambda f, n=n: f.put_array(p + "tokens", STR, [*tokens[:5], "x" * n]))  # fmt: skip
    yield vocab("T3-template-not-utf8", "is not UTF-8", lambda f: f.put("tokenizer.chat_template", STR, b"\xff"))

    def byte(token: str, where: int = 3 + 65) -> Callable[[Forge], object]:
        def spoil(f: Forge) -> None:
            names = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)] + ["\u2581", "a", "\u2581a"]
            names[where] = token
            f.put_array(p + "tokens", STR, names)

        return spoil

    for token in (
        "<0x-1>",
        "<0xZZ>",
        "<0x>",
        "<0x1>",
        "<0x100>",
        "0x41",
        "<0X41>",
        "<0x41",
        "<0x4 >",
        "<0x+4>",
        "<0x\u0661\u0661>",
    ):
        yield vocab(f"T4-{token.encode('ascii', 'backslashreplace').decode()}", "byte token", byte(token), "llama")
    yield vocab("T4-same-byte-twice", "second token for byte 0x0A", byte("<0x0a>"), "llama")
    missing = [2, 3, 3] + [6] * 255 + [1] * 4
    yield vocab("T4-255-bytes", "255 of 256", lambda f: f.put_array(p + "token_type", I32, missing), "llama")
    yield vocab("T4-gpt2-byte-type", "byte token 'a'", lambda f: f.put_array(p + "token_type", I32, [6] + [1] * 5))

    for id, merge in (
        ("no-space", "ab"),
        ("empty", ""),
        ("two-spaces", "a  b"),
        ("three", "a b c"),
        ("left-empty", " b"),
        ("right-empty", "a "),
        ("space", " "),
        ("tab", "a\tb"),
    ):
        yield vocab(
            f"T5-{id}", r"merges\[0\] is .*must be two pieces", lambda f, m=merge: f.put_array(p + "merges", STR, [m])
        )
    for id, merge, unknown in (("left", "z b", "z"), ("right", "a z", "z"), ("result", "b c", "bc")):
        yield vocab(f"T5-unknown-{id}", f"'{unknown}' is not in the vocabulary",
                    lambda f, m=merge: f.put_array(p + "merges", STR, ["a b", m]))  # fmt: skip
    yield vocab("T5-missing", "merges is missing", lambda f: f.drop(p + "merges"))
    yield vocab("T5-numbers", "merges is array.uint32", lambda f: f.put_array(p + "merges", U32, [1]))
    yield vocab(
        "T5-2^20+1",
        "more than the 1048576",
        lambda f: f.raw(p + "merges", ARR, struct.pack("<IQ", STR, 2**20 + 1) + bytes(8 * (2**20 + 1))),
    )


CASES = [*structure(), *tensor_table(), *model(), *numbers(), *vocabulary()]


def go_through(path: str, stage: str = "all") -> None:
    """Open a file and do what a load does with it: the one step `stage`, or every step."""
    with ModelFile(path) as mf:
        for key in mf.metadata if stage == "all" else ():
            mf.metadata.value_type(key), mf.metadata.head(key, 100), mf.metadata.offset(key)
        if stage in ("vocab", "all"):
            metadata.validate(mf.metadata)
        if stage in ("plan", "all"):
            plan.build(mf)
        if stage in ("check", "all"):
            mf.check_tensors(n_threads=2)
