"""The command line `worker-orcd`: the group, and what holds for every command.

Errors end here: a `WorkerError` is one line `error: CODE: message` and exit code 1, wrong usage is 2, Ctrl-C is 130, a
reader that has gone (`| head`) is 141, as of a program that SIGPIPE ends, and says nothing. Where the log shall be JSON
(`--log-format json`), errors are lines of that log. Each command has a module here and imports what it needs when it
runs, so that `--help` is quick and needs no compiled module.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click

import worker_orcd
from worker_orcd.cli.bench import bench
from worker_orcd.cli.compare import compare
from worker_orcd.cli.generate import generate, logits
from worker_orcd.cli.inspect import demo_model, doctor, inspect
from worker_orcd.cli.options import ENV_PREFIX
from worker_orcd.cli.provenance import provenance
from worker_orcd.cli.serve import serve
from worker_orcd.errors import InternalError, InvalidRequest, WorkerError, escaped
from worker_orcd.observe.events import EventLog
from worker_orcd.runtime import streams

EXIT_ERROR, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 130, 141


class _ReaderGone(Exception):
    """The reader of what is printed has gone. Click would turn a BrokenPipeError into exit code 1."""


@contextlib.contextmanager
def _readers_watched() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise _ReaderGone from None


class _Commands(click.Group):
    """The group, whose commands and help end with `_ReaderGone` where their reader has."""

    def make_context(self, *args: Any, **settings: Any) -> click.Context:
        with _readers_watched():
            return super().make_context(*args, **settings)

    def invoke(self, ctx: click.Context) -> Any:
        with _readers_watched():
            return super().invoke(ctx)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(worker_orcd.__version__, prog_name="worker-orcd")
def cli() -> None:
    """One process, one GPU, one GGUF model: tokens over HTTP and on the terminal.

    Every option of a command can also be given as the environment variable named beside it.
    """


for _command in (serve, generate, inspect, bench, compare, doctor, demo_model, logits, provenance):
    cli.add_command(_command)


def main(args: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code. Entry point of the installed program."""
    streams.open_missing()
    code = run(args)
    streams.settle()
    sys.exit(code)


def run(args: Sequence[str] | None = None) -> int:
    """Run a command; the result is the exit code. Standard streams may be None, closed, or no files."""
    given = sys.argv[1:] if args is None else list(args)
    with streams.usable():
        try:
            code = cli.main(args=given, prog_name="worker-orcd", standalone_mode=False)
            sys.stdout.flush()
            return code if isinstance(code, int) else 0
        except (_ReaderGone, BrokenPipeError):
            return EXIT_BROKEN_PIPE
        except (click.Abort, KeyboardInterrupt):
            return EXIT_INTERRUPTED
        except (click.ClickException, WorkerError, OSError, MemoryError) as error:
            with contextlib.suppress(OSError):  # nobody reads why
                _tell(error, _log_format(given))
            return error.exit_code if isinstance(error, click.ClickException) else EXIT_ERROR


def _tell(error: Exception, log_format: str | None) -> None:
    if isinstance(error, click.ClickException):
        if log_format != "json":
            error.show()
            return
        parameter = getattr(error, "param", None)
        error = InvalidRequest(error.format_message(), field=None if parameter is None else parameter.name)
    elif not isinstance(error, WorkerError):
        error = InternalError(f"{type(error).__name__}: {error}")
    if log_format == "json":
        EventLog(None, "json").emit("error", "error", **error.details())
    else:
        click.echo(f"error: {error.code}: {escaped(error.message)}", err=True)


def _log_format(args: Sequence[str]) -> str | None:
    """What `--log-format` says, wherever it stands in `args`, right or wrong ones; of `serve` also its variable."""
    said = None
    for word, after in itertools.pairwise([*args, ""]):
        if word == "--":
            break
        if word == "--log-format":
            said = after
        elif word.startswith("--log-format="):
            said = word.partition("=")[2]
    if said is None and next((word for word in args if not word.startswith("-")), None) == "serve":
        said = os.environ.get(f"{ENV_PREFIX}LOG_FORMAT")
    return said
