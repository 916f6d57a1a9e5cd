"""A model file that exists in memory only, for tests of plans and what reads them."""

from __future__ import annotations

import types

from worker_orcd.errors import ModelLoadError


class FakeMetadata(dict[str, object]):
    """Keys and values, and of which type a file would store them."""

    _NAMES = ((bool, "bool"), (int, "int64"), (float, "float64"), (str, "string"))

    def value_type(self, key):
        value = self[key]
        if isinstance(value, list):
            return f"array[{self.name_of(value[0])}]"
        return self.name_of(value)

    def name_of(self, value):
        return next(name for kind, name in self._NAMES if isinstance(value, kind))

    def array_len(self, key):
        return len(self[key])


class FakeFile:
    """A model file that exists in memory only: metadata and shapes, for what `arch` and `plan` read."""

    path = "fake.gguf"
    quantized = False

    def __init__(self, name: str = "llama", **changes: object) -> None:
        self.arch = name
        self.metadata = FakeMetadata({
            f"{name}.block_count": 2, f"{name}.embedding_length": 64, f"{name}.attention.head_count": 4,
            f"{name}.attention.head_count_kv": 2, f"{name}.feed_forward_length": 96, f"{name}.context_length": 128,
            f"{name}.attention.layer_norm_rms_epsilon": 1e-5, f"{name}.rope.freq_base": 10000.0,
        })  # fmt: skip
        for key, value in changes.items():
            self.metadata[f"{name}.{key.replace('__', '.')}"] = value
        shapes = {"token_embd.weight": (64, 100), "output_norm.weight": (64,)}
        for i in range(2):
            shapes |= {
                f"blk.{i}.attn_norm.weight": (64,), f"blk.{i}.ffn_norm.weight": (64,),
                f"blk.{i}.attn_q.weight": (64, 64), f"blk.{i}.attn_k.weight": (64, 32),
                f"blk.{i}.attn_v.weight": (64, 32), f"blk.{i}.attn_output.weight": (64, 64),
                f"blk.{i}.ffn_gate.weight": (64, 96), f"blk.{i}.ffn_up.weight": (64, 96),
                f"blk.{i}.ffn_down.weight": (96, 64),
            }  # fmt: skip
        self.tensors = {n: types.SimpleNamespace(shape=s, type_id=0, offset=32) for n, s in shapes.items()}

    def get_int(self, key, lo, hi, default=None):
        value = self.metadata.get(key, default)
        if value is None or not lo <= value <= hi:
            raise ModelLoadError(f"{key}: {value} is not in {lo}..{hi}", self.path)
        return value

    def get_int_of_layers(self, key, lo, hi, n, default=None):
        return self.get_int(key, lo, hi, default)

    def get_float(self, key, lo, hi, default=None):
        return default if key not in self.metadata else self.get_int(key, lo, hi)

    def get_str(self, key, default=None):
        return self.metadata.get(key, default)

    def error(self, key, reason):
        return ModelLoadError(f"{key} {reason}", self.path, field=key)

    def view(self, name):
        return self.data[name]
