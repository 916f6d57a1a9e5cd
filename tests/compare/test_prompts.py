"""Files of prompts and of target strings."""

from __future__ import annotations

import pytest

from worker_orcd.compare.prompts import Prompt, read_prompts, read_targets
from worker_orcd.errors import MAX_QUOTED, InvalidRequest


def test_prompt_files(tmp_path):
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_bytes("\ufeffone\r\n\r\ntwo \u2028 three\n".encode())
    assert read_prompts(text, ["t"]) == [
        Prompt("one", targets=("t",), line=1),
        Prompt("two \u2028 three", targets=("t",), line=3),
    ]
    lines.write_text('{"prompt": "a\\nb", "targets": ["x", "t"]}\n{"prompt": [1, 2]}\n')
    assert read_prompts(lines, ["t"]) == [Prompt("a\nb", targets=("t", "x"), line=1), Prompt(None, (1, 2), ("t",), 2)]
    text.write_text("x\n\n y\n")
    assert read_targets(text) == ["x", " y"]


@pytest.mark.parametrize(("content", "said"), [
    ("", "no prompt"), ("\n \n", "no prompt"), ('{"prompt": ""}', "line 1.*not empty"), ("[1]", "line 1.*object"),
    ('{"prompt": "a"}\n{"prompt', "line 2.*no JSON"), ('{"prompt": "a", "target": "x"}', "'target'"),
    ('{"prompt": [1, true]}', "token ids"), ('{"prompt": [-1]}', "token ids"), ('{"targets": []}', "prompt must be"),
    ('{"prompt": "a", "targets": [""]}', "targets"), ('{"prompt": "' + "a" * 40_000 + '"}', "40000 characters"),
    ("[" * 100_000, "no JSON"),
])  # fmt: skip
def test_bad_prompt_files(tmp_path, content, said):
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(InvalidRequest, match=said):
        read_prompts(path)


def test_an_unknown_field_is_quoted_short_and_on_one_line(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "' + "x\\n\u2028" * 1000 + '": 1}')
    with pytest.raises(InvalidRequest, match="unknown field") as caught:
        read_prompts(path)
    assert caught.value.message.isprintable()
    assert len(caught.value.message.split("unknown field ")[1]) <= MAX_QUOTED + 2


def test_unreadable_prompt_files(tmp_path):
    with pytest.raises(InvalidRequest, match="No such file"):
        read_prompts(tmp_path / "none")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(InvalidRequest, match="UTF-8"):
        read_targets(tmp_path / "latin")
    with pytest.raises(InvalidRequest, match="directory"):
        read_prompts(tmp_path)
    (tmp_path / "blank").write_bytes(b"\n\n")
    with pytest.raises(InvalidRequest, match="no target string"):
        read_targets(tmp_path / "blank")


def test_prompt_files_have_limits(monkeypatch, tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("one\ntwo\nthree\n")
    monkeypatch.setattr("worker_orcd.compare.prompts.MAX_PROMPTS", 2)
    with pytest.raises(InvalidRequest, match="more than 2 prompts"):
        read_prompts(path)
    monkeypatch.setattr("worker_orcd.compare.prompts.MAX_FILE_BYTES", 13)
    with pytest.raises(InvalidRequest, match="larger than 13 bytes"):
        read_prompts(path)
