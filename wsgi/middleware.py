"""What holds for every request: its correlation id, its sender and, where one is set, the API key."""

from __future__ import annotations

import hmac
import re
import secrets

import falcon

from worker_orcd.errors import InvalidRequest
from worker_orcd.wsgi.http_errors import Unauthorized

#: paths that answer without a key: probes of a supervisor have none, and the page is what asks a person for one
OPEN_PATHS = ("/health", "/ready", "/")
#: where the files of the page are, which are the same for everybody
OPEN_FOLDER = "/static/"
CORRELATION_HEADER = "X-Correlation-Id"
_CORRELATION_ID = re.compile(r"[\x20-\x7e]{1,128}")


def correlation_id(value: str | None) -> str:
    """The id a client gave, or a new one.

    Raises:
        InvalidRequest: it is not 1 to 128 printable ASCII characters.
    """
    if value is None:
        return secrets.token_hex(16)
    if not _CORRELATION_ID.fullmatch(value):
        raise InvalidRequest(
            f"{CORRELATION_HEADER} must be 1 to 128 printable ASCII characters", field=CORRELATION_HEADER
        )
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
        given = req.get_header(CORRELATION_HEADER)
        req.context.correlation_id = correlation_id(None)
        if given is not None:
            req.context.correlation_id = correlation_id(given)

    def process_response(self, req: falcon.Request, resp: falcon.Response, resource: object, ok: bool) -> None:
        """Echo the id."""
        resp.set_header(CORRELATION_HEADER, req.context.correlation_id)


class ApiKey:
    """Asks for `Authorization: Bearer KEY`. Comparing takes the same time whatever the key given."""

    def __init__(self, api_key: str) -> None:
        self._expected = f"Bearer {api_key}".encode("latin-1")

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Raise `Unauthorized` where the key is missing or wrong."""
        if req.path in OPEN_PATHS or req.path.startswith(OPEN_FOLDER):
            return
        given = (req.get_header("Authorization") or "").encode("latin-1", "replace")
        if not hmac.compare_digest(given, self._expected):
            raise Unauthorized("the API key is missing or wrong")
