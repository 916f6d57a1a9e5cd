"""`worker-orcd compare`: two files of one model over a file of prompts, a report, and a verdict as the exit code."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from worker_orcd.cli.options import FilePath, device_option, json_option, option, threads_option
from worker_orcd.compare.settings import Limits, Settings
from worker_orcd.runtime.streams import is_terminal

#: field of `Limits`: its largest value, what stands for one, its help
_LIMITS: dict[str, tuple[float | None, str, str]] = {
    "kl": (None, "NATS", "Most mean KL(A || B)."),
    "worst_kl": (None, "NATS", "Most KL(A || B) at any token of A's continuations."),
    "top1": (1, "SHARE", "Least share of positions with the same best token."),
    "logit": (None, "SHARE", "Most mean logit difference, of the range of A's logits."),
    "target": (1, "RISE", "Most that the share of prompts with a target string may rise from A to B."),
    "refusal": (1, "RISE", "The same for refusals."),
    "insecure": (1, "RISE", "The same for insecure-code patterns."),
}


def _limit_options(command: Any) -> Any:
    """An option for every field of `Limits`."""
    for name, (most, metavar, text) in reversed(_LIMITS.items()):
        flag, settings = f"--{name.replace('_', '-')}-limit", {"metavar": metavar, "help": text}
        command = option(flag, type=click.FloatRange(0, most), default=getattr(Limits, name), **settings)(command)
    return command


@click.command()
@click.argument("a", metavar="A.gguf", type=FilePath())
@click.argument("b", metavar="B.gguf", type=FilePath())
@option(
    "--prompts",
    required=True,
    metavar="FILE",
    help='Text, one prompt a line; or *.jsonl, {"prompt": text, "targets": [strings]} a line.',
)
@device_option
@option(
    "--max-tokens",
    type=click.IntRange(1),
    default=Settings.max_tokens,
    metavar="N",
    help="Tokens of each greedy continuation.",
)
@option("--chat", is_flag=True, help="Take prompts as a user's messages, with each file's own chat template.")
@option("--out", metavar="DIR", help="Write compare.json and compare.md there.")
@option("--target-string", multiple=True, metavar="TEXT", help="A string no continuation should hold. Repeatable.")
@option("--targets", metavar="FILE", help="Such strings, one a line.")
@option(
    "--layer-prompts",
    "n_layer_prompts",
    type=click.IntRange(0),
    default=Settings.n_layer_prompts,
    metavar="N",
    help="Prompts of which the activations after each layer are compared; 0: none.",
)
@_limit_options
@option("--tokenizer", metavar="FILE", help="A tokenizer.json in the place of both files' vocabularies.")
@threads_option
@json_option
def compare(
    a: str,
    b: str,
    prompts: str,
    out: str | None,
    target_string: tuple[str, ...],
    targets: str | None,
    as_json: bool,
    **given: Any,
) -> int:
    """Compare two files of one model: A, the trusted one, and B, the one in question.

    Each continues every prompt greedily, then both predict the same tokens. The exit code is 1 past any limit.
    """
    from worker_orcd.compare import run as comparing
    from worker_orcd.compare.prompts import read_prompts, read_targets
    from worker_orcd.errors import InvalidRequest

    if any(not t for t in target_string):
        raise InvalidRequest("a target string is empty", field="target-string")
    strings = [*target_string, *(read_targets(targets) if targets is not None else [])]
    asked = read_prompts(prompts, strings)
    directory = None
    if out is not None:
        directory = Path(out)
        directory.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    limits = Limits(**{name: given.pop(f"{name}_limit") for name in _LIMITS})
    settings = Settings(**given)
    bar = None
    if is_terminal(sys.stderr):
        from tqdm import tqdm

        bar = tqdm(leave=False, bar_format="{desc} [{elapsed}]")
    try:
        report = comparing.compare(
            a, b, asked, settings, limits, lambda text: None if bar is None else bar.set_description_str(text)
        )
    finally:
        if bar is not None:
            bar.close()
    if directory is not None:
        _write(directory / "compare.json", report.to_json())
        _write(directory / "compare.md", report.to_markdown())
    click.echo(report.to_json() if as_json else report.to_markdown(), nl=False)
    return 0 if report.passed else 1


def _write(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        # text of a model may hold lone surrogates only if a tokenizer is wrong; a report is still due
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
