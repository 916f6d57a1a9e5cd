"""A conversation: each answer is appended to the messages, and the next question is asked on top of them.

python examples/chat.py [MODEL.gguf] [--device cpu] < questions.txt
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from worker_orcd import LLM, SamplingParams, errors


def demo_model() -> str:
    """The path of the demo model, which is fetched the first time."""
    program = Path(sys.executable).with_name("worker-orcd")
    return subprocess.run([program, "demo-model"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def main() -> None:
    """Answer the lines of standard input until it ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a GGUF file; the demo model where it is left out")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    params = SamplingParams(max_tokens=48, temperature=0.0)
    messages = [{"role": "system", "content": "You are a helpful assistant. Answer in one short sentence."}]
    with LLM(args.model or demo_model(), device=args.device) as llm:
        for line in sys.stdin:
            messages.append({"role": "user", "content": line.strip()})
            try:
                answer = llm.chat(messages, params)
            except errors.WorkerError as e:  # for example a conversation that no longer fits the context
                sys.exit(f"{e.code}: {e}")
            messages.append({"role": "assistant", "content": answer.text})
            print(f"user: {line.strip()}\nassistant: {answer.text}", flush=True)
            print(f"    {answer.tokens_in} tokens in, {len(answer.token_ids)} out")


if __name__ == "__main__":
    main()
