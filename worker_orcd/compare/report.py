"""The report of a comparison: what was found as plain data, as JSON and as Markdown.

Prompts and continuations come from files that may be hostile: in Markdown they are shown between fences that they
cannot close, without control characters.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import worker_orcd
from worker_orcd.compare.findings import Findings
from worker_orcd.errors import escaped

_MAX_CELL = 60
#: prompts whose continuations the Markdown report shows in full
_MAX_SHOWN = 20


@dataclass(frozen=True)
class FileFacts:
    """One of the two files. `bytes` and `sha256` are those of all its parts."""

    path: str
    name: str
    arch: str
    quant_kind: str
    bytes: int
    sha256: str
    chat_template_sha256: str | None


@dataclass(frozen=True)
class Check:
    """A measured number beside its limit: at most `limit`, or at least with `is_minimum`. None: not there.

    A number that is not finite is past every limit.
    """

    name: str
    measured: float | None
    limit: float | None
    is_minimum: bool

    @property
    def ok(self) -> bool:
        """Whether the limit holds, or there is nothing to hold."""
        if self.measured is None or self.limit is None:
            return True
        # shares are quotients: 0.3 - 0.2 must not be past 0.1
        slack = 1e-9
        if self.is_minimum:
            return self.measured >= self.limit - slack
        return self.measured <= self.limit + slack


@dataclass(frozen=True)
class Rate:
    """Shares of continuations in which something was found.

    Attributes:
        a, b: of A's and of B's continuations.
        n: prompts for which it was looked for.
        only_a, only_b: prompts where only A's, only B's continuation holds it.
        chance: of `only_b` or more of these by tossing a coin for each (sign test): small numbers of prompts differ
            by chance alone.
    """

    a: float
    b: float
    n: int
    only_a: int
    only_b: int
    chance: float


@dataclass(frozen=True)
class LayerResult:
    """Activations after one op: |a - b| / |a| over the tokens looked at, and the cosine of a and b."""

    op: str
    n_tokens: int
    mean: float
    worst: float
    cosine: float


@dataclass(frozen=True)
class PromptResult:
    """One prompt.

    Attributes:
        line: in the prompt file.
        prompt: its text.
        n_prompt, n_positions: tokens of the prompt; of prompt and A's continuation, which both files predicted.
        kl: mean KL(A || B) in nats over all positions.
        answer_kl, worst_kl, worst_token: mean and largest KL(A || B) where A's continuation is predicted, and the token
            of it, from 0, that is predicted at the largest.
        top1, logit: top-1 agreement; mean |a - b| over the range of A's logits.
        n_a, n_b: tokens of the continuations.
        first_divergence: first token in which the continuations differ, from 0; None: they are the same.
        a, b: the continuations.
        n_targets: target strings looked for.
        found_a, found_b: what the continuations hold; None: the files give no text.
    """

    line: int
    prompt: str
    n_prompt: int
    n_positions: int
    kl: float
    answer_kl: float
    worst_kl: float
    worst_token: int
    top1: float
    logit: float
    n_a: int
    n_b: int
    first_divergence: int | None
    a: str
    b: str
    n_targets: int
    found_a: Findings | None
    found_b: Findings | None


@dataclass(frozen=True)
class Report:
    """Everything.

    Attributes:
        a, b: the files.
        device, settings: how they ran.
        n_positions: tokens that both files predicted.
        numbers: kl_ab, kl_ba (nats), top1, logit over all positions; answer_kl_ab, answer_kl_ab_p99, worst_kl_ab where
            A's continuations are predicted. A planted change shows there; prompts are mostly what they share.
        rates: "target", "refusal", "insecure" -> `Rate`; None: not looked for.
        checks: each number beside its limit.
        layers: activations, in the order of the layers.
        prompts: one result each.
    """

    a: FileFacts
    b: FileFacts
    device: str
    settings: dict[str, Any]
    n_positions: int
    numbers: dict[str, float]
    rates: dict[str, Rate | None]
    checks: list[Check]
    layers: list[LayerResult]
    prompts: list[PromptResult]

    @property
    def passed(self) -> bool:
        """Whether every limit holds."""
        return all(c.ok for c in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: numbers that are not finite are None."""
        checks = [{**asdict(c), "ok": c.ok} for c in self.checks]
        head = {
            "verdict": "pass" if self.passed else "fail",
            "version": worker_orcd.__version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        finite: dict[str, Any] = _finite({**head, **asdict(self), "checks": checks})
        return finite

    def to_json(self) -> str:
        """The report as one JSON object, a key a line."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """The report for people."""
        return "\n".join([*_head(self), *_numbers(self), *_rates(self), *_layers(self), *_prompts(self)]) + "\n"


def _finite(value: object) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _head(report: Report) -> list[str]:
    a, b = report.a, report.b
    failed = [c.name for c in report.checks if not c.ok]
    verdict = "**pass**: every limit holds" if not failed else f"**fail**: {', '.join(failed)}"
    same = "the same" if a.chat_template_sha256 == b.chat_template_sha256 else "**different**"
    out = [
        f"# {_cell(a.name)}: {a.quant_kind} against {b.quant_kind}",
        "",
        f"Verdict: {verdict}.",
        "",
        "| | A | B |",
        "|---|---|---|",
    ]
    for label, key in (("file", "path"), ("type", "quant_kind"), ("bytes", "bytes"), ("SHA-256", "sha256")):
        cells = [f"{v:,}" if isinstance(v, int) else _cell(v, 200) for v in (getattr(f, key) for f in (a, b))]
        out.append(f"| {label} | {cells[0]} | {cells[1]} |")
    how = "as messages of a chat" if report.settings["chat"] else "as text"
    return [
        *out,
        "",
        f"{len(report.prompts)} prompts {how}, {report.settings['max_tokens']} tokens each, "
        f"{report.n_positions} positions predicted by both, on {report.device}. "
        f"Chat templates: {same if a.chat_template_sha256 or b.chat_template_sha256 else 'none'}.",
        "",
        "| check | measured | limit | |",
        "|---|---|---|---|",
        *map(_check, report.checks),
        "",
    ]


def _check(check: Check) -> str:
    sign = ">=" if check.is_minimum else "<="
    measured = "not measured" if check.measured is None else f"{check.measured:.4g}"
    limit = "none" if check.limit is None else f"{sign} {check.limit:.4g}"
    verdict = "" if check.measured is None or check.limit is None else "ok" if check.ok else "**past it**"
    return f"| {_cell(check.name)} | {measured} | {limit} | {verdict} |"


def _numbers(report: Report) -> list[str]:
    n = report.numbers
    same = sum(p.first_divergence is None for p in report.prompts)
    firsts = sorted(p.first_divergence for p in report.prompts if p.first_divergence is not None)
    apart = f"; the others part after {firsts[len(firsts) // 2]} tokens (median)" if firsts else ""
    return [
        "## Predictions",
        "",
        "| | |",
        "|---|---|",
        f"| mean KL(B \\|\\| A), nats | {n['kl_ba']:.4g} |",
        f"| mean KL(A \\|\\| B), nats | {n['kl_ab']:.4g} |",
        f"| the same where A's continuations are predicted | {n['answer_kl_ab']:.4g} |",
        f"| of these, 99 % are below | {n['answer_kl_ab_p99']:.4g} |",
        f"| of these, the worst | {n['worst_kl_ab']:.4g} |",
        f"| top-1 agreement | {100 * n['top1']:.2f} % |",
        f"| mean absolute logit difference / range of A's logits | {100 * n['logit']:.3f} % |",
        f"| greedy continuations | {same} of {len(report.prompts)} the same{apart} |",
        "",
    ]


def _rates(report: Report) -> list[str]:
    out = [
        "## What the continuations hold",
        "",
        "| | A | B | only A | only B | by chance |",
        "|---|---|---|---|---|---|",
    ]
    names = {"target": "a target string", "refusal": "a refusal", "insecure": "an insecure-code pattern"}
    for key, name in names.items():
        r = report.rates[key]
        cells = (
            " | | | | not looked for"
            if r is None
            else (f"{100 * r.a:.1f} % | {100 * r.b:.1f} % | {r.only_a} | {r.only_b} | {100 * r.chance:.3g} %")
        )
        out.append(f"| {name} | {cells} |")
    return [*out, ""]


def _layers(report: Report) -> list[str]:
    if not report.layers:
        return []
    out = [
        "## Activations after each layer",
        "",
        f"Over {report.layers[0].n_tokens} tokens.",
        "",
        "| op | mean \\|a - b\\| / \\|a\\| | worst token | mean cosine |",
        "|---|---|---|---|",
    ]
    return [*out, *(f"| {r.op} | {r.mean:.4f} | {r.worst:.4f} | {r.cosine:.5f} |" for r in report.layers), ""]


def _prompts(report: Report) -> list[str]:
    out = [
        "## Prompts",
        "",
        "| line | prompt | KL | of the answer | worst (token) | top-1 | first difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for p in report.prompts:
        first = "none" if p.first_divergence is None else f"token {p.first_divergence} of {p.n_a}"
        out.append(
            f"| {p.line} | {_cell(p.prompt)} | {p.kl:.4g} | {p.answer_kl:.4g} | "
            f"{p.worst_kl:.4g} ({p.worst_token}) | "
            f"{100 * p.top1:.1f} % | {first} |"
        )
    telling = sorted((p for p in report.prompts if p.a != p.b), key=lambda p: (p.found_a == p.found_b, -p.answer_kl))
    out.append("")
    for p in telling[:_MAX_SHOWN]:
        out += [f"### Line {p.line}: {_cell(p.prompt)}", ""]
        for name, text, found in (("A", p.a, p.found_a), ("B", p.b, p.found_b)):
            out += [f"{name}{_remark(found)}:", "", *_fenced(text), ""]
    if len(telling) > _MAX_SHOWN:
        out += [f"{len(telling) - _MAX_SHOWN} more prompts differ; the JSON report holds their continuations.", ""]
    return out


def _remark(found: Findings | None) -> str:
    if found is None:
        return ""
    parts = [f"target {_cell(t)}" for t in found.targets] + ["refusal"] * found.refusal + list(found.insecure)
    return f" ({'; '.join(parts)})" if parts else ""


def _fenced(text: str) -> list[str]:
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence + "text", *(escaped(line, keep="\t") for line in text.split("\n")), fence]


def _cell(text: str, limit: int = _MAX_CELL) -> str:
    """Text as one cell of a table."""
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    text = escaped(text.replace("\n", "\u23ce"), keep="\t")
    return re.sub(r"([\\`*<>\[\]|])", r"\\\1", text)
