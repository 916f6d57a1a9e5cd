"""`worker-orcd generate` and `worker-orcd logits`: one completion, or the bare predictions, on the terminal."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING

import click

from worker_orcd.cli.options import (
    device_option,
    json_option,
    load_options,
    mib,
    model_option,
    option,
    parse_ids,
    plan_printer,
    threads_option,
    verbose_option,
)
from worker_orcd.errors import InvalidRequest

if TYPE_CHECKING:
    from worker_orcd.serving.job import Completion


@click.command()
@model_option
@option("--prompt", required=True, metavar="TEXT", help="The prompt; - reads it from standard input.")
@option("--chat", is_flag=True, help="Take the prompt as a user's message and apply the chat template of the file.")
@option("--max-tokens", type=int, metavar="N", help="Tokens to generate. Default: 2048, or what the context leaves.")
@option("--temperature", type=float, default=1.0, metavar="T", help="0 to 2; 0 is greedy.")
@option("--top-p", type=float, default=1.0, metavar="P", help="0 to 1; 1 is off.")
@option("--top-k", type=int, default=0, metavar="K", help="0 is off.")
@option("--min-p", type=float, default=0.0, metavar="P", help="0 to 1; 0 is off.")
@option("--repetition-penalty", type=float, default=1.0, metavar="R", help="Above 0, to 2; 1 is off.")
@option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given up to four times.")
@option("--seed", type=int, metavar="N", help="0 to 2^64-1. Default: made up; --json tells it.")
@device_option
@threads_option
@load_options
@verbose_option
@json_option
def generate(
    model: str,
    prompt: str,
    chat: bool,
    max_tokens: int | None,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition_penalty: float,
    stop: tuple[str, ...],
    seed: int | None,
    device: str,
    threads: int,
    context_length: int | None,
    kv_cache_size_mb: int | None,
    vram_limit_mb: int | None,
    tokenizer: str | None,
    check_tensors: bool,
    expect_sha256: str | None,
    trusted_models: str | None,
    verbose: bool,
    as_json: bool,
) -> None:
    """Continue a prompt and stream the text to the terminal."""
    from worker_orcd.engine.sampling import SamplingParams
    from worker_orcd.runtime.llm import LLM

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop,
        seed=seed,
    )
    params.check()
    if prompt == "-":
        prompt = sys.stdin.read()
    if not prompt:
        raise InvalidRequest("the prompt is empty", field="prompt")
    with LLM(
        model,
        device=device,
        context_length=context_length,
        kv_cache_bytes=mib(kv_cache_size_mb),
        max_seqs=1,
        n_threads=threads,
        tokenizer=tokenizer,
        check_tensors=check_tensors,
        expect_sha256=expect_sha256,
        trusted_models=trusted_models,
        vram_limit_bytes=mib(vram_limit_mb),
        on_plan=plan_printer(verbose),
    ) as llm:
        text_or_ids: str | list[int] = prompt
        if chat:
            if llm.tokenizer is None:
                raise InvalidRequest("the model file has no tokenizer, so it cannot chat", field="chat")
            text_or_ids = llm.tokenizer.apply_chat([{"role": "user", "content": prompt}])
        sys.stdout.reconfigure(errors="replace")
        with llm.stream(text_or_ids, params) as stream:
            for piece in stream:
                if not as_json:
                    sys.stdout.write(piece.text)
                    sys.stdout.flush()
            result = stream.job.completion()
        if as_json:
            click.echo(json.dumps(_as_dict(result, llm.info.name, llm.info.device)))
            return
        sys.stdout.write("\n")
        sys.stdout.flush()
        if sys.stderr.isatty():
            click.echo(
                f"[{result.tokens_in} tokens in, {len(result.token_ids)} out, "
                f"{result.timings.tokens_per_s:.1f} tokens/s, {result.finish_reason}, seed {result.seed}]",
                err=True,
            )


def _as_dict(result: Completion, model: str, device: str) -> dict[str, object]:
    return {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "tokens_in": result.tokens_in,
        "tokens_out": len(result.token_ids),
        "seed": result.seed,
        "timings": dataclasses.asdict(result.timings),
        "model": model,
        "device": device,
    }


@click.command()
@click.argument("model", metavar="FILE")
@option("--ids", "text", required=True, metavar="1,2,3", help="Token ids of the input.")
@option("--top", type=click.IntRange(1), default=5, metavar="N", help="Predictions to show for each position.")
@option("--out", metavar="FILE.npy", help="Also write all logits, float32 [n_tokens, n_vocab].")
@device_option
@threads_option
@json_option
def logits(model: str, text: str, top: int, out: str | None, device: str, threads: int, as_json: bool) -> None:
    """Show what a model predicts after each of the given tokens. Needs no tokenizer."""
    import numpy as np

    from worker_orcd.runtime.llm import LLM

    ids = parse_ids(text)
    with LLM(model, device=device, max_seqs=1, n_threads=threads) as llm:
        values = llm.logits(ids)
        tokenizer = llm.tokenizer
    if out is not None:
        np.save(out, values)
    n_shown = min(top, values.shape[1])
    rows = []
    for position, row in enumerate(values):
        best = np.argsort(-row, kind="stable")[:n_shown]
        rows.append(
            {"position": position, "id": ids[position], "top": [{"id": int(i), "logit": float(row[i])} for i in best]}
        )
    if as_json:
        click.echo(json.dumps(rows))
        return
    for row in rows:
        shown = "  ".join(f"{t['id']}{_piece(tokenizer, t['id'])} {t['logit']:.4f}" for t in row["top"])
        click.echo(f"{row['position']:5d} {row['id']:7d}:  {shown}")


def _piece(tokenizer: object, token_id: int) -> str:
    return "" if tokenizer is None else ascii(tokenizer.decode([token_id]))
