"""create_app: the Falcon application around one `Service`.

It can be run by any WSGI server or test client; what needs gunicorn lives in `server` and `gunicorn_worker`.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from typing import Any
from wsgiref.util import setup_testing_defaults

import falcon

from worker_orcd.errors import WorkerError
from worker_orcd.wsgi import http_errors
from worker_orcd.wsgi.access import FIELDS as ACCESS_FIELDS
from worker_orcd.wsgi.access import Rules
from worker_orcd.wsgi.middleware import CORRELATION_HEADER, REQUEST_ID_HEADER, Access, ApiKey, Correlation, cors, peer
from worker_orcd.wsgi.native.cancel import Cancel
from worker_orcd.wsgi.native.execute import Execute, ExecuteBody
from worker_orcd.wsgi.native.health import Health, Ready
from worker_orcd.wsgi.native.metrics import MetricsText
from worker_orcd.wsgi.native.requests import DEADLINE_HEADER
from worker_orcd.wsgi.native.shutdown import Shutdown
from worker_orcd.wsgi.page import Page, Static
from worker_orcd.wsgi.service import Service

#: every route: its path, and the resource that answers its methods; docs/http.md has a row for each
ROUTES: tuple[tuple[str, Callable[[Service], object]], ...] = (
    ("/execute", Execute),
    ("/cancel", Cancel),
    ("/health", Health),
    ("/ready", Ready),
    ("/metrics", MetricsText),
    ("/shutdown", Shutdown),
    ("/", Page),
    ("/static/{name}", Static),
)

#: what a refused request may be said to have wrong: fields of bodies and headers
_HEADERS = (CORRELATION_HEADER, REQUEST_ID_HEADER, DEADLINE_HEADER, *ACCESS_FIELDS)
_FIELDS = frozenset((*ExecuteBody.__struct_fields__, *_HEADERS))


def create_app(service: Service) -> falcon.App[falcon.Request, falcon.Response]:
    """The application that serves `service`."""
    rules = Rules.of(service.config)
    middleware: list[Any] = [Correlation(), Access(rules)]
    if rules.cors_origins:
        middleware.append(cors(rules))
    if service.config.api_key is not None:
        middleware.append(ApiKey(service.config.api_key, rules))
    app = falcon.App(middleware=middleware, media_type=falcon.MEDIA_JSON)
    for path, make in ROUTES:
        resource: Any = make(service)
        if hasattr(resource, "on_get"):
            resource.on_head = resource.on_get  # Falcon leaves the body out and keeps its length
        app.add_route(path, resource)

    def refuse(req: falcon.Request, resp: falcon.Response, error: Exception, params: dict[str, object]) -> None:
        if isinstance(error, falcon.HTTPError):
            for name, value in _headers(error):
                resp.set_header(name, value)
            known = http_errors.from_falcon(error)
        else:
            known = http_errors.from_exception(error)
        if req.method == "POST":
            # no message, and no name of a field that we do not know: a misquoted body can make one of a prompt
            field = known.fields.get("field")
            service.events.emit(
                "refused",
                path=req.path,
                status=known.status,
                code=known.code,
                field=field if field is None or field in _FIELDS else "(unknown)",
                job_id=req.context.get("job_id"),
                peer=peer(req.remote_addr, req.env.get("REMOTE_PORT")),
                correlation_id=req.context.correlation_id,
            )
        if known is not error and known.status >= 500:
            # where it happened, not what it said: the text of a foreign exception may hold a prompt
            frame = traceback.extract_tb(error.__traceback__)[-1]
            service.events.emit(
                "error",
                "error",
                code=known.code,
                message=known.message,
                path=req.path,
                correlation_id=req.context.correlation_id,
                at=f"{frame.filename}:{frame.lineno}",
            )
        service.note_error(known)
        service.metrics.refused(known.code, known.status)
        http_errors.answer(resp, known)

    app.add_error_handler(Exception, refuse)
    app.add_error_handler(falcon.HTTPError, refuse)
    app.add_error_handler(WorkerError, refuse)
    return app


def first_request(app: falcon.App[falcon.Request, falcon.Response], url: str) -> None:
    """Ask for the health once, without a server: Falcon makes its table of routes at the first request of all."""
    environ: dict[str, Any] = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": "/health",
        "HTTP_HOST": url.partition("://")[2],
        "REMOTE_ADDR": "127.0.0.1",
    }
    setup_testing_defaults(environ)  # the rest of what a server says
    for _ in app(environ, lambda status, headers, info=None: lambda data: None):
        pass


def _headers(error: falcon.HTTPError) -> list[tuple[str, str]]:
    headers = error.headers or []
    return list(headers.items() if isinstance(headers, Mapping) else headers)
