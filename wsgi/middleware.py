"""What holds for every request: its correlation id, who may send it (`access`) and, where one is set, the API key."""

from __future__ import annotations

import hmac
import re
import secrets
from typing import Any

import falcon

from worker_orcd.config import ANY
from worker_orcd.errors import InvalidRequest
from worker_orcd.wsgi.access import SAFE_METHODS, Rules, bearer_token, check_body
from worker_orcd.wsgi.http_errors import Unauthorized

#: paths that answer without a key: probes of a supervisor have none, and the page is what asks a person for one
OPEN_PATHS = ("/health", "/ready", "/")
#: where the files of the page are, which are the same for everybody
OPEN_FOLDER = "/static/"
CORRELATION_HEADER = "X-Correlation-Id"
#: the name that OpenAI's clients and most proxies know it by: taken where the other is absent, answered beside it
REQUEST_ID_HEADER = "X-Request-Id"
_CORRELATION_ID = re.compile(r"[\x20-\x7e]{1,128}")


def correlation_id(value: str | None, header: str = CORRELATION_HEADER) -> str:
    """The id a client gave, or a new one.

    Args:
        header: where it gave it.

    Raises:
        InvalidRequest: it is not 1 to 128 printable ASCII characters.
    """
    if value is None:
        return secrets.token_hex(16)
    if not _CORRELATION_ID.fullmatch(value):
        raise InvalidRequest(f"{header} must be 1 to 128 printable ASCII characters", field=header)
    return value


def peer(address: str | None, port: str | int | None) -> str | None:
    """The other side of a connection as ADDRESS:PORT, for the log."""
    if not address:
        return None
    host = f"[{address}]" if ":" in address else address
    return host if port is None else f"{host}:{port}"


class Correlation:
    """Takes or makes the correlation id of a request and echoes it on the answer, whatever the answer is."""

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Set `req.context.correlation_id`; an id that breaks the rule is refused under a new one."""
        req.context.correlation_id = correlation_id(None)
        for header in (CORRELATION_HEADER, REQUEST_ID_HEADER):
            given = req.get_header(header)
            if given is not None:
                req.context.correlation_id = correlation_id(given, header)
                return

    def process_response(self, req: falcon.Request, resp: falcon.Response, resource: object, ok: bool) -> None:
        """Echo the id."""
        for header in (CORRELATION_HEADER, REQUEST_ID_HEADER):
            resp.set_header(header, req.context.correlation_id)


class Access:
    """Refuses what no user of this worker has meant, and bodies that are not JSON; see `access`."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._varies = bool(rules.cors_origins) and ANY not in rules.cors_origins

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Raise `Forbidden` or `UnsupportedMediaType`."""
        self._rules.check(req.method, req.env)
        if req.method not in SAFE_METHODS:
            check_body(req.env)

    def process_response(self, req: falcon.Request, resp: falcon.Response, resource: object, ok: bool) -> None:
        """Tell caches that an answer is for one page only."""
        if self._varies:
            resp.append_header("Vary", "Origin")


def cors(rules: Rules) -> Any:
    """What tells browsers that the pages of `rules.cors_origins` may read answers, and send what needs asking first."""
    return falcon.CORSMiddleware(
        ANY if ANY in rules.cors_origins else sorted(rules.cors_origins),
        expose_headers=(CORRELATION_HEADER, REQUEST_ID_HEADER, "Retry-After"),
        allow_private_network=True,
    )


class ApiKey:
    """Asks for `Authorization: Bearer KEY`. Comparing takes the same time whatever the key given."""

    def __init__(self, api_key: str, rules: Rules) -> None:
        self._expected = api_key.encode("latin-1")
        self._rules = rules

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Raise `Unauthorized` where the key is missing or wrong."""
        if req.path in OPEN_PATHS or req.path.startswith(OPEN_FOLDER) or self._asks_first(req):
            return
        given = (bearer_token(req.get_header("Authorization")) or "").encode("latin-1", "replace")
        if not hmac.compare_digest(given, self._expected):
            raise Unauthorized("the API key is missing or wrong")

    def _asks_first(self, req: falcon.Request) -> bool:
        """Whether a browser asks what an allowed page may send; it gives no key then, and gets no more than that."""
        origin = req.get_header("Origin")
        asks = req.method == "OPTIONS" and req.get_header("Access-Control-Request-Method") is not None
        return asks and origin is not None and self._rules.origin_is_allowed(origin)
