"""file_defaults: what a file recommends, by the names of the format; what cannot be followed is left out."""

from __future__ import annotations

import gguf
import pytest
from helpers import gguf_forge as g
from helpers.golden_forge import take_apart

from worker_orcd import LLM, SamplingParams
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import keys
from worker_orcd.runtime.sampling_defaults import FIELDS, file_defaults

P = "general.sampling."


def defaults_of(tmp_path, **found):
    """Of a file with these keys, each (type, value)."""
    forge = g.tiny_llama()
    for key, (kind, value) in found.items():
        forge.put(P + key, kind, value)
    path = tmp_path / "m.gguf"
    path.write_bytes(forge.build())
    with ModelFile(path) as file:
        return file_defaults(file, 100)


def test_a_file_that_says_nothing_recommends_nothing(tmp_path):
    assert defaults_of(tmp_path) == {}


def test_each_key_sets_its_field(tmp_path):
    found = {"temp": (g.F32, 0.6), "top_k": (g.I32, 20), "top_p": (g.F32, 0.95), "min_p": (g.F32, 0.05),
             "penalty_repeat": (g.F32, 1.05)}  # fmt: skip
    wanted = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.05}
    assert defaults_of(tmp_path, **found) == wanted, "as the decimals of the float32"
    SamplingParams(**defaults_of(tmp_path, **found)).check(n_vocab=100)
    assert type(defaults_of(tmp_path, **found)["top_k"]) is int


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ({"temp": (g.F32, 0.0)}, {"temperature": 0.0}),
        ({"temp": (g.F32, -1.0)}, {"temperature": 0.0}),
        ({"temp": (g.U32, 1)}, {"temperature": 1.0}),
        ({"temp": (g.F32, 2.5)}, {}),
        ({"temp": (g.F32, float("nan"))}, {}),
        ({"temp": (g.F32, float("inf"))}, {}),
        ({"temp": (g.STR, "0.5")}, {}),
        ({"temp": (g.BOOL, True)}, {}),
        ({"top_k": (g.I32, -1)}, {"top_k": 0}),
        ({"top_k": (g.I32, 0)}, {"top_k": 0}),
        ({"top_k": (g.I32, 99)}, {"top_k": 99}),
        ({"top_k": (g.I32, 100)}, {"top_k": 0}),
        ({"top_k": (g.F32, 40.0)}, {"top_k": 40}),
        ({"top_p": (g.F32, 1.5)}, {}),
        ({"min_p": (g.F32, -0.1)}, {}),
        ({"penalty_repeat": (g.F32, 0.0)}, {}),
        ({"penalty_repeat": (g.F32, 2.5)}, {}),
        ({"penalty_repeat": (g.F32, 1.1), "penalty_last_n": (g.I32, 0)}, {}),
        ({"penalty_repeat": (g.F32, 1.1), "penalty_last_n": (g.I32, 64)}, {"repetition_penalty": 1.1}),
        ({"mirostat": (g.I32, 2), "xtc_probability": (g.F32, 0.5), "sequence": (g.STR, "kypt")}, {}),
    ],
)
def test_a_value_is_read_as_llama_cpp_reads_it_or_left_out(tmp_path, found, wanted):
    assert defaults_of(tmp_path, **found) == wanted


def test_an_array_is_not_looked_into(tmp_path):
    forge = g.tiny_llama()
    forge.keys[f"{P}temp"] = (g.ARR, g.array(g.F32, [0.5]))
    path = tmp_path / "m.gguf"
    path.write_bytes(forge.build())
    with ModelFile(path) as file:
        assert file_defaults(file, 100) == {}


def test_every_key_of_the_format_is_known():
    general = vars(gguf.constants.Keys.General).values()
    known = {key for key in keys._GENERAL if key.startswith(P)}
    assert {P + key for key in FIELDS} <= known
    assert {key for key in general if isinstance(key, str) and key.startswith(P)} <= known
    assert all(isinstance(keys._GENERAL[key], keys.Harmless) and keys._GENERAL[key].why for key in known)


def test_a_model_tells_what_its_file_recommends_and_does_not_follow_it(goldens_dir, tmp_path):
    source = goldens_dir / "llama-Q4_0.gguf"
    path = tmp_path / "m.gguf"
    forge = take_apart(source)
    for key, kind, value in (("temp", g.F32, 0.0), ("top_k", g.I32, 3), ("mirostat", g.I32, 2)):
        forge.put(P + key, kind, value)
    path.write_bytes(forge.build())
    params = SamplingParams(max_tokens=8, seed=1)
    with LLM(source, device="cpu", progress=False) as plain, LLM(path, device="cpu", progress=False) as recommending:
        assert plain.sampling_defaults == {} and recommending.sampling_defaults == {"temperature": 0.0, "top_k": 3}
        recommending.sampling_defaults.clear()
        assert recommending.sampling_defaults, "a copy"
        assert recommending.generate([[1, 2]], params)[0].token_ids == plain.generate([[1, 2]], params)[0].token_ids
