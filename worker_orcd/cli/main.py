"""The command line `worker-orcd`: the group, and what holds for every command.

Errors end here: a `WorkerError` is one line `error: CODE: message` and exit code 1, Ctrl-C is 130, a reader that has
gone (`| head`) is no error. Each command has a module here and imports what it needs when it runs, so that `--help` is
quick and needs no compiled module.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

import worker_orcd
from worker_orcd.cli.bench import bench
from worker_orcd.cli.compare import compare
from worker_orcd.cli.generate import generate, logits
from worker_orcd.cli.inspect import demo_model, doctor, inspect
from worker_orcd.cli.provenance import provenance
from worker_orcd.cli.serve import serve
from worker_orcd.errors import InternalError, WorkerError, escaped

EXIT_ERROR, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 130, 141


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(worker_orcd.__version__, prog_name="worker-orcd")
def cli() -> None:
    """One process, one GPU, one GGUF model: tokens over HTTP and on the terminal.

    Every option of a command can also be given as the environment variable named beside it.
    """


for _command in (serve, generate, inspect, bench, compare, doctor, demo_model, logits, provenance):
    cli.add_command(_command)


def main(args: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code. Entry point of the installed program."""
    sys.exit(run(args))


def run(args: Sequence[str] | None = None) -> int:
    """Run a command; the result is the exit code."""
    try:
        code = cli.main(args=args, prog_name="worker-orcd", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit would complain
        return EXIT_BROKEN_PIPE
    except WorkerError as error:
        return _fail(error)
    except (OSError, MemoryError) as error:
        return _fail(InternalError(f"{type(error).__name__}: {error}"))


def _fail(error: WorkerError) -> int:
    click.echo(f"error: {error.code}: {escaped(error.message)}", err=True)
    return EXIT_ERROR
