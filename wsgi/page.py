"""GET / and GET /static/NAME: the page, out of a table of files that is read once.

A name in a request is looked up in that table and never becomes a path. The page holds no data of anybody: it answers
without an API key, and asks for one where the worker does.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import falcon

from worker_orcd.wsgi.service import Service

_FOLDER = Path(__file__).parent / "static"
_INDEX = "index.html"
#: what may lie in the folder, by the end of its name
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
#: nothing of another host, no script or style inside the document, nobody's frame
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a new version of the worker shows at once; the ETag spares the bytes
}


@dataclass(frozen=True)
class _File:
    data: bytes
    content_type: str
    etag: str


@cache
def _files() -> dict[str, _File]:
    """Name to file, for each plain file of the folder that is of a kind in the table."""
    found = {}
    for path in sorted(_FOLDER.iterdir()):
        if path.suffix in _TYPES and path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            found[path.name] = _File(data, _TYPES[path.suffix], hashlib.sha256(data).hexdigest()[:32])
    return found


def _answer(req: falcon.Request, resp: falcon.Response, file: _File) -> None:
    resp.set_headers(_HEADERS)
    resp.etag = file.etag
    known = req.if_none_match or ()
    if any(tag == "*" or tag == file.etag for tag in known):
        resp.status = 304
        return
    resp.content_type = file.content_type
    resp.data = file.data


class Page:
    """GET /: the page."""

    def __init__(self, service: Service) -> None:
        self._file = _files()[_INDEX]

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """200 at any time, also while the model loads; 304 where the client has it."""
        _answer(req, resp, self._file)


class Static:
    """GET /static/NAME: the scripts, the styles and the picture of the page."""

    def __init__(self, service: Service) -> None:
        self._files = _files()

    def on_get(self, req: falcon.Request, resp: falcon.Response, name: str) -> None:
        """200, 304 where the client has it, 404 for what is not in the folder."""
        file = self._files.get(name)
        if file is None:
            raise falcon.HTTPNotFound(description="the page has no file of this name")
        _answer(req, resp, file)
