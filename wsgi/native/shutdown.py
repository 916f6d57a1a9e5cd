"""POST /shutdown."""

from __future__ import annotations

import falcon

from worker_orcd.wsgi.native.requests import answer_json
from worker_orcd.wsgi.service import Service


class Shutdown:
    """POST /shutdown: as SIGTERM."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer 202; running jobs get the grace time, then the process exits with code 0."""
        self._service.terminate()
        answer_json(resp, 202, {"status": "stopping"})
