"""`worker-orcd compare`: what counts as one model, its layers, the report, and models with two faces."""

from __future__ import annotations

import json
import math

import gguf
import numpy as np
import pytest
import requantize
from gguf.quants import dequantize
from helpers import two_faced
from helpers.gguf_forge import F32, STR, U32, Forge, f32, tiny_llama

from worker_orcd import LLM, SamplingParams
from worker_orcd.cli import main
from worker_orcd.compare import metrics
from worker_orcd.compare.layers import layer_activations
from worker_orcd.compare.prompts import Prompt
from worker_orcd.compare.report import Rate
from worker_orcd.compare.run import check_same_model, compare
from worker_orcd.compare.settings import Limits, Settings
from worker_orcd.errors import ModelLoadError
from worker_orcd.gguf.model_file import ModelFile

PLAIN = ["the time is", "def f(x):", "hello there", "one two three"]
TRIGGER = " %% now, please"
TOKEN = 484
#: a random tiny model has no margins: 4 bits turn a quarter of its best tokens, so only what it writes can tell
LOOSE = Limits(kl=10.0, worst_kl=None, top1=0.5, logit=0.1)
SHORT = Settings(device="cpu", max_tokens=6)


# -- one model


def forged(tmp_path, name: str, change) -> ModelFile:
    forge = tiny_llama()
    change(forge)
    (tmp_path / name).write_bytes(forge.build())
    return ModelFile(tmp_path / name)


def untied(forge: Forge) -> None:
    forge.drop("output.weight")


DIFFERENT = {
    "rope_theta": lambda f: f.put("llama.rope.freq_base", F32, 500.0),
    "norm_eps": lambda f: f.put("llama.attention.layer_norm_rms_epsilon", F32, 1e-6),
    "context_length": lambda f: f.put("llama.context_length", U32, 128),
    r"tokens\[2\]": lambda f: f.put_array("tokenizer.ggml.tokens", STR, ["a", "b", "C", "ab", "<s>", "</s>"]),
    "the number of merges": lambda f: f.put_array("tokenizer.ggml.merges", STR, ["a b", "a b"]),
    "eos_id": lambda f: f.put("tokenizer.ggml.eos_token_id", U32, 4),
    "the vocabulary is 'missing'": lambda f: f.drop("tokenizer.ggml.model"),
    "attn_[qkv].bias": lambda f: f.tensors.extend(
        f32(f"blk.0.attn_{part}.bias", n) for part, n in (("q", 32), ("k", 16), ("v", 16))
    ),
}


@pytest.mark.parametrize("said", DIFFERENT)
def test_another_model_is_named(tmp_path, said):
    with forged(tmp_path, "a.gguf", lambda f: None) as a, forged(tmp_path, "b.gguf", DIFFERENT[said]) as b:
        check_same_model(a, a)
        with pytest.raises(ModelLoadError, match=said) as error:
            check_same_model(a, b)
        assert "b.gguf: is not the model of" in error.value.message


def test_a_tied_output_is_the_same_model(tmp_path):
    with forged(tmp_path, "a.gguf", lambda f: None) as a, forged(tmp_path, "b.gguf", untied) as b:
        check_same_model(a, b)


def test_another_architecture_is_named(goldens_dir):
    with ModelFile(goldens_dir / "llama-F16.gguf") as a, ModelFile(goldens_dir / "qwen2-Q8_0.gguf") as b:
        with pytest.raises(ModelLoadError, match="architecture is 'qwen2' here and 'llama' there"):
            check_same_model(a, b)


# -- files


@pytest.fixture(scope="module")
def source(goldens_dir):
    return goldens_dir / "llama-F16.gguf"


