"""GET /health and GET /ready: answered from memory, also while the model loads."""

from __future__ import annotations

import falcon

from worker_orcd.wsgi.native.requests import answer_json
from worker_orcd.wsgi.service import Service


class Health:
    """GET /health: what the worker is and how it is."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """200 when healthy, 503 while loading, unhealthy or stopping."""
        healthy, facts = self._service.health()
        answer_json(resp, 200 if healthy else 503, facts)


class Ready:
    """GET /ready: whether jobs are accepted."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """200 only when /execute takes jobs."""
        ready = self._service.state == "ready"
        answer_json(resp, 200 if ready else 503, {"ready": ready, "status": self._service.state})
