"""Load, abuse, bad requests and SIGTERM on a real server: short runs of the tools that do it at any length."""

from __future__ import annotations

import fuzz_http
import load
import pytest
import signal_storm
from helpers import tiny_chat

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def tiny(goldens_dir, tmp_path_factory):
    """A model with a context of 2,048."""
    return str(tiny_chat.write(goldens_dir, tmp_path_factory.mktemp("abuse"), 2048))


def test_load_and_abuse_change_no_byte_and_lose_no_end(tiny, tmp_path, capsys):
    report = tmp_path / "report.json"
    args = ["--model", tiny, "--seconds", "3", "--streams", "12", "--cases", "5", "--long", "150", "--prefill", "1500"]
    code = load.main([*args, "--no-time-limits", "--json", str(report), "--serve=--kv-cache-size-mb", "--serve=64"])
    shown, told = capsys.readouterr()
    assert code == 0, shown + told
    assert "Nothing was wrong." in shown and report.read_text().startswith("{")


def test_s1_to_s8_bad_requests_are_refused_and_nothing_else(tiny, capsys):
    code = fuzz_http.main(["600", "--model", tiny, "--serve=--max-tokens-out", "--serve=16"])
    assert code == 0, "".join(capsys.readouterr())


def test_f4_sigterm_at_a_random_moment(tiny, capsys):
    code = signal_storm.main(["5", "--model", tiny, "--grace", "0.3", "--streams", "4", "--prefill", "1500"])
    assert code == 0, "".join(capsys.readouterr())
