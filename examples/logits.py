"""What a model thinks of a text: the probability of each token after those before it, and the perplexity.

python examples/logits.py [MODEL.gguf] [--device cpu] [--text TEXT]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

from worker_orcd import LLM


def demo_model() -> str:
    """The path of the demo model, which is fetched the first time."""
    program = Path(sys.executable).with_name("worker-orcd")
    return subprocess.run([program, "demo-model"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def main() -> None:
    """Print a line for each token of the text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a GGUF file; the demo model where it is left out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--text", default="The capital of France is Paris.")
    args = parser.parse_args()

    with LLM(args.model or demo_model(), device=args.device) as llm:
        ids = llm.tokenizer.encode(args.text)
        logits = llm.logits(ids)
        print(f"logits: {logits.dtype} {list(logits.shape)}")
        # row i is what the model predicts after ids[0..i], so the last row has no token to be compared with
        top = logits.max(axis=1, keepdims=True)
        logprobs = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
        chosen = logprobs[np.arange(len(ids) - 1), ids[1:]]
        for token, logprob, row in zip(ids[1:], chosen, logprobs, strict=False):
            best = llm.tokenizer.decode([int(row.argmax())])
            print(f"{llm.tokenizer.decode([token])!r:12} p = {np.exp(logprob):.4f}   likeliest: {best!r}")
        print(f"perplexity: {np.exp(-chosen.mean()):.3f}")


if __name__ == "__main__":
    main()
