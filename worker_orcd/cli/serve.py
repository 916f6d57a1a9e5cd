"""`worker-orcd serve`: flags to `ServeConfig`, then the HTTP worker."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from worker_orcd.cli.options import config_option, option
from worker_orcd.config import FLAGS, ServeConfig
from worker_orcd.errors import InvalidRequest
from worker_orcd.runtime.streams import is_terminal


def _serve_options(command: Any) -> Any:
    """An option for every field of `ServeConfig` that has a flag, and --gpu-device after --device."""
    for name in reversed(FLAGS):
        if name == "device":
            gpu = option("--gpu-device", type=click.IntRange(0, 999), metavar="N", help="The same as --device cuda:N.")
            command = gpu(command)
        command = config_option(name)(command)
    return command


def _leave_removed_directory(given: dict[str, Any]) -> None:
    """gunicorn asks for the working directory and fails where it was removed; it needs none."""
    try:
        os.getcwd()
    except FileNotFoundError:
        for name in ("model", "tokenizer", "trusted_models"):
            if given[name] is not None and not os.path.isabs(given[name]):
                reason = f"{given[name]} is named from the working directory, which was removed"
                raise InvalidRequest(reason, field=name) from None
        os.chdir("/")


@click.command()
@_serve_options
def serve(gpu_device: int | None, **given: Any) -> None:
    """Serve one model over HTTP until told to stop.

    POST /execute streams a completion as server-sent events, POST /cancel ends one, GET /health and /ready tell how
    the worker is, GET /metrics tells Prometheus - also while it loads. Without --api-key only this machine may use it.
    Exit codes: 0 stopped as told, 1 failed before it was ready, 70 the engine died (start it again).
    """
    _leave_removed_directory(given)
    from worker_orcd.wsgi import server

    if gpu_device is not None:
        device = given["device"]
        if device not in ("auto", f"cuda:{gpu_device}"):
            raise InvalidRequest(
                f"--device {device} and --gpu-device {gpu_device} contradict each other", field="gpu_device"
            )
        given["device"] = f"cuda:{gpu_device}"
    on_terminal = is_terminal(sys.stderr)
    log_format = given["log_format"] or ("text" if on_terminal else "json")
    for_people = on_terminal and log_format == "text"
    given |= {"log_format": log_format, "print_curl": given["print_curl"] or for_people, "progress_bar": for_people}
    server.serve(ServeConfig(**{name: value for name, value in given.items() if value is not None}))
