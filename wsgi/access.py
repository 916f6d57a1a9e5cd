"""Who may talk to the worker: whose `Host`, `Origin`, peer and kind of body are taken. Pure functions of header values.

A web page that somebody on this machine looks at can send requests to it, and none of its users means them. Three
things give it away:

- `Host`: a page whose own name is made to point here (DNS rebinding) sends that name. An IP literal cannot be made to
  point elsewhere, so a name must be known to be ours and an address need not be.
- `Origin`, or `Sec-Fetch-Site` where it is missing: a browser says with every request that may change something which
  page it comes from.
- the body's media type: pages can send forms and plain text to anybody, but no JSON.

What has neither `Host` nor `Origin` comes from no browser.
"""

from __future__ import annotations

import functools
import ipaddress
import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import falcon

from worker_orcd.config import ANY, ServeConfig, is_loopback
from worker_orcd.errors import InvalidRequest, quoted
from worker_orcd.wsgi.http_errors import Forbidden, UnsupportedMediaType

JSON = "application/json"
#: the charsets in which JSON is sent: UTF-8, and what is a part of it
_CHARSETS = ("utf-8", "utf8", "us-ascii", "ascii")
#: methods that change nothing
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
#: what proxies add to a request that they pass on, as WSGI calls it: its peer is the proxy, and the sender anybody
PROXY_HEADERS = ("HTTP_FORWARDED", "HTTP_VIA", "HTTP_X_FORWARDED_FOR", "HTTP_X_FORWARDED_HOST", "HTTP_X_REAL_IP")
#: the headers that a refusal may name
FIELDS = ("Host", "Origin", "Sec-Fetch-Site", "Content-Type", "Content-Encoding")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")
_PORT = re.compile(r"[0-9]{1,5}")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")
_MAX_NAME_CHARS = 253
#: hosts that are remembered as they were parsed
_KNOWN_HOSTS = 64

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Authority:
    """HOST or HOST:PORT as it is compared: a name in small letters without a dot at its end, or an IP address.

    Attributes:
        host: the name, or the address in its shortest form.
        port: None where none is given.
        is_address: whether it is an IP literal.
    """

    host: str
    port: int | None
    is_address: bool

    @property
    def is_local(self) -> bool:
        """Whether it can only mean the machine that the client runs on."""
        return is_loopback(self.host)


