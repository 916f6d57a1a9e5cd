"""A client of POST /v1/chat/completions with the standard library alone: a conversation, its answers as they come.

python examples/chat_client.py http://127.0.0.1:8080 < questions.txt
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator


def answer(url: str, body: dict) -> Iterator[dict]:
    """The chunks of one answer; exits with 1 where it is refused, fails or is cut."""
    key = os.environ.get("WORKER_ORCD_API_KEY", "")  # a worker without a key ignores it
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{url.rstrip('/')}/v1/chat/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request) as lines:
            for line in lines:
                data = line.decode("utf-8").rstrip("\r\n").removeprefix("data: ")
                if data == "[DONE]":
                    return
                if data.startswith("{"):  # else it is empty, or a comment that breaks the silence
                    chunk = json.loads(data)
                    if "error" in chunk:
                        sys.exit(f"\n{chunk['error']['code']}: {chunk['error']['message']}")
                    yield chunk
        sys.exit("\nthe connection was cut")
    except urllib.error.HTTPError as e:  # refused before the stream began
        sys.exit(f"{e.code}: {e.read().decode()}")


def main() -> None:
    """Answer the lines of standard input until it ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="of a running worker")
    args = parser.parse_args()
    messages = [{"role": "system", "content": "You are a helpful assistant. Answer in one short sentence."}]
    settings = {"max_tokens": 48, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    for line in sys.stdin:
        messages.append({"role": "user", "content": line.strip()})
        print(f"user: {line.strip()}\nassistant: ", end="", flush=True)
        text, usage = "", {}
        for chunk in answer(args.url, {"messages": messages, **settings}):
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:  # one; the last chunk, of the usage, has none
                text += choice["delta"].get("content") or ""
                print(choice["delta"].get("content") or "", end="", flush=True)
        messages.append({"role": "assistant", "content": text})
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        print(f"\n    {usage['prompt_tokens']} tokens in, {cached} of them cached, {usage['completion_tokens']} out")


if __name__ == "__main__":
    main()
