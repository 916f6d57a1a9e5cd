"""One prompt, its text as it comes, and an end on one's own terms: leaving the stream cancels the job.

python examples/stream.py [MODEL.gguf] [--device cpu] [--prompt TEXT] [--until TEXT]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from worker_orcd import LLM, SamplingParams


def demo_model() -> str:
    """The path of the demo model, which is fetched the first time."""
    program = Path(sys.executable).with_name("worker-orcd")
    return subprocess.run([program, "demo-model"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def main() -> None:
    """Print the pieces of a continuation when they arrive."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a GGUF file; the demo model where it is left out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt", default="Once upon a time, there was a little robot who")
    parser.add_argument("--until", default="\n\n", help="leave the stream when the text holds this")
    args = parser.parse_args()

    params = SamplingParams(max_tokens=64, temperature=0.0)
    with LLM(args.model or demo_model(), device=args.device) as llm, llm.stream(args.prompt, params) as pieces:
        print(args.prompt, end="", flush=True)
        text = ""
        for piece in pieces:
            print(piece.text, end="", flush=True)
            text += piece.text
            if args.until in text:
                break
    print()


if __name__ == "__main__":
    main()