def address_of(text: str) -> Address | None:
    """An IP address without brackets, None where `text` is none. An IPv4 address in IPv6 form is that IPv4 address."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return address if isinstance(address, ipaddress.IPv4Address) else address.ipv4_mapped or address


def parse_authority(text: str) -> Authority | None:
    """The value of a `Host` header, or the part of a URL behind its scheme; None where it is malformed.

    A user's name, a path, a zone of IPv6, blanks: none of it belongs there.
    """
    # clients name the same few hosts again and again
    return _known_authority(text) if len(text) <= _MAX_NAME_CHARS else _parse_authority(text)


def _parse_authority(text: str) -> Authority | None:
    """`parse_authority`, without its memory."""
    if text.startswith("["):
        literal, closed, port = text[1:].partition("]")
        address = address_of(literal) if closed and "%" not in literal and ":" in literal else None
        if address is None or (port and not port.startswith(":")):
            return None
        port = port[1:]
    else:
        literal, _, port = text.partition(":")
        address = address_of(literal)
    if port and (not _PORT.fullmatch(port) or int(port) > 65_535):
        return None
    number = int(port) if port else None
    if address is not None:
        return Authority(str(address), number, True)
    name = literal.lower().removesuffix(".")
    if len(name) > _MAX_NAME_CHARS or not _NAME.fullmatch(name):
        return None
    return Authority(name, number, False)


_known_authority = functools.lru_cache(_KNOWN_HOSTS)(_parse_authority)


def parse_origin(text: str) -> tuple[str, Authority] | None:
    """(scheme, authority) of the value of an `Origin` header, None for "null" and what is malformed."""
    scheme, given, rest = text.partition("://")
    authority = parse_authority(rest)
    if not given or authority is None or not _SCHEME.fullmatch(scheme.lower()):
        return None
    return scheme.lower(), authority


def as_browsers_write_it(origin: str) -> str | None:
    """An origin that a person has written as a browser sends it; None where it is no origin. `null` and `*` are."""
    if origin in (ANY, "null"):
        return origin
    parsed = parse_origin(origin)
    if parsed is None:
        return None
    scheme, authority = parsed
    host = f"[{authority.host}]" if ":" in authority.host else authority.host
    shown = authority.port is not None and authority.port != _DEFAULT_PORTS.get(scheme)
    return f"{scheme}://{host}:{authority.port}" if shown else f"{scheme}://{host}"


class Rules:
    """Which `Host` and `Origin` are the worker's own.

    Args:
        host: the address or name that it listens on.
        hostname: the machine's name; its own where it listens beyond loopback.
        allowed_hosts: further hosts, each HOST (with any port) or HOST:PORT, or `ANY`.
        cors_origins: pages that may use the worker though they are not its own, as `as_browsers_write_it` says.

    Listening on loopback, the addresses of loopback and `localhost` are its own; listening beyond, every IP literal is:
    behind a port mapping the address that clients see is none of this machine. Ports do not count: they may be mapped,
    and no page chooses where a port leads.

    Raises:
        InvalidRequest: one of `allowed_hosts` is no host, one of `cors_origins` no origin.
    """

    def __init__(
        self, host: str, hostname: str = "", allowed_hosts: Iterable[str] = (), cors_origins: Iterable[str] = ()
    ) -> None:
        self._any_address = not is_loopback(host)
        names = ["localhost", host, *([hostname] if self._any_address else [])]
        self._names = {a.host for name in names if (a := _written_authority(name)) is not None}
        self._any_host = ANY in allowed_hosts
        self._allowed: set[tuple[str, int | None]] = set()
        for text in allowed_hosts:
            authority = _written_authority(text)
            if authority is not None:
                self._allowed.add((authority.host, authority.port))
            elif text != ANY:
                raise InvalidRequest(
                    f"allowed_hosts must be names or addresses, each with or without a port, not {quoted(text)}",
                    field="allowed_hosts",
                )
        #: as browsers write them; "*" is any
        self.cors_origins: frozenset[str] = frozenset(_written_origin(text) for text in cors_origins)

    @classmethod
    def of(cls, config: ServeConfig) -> Rules:
        """Those that a worker was started with."""
        return cls(config.host, socket.gethostname(), config.allowed_hosts, config.cors_origins)

    def host_is_ours(self, host: Authority) -> bool:
        """Whether a client that means this worker may call it so."""
        if self._any_host or host.host in self._names:
            return True
        if host.is_address and (host.is_local or self._any_address):
            return True
        return (host.host, None) in self._allowed or (host.host, host.port) in self._allowed

    def origin_is_allowed(self, origin: str) -> bool:
        """Whether an origin is one of `cors_origins`."""
        return ANY in self.cors_origins or as_browsers_write_it(origin) in self.cors_origins

    def check(self, method: str, headers: Mapping[str, str]) -> None:
        """Refuse a request that no user of this worker has meant.

        Args:
            method: of the request.
            headers: a WSGI environment.

        Raises:
            Forbidden: with what would let it pass.
        """
        host = self._check_host(headers)
        origin = headers.get("HTTP_ORIGIN")
        if origin is None:
            site = headers.get("HTTP_SEC_FETCH_SITE", "none").lower()
            if method not in SAFE_METHODS and site not in ("none", "same-origin"):
                raise Forbidden("the request comes from a page of another site", field="Sec-Fetch-Site")
            return
        if self.origin_is_allowed(origin) or same_origin(origin, host):
            return
        shown = as_browsers_write_it(origin)
        if shown is None:
            raise Forbidden("the Origin header is malformed", field="Origin")
        raise Forbidden(
            f"the request comes from a page of {quoted(shown)}, which is not this worker's own; --cors-origin names "
            "pages that may use it",
            field="Origin",
        )

    def _check_host(self, headers: Mapping[str, str]) -> Authority | None:
        """The host that the request names, None where it names none, as HTTP/1.0 may."""
        named = [text for text in (headers.get("HTTP_HOST"), target_authority(headers)) if text is not None]
        host = None
        for text in named:
            host = parse_authority(text)
            if host is None:
                raise Forbidden("the Host header is malformed", field="Host")
            if not self.host_is_ours(host):
                raise Forbidden(
                    f"the host {quoted(host.host)} is none of this worker's addresses; --allowed-host names others "
                    "that it may be called by",
                    field="Host",
                )
        return host


def _written_authority(text: str) -> Authority | None:
    """A host as people write it: an IPv6 address may stand without brackets."""
    return parse_authority(f"[{text}]" if address_of(text) is not None and ":" in text else text)


def _written_origin(text: str) -> str:
    origin = as_browsers_write_it(text)
    if origin is None:
        raise InvalidRequest(
            f"cors_origins must be like https://app.example (scheme, host, maybe a port, no path), not {quoted(text)}",
            field="cors_origins",
        )
    return origin


def same_origin(origin: str, host: Authority | None) -> bool:
    """Whether a page of `origin` talks to where it came from. The scheme is not known here: TLS may end in a proxy."""
    parsed = parse_origin(origin)
    if parsed is None or host is None:
        return False
    scheme, page = parsed
    default = _DEFAULT_PORTS.get(scheme)
    if default is None or page.host != host.host:
        return False
    return (page.port or default) == (host.port or default)


def target_authority(headers: Mapping[str, str]) -> str | None:
    """What a request target in absolute form (`GET http://HOST/path`) names, which counts for more than `Host`."""
    target = headers.get("RAW_URI", "")
    if target.startswith("/") or "://" not in target:
        return None
    return re.split(r"[/?#]", target.split("://", 1)[1], maxsplit=1)[0]


def is_local_peer(headers: Mapping[str, str]) -> bool:
    """Whether the sender is on this machine: its address is of loopback, and no proxy passed the request on.

    A peer without an address (a Unix socket) is none: what is behind it is a proxy as a rule.
    """
    return is_loopback(headers.get("REMOTE_ADDR") or "") and not any(name in headers for name in PROXY_HEADERS)


def check_body(headers: Mapping[str, str]) -> None:
    """Refuse a body that is not said to be JSON, before it is read.

    Raises:
        UnsupportedMediaType: with the header that would be right.
    """
    given = headers.get("CONTENT_TYPE") or None
    has_body = headers.get("CONTENT_LENGTH", "0") not in ("", "0") or "HTTP_TRANSFER_ENCODING" in headers
    if given is None and not has_body:
        return
    if given is None or not is_json(given):
        raise UnsupportedMediaType(
            f"the body must be JSON and say so: send the header 'Content-Type: {JSON}' (curl: -H 'Content-Type: "
            f"{JSON}')",
            field="Content-Type",
        )
    if headers.get("HTTP_CONTENT_ENCODING", "identity").strip().lower() not in ("identity", ""):
        raise UnsupportedMediaType("the body must not be compressed", field="Content-Encoding")


def is_json(content_type: str) -> bool:
    """Whether a `Content-Type` is that of JSON in UTF-8, with any further parameters."""
    kind, parameters = falcon.parse_header(content_type)
    return kind.lower() == JSON and parameters.get("charset", "utf-8").lower() in _CHARSETS


def bearer_token(authorization: str | None) -> str | None:
    """The token of `Authorization: Bearer TOKEN`; the scheme's letters may be of any size (RFC 9110, 11.1)."""
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip(" ") or None if scheme.lower() == "bearer" else None