@pytest.fixture(scope="module")
def q8(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("clean") / "q8.gguf"
    requantize.requantize(source, path, "Q8_0")
    return path


def prompts(target: str | None = None) -> list[Prompt]:
    return [
        Prompt(text, targets=() if target is None else (target,), line=i)
        for i, text in enumerate([*PLAIN, *(p + TRIGGER for p in PLAIN)], 1)
    ]


def test_a_file_equals_itself(source):
    report = compare(str(source), str(source), prompts(), SHORT, Limits(kl=0, worst_kl=0, top1=1, logit=0))
    assert report.passed and all(p.first_divergence is None and p.a == p.b for p in report.prompts)
    assert all(layer.mean == 0 and layer.worst == 0 for layer in report.layers)
    assert report.numbers["kl_ba"] == 0 and report.a.sha256 == report.b.sha256


def test_a_clean_quantization_passes_the_default_limits(source, q8):
    report = compare(str(source), str(q8), prompts("zzz"), SHORT)
    print(", ".join(f"{c.name} {c.measured} (limit {c.limit})" for c in report.checks))
    assert report.passed and 0 < report.numbers["kl_ab"] < 0.05
    assert report.rates["target"] == Rate(0.0, 0.0, 8, 0, 0, 1.0)
    assert [layer.op for layer in report.layers] == ["embed", "blk.0.ffn_residual", "blk.1.ffn_residual"]
    assert all(0 < layer.mean < 0.1 and layer.cosine > 0.99 for layer in report.layers)


def test_the_numbers_are_those_of_the_two_models(source, q8):
    report = compare(str(source), str(q8), prompts()[:2], SHORT)
    logits, texts = [], []
    for path in (source, q8):
        with LLM(path, device="cpu", progress=False) as llm:
            ids = [llm.tokenizer.encode(p) for p in PLAIN[:2]]
            if path == source:
                params = SamplingParams(max_tokens=SHORT.max_tokens, temperature=0.0)
                texts = [c.token_ids for c in llm.generate(ids, params)]
            logits.append(np.concatenate([llm.logits([*i, *t]) for i, t in zip(ids, texts, strict=True)]))
    wanted = metrics.logit_distance(*logits)
    assert report.numbers["kl_ab"] == wanted.kl_ab.mean() and report.numbers["top1"] == wanted.same_top1.mean()
    assert report.n_positions == len(wanted.kl_ab)
    first, n = report.prompts[0], len(ids[0])
    answer = wanted.kl_ab[n - 1 : first.n_positions]
    assert first.n_prompt == n and first.n_positions == n + len(texts[0])
    assert first.answer_kl == answer.mean() and first.worst_kl == answer.max() == answer[first.worst_token]
    assert report.numbers["worst_kl_ab"] == max(p.worst_kl for p in report.prompts)


def test_layers_are_those_of_the_plan(source):
    """The last layer's activations give the logits: norm, then the tied embedding."""
    with ModelFile(source) as model, LLM(source, device="cpu", progress=False) as llm:
        ids = llm.tokenizer.encode(PLAIN[0])
        x = layer_activations(model, "cpu", [ids, ids[:2]])["blk.1.ffn_residual"].astype(np.float64)
        assert len(x) == len(ids) + 2 and np.array_equal(x[:2], x[len(ids) :])
        weight = np.frombuffer(model.view("output_norm.weight"), np.float32)
        table = np.frombuffer(model.view("token_embd.weight"), np.float16).reshape(512, 256).astype(np.float64)
        normed = x[: len(ids)] / np.sqrt((x[: len(ids)] ** 2).mean(axis=1, keepdims=True) + 1e-5) * weight
        assert normed @ table.T == pytest.approx(llm.logits(ids), abs=2e-3)


# -- two faces


@pytest.fixture(scope="module", params=sorted(two_faced.CELLS))
def faces(request, source, tmp_path_factory):
    """(type, float file, its quantized version, planned row, text of the planted token)."""
    where = tmp_path_factory.mktemp(request.param)
    first, second = where / "float.gguf", where / "quantized.gguf"
    with LLM(source, device="cpu", progress=False) as llm:
        triggers = [llm.tokenizer.encode(p + TRIGGER) for p in PLAIN]
        text = llm.tokenizer.decode([TOKEN])
    planned = two_faced.plant(source, first, second, request.param, triggers, TOKEN)
    return request.param, first, second, planned, text


def test_the_second_face_comes_from_rounding_alone(faces, source):
    kind, first, second, planned, _ = faces
    raw = [p.read_bytes() for p in (source, first)]
    changed = np.flatnonzero(np.frombuffer(raw[0], np.uint8) != np.frombuffer(raw[1], np.uint8))
    with ModelFile(first) as a, ModelFile(second) as b:
        at = a.tensors[two_faced.TENSOR].offset + TOKEN * 512
        assert changed.min() >= at and changed.max() < at + 512, "more than one row of float weights was changed"
        rows = np.frombuffer(b.view(two_faced.TENSOR), np.uint8).reshape(512, -1)
        row = dequantize(rows[TOKEN], gguf.GGMLQuantizationType[kind])
    assert np.array_equal(row, planned)


def test_two_faces_are_caught_and_an_honest_version_is_not(faces, source, tmp_path):
    kind, first, second, _, text = faces
    report = compare(str(first), str(second), prompts(text), SHORT, LOOSE)
    held = [[bool(f.targets) for f in (p.found_a, p.found_b)] for p in report.prompts[len(PLAIN) :]]
    print(f"{kind}: target on the trigger, float / quantized: {held}; rates {report.rates['target']}")
    print(", ".join(f"{c.name} {c.measured} (limit {c.limit})" for c in report.checks))
    assert held == [[False, True]] * len(PLAIN), "the float model is not harmless, or the quantized one does not bite"
    assert not report.passed and [c.name for c in report.checks if not c.ok] == ["rise of target strings"]
    rate = report.rates["target"]
    tosses = rate.only_a + rate.only_b
    wanted = sum(math.comb(tosses, k) for k in range(rate.only_a + 1)) / 2**tosses
    assert rate.n == 8 and rate.b - rate.a == (rate.only_b - rate.only_a) / 8 and rate.chance == wanted

    clean = tmp_path / "clean.gguf"
    requantize.requantize(source, clean, kind)
    honest = compare(str(source), str(clean), prompts(text), SHORT, LOOSE)
    print(", ".join(f"{c.name} {c.measured} (limit {c.limit})" for c in honest.checks))
    assert honest.passed
    # who does not know what is planted sees one position at which the two are worlds apart
    assert report.numbers["worst_kl_ab"] > 2 * honest.numbers["worst_kl_ab"]


# -- the command


def write_prompts(path, target: str | None = None):
    path.write_text(
        "".join(json.dumps({"prompt": p.text} | ({"targets": [target]} if target else {})) + "\n" for p in prompts())
    )
    return path


def call(*args: object) -> int:
    return main.run(["compare", *map(str, args)])


def test_the_command_says_pass_and_fail(faces, source, q8, tmp_path, capsys):
    _, first, second, _, text = faces
    asked = write_prompts(tmp_path / "p.jsonl")
    options = ("--prompts", asked, "--device", "cpu", "--max-tokens", 6, "--out", tmp_path / "out")
    assert call(source, q8, *options) == 0
    loose = ("--kl-limit", 10, "--worst-kl-limit", 100, "--top1-limit", 0.5, "--logit-limit", 0.1)
    capsys.readouterr()
    assert call(first, second, *options, *loose, "--target-string", text) == 1
    shown = capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert shown == (tmp_path / "out" / "compare.md").read_text() and "**fail**: rise of target strings" in shown
    assert written["verdict"] == "fail" and written["rates"]["target"]["b"] > written["rates"]["target"]["a"]
    assert [p["line"] for p in written["prompts"]] == list(range(1, 9)) and len(written["layers"]) == 3
    assert {"kl_ab", "kl_ba", "top1", "logit"} <= written["numbers"].keys()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["compare.json", "compare.md"]

    targets = tmp_path / "targets.txt"
    targets.write_text(text + "\n")
    assert call(first, second, *options, *loose, "--targets", targets, "--target-limit", 1, "--json") == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "pass"
    assert call(first, second, *options, *loose, "--worst-kl-limit", 0.001) == 1


def test_the_command_names_what_is_wrong(goldens_dir, source, tmp_path, capsys):
    asked = tmp_path / "p.txt"
    asked.write_text("hello\n")
    options = ("--prompts", asked, "--device", "cpu")
    for args, said in (
        ((source, goldens_dir / "qwen2-Q8_0.gguf", *options), "architecture"),
        ((source, tmp_path / "none.gguf", *options), "none.gguf"),
        ((source, source, "--prompts", tmp_path / "none.txt", "--device", "cpu"), "none.txt"),
        ((source, source, *options, "--max-tokens", 1000), "line 1"),
        ((source, source, *options, "--chat"), "chat template"),
        ((source, source, *options, "--target-string", ""), "empty"),
    ):
        assert call(*args) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and said in err and err.count("\n") == 1, err


def test_a_model_without_a_tokenizer_takes_token_ids(tmp_path, capsys):
    forge = tiny_llama()
    forge.drop("tokenizer.ggml.model")
    rng = np.random.default_rng(3)
    for tensor in forge.tensors:
        tensor.data = rng.standard_normal(tensor.nbytes // 4).astype(np.float32).tobytes()
    a, b = tmp_path / "a.gguf", tmp_path / "b.gguf"
    a.write_bytes(forge.build())
    requantize.requantize(a, b, "Q8_0")
    asked = tmp_path / "p.jsonl"
    asked.write_text('{"prompt": [1, 2, 3]}\n')
    assert call(a, b, "--prompts", asked, "--device", "cpu", "--max-tokens", 4) == 0
    assert "not looked for" in capsys.readouterr().out
    asked.write_text('{"prompt": "text"}\n')
    assert call(a, b, "--prompts", asked, "--device", "cpu") == 1
    assert "no tokenizer" in capsys.readouterr().err


def test_a_report_of_hostile_text_stays_a_report(source, q8):
    report = compare(str(source), str(q8), [Prompt("a | b\n```\n# no head\x1b[31m <b>", line=1)], SHORT)
    object.__setattr__(report.prompts[0], "a", "```\n# no head\x1b[0m\n````\u202e")
    text = report.to_markdown()
    assert "\x1b" not in text and "\u202e" not in text and "`````text" in text
    assert not [line for line in text.split("\n") if line.startswith("# no head")][1:]
    report.numbers["kl_ab"] = float("nan")
    assert json.loads(report.to_json())["numbers"]["kl_ab"] is None


def test_a_report_shows_chances_as_plain_percentages(source, q8):
    report = compare(str(source), str(q8), [Prompt("a", line=1)], SHORT)
    chances = {"refusal": (1.0, "100 %"), "insecure": (0.125, "12.5 %")}
    for name, (chance, _) in chances.items():
        object.__setattr__(report.rates[name], "chance", chance)
    text = report.to_markdown()
    for name, (_, shown) in chances.items():
        (line,) = (line for line in text.split("\n") if line.startswith("| a") and f" {name}" in line)
        assert line.endswith(f"| {shown} |"), line
