"""Generation: from the requests of one answer to its jobs, and from them to a stream or to one whole answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import falcon

from worker_orcd.runtime.request import Limits, Request
from worker_orcd.serving.job import Completion, Job
from worker_orcd.wsgi.native import requests
from worker_orcd.wsgi.native.execute import EVENT_STREAM
from worker_orcd.wsgi.openai.asked import limits_of
from worker_orcd.wsgi.openai.heads import Head, fingerprint
from worker_orcd.wsgi.openai.ids import new_id
from worker_orcd.wsgi.openai.logprobs import TokenTexts
from worker_orcd.wsgi.service import Service
from worker_orcd.wsgi.sse import JobStream
from worker_orcd.wsgi.stream_format import StreamFormat, json_line
from worker_orcd.wsgi.whole_answer import wait_for

if TYPE_CHECKING:
    from worker_orcd.runtime.llm import LLM


class Generation:
    """One answer in the making. Begins with what must hold before a body is looked at.

    Args:
        service: has the model and the places.
        req: the HTTP request.
        prefix: of the answer's id.

    Attributes:
        llm: the loaded model.
        head: of the answer.
        texts: of single tokens.
        limits: of its requests.
        deadline: `time.monotonic()` at which its jobs end.

    Raises:
        NotReady: no jobs are taken.
        InvalidRequest, InferenceTimeout: the deadline of the request is malformed or has passed.
    """

    def __init__(self, service: Service, req: falcon.Request, prefix: str) -> None:
        self.service = service
        self.llm: LLM = service.llm()
        longest = service.config.inference_timeout_sec
        self._left = requests.seconds_left(req.get_header(requests.DEADLINE_HEADER))
        self.deadline = time.monotonic() + (longest if self._left is None else min(self._left, longest))
        self.head = Head(new_id(prefix), service.model, _fingerprint(service, self.llm))
        self.texts = TokenTexts(self.llm.tokenizer)
        self.limits: Limits = limits_of(service.config)
        self._req = req
        self._log = service.events.bind(correlation_id=req.context.correlation_id, route=req.path)
        req.context.job_id = self.head.id

    def begin(self, asked: Sequence[Request], **facts: object) -> tuple[object, list[Job]]:
        """Submit all requests or none.

        Args:
            facts: what the log says of them.

        Returns:
            The place of the answer, and the jobs.

        Raises:
            WorkerError: what refuses one of them, or there is no room.
        """
        place = self.service.places.take()
        try:
            jobs = self.llm.submit_requests(asked, self.limits)
        except BaseException:
            self.service.places.leave(place)
            raise
        for job in jobs:
            self._log.emit(
                "execute_start",
                job_id=job.job_id,
                answer_id=self.head.id,
                tokens_in=job.tokens_in,
                seed=job.seed,
                max_tokens=job.params.max_tokens,
                temperature=job.params.temperature,
                n_stop=len(job.params.stop),
                deadline_in_sec=self._left,
                **facts,
            )
        return place, jobs

    def wait(self, place: object, jobs: Sequence[Job]) -> list[Completion]:
        """Wait for all jobs.

        Raises:
            WorkerError: what ended one of them; Cancelled: the client has gone.
        """
        return wait_for(self.service, place, jobs, self._log, self._req.env.get("gunicorn.socket"))

    def stream(
        self, resp: falcon.Response, place: object, jobs: Sequence[Job], make_format: Callable[[], StreamFormat]
    ) -> None:
        """Answer with a stream of the jobs; they end if it cannot be made."""
        try:
            format = make_format()
            sock = self._req.env.get("gunicorn.socket")
            resp.stream = JobStream(self.service, place, jobs, format, self._log, sock)
        except BaseException:
            for job in jobs:
                job.cancel()
            self.service.places.leave(place)
            raise
        _as_events(resp)

    def stream_ready(self, resp: falcon.Response, events: bytes) -> None:
        """Answer with a stream that is known to its end."""
        resp.data = events
        _as_events(resp)


def _as_events(resp: falcon.Response) -> None:
    resp.content_type = EVENT_STREAM
    resp.set_header("Cache-Control", "no-store")
    resp.set_header("X-Accel-Buffering", "no")


def answer(resp: falcon.Response, value: Any) -> None:
    """Answer 200 with JSON."""
    resp.data = json_line(value)


def _fingerprint(service: Service, llm: LLM) -> str:
    if service.fingerprint is None:
        service.fingerprint = fingerprint(llm)
    return service.fingerprint
