"""Several prompts at once: they run together, and the results come in the order of the prompts.

python examples/batch.py [MODEL.gguf] [--device cpu] [--prompts FILE.jsonl]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from worker_orcd import LLM, SamplingParams


def demo_model() -> str:
    """The path of the demo model, which is fetched the first time."""
    program = Path(sys.executable).with_name("worker-orcd")
    return subprocess.run([program, "demo-model"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def main() -> None:
    """Print each prompt with its continuation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a GGUF file; the demo model where it is left out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=Path, default=Path(__file__).with_name("prompts.jsonl"))
    args = parser.parse_args()

    lines = [json.loads(line) for line in args.prompts.read_text(encoding="utf-8").splitlines()]
    prompts = [line.pop("prompt") for line in lines]
    # one SamplingParams for all is enough in most cases; here each line may bring its own settings
    params = [SamplingParams(**{"temperature": 0.0, "max_tokens": 16, **settings}) for settings in lines]
    with LLM(args.model or demo_model(), device=args.device) as llm:
        for prompt, result in zip(prompts, llm.generate(prompts, params), strict=True):
            print(f"{prompt!r} -> {result.text!r}")
            print(f"    {len(result.token_ids)} tokens, ended by {result.finish_reason}, seed {result.seed}")


if __name__ == "__main__":
    main()
