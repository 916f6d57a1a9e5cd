"""Options that commands share, and the rule that every flag is also an environment variable."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from worker_orcd.cuda.vram import VramPlan

ENV_PREFIX = "WORKER_ORCD_"


def option(*names: str, **settings: Any) -> Callable[[Any], Any]:
    """`click.option` with the environment variable WORKER_ORCD_<FLAG> and the default shown in the help."""
    flag = next(n for n in names if n.startswith("--")).split("/")[0]
    settings.setdefault("envvar", ENV_PREFIX + flag[2:].replace("-", "_").upper())
    settings.setdefault("show_envvar", True)
    if settings.get("default") is not None and not settings.get("is_flag"):
        settings.setdefault("show_default", True)
    return click.option(*names, **settings)


def model_option(command: Any) -> Any:
    """--model."""
    return option("--model", required=True, metavar="FILE", help="The GGUF file.")(command)


def device_option(command: Any) -> Any:
    """--device."""
    return option(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="cpu, cuda:N, or auto: cuda:0 where there is a driver and a GPU, an error elsewhere.",
    )(command)


def threads_option(command: Any) -> Any:
    """--threads."""
    return option(
        "--threads",
        type=click.IntRange(0, 4096),
        default=0,
        metavar="N",
        help="Threads of the CPU engine; 0: one per core.",
    )(command)


def json_option(command: Any) -> Any:
    """--json."""
    return option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")(command)


def verbose_option(command: Any) -> Any:
    """--verbose."""
    return option(
        "-v",
        "--verbose",
        is_flag=True,
        help="Say what the model takes on the GPU before it is loaded; on a terminal always.",
    )(command)


def plan_printer(verbose: bool) -> Callable[[VramPlan, int], None] | None:
    """What prints a VRAM plan on stderr for whoever looks; None where nobody does."""
    if not (verbose or sys.stderr.isatty()):
        return None
    return lambda plan, free: click.echo(plan.table(free), err=True)


def load_options(command: Any) -> Any:
    """--context-length, --kv-cache-size-mb, --vram-limit-mb, --tokenizer, --check-tensors and demands on the file."""
    for decorate in reversed(
        (
            option(
                "--context-length",
                type=click.IntRange(1),
                metavar="N",
                help="Positions a sequence may reach. Default: as many as the file says and the KV cache holds.",
            ),
            option(
                "--kv-cache-size-mb",
                type=click.IntRange(1),
                metavar="MB",
                help="Size of the KV cache in MiB. Default: what fits.",
            ),
            vram_limit_option,
            option(
                "--tokenizer",
                metavar="FILE",
                help="A tokenizer.json (or another GGUF file) in the place of the file's own vocabulary.",
            ),
            option(
                "--check-tensors/--no-check-tensors",
                default=True,
                help="Refuse NaN and infinity in norms, biases and block scales while loading. Default: check.",
            ),
            option("--expect-sha256", metavar="HEX", help="The digest the model file must have."),
            trusted_option,
        )
    ):
        command = decorate(command)
    return command


def vram_limit_option(command: Any) -> Any:
    """--vram-limit-mb."""
    return option(
        "--vram-limit-mb",
        type=click.IntRange(1),
        metavar="MB",
        help="MiB of the GPU's memory that the model may take in all. Default: what is free.",
    )(command)


def trusted_option(command: Any) -> Any:
    """--trusted-models."""
    return option(
        "--trusted-models",
        metavar="FILE",
        help="JSON list of the models that may be loaded, as the command provenance writes its entries; any "
        "other is refused.",
    )(command)


def mib(megabytes: int | None) -> int | None:
    """MiB as bytes."""
    return None if megabytes is None else megabytes << 20


def parse_ids(text: str) -> list[int]:
    """Comma-separated token ids."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter("must be whole numbers with commas between them, for example 1,2,3") from None
