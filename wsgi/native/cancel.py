"""POST /cancel."""

from __future__ import annotations

import falcon
import msgspec

from worker_orcd.runtime.request import check_job_id
from worker_orcd.wsgi.native import requests
from worker_orcd.wsgi.service import Service


class CancelBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /cancel."""

    job_id: str


_BODY = requests.Decoder(CancelBody)


class Cancel:
    """POST /cancel: 202 whatever the job's state; saying it again changes nothing."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Cancel the job named in the body; its stream ends with the error CANCELLED."""
        job_id = requests.take(req, _BODY).job_id
        check_job_id(job_id, plain_text=True)
        state = self._service.cancel(job_id)
        self._service.events.emit("cancel", job_id=job_id, correlation_id=req.context.correlation_id, state=state)
        requests.answer_json(resp, 202, {"job_id": job_id, "state": state})
