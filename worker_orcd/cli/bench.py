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
    from worker_orcd.diagnose.crowd import Crowd
    from worker_orcd.diagnose.mix import Mix
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
    "--crowd",
    type=click.IntRange(1, 1 << 16),
    metavar="N",
    help="N requests at once, each with the first of -p tokens and -n more, --streams of them together; over HTTP too "
    "with --http.",
)
@option(
    "--mix",
    type=click.IntRange(1),
    metavar="N",
    help="--streams streams alone, and while prompts of N tokens arrive, one after the other.",
)
@option(
    "--streams",
    type=click.IntRange(1, 1024),
    default=64,
    metavar="N",
    help="Streams of --http, --crowd and --mix that run together.",
)
@option(
    "--seconds",
    type=click.FloatRange(0.1, 3600),
    default=10.0,
    metavar="S",
    help="How long --mix measures, without and with prompts.",
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
    crowd: int | None,
    mix: int | None,
    streams: int,
    seconds: float,
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
    if crowd and not (n_prompt and n_gen):
        raise InvalidRequest("--crowd needs a length of prompts (--n-prompt) and of answers (--n-gen)", field="crowd")
    if kernels and not n_gen:
        raise InvalidRequest("--kernels measures a decode step, and --n-gen is 0", field="n_gen")
    bar = None
    if is_terminal(sys.stderr):
        from tqdm import tqdm

        n_tests = len(n_prompt) + (len(batch) if n_gen else 0) + len({1, *batch}) * kernels
        n_more = 5 * http + ((1 + http) if crowd else 0) + (3 if mix else 0)
        bar = tqdm(total=2 + n_tests + n_more, leave=False, bar_format="{desc}: {n}/{total}")

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
        if http or crowd or mix:
            from worker_orcd.diagnose import overhead

            where = overhead.Device(device, **given)
        if http:
            asked = overhead.Asked(n_gen, streams, repeat)
            report = dataclasses.replace(report, http=overhead.measure(model, where, asked, progress))
        if crowd:
            from worker_orcd.diagnose import crowd as crowds

            wanted = crowds.Asked(crowd, n_prompt[0], n_gen, min(streams, crowd), repeat, http)
            report = dataclasses.replace(report, crowd=crowds.measure(model, where, wanted, progress))
        if mix:
            from worker_orcd.diagnose import mix as mixes

            mixed = mixes.measure(model, where, mixes.Asked(mix, streams, seconds), progress)
            report = dataclasses.replace(report, mix=mixed)
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
    if report.crowd is not None:
        out += ["", *_crowd_lines(report.crowd)]
    if report.mix is not None:
        out += ["", *_mix_lines(report.mix)]
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


def _crowd_lines(crowd: Crowd) -> list[str]:
    size = f"{crowd.n_prompt} tokens and {crowd.n_tokens} more, {min(crowd.n_streams, crowd.n_together)} together"
    out = [f"{crowd.n_requests} requests at once of {size}"]
    out.append(
        f"{'':10s} {'tokens/s':>10s} {'of answers':>10s} {'first p50':>10s} {'p99, ms':>10s} {'gap p50':>10s} "
        f"{'p99, ms':>10s}"
    )
    for name, times in (("generate", crowd.generate), ("HTTP", crowd.http)):
        if times is None:
            continue
        gaps = [f"{gap:10.2f}" if gap is not None else "" for gap in (times.gap_p50_ms, times.gap_p99_ms)]
        rates = f"{times.tokens_per_s:10.1f} {times.answer_tokens_per_s:10.1f}"
        first = f"{times.first_token_p50_ms:10.1f} {times.first_token_p99_ms:10.1f}"
        out.append(" ".join([f"{name:10s}", rates, first, *gaps]).rstrip())
    return out


def _mix_lines(mix: Mix) -> list[str]:
    out = [f"{mix.n_streams} streams, {mix.seconds:g} s without and with prompts of {mix.n_prompt} tokens, one pending"]
    out.append(
        f"{'':10s} {'gap p50':>10s} {'p99, ms':>10s} {'p99/p50':>10s} {'decode/s':>10s} {'prompt/s':>10s} "
        f"{'first, ms':>10s}"
    )
    for name, times in (("alone", mix.alone), ("mixed", mix.mixed)):
        gaps = f"{times.gap_p50_ms:10.2f} {times.gap_p99_ms:10.2f} {times.gap_ratio:10.2f}"
        first = f"{times.first_token_ms:10.1f}" if times.first_token_ms is not None else ""
        out.append(
            f"{name:10s} {gaps} {times.decode_tokens_per_s:10.1f} {times.prompt_tokens_per_s:10.1f} {first}".rstrip()
        )
    out.append(f"p99 of the mixed over p50 of the streams alone: {mix.mixed.gap_p99_ms / mix.alone.gap_p50_ms:.2f}")
    return out
