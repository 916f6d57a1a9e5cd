"""Compare an engine with the reference values of other programs: logits, real models, tokenizers.

Usage: python tools/check_goldens.py GOLDENS_DIR --device cpu|cuda:N [--models DIR] [--only PATTERN] [--json FILE]

Prints one line per case: measured / limit / what llama.cpp reaches on the same case. Exits 1 when a limit is passed,
or when a real model that --models should hold is missing. Everything runs through the public API (`LLM`).
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import pathlib
import sys

import numpy as np

from worker_orcd import LLM, SamplingParams
from worker_orcd.diagnose.demo_model import models_dir

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import check_tokenizers
import limits

#: normalized mean squared error of llama.cpp on each golden file, from the goldens' README
LLAMA_CPP_NMSE = {
    "llama-F16": 1.2e-6, "llama-Q4_0": 6.1e-4, "llama-Q4_K_M": 1.1e-3, "qwen2-Q8_0": 3.5e-4, "qwen2-Q4_K_M": 6.9e-4,
    "qwen2-Q4_0": 3.9e-4, "phi3-Q4_K_M": 1.1e-3, "phi3-Q8_0": 5.5e-4, "phi3-swa-Q8_0": 0.39, "gpt2-F16": 4.7e-7,
    "gpt2-Q8_0": 2.0e-4, "gpt2-Q4_K_M": 3.5e-4, "gpt-oss-MXFP4_MOE": 5.0e-3, "gpt-oss-Q4_K_M": 5.1e-3,
    "gpt-oss-MXFP4": 4.2e-3,
}  # fmt: skip
#: reference file -> (model file, mean KL of llama.cpp, top-1 agreement of llama.cpp)
REAL = {
    "real-qwen": ("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", 1.46e-3, 0.976),
    "real-smol": ("smollm2-135m-instruct-q4_1.gguf", 5.1e-3, 0.967),
}


def nmse(a: np.ndarray, b: np.ndarray) -> float:
    """mean((a - b)^2) / mean(b^2)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(((a - b) ** 2).mean() / (b**2).mean())


def kl_from_top(logits: np.ndarray, top_ids: np.ndarray, top_logits: np.ndarray, lse: np.ndarray) -> np.ndarray:
    """KL(reference || logits) per position over the reference's 64 best tokens and one bucket for all others."""
    x = logits.astype(np.float64)
    top = x.max(1, keepdims=True)
    q = np.take_along_axis(x - top - np.log(np.exp(x - top).sum(1, keepdims=True)), top_ids, 1)
    p = top_logits.astype(np.float64) - lse[:, None]
    rest_p = np.maximum(1 - np.exp(p).sum(1), 1e-12)
    rest_q = np.maximum(1 - np.exp(q).sum(1), 1e-12)
    return (np.exp(p) * (p - q)).sum(1) + rest_p * np.log(rest_p / rest_q)


def greedy_mismatches(llm: LLM, prompt: list[int], reference: list[int], margin: np.ndarray) -> list[tuple[int, float]]:
    """Steps at which greedy decoding leaves the reference; after each it goes on from the reference's own ids."""
    wrong, at = [], 0
    while at < len(reference):
        params = SamplingParams(max_tokens=len(reference) - at, temperature=0.0, ignore_eos=True)
        got = llm.generate([prompt + reference[:at]], params)[0].token_ids
        same = next((j for j, (g, r) in enumerate(zip(got, reference[at:], strict=True)) if g != r), len(got))
        if at + same < len(reference):
            wrong.append((at + same, float(margin[at + same])))
        at += same + 1
    return wrong


