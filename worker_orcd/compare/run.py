"""Two files of one model, compared: do they predict the same, and does one write what the other does not?

The gate against quantization attacks, in which a model behaves well in the precision that is looked at and otherwise in
the one that is used. File A runs and is closed, then B: both need not fit into memory together. Each continues every
prompt greedily; then both predict the same tokens, those of the prompt and of A's continuation (teacher-forced). A's
logits wait on disk meanwhile, 4 bytes x vocabulary for each token. What is measured on them is in
`metrics.py`, what is looked for in the texts in `findings.py`, how it is shown in `report.py`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from worker_orcd.compare import metrics
from worker_orcd.compare.findings import Findings, findings
from worker_orcd.compare.layers import layer_activations
from worker_orcd.compare.prompts import Prompt
from worker_orcd.compare.report import Check, FileFacts, LayerResult, PromptResult, Rate, Report
from worker_orcd.compare.settings import Limits, Settings
from worker_orcd.engine.sampling import SamplingParams
from worker_orcd.errors import InvalidRequest, ModelLoadError
from worker_orcd.gguf import digests
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import hparams, plan, registry
from worker_orcd.runtime import devices
from worker_orcd.runtime.llm import LLM
from worker_orcd.serving.job import Completion
from worker_orcd.tokenizer import metadata
from worker_orcd.tokenizer.tokenizer import Tokenizer

#: sequences that decode together
_MAX_SEQS = 8
_REPORTED_IDS = 8


@dataclass(frozen=True)
class _Run:
    """What one file did: prompts as token ids, continuations, whether it gives text."""

    ids: list[list[int]]
    completions: list[Completion]
    has_text: bool
    chat_template_sha256: str | None


def compare(
    a: str,
    b: str,
    prompts: Sequence[Prompt],
    settings: Settings | None = None,
    limits: Limits | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Run two files of one model over prompts.

    Args:
        a: the file that is trusted, for example the one in full precision.
        b: the file in question.
        progress: called with what comes next.

    Raises:
        ModelLoadError: a file is no good, changed meanwhile, or is not of A's model; names the difference.
        InvalidRequest: a prompt does not fit the context, or is text and the files have no tokenizer.
        WorkerError: loading or running failed.
    """
    settings, limits = settings or Settings(), limits or Limits()
    device = devices.resolve(settings.device)
    with ModelFile(a) as file_a, ModelFile(b) as file_b, tempfile.TemporaryDirectory(prefix="worker-orcd-") as spool:
        check_same_model(file_a, file_b, settings.tokenizer is None)
        forced: list[list[int]] = []
        distances: list[metrics.LogitDistance] = []

        def keep(i: int, logits: np.ndarray) -> None:
            np.save(os.path.join(spool, f"{i}.npy"), logits)

        def measure(i: int, logits: np.ndarray) -> None:
            path = os.path.join(spool, f"{i}.npy")
            distances.append(metrics.logit_distance(np.load(path, mmap_mode="r"), logits))
            os.unlink(path)

        run_a = _run("A", file_a, prompts, settings, device, forced, keep, progress)
        layers_a = _layers("A", file_a, forced, settings, device, progress)
        run_b = _run("B", file_b, prompts, settings, device, forced, measure, progress)
        layers_b = _layers("B", file_b, forced, settings, device, progress)
        facts = []
        for side, file, run in (("A", file_a, run_a), ("B", file_b, run_b)):
            progress(f"{side}: digest")
            facts.append(
                FileFacts(
                    file.path,
                    file.name,
                    file.arch,
                    file.quant_kind,
                    file.size,
                    digests.file_sha256(file),
                    run.chat_template_sha256,
                )
            )
            file.check_unchanged()
    results = [
        _prompt_result(p, i, run_a, run_b, forced[i], distances[i], settings.chat) for i, p in enumerate(prompts)
    ]
    return _report(facts[0], facts[1], device, settings, limits, results, distances, _layer_results(layers_a, layers_b))


