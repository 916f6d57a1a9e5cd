"""Which tokenizer a model gets: the one asked for, its own, the one beside it, none; and who is told of it."""

import json
import pathlib
import types

import pytest
from helpers.gguf_forge import STR, U32, Forge, tiny_llama, tiny_vocab
from helpers.tiny_library import tiny_library

from worker_orcd._gguf import GgufFile
from worker_orcd.cli.main import run
from worker_orcd.errors import ModelLoadError
from worker_orcd.gguf import quants
from worker_orcd.runtime.llm import LLM
from worker_orcd.tokenizer.tokenizer import Tokenizer


def _write(path: pathlib.Path, forge: Forge) -> pathlib.Path:
    path.write_bytes(forge.build())
    return path


def _model(path, metadata, n_vocab):
    embeddings = types.SimpleNamespace(shape=(64, n_vocab))
    return types.SimpleNamespace(path=str(path), metadata=metadata, tensors={"token_embd.weight": embeddings})


def test_from_model_without_tokenizer_is_none(tmp_path):
    for forge in (Forge(), Forge().put("tokenizer.ggml.model", STR, "none")):
        path = _write(tmp_path / "v.gguf", forge.put("general.architecture", STR, "llama"))
        with GgufFile(path, quants.BLOCK_SIZES) as file:
            assert Tokenizer.from_model(_model(tmp_path / "m.gguf", file.metadata, 4)) is None
        with pytest.raises(ModelLoadError, match="holds no tokenizer"):
            Tokenizer.from_file(path)


def _bare(directory, n_vocab, ids=(), template=None):
    """A model whose file holds no vocabulary, but may name special ids and a template."""
    forge = Forge().put("general.architecture", STR, "llama")
    for name, token in dict(ids).items():
        forge.put(f"tokenizer.ggml.{name}_token_id", U32, token)
    if template is not None:
        forge.put("tokenizer.chat_template", STR, template)
    path = _write(directory / "m.gguf", forge)
    return _model(path, GgufFile(path, quants.BLOCK_SIZES).metadata, n_vocab)


def _neighbours(directory, **config):
    """A tokenizer.json, tokenizer_config.json and chat_template.jinja such as another model may have left."""
    tiny_library().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text("{{ 'b' }}")


def test_a_model_without_a_vocabulary_takes_the_json_beside_it(tmp_path):
    _neighbours(tmp_path, bos_token="a", eos_token="c")
    tokenizer = Tokenizer.from_model(_bare(tmp_path, 8))
    assert (tokenizer.kind, tokenizer.n_vocab, tokenizer.chat_template) == ("hf-json", 5, "{{ 'b' }}")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (0, 2, (2, 4))
    model = _bare(tmp_path, 8, {"eos": 3}, "{{ eos_token }}")
    tokenizer = Tokenizer.from_model(model)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (0, 3, (3, 4)), "the model's word comes first"
    assert tokenizer.apply_chat([{"role": "user", "content": "a"}]) == [3]
    given = Tokenizer.from_model(model, override=tmp_path)
    assert (given.bos_id, given.eos_id, given.chat_template) == (0, 2, "{{ 'b' }}"), "but not before what is asked for"


@pytest.mark.parametrize("spoil", [
    lambda d: None,
    lambda d: (d / "tokenizer.json").write_bytes(b"{"),
    lambda d: (d / "tokenizer_config.json").write_bytes(b"{"),
    lambda d: (d / "chat_template.jinja").write_bytes(b"\xff"),
], ids=["good", "damaged json", "damaged config", "damaged template"])  # fmt: skip
def test_a_model_with_a_vocabulary_takes_nothing_that_lies_beside_it(tmp_path, spoil):
    """Neither another model's tokens nor its config and template, and nothing of them makes loading fail."""
    _neighbours(tmp_path, bos_token="a", eos_token="c")
    spoil(tmp_path)
    path = _write(tmp_path / "m.gguf", tiny_vocab().put("tokenizer.chat_template", STR, "own"))
    with GgufFile(path, quants.BLOCK_SIZES) as file:
        tokenizer = Tokenizer.from_model(_model(path, file.metadata, 6))
        assert (tokenizer.kind, tokenizer.path, tokenizer.chat_template) == ("gguf-bpe", str(path), "own")
        assert (tokenizer.encode("ab"), tokenizer.bos_id, tokenizer.eos_id) == ([3], 4, 5)
        with pytest.raises(ModelLoadError, match="has 6 tokens, but embeddings for 5: its vocabulary and its tensors"):
            Tokenizer.from_model(_model(path, file.metadata, 5))
    (tmp_path / "chat_template.jinja").unlink()
    path = _write(tmp_path / "m.gguf", tiny_vocab())
    with GgufFile(path, quants.BLOCK_SIZES) as file:
        assert Tokenizer.from_model(_model(path, file.metadata, 6)).chat_template is None


