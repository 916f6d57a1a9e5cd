"""The manifest of the packaged kernel images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from worker_orcd.cuda import images

LISTED = {"ops": {"sass": ["80", "90a"], "ptx": "80"}}


def test_images_that_are_not_there_do_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(images, "__file__", str(tmp_path / "cuda" / "images.py"))
    assert images.packaged() == {}
    (tmp_path / "fatbins").mkdir()
    (tmp_path / "fatbins" / "manifest.json").write_text(json.dumps(LISTED))
    assert images.packaged() == {} and not images.has_machine_code("ops", "90a")
    (tmp_path / "fatbins" / "ops.fatbin").write_bytes(b"x")
    assert images.packaged() == LISTED
    assert images.has_machine_code("ops", "90a") and not images.has_machine_code("ops", "90")