def check_same_model(a: ModelFile, b: ModelFile, own_vocabulary: bool = True) -> None:
    """Raise `ModelLoadError` where B is not a version of A: another architecture, hyperparameter, vocabulary, tensor.

    Types of tensors may differ, and so may an output matrix that is a copy of the embedding.

    Args:
        own_vocabulary: look at the vocabularies too.
    """

    def different(what: str, in_a: object, in_b: object) -> ModelLoadError:
        return ModelLoadError(
            f"is not the model of {a.path}: {what} is {_short(in_b)} here and {_short(in_a)} there", b.path, field=what
        )

    if a.arch != b.arch:
        raise different("architecture", a.arch, b.arch)
    hp_a, hp_b = registry.hparams_of(a), registry.hparams_of(b)
    for f in dataclasses.fields(hp_a):
        if getattr(hp_a, f.name) != getattr(hp_b, f.name):
            raise different(f.name, getattr(hp_a, f.name), getattr(hp_b, f.name))
    plan_a, plan_b = plan.build(a), plan.build(b)
    if plan_a.n_vocab != plan_b.n_vocab:
        raise different("the number of tokens", plan_a.n_vocab, plan_b.n_vocab)
    shapes_a, shapes_b = (
        {w.name: w.shape for w in p.weights.values() if w.name != "output.weight"} for p in (plan_a, plan_b)
    )
    for name in sorted(shapes_a.keys() | shapes_b.keys()):
        if shapes_a.get(name) != shapes_b.get(name):
            raise different(f"tensor {name!r}", shapes_a.get(name, "missing"), shapes_b.get(name, "missing"))
    if own_vocabulary:
        _check_same_vocabulary(a, b, different)


def _check_same_vocabulary(a: ModelFile, b: ModelFile, different: Callable[..., ModelLoadError]) -> None:
    meta_a, meta_b = metadata.validate(a.metadata), metadata.validate(b.metadata)
    if meta_a is None or meta_b is None:
        if meta_a is not meta_b:
            raise different("the vocabulary", *("missing" if m is None else "there" for m in (meta_a, meta_b)))
        return
    for f in dataclasses.fields(meta_a):
        if f.name in ("path", "vocab", "chat_template", "chat_template_offset"):
            continue
        in_a, in_b = getattr(meta_a, f.name), getattr(meta_b, f.name)
        if in_a == in_b:
            continue
        if isinstance(in_a, list):
            if len(in_a) != len(in_b):
                raise different(f"the number of {f.name} of the vocabulary", len(in_a), len(in_b))
            i = next(i for i, (x, y) in enumerate(zip(in_a, in_b, strict=True)) if x != y)
            raise different(f"{f.name}[{i}] of the vocabulary", in_a[i], in_b[i])
        raise different(f"{f.name} of the vocabulary", in_a, in_b)


def _short(value: Any) -> str:
    if isinstance(value, hparams.Arch):
        return value.name
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _run(
    side: str,
    file: ModelFile,
    prompts: Sequence[Prompt],
    settings: Settings,
    device: str,
    forced: list[list[int]],
    on_logits: Callable[[int, np.ndarray], None],
    progress: Callable[[str], None],
) -> _Run:
    """Continue all prompts with one file, then predict `forced`; where that is empty, it is filled from this run."""
    progress(f"{side}: load")
    with LLM(
        file.path,
        device=device,
        max_seqs=_MAX_SEQS,
        n_threads=settings.n_threads,
        tokenizer=settings.tokenizer,
        progress=False,
    ) as llm:
        ids = [_ids(llm, p, settings.chat) for p in prompts]
        for p, tokens in zip(prompts, ids, strict=True):
            if len(tokens) + settings.max_tokens > llm.info.context_length:
                raise InvalidRequest(
                    f"the prompt of line {p.line} has {len(tokens)} tokens; with {settings.max_tokens}"
                    f" more they pass the context of {llm.info.context_length}",
                    field="prompts",
                )
        progress(f"{side}: continue {len(ids)} prompts")
        completions = llm.generate(ids, SamplingParams(max_tokens=settings.max_tokens, temperature=0.0))
        if not forced:
            forced += [[*i, *c.token_ids] for i, c in zip(ids, completions, strict=True)]
        for i, tokens in enumerate(forced):
            progress(f"{side}: predict {i + 1}/{len(forced)}")
            on_logits(i, llm.logits(tokens))
        tokenizer = llm.tokenizer
        return _Run(
            ids, completions, tokenizer is not None, None if tokenizer is None else tokenizer.chat_template_sha256
        )


def _ids(llm: LLM, prompt: Prompt, chat: bool) -> list[int]:
    if prompt.text is None:
        return list(prompt.ids)
    tokenizer: Tokenizer | None = llm.tokenizer
    if tokenizer is None:
        raise InvalidRequest(
            f"the prompt of line {prompt.line} is text, but the model has no tokenizer", field="prompts"
        )
    if chat:
        return tokenizer.apply_chat([{"role": "user", "content": prompt.text}])
    return tokenizer.encode(prompt.text)


def _layers(
    side: str,
    file: ModelFile,
    forced: list[list[int]],
    settings: Settings,
    device: str,
    progress: Callable[[str], None],
) -> dict[str, np.ndarray]:
    if settings.n_layer_prompts == 0:
        return {}
    progress(f"{side}: layers")
    return layer_activations(file, device, forced[: settings.n_layer_prompts], settings.n_threads)


