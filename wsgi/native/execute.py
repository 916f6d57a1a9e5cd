"""The resources: /execute, /cancel, /health, /ready, /shutdown.

Each reads its request through `requests`, talks to the LLM of the service, and lets errors rise to the app's one map.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

import falcon
import msgspec

from worker_orcd.engine.sampling import DEFAULT_MAX_TOKENS
from worker_orcd.errors import InvalidRequest
from worker_orcd.observe.events import text_facts
from worker_orcd.wsgi import requests
from worker_orcd.wsgi.service import Service
from worker_orcd.wsgi.stream import JobStream

if TYPE_CHECKING:
    from worker_orcd.runtime.llm import LLM

EVENT_STREAM = "text/event-stream"


def _json(resp: falcon.Response, status: int, data: dict[str, object]) -> None:
    resp.status = status
    resp.data = msgspec.json.encode(data, enc_hook=str)


class Execute:
    """POST /execute: check everything, submit the job, stream its events."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer 200 with a stream once the job is accepted; every refusal is an HTTP error before it."""
        service, config = self._service, self._service.config
        llm = service.llm()
        left = requests.seconds_left(req.get_header(requests.DEADLINE_HEADER))
        request = requests.decode(requests.read_body(req), requests.ExecuteRequest)
        params = request.sampling()
        params.check(n_vocab=llm.info.n_vocab, max_tokens_out=config.max_tokens_out)
        ids = self._encode(llm, request.prompt)
        if params.max_tokens is None and config.max_tokens_out < DEFAULT_MAX_TOKENS:
            room = max(1, llm.info.context_length - len(ids))
            params = dataclasses.replace(params, max_tokens=min(config.max_tokens_out, room))
        limit = config.inference_timeout_sec
        job = llm.submit(
            ids,
            params,
            job_id=request.job_id,
            deadline=time.monotonic() + (limit if left is None else min(left, limit)),
        )
        log = service.events.bind(job_id=request.job_id, correlation_id=req.context.correlation_id)
        resp.stream = JobStream(service, job, log, req.env.get("gunicorn.socket"))
        log.emit(
            "execute_start",
            tokens_in=job.tokens_in,
            **text_facts("prompt", request.prompt),
            seed=job.seed,
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            n_stop=len(params.stop),
            deadline_in_sec=left,
        )
        resp.content_type = EVENT_STREAM
        resp.set_header("Cache-Control", "no-store")
        resp.set_header("X-Accel-Buffering", "no")

    def _encode(self, llm: LLM, prompt: str) -> list[int]:
        if llm.tokenizer is None:
            raise InvalidRequest(
                "the model has no tokenizer; the worker can be given one with --tokenizer", field="prompt"
            )
        ids = llm.tokenizer.encode(prompt)
        limit = self._service.config.max_tokens_in
        if limit is not None and len(ids) > limit:
            raise InvalidRequest(f"prompt has {len(ids)} tokens; at most {limit} are taken", field="prompt")
        return ids


class Cancel:
    """POST /cancel: 202 whatever the job's state; saying it again changes nothing."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Cancel the job named in the body; its stream ends with the error CANCELLED."""
        llm = self._service.llm_for_cancel()
        request = requests.decode(requests.read_body(req), requests.CancelRequest)
        state = llm.cancel(request.job_id)
        self._service.events.emit(
            "cancel", job_id=request.job_id, correlation_id=req.context.correlation_id, state=state
        )
        _json(resp, 202, {"job_id": request.job_id, "state": state})


class Health:
    """GET /health: what the worker is and how it is, from memory."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """200 when healthy, 503 while loading, unhealthy or stopping."""
        healthy, facts = self._service.health()
        _json(resp, 200 if healthy else 503, facts)


class Ready:
    """GET /ready: whether jobs are accepted."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """200 only when /execute takes jobs."""
        ready = self._service.state == "ready"
        _json(resp, 200 if ready else 503, {"ready": ready, "status": self._service.state})


class Shutdown:
    """POST /shutdown: as SIGTERM."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer 202; running jobs get the grace time, then the process exits with code 0."""
        self._service.terminate()
        _json(resp, 202, {"status": "stopping"})
