"""`worker-orcd provenance`: the entry with which a model gets into a list of trusted models."""

from __future__ import annotations

import json
import os

import click

from worker_orcd.cli.options import FilePath, OutFile, option


@click.command()
@click.argument("model", metavar="FILE", type=FilePath())
@option("--name", metavar="NAME", help="What to call the model. Default: the name of the file.")
@option("--source", default="", show_default=False, metavar="TEXT", help="Where it comes from, for people.")
@option(
    "--out",
    type=OutFile(),
    metavar="FILE",
    help="Write there instead of to standard output; an existing file is replaced.",
)
def provenance(model: str, name: str | None, source: str, out: str | None) -> None:
    """Write the entry that makes a model trusted: its SHA-256 and those of its chunks of 64 MiB, as JSON.

    Of a split model name the first part. A list for --trusted-models is one entry, or several in [ ].
    """
    from worker_orcd.gguf.model_file import ModelFile
    from worker_orcd.gguf.trusted_models import entry_of
    from worker_orcd.runtime.progress import LoadProgress

    with ModelFile(model) as model_file, LoadProgress(True, model_file.size, "hashing") as bar:
        entry = entry_of(model_file, os.path.basename(model) if name is None else name, source, bar.next())
    text = json.dumps(entry, indent=1, ensure_ascii=False)
    if out is None:
        click.echo(text)
        return
    with open(out, "w", encoding="utf-8") as file:
        file.write(text + "\n")