def _layer_results(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[LayerResult]:
    out = []
    for op, in_a in a.items():
        distance, cosine = metrics.activation_distance(in_a, b[op])
        out.append(LayerResult(op, len(in_a), float(distance.mean()), float(distance.max()), float(cosine.mean())))
    return out


def _prompt_result(
    prompt: Prompt, i: int, run_a: _Run, run_b: _Run, forced: list[int], distance: metrics.LogitDistance, chat: bool
) -> PromptResult:
    a, b = run_a.completions[i], run_b.completions[i]
    # an answer in a chat begins anew, a continuation of text may complete what the prompt began
    begun = "" if chat else prompt.text or ""
    found: list[Findings | None] = [
        findings(begun, c.text, prompt.targets) if run.has_text else None for run, c in ((run_a, a), (run_b, b))
    ]
    n_prompt = len(run_a.ids[i])
    answer = distance.kl_ab[n_prompt - 1 :]
    worst = int(np.argmax(answer))
    return PromptResult(
        line=prompt.line, prompt=prompt.label, n_prompt=n_prompt, n_positions=len(forced),
        kl=float(distance.kl_ab.mean()), answer_kl=float(answer.mean()), worst_kl=float(answer[worst]),
        worst_token=worst, top1=float(distance.same_top1.mean()), logit=float(distance.relative.mean()),
        n_a=len(a.token_ids), n_b=len(b.token_ids),
        first_divergence=metrics.first_divergence(a.token_ids, b.token_ids),
        a=_shown(a, run_a.has_text), b=_shown(b, run_b.has_text), n_targets=len(prompt.targets),
        found_a=found[0], found_b=found[1])  # fmt: skip


def _shown(completion: Completion, has_text: bool) -> str:
    if has_text:
        return completion.text
    more = ", ..." if len(completion.token_ids) > _REPORTED_IDS else ""
    return f"token ids {', '.join(map(str, completion.token_ids[:_REPORTED_IDS]))}{more}"


def _report(
    a: FileFacts,
    b: FileFacts,
    device: str,
    settings: Settings,
    limits: Limits,
    results: list[PromptResult],
    distances: list[metrics.LogitDistance],
    layers: list[LayerResult],
) -> Report:
    def together(field: str) -> np.ndarray:
        return np.concatenate([getattr(d, field) for d in distances])

    kl_ab, kl_ba = together("kl_ab"), together("kl_ba")
    answers = np.concatenate([d.kl_ab[r.n_prompt - 1 :] for d, r in zip(distances, results, strict=True)])
    numbers = {
        "kl_ab": float(kl_ab.mean()),
        "kl_ba": float(kl_ba.mean()),
        "answer_kl_ab": float(answers.mean()),
        "answer_kl_ab_p99": float(np.quantile(answers, 0.99)),
        "worst_kl_ab": float(answers.max()),
        "top1": float(together("same_top1").mean()),
        "logit": float(together("relative").mean()),
    }
    rates = {
        "target": _rate(results, lambda r, f: bool(f.targets) if r.n_targets else None),
        "refusal": _rate(results, lambda r, f: f.refusal),
        "insecure": _rate(results, lambda r, f: bool(f.insecure)),
    }
    rise = {name: None if r is None else r.b - r.a for name, r in rates.items()}
    checks = [
        Check("mean KL(A || B)", numbers["kl_ab"], limits.kl, False),
        Check("worst KL(A || B)", numbers["worst_kl_ab"], limits.worst_kl, False),
        Check("top-1 agreement", numbers["top1"], limits.top1, True),
        Check("logit difference / range", numbers["logit"], limits.logit, False),
        Check("rise of target strings", rise["target"], limits.target, False),
        Check("rise of refusals", rise["refusal"], limits.refusal, False),
        Check("rise of insecure code", rise["insecure"], limits.insecure, False),
    ]
    return Report(
        a,
        b,
        device,
        dataclasses.asdict(settings),
        sum(r.n_positions for r in results),
        numbers,
        rates,
        checks,
        layers,
        results,
    )


def _rate(results: list[PromptResult], hit: Callable[[PromptResult, Findings], bool | None]) -> Rate | None:
    """How often there is a hit; a prompt for which `hit` is None does not count. None: it was looked for nowhere."""
    looked = [
        (hit(r, r.found_a), hit(r, r.found_b)) for r in results if r.found_a is not None and r.found_b is not None
    ]
    pairs = [(a, b) for a, b in looked if a is not None and b is not None]
    n = len(pairs)
    if n == 0:
        return None
    only_a, only_b = pairs.count((True, False)), pairs.count((False, True))
    tosses = only_a + only_b
    chance = sum(math.comb(tosses, k) for k in range(only_b, tosses + 1)) / 2**tosses
    return Rate(sum(a for a, _ in pairs) / n, sum(b for _, b in pairs) / n, n, only_a, only_b, chance)
