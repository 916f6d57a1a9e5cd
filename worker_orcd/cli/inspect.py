"""`worker-orcd inspect`, `doctor` and `demo-model`: what a file, a machine and the cache hold. None needs a GPU."""

from __future__ import annotations

import dataclasses
import json
import textwrap

import click

from worker_orcd.cli.options import FilePath, json_option, option


@click.command()
@click.argument("model", metavar="FILE", type=FilePath())
@option("--tensors/--no-tensors", default=True, help="Show the table of tensors. Default: show.")
@option("--tokenizer", metavar="FILE", help="A tokenizer.json in the place of the file's own vocabulary.")
@option("--sha256", is_flag=True, help="Also read the whole file and show its SHA-256, and that of each part.")
@json_option
def inspect(model: str, tensors: bool, tokenizer: str | None, sha256: bool, as_json: bool) -> None:
    """Show what a GGUF file holds: metadata, tensors, quant kind, tokenizer, plan, and the memory it will take.

    Reads the file's head only (but see --sha256), on any machine. Of a file with a vocabulary and no tensors it shows
    what there is.
    """
    from worker_orcd.diagnose import inspect as report

    facts = report.inspect(model, tokenizer, sha256)
    if not tensors:
        del facts["tensors"]
    click.echo(json.dumps(facts) if as_json else report.as_text(facts))


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what this machine has, what is missing, and what to do about it."""
    from worker_orcd.diagnose import doctor as checks

    findings = checks.check()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(f) for f in findings]))
        return
    width = max(len(f.name) for f in findings)
    for f in findings:
        click.echo(f"{f.status:7s}  {f.name:{width}s}  {f.detail}")
        if f.advice:
            indent = " " * (width + 11)
            click.echo(textwrap.fill(f"-> {f.advice}", 110, initial_indent=indent, subsequent_indent=indent + "   "))


@click.command("demo-model")
def demo_model() -> None:
    """Print the path of the demo model, SmolLM2-135M; fetch it where it is absent."""
    from worker_orcd.diagnose import demo_model as demo

    click.echo(str(demo.path()))
