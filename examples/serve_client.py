"""A client of POST /execute with the standard library alone: print the text of the events as they come.

python examples/serve_client.py http://127.0.0.1:8080 [--prompt TEXT] [--max-tokens N] [--seed N]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterable, Iterator


def events(lines: Iterable[bytes]) -> Iterator[tuple[str, dict]]:
    """(name, data) of each server-sent event; a line that begins with a colon is a comment."""
    name, data = "", ""
    for raw in lines:
        line = raw.decode("utf-8").rstrip("\r\n")
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            data = line.removeprefix("data: ")
        elif not line and name:
            yield name, json.loads(data)
            name, data = "", ""


def main() -> None:
    """Run one job; exits with 1 where it ends in an error, and tells its code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="of a running worker")
    parser.add_argument("--prompt", default="Write a haiku about the sea")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    job = {"job_id": str(uuid.uuid4()), "prompt": args.prompt, "max_tokens": args.max_tokens, "seed": args.seed}
    key = os.environ.get("WORKER_ORCD_API_KEY", "")  # a worker without a key ignores it
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{args.url.rstrip('/')}/execute", json.dumps(job).encode(), headers)
    try:
        with urllib.request.urlopen(request) as answer:
            for name, data in events(answer):
                if name == "token":
                    print(data["t"], end="", flush=True)
                elif name == "end":
                    print(f"\n{data['tokens_out']} tokens, ended by {data['finish_reason']}")
                    return
                elif name == "error":
                    sys.exit(f"\n{data['code']}: {data['message']}")
        sys.exit("\nthe connection was cut")
    except urllib.error.HTTPError as e:  # refused before the stream began
        sys.exit(f"{e.code}: {e.read().decode()}")


if __name__ == "__main__":
    main()
