"""The library's two calls for a text give the same, and the one for long texts keeps nobody from running."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers.patience import patient, turns_of_another_thread
from helpers.tiny_library import tiny_library
from tokenizers import decoders

from worker_orcd.tokenizer.library import POOL_VARIABLE, decode_with
from worker_orcd.tokenizer.tokenizer import Tokenizer

pytestmark = pytest.mark.timeout(patient(120))

TEXT = "The sea, 42 times:\n\tна море и обратно 🌊🌊 <|im_end|> " + "naïve co-operation isn't   over.  \r\n"


@pytest.fixture(params=["gpt-2", "qwen2", "llama-bpe", "llama-spm", "phi-3"])
def tokenizer(request, goldens_dir):
    return Tokenizer.from_file(goldens_dir / "tokenizers" / f"{request.param}.gguf")


def test_both_calls_give_the_same(tokenizer, monkeypatch):
    for n in (1, 30, 300):
        monkeypatch.setenv(POOL_VARIABLE, "true")
        text = TEXT * n
        ids = tokenizer.encode(text)
        decoded = tokenizer.decode(ids)
        monkeypatch.setenv(POOL_VARIABLE, "false")
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == decoded
        stream = tokenizer.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == decoded


def test_others_run_while_a_long_text_is_tokenized(tokenizer, monkeypatch):
    monkeypatch.setenv(POOL_VARIABLE, "false")
    text = TEXT * 600
    assert turns_of_another_thread(lambda: tokenizer.encode(text)) > 2


def test_a_process_that_wants_no_pool_gets_none(goldens_dir):
    program = f"""
import os
os.environ[{POOL_VARIABLE!r}] = "false"
from worker_orcd.tokenizer.tokenizer import Tokenizer
tokenizer = Tokenizer.from_file({str(goldens_dir / "tokenizers" / "qwen2.gguf")!r})
for n in (100, 5_000, 100_000):
    tokenizer.decode(tokenizer.encode("the sea " * (n // 8)))
print(len(os.listdir("/proc/self/task")))
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], check=True, capture_output=True, text=True, timeout=patient(60)
    )
    assert done.stdout.strip() == "1"


@pytest.mark.parametrize("skip_special", [True, False])
def test_both_calls_give_the_same_text_of_ids(skip_special, monkeypatch):
    """Of a tokenizer.json whose decoder is more than a table of bytes, which alone has its text from the library."""
    library = tiny_library(decoder=decoders.WordPiece(prefix="b"))
    ids = [i % library.get_vocab_size() for i in range(5_000)]
    monkeypatch.setenv(POOL_VARIABLE, "true")
    alone = decode_with(library, ids, skip_special)
    monkeypatch.setenv(POOL_VARIABLE, "false")
    assert decode_with(library, ids, skip_special) == alone
    assert ("<|end|>" in alone) is not skip_special and len(alone) > 4_000
