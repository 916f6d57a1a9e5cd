"""`worker-orcd bench`: what to measure, and the table of what was found."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

import click

from worker_orcd.cli.options import (
    Numbers,
    device_option,
    json_option,
    model_option,
    option,
    plan_printer,
    threads_option,
    trusted_option,
    verbose_option,
    vram_options,
)
from worker_orcd.errors import InvalidRequest
from worker_orcd.runtime.streams import is_terminal

if TYPE_CHECKING:
    from worker_orcd.diagnose.bench import Report
    from worker_orcd.diagnose.overhead import Overhead


@click.command()
@model_option
@option(
    "-p",
    "--n-prompt",
    type=Numbers(or_none=True),
    default="512,2048",
    metavar="N,N",
    help="Lengths of the prompts to prefill; empty: none.",
)
@option("-n", "--n-gen", type=click.IntRange(0), default=128, metavar="N", help="Tokens to decode; 0: none.")
@option("--batch", type=Numbers(), default="1,8", metavar="N,N", help="Numbers of sequences to decode together.")
@option("--repeat", type=click.IntRange(1), default=5, metavar="N", help="Timed runs of each test, after one untimed.")
@option(
    "--http",
    is_flag=True,
    help="Serve the model too: one stream over HTTP beside the engine, --streams of them beside LLM.generate.",
)
@option(
    "--streams", type=click.IntRange(1, 1024), default=64, metavar="N", help="Streams of --http that are open together."
)
@option("--kernels", is_flag=True, help="Time each kind of launch of a step too, beside a copy and cuBLAS.")
@device_option
@threads_option
@vram_options
@trusted_option
@verbose_option
@json_option
def bench(
    model: str,
    n_prompt: list[int],
    n_gen: int,
    batch: list[int],
    repeat: int,
    http: bool,
    streams: int,
    kernels: bool,
    device: str,
    verbose: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Measure prefill and decode speed on random token ids. Needs no tokenizer.

    GB/s is what a decode step must read from memory (weights once, the KV cache of every sequence) over its time;
    the column beside it compares that with the memory bandwidth measured in the same run. Each sequence of a batch has
    tokens of its own; the last column says how many of those in a step differ.
    """
    from worker_orcd.diagnose import bench as measuring

    if http and not n_gen:
        raise InvalidRequest("--http measures the tokens of streams, and --n-gen is 0", field="n_gen")
    if kernels and not n_gen:
        raise InvalidRequest("--kernels measures a decode step, and --n-gen is 0", field="n_gen")
    bar = None
    if is_terminal(sys.stderr):
        from tqdm import tqdm

        n_tests = len(n_prompt) + (len(batch) if n_gen else 0) + len({1, *batch}) * kernels
        bar = tqdm(total=2 + n_tests + 5 * http, leave=False, bar_format="{desc}: {n}/{total}")

    def progress(text: str) -> None:
        if bar is not None:
            bar.set_description_str(text)
            bar.update()

    try:
        report = measuring.run(
            model,
            device,
            measuring.Measurements(n_prompt, n_gen, batch, repeat, kernels),
            progress=progress,
            on_plan=plan_printer(verbose),
            **given,
        )
        if http:
            from worker_orcd.diagnose import overhead

            where, asked = overhead.Device(device, **given), overhead.Asked(n_gen, streams, repeat)
            report = dataclasses.replace(report, http=overhead.measure(model, where, asked, progress))
    finally:
        if bar is not None:
            bar.close()
    click.echo(json.dumps(report.to_dict()) if as_json else as_text(report))


def as_text(report: Report) -> str:
    """The table for people."""
    threads = f", {report.n_threads} threads" if report.n_threads else ""
    bandwidth = f"{report.bandwidth_gb_per_s:.1f} GB/s" if report.bandwidth_gb_per_s else "not measured"
    speed = f" ({report.load_gb_per_s:.1f} GB/s)" if report.load_gb_per_s else ""
    vram = f", VRAM {report.vram_bytes / 1e6:.0f} MB" if report.vram_bytes else ""
    out = [
        f"{report.model}: {report.arch} {report.quant_kind}, {report.weight_bytes / 1e6:.0f} MB of weights",
        f"{report.device}{threads}; loaded in {report.load_s:.2f} s{speed}{vram}; memory bandwidth {bandwidth}",
        "",
        f"{'test':18s} {'tokens/s':>10s} {'slowest':>10s} {'fastest':>10s} {'GB/s':>8s} {'of bandwidth':>13s} "
        f"{'distinct':>9s}",
    ]
    for r in report.results:
        name = f"{r.test} {r.n_tokens}" + (f" x {r.batch}" if r.test == "decode" else "")
        rate = f"{r.gb_per_s:8.2f}" if r.gb_per_s is not None else " " * 8
        percent = f"{r.percent_of_bandwidth:11.0f} %" if r.percent_of_bandwidth is not None else " " * 13
        distinct = f"{100 * r.distinct:7.0f} %" if r.distinct is not None else ""
        speeds = f"{r.tokens_per_s:10.1f} {r.slowest:10.1f} {r.fastest:10.1f}"
        out.append(f"{name:18s} {speeds} {rate} {percent} {distinct}".rstrip())
    if report.http is not None:
        out += ["", *_http_lines(report.http)]
    if report.kernels is not None:
        from worker_orcd.diagnose import bench_kernels

        out += ["", bench_kernels.as_text(report.kernels)]
    return "\n".join(out)


def _http_lines(http: Overhead) -> list[str]:
    out = [f"{'1 stream, ms':24s} {'engine':>10s} {'HTTP':>10s} {'more':>10s}"]
    for name, engine, served in (
        (f"first token, prompt {http.tokens_in}", http.engine_first_token_ms, http.first_token_ms),
        ("each token", http.engine_per_token_ms, http.per_token_ms),
    ):
        rest = "" if served is None else f"{served:10.3f} {served - engine:10.3f}"
        out.append(f"{name:24s} {engine:10.3f} {rest}".rstrip())
    generate, served = http.generate_tokens_per_s, http.http_tokens_per_s
    out += ["", f"{f'{http.n_streams} streams':24s} {'generate':>10s} {'HTTP':>10s} {'of it':>10s}"]
    out.append(f"{'tokens/s':24s} {generate:10.1f} {served:10.1f} {100 * served / generate:8.1f} %")
    if http.gap_p50_ms is not None:
        out.append(f"gap between tokens: p50 {http.gap_p50_ms:.2f} ms, p99 {http.gap_p99_ms:.2f} ms")
    return out
