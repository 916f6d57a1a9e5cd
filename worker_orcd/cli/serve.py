"""`worker-orcd serve`: flags to `ServeConfig`, then the HTTP worker."""

from __future__ import annotations

import sys
import uuid

import click

from worker_orcd import config as defaults
from worker_orcd.cli.options import device_option, load_options, mib, model_option, option, threads_option
from worker_orcd.config import ServeConfig
from worker_orcd.errors import InvalidRequest

_D = ServeConfig(model="", worker_id="")


@click.command()
@model_option
@option("--worker-id", metavar="UUID", help="Name of this worker in its log and health. Default: made up.")
@device_option
@option("--gpu-device", type=click.IntRange(0, 999), metavar="N", help="The same as --device cuda:N.")
@option("--host", default=_D.host, metavar="ADDRESS", help="Address to listen on.")
@option(
    "--port",
    type=click.IntRange(0, 65535),
    default=_D.port,
    metavar="N",
    help="Port to listen on; 0 lets the system choose one, which the log tells.",
)
@option(
    "--max-tokens-in", type=click.IntRange(1), metavar="N", help="Tokens of a prompt. Default: what the context holds."
)
@option(
    "--max-tokens-out",
    type=click.IntRange(1),
    default=_D.max_tokens_out,
    metavar="N",
    help="Limit of a request's max_tokens.",
)
@option(
    "--inference-timeout-sec",
    type=float,
    default=_D.inference_timeout_sec,
    metavar="S",
    help="A job that takes longer ends with INFERENCE_TIMEOUT.",
)
@load_options
@option(
    "--max-streams",
    type=click.IntRange(1, 1024),
    default=_D.max_streams,
    metavar="N",
    help="Sequences decoded together.",
)
@option(
    "--max-queue",
    type=click.IntRange(0, 4096),
    default=_D.max_queue,
    metavar="N",
    help="Jobs that may wait beyond those; more are answered 429.",
)
@threads_option
@option(
    "--chunk-bytes",
    type=click.IntRange(4096, 1 << 30),
    default=_D.chunk_bytes,
    metavar="N",
    help="Bytes of one host-to-device copy.",
)
@option(
    "--residency-check-sec",
    type=click.FloatRange(0.1),
    default=_D.residency_check_sec,
    metavar="S",
    help="Time between looks at whether the model's memory is still on the GPU.",
)
@option(
    "--api-key",
    metavar="KEY",
    help="Ask for 'Authorization: Bearer KEY' on everything but /health and /ready. Better given as variable.",
)
@option(
    "--log-format",
    type=click.Choice(["json", "text"]),
    help="Form of the log on stderr. Default: text on a terminal, else json.",
)
@option(
    "--grace-sec",
    type=click.FloatRange(0, defaults.EXIT_LIMIT_SEC - 1),
    default=_D.grace_sec,
    metavar="S",
    help="Time running jobs get to finish after SIGTERM or Ctrl-C.",
)
@option("--print-curl", is_flag=True, help="Print a ready curl line once jobs are accepted.")
def serve(
    model: str,
    worker_id: str | None,
    device: str,
    gpu_device: int | None,
    host: str,
    port: int,
    max_tokens_in: int | None,
    max_tokens_out: int,
    inference_timeout_sec: float,
    context_length: int | None,
    kv_cache_size_mb: int | None,
    vram_limit_mb: int | None,
    tokenizer: str | None,
    check_tensors: bool,
    expect_sha256: str | None,
    trusted_models: str | None,
    max_streams: int,
    max_queue: int,
    threads: int,
    chunk_bytes: int,
    residency_check_sec: float,
    api_key: str | None,
    log_format: str | None,
    grace_sec: float,
    print_curl: bool,
) -> None:
    """Serve one model over HTTP until told to stop.

    POST /execute streams a completion as server-sent events, POST /cancel ends one, GET /health and /ready tell how
    the worker is - also while it loads. Exit codes: 0 stopped as told, 1 failed before it was ready, 70 the engine
    died (start it again).
    """
    from worker_orcd.wsgi import server

    if gpu_device is not None:
        if device not in ("auto", f"cuda:{gpu_device}"):
            raise InvalidRequest(
                f"--device {device} and --gpu-device {gpu_device} contradict each other", field="gpu_device"
            )
        device = f"cuda:{gpu_device}"
    on_terminal = sys.stderr.isatty()
    log_format = log_format or ("text" if on_terminal else "json")
    server.serve(
        ServeConfig(
            model=model,
            worker_id=worker_id or str(uuid.uuid4()),
            device=device,
            host=host,
            port=port,
            max_tokens_in=max_tokens_in,
            max_tokens_out=max_tokens_out,
            inference_timeout_sec=inference_timeout_sec,
            kv_cache_bytes=mib(kv_cache_size_mb),
            context_length=context_length,
            max_streams=max_streams,
            max_queue=max_queue,
            n_threads=threads,
            chunk_bytes=chunk_bytes,
            tokenizer=tokenizer,
            check_tensors=check_tensors,
            expect_sha256=expect_sha256,
            trusted_models=trusted_models,
            vram_limit_bytes=mib(vram_limit_mb),
            residency_check_sec=residency_check_sec,
            api_key=api_key,
            log_format=log_format,
            grace_sec=grace_sec,
            print_curl=print_curl or (on_terminal and log_format == "text"),
            progress_bar=on_terminal and log_format == "text",
        )
    )
