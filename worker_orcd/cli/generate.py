"""`worker-orcd generate` and `worker-orcd logits`: one completion, or the bare predictions, on the terminal."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from typing import TYPE_CHECKING, Any

import click

from worker_orcd.cli.options import (
    FilePath,
    Numbers,
    OutFile,
    device_option,
    json_option,
    load_options,
    model_option,
    option,
    plan_printer,
    threads_option,
    verbose_option,
)
from worker_orcd.engine.sampling import RULES, SamplingParams
from worker_orcd.errors import InvalidRequest, escaped
from worker_orcd.runtime.streams import is_terminal

if TYPE_CHECKING:
    from worker_orcd.serving.job import Completion
    from worker_orcd.tokenizer.tokenizer import Tokenizer


_SAMPLING = {name: rule for name, rule in RULES.items() if rule.flag}


def _sampling_options(command: Any) -> Any:
    """An option for every field of `SamplingParams` that has a flag."""
    defaults = SamplingParams()
    for name, rule in reversed(_SAMPLING.items()):
        settings: dict[str, Any] = {"help": rule.flag, "metavar": rule.metavar}
        if rule.kind in (list, dict):
            settings["multiple"] = True
        elif rule.kind is tuple:
            settings["type"] = Numbers()
        else:
            settings |= {"type": rule.kind, "default": getattr(defaults, name)}
        if rule.kind is dict:
            settings["callback"] = _as_mapping
        command = option(f"--{name.replace('_', '-')}", **settings)(command)
    return command


def _as_mapping(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    """Texts ID=B as {ID: B}."""
    try:
        return {token: float(number) for token, number in (value.split("=") for value in values)}
    except ValueError:
        raise click.BadParameter("must be a token id, = and a number, for example 198=-100", ctx, param) from None


@click.command()
@model_option
@option("--prompt", required=True, metavar="TEXT", help="The prompt; - reads it from standard input.")
@option("--chat", is_flag=True, help="Take the prompt as a user's message and apply the chat template of the file.")
@_sampling_options
@device_option
@threads_option
@load_options
@verbose_option
@json_option
def generate(model: str, prompt: str, chat: bool, verbose: bool, as_json: bool, **given: Any) -> None:
    """Continue a prompt and stream the text to the terminal."""
    from worker_orcd.runtime.llm import LLM
    from worker_orcd.runtime.request import Request
    from worker_orcd.runtime.token_stream import TokenStream

    params = SamplingParams(**{name: given.pop(name) for name in _SAMPLING})
    params.check()
    if prompt == "-":
        try:
            prompt = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"standard input is no {error.encoding} text", field="prompt") from None
    if not prompt:
        raise InvalidRequest("the prompt is empty", field="prompt")
    with LLM(model, max_seqs=1, on_plan=plan_printer(verbose), **given) as llm:
        if llm.info.tokenizer_source == "beside":
            click.echo(f"the model file holds no vocabulary; {escaped(str(llm.info.tokenizer_path))} is used", err=True)
        request = Request(prompt, params=params)
        if chat:
            request = Request(messages=[{"role": "user", "content": prompt}], params=params)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        with TokenStream(llm, llm.submit_request(request)) as stream:
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
        if is_terminal(sys.stderr):
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
        "stop_reason": result.stop_reason,
        "tokens_in": result.tokens_in,
        "tokens_out": len(result.token_ids),
        "seed": result.seed,
        "timings": dataclasses.asdict(result.timings),
        "model": model,
        "device": device,
    }


@click.command()
@click.argument("model", metavar="FILE", type=FilePath())
@option("--ids", type=Numbers(), required=True, metavar="1,2,3", help="Token ids of the input.")
@option("--top", type=click.IntRange(1), default=5, metavar="N", help="Predictions to show for each position.")
@option("--out", type=OutFile(), metavar="FILE.npy", help="Also write all logits, float32 [n_tokens, n_vocab].")
@device_option
@threads_option
@json_option
def logits(model: str, ids: list[int], top: int, out: str | None, device: str, n_threads: int, as_json: bool) -> None:
    """Show what a model predicts after each of the given tokens. Needs no tokenizer."""
    import numpy as np

    from worker_orcd.runtime.llm import LLM

    with LLM(model, device=device, max_seqs=1, n_threads=n_threads) as llm:
        values = llm.logits(ids)
        tokenizer = llm.tokenizer
    if out is not None:
        np.save(out, values)
    n_shown = min(top, values.shape[1])
    rows: list[dict[str, Any]] = []
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


def _piece(tokenizer: Tokenizer | None, token_id: int) -> str:
    return "" if tokenizer is None else ascii(tokenizer.decode([token_id]))