def test_what_is_no_file_beside_a_model_is_passed_over(tmp_path):
    model = _bare(tmp_path, 5)
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "gone")
    assert Tokenizer.from_model(model) is None
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").mkdir()
    assert Tokenizer.from_model(model) is None


def test_a_json_beside_that_does_not_fit_is_named(tmp_path):
    _neighbours(tmp_path)
    beside = rf"^{tmp_path}/tokenizer\.json: has 5 tokens, but {tmp_path}/m\.gguf has"
    remedy = "it is not this model's tokenizer; move it away, or name the right one with --tokenizer$"
    with pytest.raises(ModelLoadError, match=f"{beside} embeddings for 4: {remedy}"):
        Tokenizer.from_model(_bare(tmp_path, 4))
    for name in ("bos", "eos", "eot", "eom"):
        with pytest.raises(ModelLoadError, match=f"{beside} {name}_id 5: {remedy}"):
            Tokenizer.from_model(_bare(tmp_path, 8, {name: 5}))
    (tmp_path / "tokenizer.json").write_bytes(b"{")
    with pytest.raises(ModelLoadError, match=rf"^{tmp_path}/tokenizer\.json: is no tokenizer\.json: "):
        Tokenizer.from_model(_bare(tmp_path, 8))


def test_a_given_json_with_too_many_tokens_is_refused(tmp_path):
    tiny_library().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json: has 5 tokens, but .* has embeddings for 4: it is not"):
        Tokenizer.from_model(_model(tmp_path / "m.gguf", {}, 4), override=tmp_path)


def test_override_may_be_a_gguf_vocabulary(tmp_path):
    path = _write(tmp_path / "v.gguf", tiny_vocab())
    tokenizer = Tokenizer.from_model(_model(tmp_path / "m.gguf", {}, 10), override=path)
    assert (tokenizer.kind, tokenizer.encode("aab")) == ("gguf-bpe", [0, 3])


# --- who is told ---------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path):
    """A whole model without a vocabulary."""
    forge = tiny_llama()
    forge.drop(*[k for k in forge.keys if k.startswith("tokenizer.")])
    return _write(tmp_path / "m.gguf", forge)


def test_info_says_where_the_tokenizer_is_from(bare, tmp_path):
    def source(model, **given):
        with LLM(model, device="cpu", kv_cache_bytes=1 << 20, **given) as llm:
            return llm.info.tokenizer_source, llm.info.tokenizer_path, llm.info.tokenizer_kind

    assert source(bare) == (None, None, None)
    _neighbours(tmp_path)
    beside = str(tmp_path / "tokenizer.json")
    assert source(bare) == ("beside", beside, "hf-json")
    assert source(bare, tokenizer=beside) == ("given", beside, "hf-json")
    own = _write(tmp_path / "own.gguf", tiny_llama())
    assert source(own) == ("model", str(own), "gguf-bpe")
    assert source(own, tokenizer=tmp_path) == ("given", beside, "hf-json")


def test_generate_says_on_standard_error_that_a_neighbour_is_used(bare, tmp_path, capsys):
    _neighbours(tmp_path)
    assert (
        run(["generate", "--model", str(bare), "--device", "cpu", "--prompt", "ab", "--max-tokens", "1", "--json"]) == 0
    )
    out, err = capsys.readouterr()
    assert err == f"the model file holds no vocabulary; {tmp_path}/tokenizer.json is used\n"
    assert json.loads(out)["tokens_in"] == 2
