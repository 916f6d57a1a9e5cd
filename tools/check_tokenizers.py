"""Compare tokenizers with the reference ids of other programs: every line of tokenizers/*.jsonl, and decoding back.

Usage: python tools/check_tokenizers.py GOLDENS_DIR [MODELS_DIR]

check_goldens.py runs it as part of the whole comparison; alone it prints the first lines that differ.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time
from dataclasses import dataclass, field

from worker_orcd.tokenizer.tokenizer import Tokenizer

#: reference file -> tokenizer in the models' folder; the others have a vocabulary-only .gguf beside them
OF_MODELS = {"gpt-oss": "gpt-oss-tokenizer/tokenizer.json"}


@dataclass
class Row:
    """What one reference file gave.

    Attributes:
        name: its name without ending.
        n_lines: lines compared.
        wrong: lines whose ids differ.
        wrong_round_trips: lines whose ids do not decode to their text.
        build_s: seconds to load the tokenizer.
        examples: of what is wrong, at most three.
    """

    name: str
    n_lines: int = 0
    wrong: int = 0
    wrong_round_trips: int = 0
    build_s: float = 0.0
    examples: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Keep an example."""
        if len(self.examples) < 3:
            self.examples.append(text)


def check(goldens_dir: str | os.PathLike[str], models_dir: str | os.PathLike[str]) -> list[Row]:
    """Compare every tokenizers/*.jsonl of `goldens_dir`.

    A line's text must give its ids and, but for the white space that Phi-3's control tokens take with them (lines with
    parse_special), the ids must give the text.
    """
    rows = []
    for lines in sorted(pathlib.Path(goldens_dir, "tokenizers").glob("*.jsonl")):
        of_model = OF_MODELS.get(lines.stem)
        source = pathlib.Path(models_dir, of_model) if of_model else lines.with_suffix(".gguf")
        start = time.perf_counter()
        tokenizer = Tokenizer.from_file(source)
        row = Row(lines.stem, build_s=time.perf_counter() - start)
        for line in lines.read_text(encoding="utf-8").splitlines():
            compare(tokenizer, json.loads(line), row)
        rows.append(row)
    return rows


def compare(tokenizer: Tokenizer, case: dict, row: Row) -> None:
    """One line."""
    text, special = case["text"], case.get("parse_special", False)
    ids = tokenizer.encode(text, special=special, add_bos=False)
    row.n_lines += 1
    if ids != case["ids"]:
        row.wrong += 1
        row.note(f"{text[:80]!r}: {ids[:12]} instead of {case['ids'][:12]}")
    back = tokenizer.decode(case["ids"])
    if back != text and not (special and tokenizer.kind == "gguf-spm"):
        row.wrong_round_trips += 1
        row.note(f"{text[:80]!r} came back as {back[:80]!r}")


def main() -> int:
    """Print a table; 1 where a line is wrong."""
    models = sys.argv[2] if len(sys.argv) > 2 else os.path.expanduser("~/.cache/worker-orcd/models")
    rows = check(sys.argv[1], models)
    for row in rows:
        n, right, trips = row.n_lines, row.n_lines - row.wrong, row.n_lines - row.wrong_round_trips
        print(f"{row.name:10} ids {right}/{n}  round trips {trips}/{n}  built in {row.build_s:.2f} s")
        for example in row.examples:
            print("   ", example)
    return int(not rows or any(r.wrong or r.wrong_round_trips for r in rows))


if __name__ == "__main__":
    sys.exit(main())
