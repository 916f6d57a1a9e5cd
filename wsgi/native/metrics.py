"""GET /metrics: for Prometheus, answered from memory, also while the model loads."""

from __future__ import annotations

import falcon

from worker_orcd.wsgi.service import Service


class MetricsText:
    """GET /metrics: all metrics as text, in the form that the client prefers."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """200 in any state; OpenMetrics where `Accept` names it."""
        resp.data, resp.content_type = self._service.metrics.exposition(req.get_header("Accept"))
