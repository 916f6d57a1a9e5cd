"""POST /shutdown."""

from __future__ import annotations

import falcon

from worker_orcd.wsgi.access import is_local_peer
from worker_orcd.wsgi.http_errors import Forbidden
from worker_orcd.wsgi.native.requests import answer_json
from worker_orcd.wsgi.service import Service


class Shutdown:
    """POST /shutdown: as SIGTERM, for who has the key; where there is none, for this machine alone."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer 202; running jobs get the grace time, then the process exits with code 0.

        Raises:
            Forbidden: there is no API key, and the request comes from another machine or through a proxy.
        """
        if self._service.config.api_key is None and not is_local_peer(req.env):
            raise Forbidden("a worker without an API key is stopped from its own machine only, and through no proxy")
        self._service.terminate()
        answer_json(resp, 202, {"status": "stopping"})
