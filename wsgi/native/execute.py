"""POST /execute: a JSON body becomes a `Request`, which the runtime checks; the job's events are streamed."""

from __future__ import annotations

import time
from typing import Any

import falcon
import msgspec

from worker_orcd.config import MAX_PROMPT_CHARS
from worker_orcd.errors import DuplicateJob, QueueFull
from worker_orcd.observe.events import text_facts
from worker_orcd.runtime.request import HTTP_FIELDS, Limits, Request, SamplingParams
from worker_orcd.wsgi.native import requests
from worker_orcd.wsgi.native.events import JobEvents
from worker_orcd.wsgi.service import Service
from worker_orcd.wsgi.sse import JobStream

#: with the charset, because some clients read text without one as Latin-1
EVENT_STREAM = "text/event-stream; charset=utf-8"

_JSON_TYPES: dict[type, Any] = {int: int | float, float: float, list: list[str]}

#: body of POST /execute: job_id, prompt, and those sampling fields that are open to HTTP; types are checked, no values.
#: null stands for a field that is not given.
ExecuteBody = msgspec.defstruct(
    "ExecuteBody",
    [
        ("job_id", str),
        ("prompt", str),
        *((name, _JSON_TYPES[kind] | None, None) for name, kind in HTTP_FIELDS.items()),
    ],
    forbid_unknown_fields=True,
)
_BODY: requests.Decoder[Any] = requests.Decoder(ExecuteBody)


class Execute:
    """POST /execute: check everything, submit the job, stream its events."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._limits = Limits(
            max_prompt_chars=MAX_PROMPT_CHARS,
            max_tokens_in=service.config.max_tokens_in,
            max_tokens_out=service.config.max_tokens_out,
            plain_text=True,
            without_tokenizer="the model has no tokenizer; the worker can be given one with --tokenizer",
        )

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer 200 with a stream once the job is accepted; every refusal is an HTTP error before it."""
        service, longest = self._service, self._service.config.inference_timeout_sec
        llm = service.llm()
        left = requests.seconds_left(req.get_header(requests.DEADLINE_HEADER))
        body = requests.take(req, _BODY)
        given: dict[str, Any] = {
            name: requests.whole(name, value) if kind is int else value
            for name, kind in HTTP_FIELDS.items()
            if (value := getattr(body, name)) is not None
        }
        request = Request(
            prompt=body.prompt,
            params=SamplingParams(**given),
            job_id=body.job_id,
            deadline=time.monotonic() + (longest if left is None else min(left, longest)),
        )
        try:
            place = service.places.take()
        except QueueFull:
            if llm.job(body.job_id) is not None:  # however full: asking again will not help
                raise DuplicateJob(body.job_id) from None
            raise
        try:
            job = llm.submit_request(request, self._limits)
        except BaseException:
            service.places.leave(place)
            raise
        log = service.events.bind(correlation_id=req.context.correlation_id)
        format = JobEvents(job, service.model)
        resp.stream = JobStream(service, place, [job], format, log, req.env.get("gunicorn.socket"))
        log.emit(
            "execute_start",
            job_id=job.job_id,
            tokens_in=job.tokens_in,
            **text_facts("prompt", body.prompt),
            seed=job.seed,
            max_tokens=job.params.max_tokens,
            temperature=job.params.temperature,
            n_stop=len(job.params.stop),
            deadline_in_sec=left,
        )
        resp.content_type = EVENT_STREAM
        resp.set_header("Cache-Control", "no-store")
        resp.set_header("X-Accel-Buffering", "no")
