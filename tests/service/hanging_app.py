"""Serve a model whose engine never comes back: `python hanging_app.py MODEL WATCHDOG_SEC N_STEPS STEP_SEC`.

It computes N_STEPS steps of one call each, no faster than STEP_SEC, and hangs in the next, with the lock of Python
released, as a driver does.
"""

from __future__ import annotations

import sys
import threading
import time

from worker_orcd._cpu import CpuEngine
from worker_orcd.config import ServeConfig
from worker_orcd.runtime import devices
from worker_orcd.wsgi import server
from worker_orcd.wsgi.service import load_llm


class Hangs:
    """The engine, but for the calls after the first `n`."""

    def __init__(self, engine: CpuEngine, n: int, seconds: float) -> None:
        self.engine, self.left, self.seconds, self.serving = engine, n, seconds, False

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def _count(self):
        if self.serving:
            self.left -= 1
            if self.left < 0:
                threading.Event().wait()
            time.sleep(self.seconds)

    def step(self, *args, **kwargs):
        self._count()
        return self.engine.step(*args, **kwargs)

    def decode(self, slots, seq_ids, tokens, positions, n_steps, *rest):
        self._count()
        return self.engine.decode(slots, seq_ids, tokens, positions, 1, *rest)


def main():
    model, watchdog_sec, n_steps, step_sec = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    made = []
    open_engine = devices.open_engine

    def open_one_that_hangs(*args, **kwargs):
        made.append(Hangs(open_engine(*args, **kwargs), n_steps, step_sec))
        return made[-1]

    devices.open_engine = open_one_that_hangs

    def load(*args):
        llm = load_llm(*args)
        made[-1].serving = True
        return llm

    server.serve(
        ServeConfig(model=model, device="cpu", port=0, log_format="json", max_seqs=2, watchdog_sec=watchdog_sec), load
    )


main()