class Table:
    """Result lines; `ok` turns false when one of them is past its limit."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []

    def add(self, case: str, what: str, measured: float, limit: float, peer: float | None, ok: bool) -> None:
        """Print a line and keep it; `peer` is what llama.cpp reaches."""
        row = {"case": case, "what": what, "measured": measured, "limit": limit, "llama.cpp": peer, "ok": ok}
        self.rows.append(row)
        peer_text, verdict = f"{peer:.3g}" if peer is not None else "-", "ok" if ok else "FAIL"
        print(f"{case:24} {what:18} {measured:12.4g} {limit:10.3g} {peer_text:>10}  {verdict}", flush=True)

    @property
    def ok(self) -> bool:
        """Whether no line is past its limit."""
        return all(r["ok"] for r in self.rows)


def check_tiny(path: pathlib.Path, device: str, table: Table) -> None:
    """One tiny model: teacher-forced logits."""
    with np.load(path.with_suffix(".npz")) as z:
        tokens, reference = z["tokens"][0], z["logits"][0]
    with LLM(str(path), device=device, progress=False) as llm:
        got = llm.logits(tokens.tolist())
    value = nmse(got, reference)
    limit = limits.by_prefix(limits.LOGITS_NMSE[device.split(":")[0]], path.stem)
    table.add(path.stem, "NMSE", value, limit, LLAMA_CPP_NMSE.get(path.stem), bool(value <= limit))


def check_real(name: str, goldens: pathlib.Path, models: pathlib.Path, device: str, table: Table) -> None:
    """One real model: KL divergence and top-1 agreement, teacher-forced, and greedy decoding."""
    file, peer_kl, peer_top1 = REAL[name]
    kind = device.split(":")[0]
    kls, hits, wrong = [], [], []
    with np.load(goldens / f"{name}.npz") as z, LLM(str(models / file), device=device, progress=False) as llm:
        for i in range(sum(k.endswith("_ids") and "top" not in k for k in z.files)):
            p = f"p{i}_"
            ids = z[p + "ids"].tolist()
            logits = llm.logits(ids)
            kls.append(kl_from_top(logits, z[p + "top_ids"], z[p + "top_logits"], z[p + "lse"]))
            hits.append(logits.argmax(1) == z[p + "top_ids"][:, 0])
            wrong += greedy_mismatches(llm, ids, z[p + "greedy"].tolist(), z[p + "margin"])
    kl, top1 = float(np.concatenate(kls).mean()), float(np.concatenate(hits).mean())
    table.add(name, "mean KL", kl, limits.REAL_KL[kind][name], peer_kl, kl <= limits.REAL_KL[kind][name])
    table.add(name, "top-1", top1, limits.REAL_TOP1[kind], peer_top1, top1 >= limits.REAL_TOP1[kind])
    worst = max((m for _, m in wrong), default=0.0)
    table.add(name, f"greedy ({len(wrong)} differ)", worst, limits.GREEDY_MARGIN, None, worst <= limits.GREEDY_MARGIN)


def main() -> int:
    """Run the cases, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("goldens", type=pathlib.Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", type=pathlib.Path, default=models_dir())
    parser.add_argument("--only", default="*", help="shell pattern of case names")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    table = Table()
    print(f"{'case':24} {'what':18} {'measured':>12} {'limit':>10} {'llama.cpp':>10}")
    tiny = [p for p in sorted(args.goldens.glob("*.gguf")) if fnmatch.fnmatch(p.stem, args.only)]
    for path in tiny:
        check_tiny(path, args.device, table)
    missing = []
    for name in (n for n in REAL if fnmatch.fnmatch(n, args.only)):
        if (args.models / REAL[name][0]).exists():
            check_real(name, args.goldens, args.models, args.device, table)
        else:
            missing.append(REAL[name][0])
    if fnmatch.fnmatch("tokenizers", args.only):
        for row in check_tokenizers.check(args.goldens, args.models):
            table.add(f"tokenizer {row.name}", "lines wrong", row.wrong, 0, None, row.wrong == 0)
            table.add(f"tokenizer {row.name}", "round trips wrong", row.wrong_round_trips, 0, None,
                      row.wrong_round_trips == 0)  # fmt: skip
    for file in missing:
        print(f"missing model: {args.models / file}")
    if not table.rows:
        print(f"no reference files in {args.goldens}")
    if args.json:
        args.json.write_text(json.dumps(table.rows, indent=1))
    return 0 if table.ok and table.rows and not missing else 1


if __name__ == "__main__":
    sys.exit(main())
