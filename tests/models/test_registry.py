"""Rows of architectures: where they are listed, and what none may say."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil

import pytest

from worker_orcd import models
from worker_orcd.models import registry
from worker_orcd.models.ops import ACT_ACTIVATIONS, GLU_ACTIVATIONS


def test_every_family_is_listed_and_no_row_hides_another():
    modules = [importlib.import_module(f"worker_orcd.models.{m.name}") for m in pkgutil.iter_modules(models.__path__)]
    families = [m for m in modules if hasattr(m, "ROWS") and m is not registry]
    assert set(families) == set(registry.FAMILIES)
    assert len(registry.ROWS) == sum(len(m.ROWS) for m in families)
    assert all(name == row.name for name, row in registry.ROWS.items())


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("qwen2", "act", "gelu"),
        ("qwen2", "act", "relu"),
        ("gpt2", "act", "silu"),  # an mlp has no gate
        ("gpt-oss", "act", "swiglu"),
        ("llama", "ffn", "experts"),
        ("llama", "norm", "l2"),
        ("llama", "rope_type", "normal"),
        ("llama", "window", "odd"),
        ("llama", "qkv_bias", True),
    ],
)
def test_a_row_with_an_unknown_value_is_refused_when_it_is_made(name, field, value):
    with pytest.raises(ValueError, match=f"architecture {name}: {field} {value!r} is none of "):
        dataclasses.replace(registry.ROWS[name], **{field: value})


def test_a_row_may_have_any_activation_of_its_feed_forward():
    for name, names in (("qwen2", GLU_ACTIVATIONS), ("phi3", GLU_ACTIVATIONS), ("gpt2", ACT_ACTIVATIONS)):
        for act in names:
            assert dataclasses.replace(registry.ROWS[name], act=act).act == act
