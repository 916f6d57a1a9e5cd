"""A model that speaks on command: the LLM interface that the HTTP side uses, with no engine behind it.

The first word of a prompt says how it behaves; see `FakeLLM._speak`. Ids are the UTF-8 bytes of the text.
"""

from __future__ import annotations

import hashlib
import threading
import time
from types import SimpleNamespace

from worker_orcd.errors import CudaError, DuplicateJob, InvalidRequest, NotReady, QueueFull
from worker_orcd.observe.stats import EngineStats
from worker_orcd.runtime.request import ModelParts, prepare
from worker_orcd.serving.job import Job

N_VOCAB = 512
CONTEXT = 40_000


class FakeInfo(SimpleNamespace):
    def to_dict(self):
        return dict(vars(self))


class FakeTokenizer:
    def encode(self, text, *, special=False, add_bos=None):
        return list(text.encode())

    def decode(self, ids, *, skip_special=False):
        return bytes(ids).decode("utf-8", "replace")


class FakeCapacity:
    """A context and a cache of `CONTEXT` positions."""

    def check(self, n_prompt, max_tokens):
        if n_prompt + max_tokens > CONTEXT:
            raise InvalidRequest("past the context", field="prompt")

    def room_for(self, n_prompt):
        return CONTEXT - n_prompt


class FakeLLM:
    def __init__(self, config, on_fatal):
        self.on_fatal = on_fatal
        self.tokenizer = FakeTokenizer()
        self.warm_up_seconds = 0.0
        self.info = FakeInfo(
            name="fake",
            path=config.model,
            n_vocab=N_VOCAB,
            context_length=CONTEXT,
            quant_kind="Q4_K_M",
            tokenizer_kind="gguf-bpe",
            device="cpu",
            model_bytes=123,
            sha256=config.expect_sha256,
            verified_by=config.expect_sha256 and "sha256",
            tokenizer_sha256="70" * 32,
        )
        self.limit = config.max_seqs + config.max_queue
        self.jobs = {}
        self.n_seq = 0
        self.lock = threading.Lock()
        self.closing = False
        self.told = lambda job: None
        self.faults = []

    def submit_request(self, request, limits):
        ready = prepare(ModelParts(self.tokenizer, N_VOCAB, FakeCapacity()), request, limits)
        job_id = ready.job_id
        with self.lock:
            if self.closing:
                raise NotReady("the worker is shutting down")
            live = [j for j in self.jobs.values() if not j.finished]
            if job_id in self.jobs and not self.jobs[job_id].finished:
                raise DuplicateJob(job_id)
            if len(live) >= self.limit:
                raise QueueFull("the queue is full", retry_after=1)
            self.n_seq += 1
            job = Job(
                job_id,
                self.n_seq,
                ready.params,
                ready.seed,
                len(ready.token_ids),
                ready.deadline,
                lambda ended: self.told(ended),  # noqa: PLW0108  (who is told may change)
            )
            self.jobs[job_id] = job
        words = self.tokenizer.decode(ready.token_ids.tolist()).split(" ", 1)
        threading.Thread(target=self._speak, args=(job, words[0], words[1:]), daemon=True).start()
        return job

    def _speak(self, job, verb, rest):
        """say TEXT: one piece a character; slow: a piece every 20 ms until stopped; flood: 8 MB at once;
        quiet: nothing until stopped; fail: an error after the first piece; sticky: the engine dies, at once or
        late-sticky: after 0.4 s."""
        job.admitted_at = job.first_token_at = time.monotonic()
        limit = job.params.max_tokens
        if verb == "say":
            text = rest[0][:limit]
            for char in text:
                job.add_piece(char, list(char.encode()))
            job.finish("stop")
        elif verb in ("slow", "flood"):
            for i in range(limit):
                job.add_piece(f"w{i} " if verb == "slow" else 4096 * "w", [i % 256])
                if job.finished:
                    return
                if verb == "slow":
                    time.sleep(0.02)
            job.finish("length")
        elif verb == "quiet":
            while not job.finished:
                time.sleep(0.01)
        elif verb == "fail":
            job.add_piece("x", [120])
            job.end(InvalidRequest("no room in the cache", field="max_tokens"))
        elif verb in ("sticky", "late-sticky"):
            if verb == "late-sticky":
                time.sleep(0.4)
            error = CudaError("an illegal address", call="cuStreamSynchronize", sticky=True)
            for other in self.jobs.values():
                other.end(error)
            self.on_fatal(error)

    def job(self, job_id):
        job = self.jobs.get(job_id)
        return None if job is None or job.finished else job

    def cancel(self, job_id):
        job = self.jobs.get(job_id)
        if job is None:
            return "unknown"
        if job.finished:
            return "finished"
        job.cancel()
        return "cancelling"

    def on_job_end(self, told):
        self.told = told

    def stats(self):
        jobs = [j for j in list(self.jobs.values()) if j.outcome is None]
        computed = [j for j in jobs if j.first_token_at is not None]
        return EngineStats(
            n_running=len(computed),
            n_waiting=len(jobs) - len(computed),
            n_kv_blocks=100,
            n_kv_blocks_used=len(computed),
            kv_usage=len(computed) / 100,
            prompt_tokens=sum(j.tokens_in for j in computed),
            generated_tokens=sum(j.tokens_out for j in jobs),
        )

    def digest(self, progress):
        progress(0)
        return hashlib.sha256(b"fake").hexdigest()

    def check_residency(self):
        return list(self.faults)

    def shutdown(self, grace):
        self.closing = True
        end = time.monotonic() + grace
        while time.monotonic() < end and any(not j.finished for j in self.jobs.values()):
            time.sleep(0.01)
        for job in self.jobs.values():
            job.end(NotReady("the worker is shutting down"))

    def close(self):
        self.shutdown(0)
