"""A short run of the CUDA engine that launches each kind of kernel of the given models, for the GPU sanitizers.

    python sanitize_run.py MODEL... [--device N]

Prompt rows over a tile's edge, a mixed step, decode graphs of several sizes, greedy and drawn with every filter. Frees
everything, so that a leak check sees what was forgotten. Results are not looked at: that is what the tests are for.
"""

from __future__ import annotations

import argparse

import numpy as np

from worker_orcd._engine import CudaEngine
from worker_orcd._ring import Control, TokenRing
from worker_orcd.engine.protocol import Batch, EngineConfig
from worker_orcd.engine.sampling import SamplingParams
from worker_orcd.errors import ModelLoadError
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import plan

GREEDY = SamplingParams(temperature=0.0, seed=0)
FILTERED = SamplingParams(temperature=0.8, top_k=40, top_p=0.95, min_p=0.02, repetition_penalty=1.1, seed=7)
N_SEQS = 4


def ints(values: object) -> np.ndarray:
    return np.asarray(values, np.int32)


def exercise(engine: CudaEngine, n_vocab: int) -> None:
    rng = np.random.default_rng(0)
    per_seq = engine.config.n_blocks[0] // N_SEQS
    for slot in range(N_SEQS):
        engine.block_tables[:, slot, :per_seq] = np.arange(per_seq) + slot * per_seq
        engine.set_slot(slot, FILTERED if slot % 2 else GREEDY)
    lengths = [70, 5, 64, 33]
    for slot, n in enumerate(lengths):
        engine.step(Batch(ints(rng.integers(0, n_vocab, n)), ints(range(n)), ints([slot] * n), 0, ints([n - 1])))
    mixed = Batch(ints(rng.integers(0, n_vocab, 12)), ints([70, *range(5, 16)]), ints([0] + [1] * 11), 1, ints([0, 11]))
    engine.step(mixed, want_logits=True)
    engine.forward(Batch(ints(rng.integers(0, n_vocab, 66)), ints(range(66)), ints([3] * 66), 0, ints(range(66))))
    at = [71, 16, 64, 66]
    for n in (1, 3, 4):
        engine.decode(
            ints(range(n)),
            np.arange(n, dtype=np.int64),
            ints([1] * n),
            ints(at[:n]),
            3,
            np.empty(0, np.int32),
            np.zeros(n + 1, np.int32),
            TokenRing(),
            Control(),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--device", type=int, default=0)
    args = parser.parse_args()
    done = 0
    for path in args.models:
        with ModelFile(path) as mf:
            p = plan.build(mf)
            config = EngineConfig(N_SEQS, 96, p.context_length, (16,) * len(p.kv_groups))
            try:
                engine = CudaEngine(mf, p, config, device=args.device)
            except ModelLoadError as error:
                print(f"left out: {error.message}")
                continue
            try:
                exercise(engine, p.n_vocab)
            finally:
                engine.close()
        done += 1
        print(f"ran {path}")
    raise SystemExit(0 if done else "no model could be run")


if __name__ == "__main__":
    main()
