"""Who may talk to the worker: tables of pairs for wsgi.access, and browsers' requests against the application."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.in_process import App, error_of, events_of
from worker_orcd.config import ServeConfig, is_loopback
from worker_orcd.errors import InvalidRequest
from worker_orcd.wsgi import access
from worker_orcd.wsgi.access import Authority, Rules, parse_authority
from worker_orcd.wsgi.http_errors import Forbidden, UnsupportedMediaType

# -- Host

AUTHORITIES = {
    "localhost": ("localhost", None, False),
    "LocalHost:8080": ("localhost", 8080, False),
    "localhost.": ("localhost", None, False),
    "localhost.:80": ("localhost", 80, False),
    "127.0.0.1:8080": ("127.0.0.1", 8080, True),
    "127.0.0.1:": ("127.0.0.1", None, True),
    "[::1]:8080": ("::1", 8080, True),
    "[::1]": ("::1", None, True),
    "[0:0:0:0:0:0:0:1]:1": ("::1", 1, True),
    "[::FFFF:127.0.0.1]:8080": ("127.0.0.1", 8080, True),
    "[2001:DB8::1]:443": ("2001:db8::1", 443, True),
    "gpu-box.Example.com:65535": ("gpu-box.example.com", 65535, False),
    "under_score": ("under_score", None, False),
    "127.1": ("127.1", None, False),
    "2130706433": ("2130706433", None, False),
}
MALFORMED = [
    "",
    " ",
    "localhost ",
    " localhost",
    "local host",
    "localhost:99999",
    "localhost:-1",
    "localhost:8080:8080",
    "localhost:x",
    "localhost:８０８０",
    "localhost,evil.example",
    "localhost/evil.example",
    "localhost#@evil.example",
    "evil.example@localhost",
    "localhost@evil.example:80",
    "user:pass@localhost",
    "http://localhost",
    "localhost..",
    ".localhost",
    "local..host",
    "-x",
    "x-",
    "[::1",
    "::1",
    "[::1]8080",
    "[::1]x:1",
    "[::1%lo]:8080",
    "[127.0.0.1]:8080",
    "[localhost]",
    "[]",
    "localhost\x00",
    "локалхост",
    "a" * 254,
]


@pytest.mark.parametrize("text", AUTHORITIES)
def test_a_host_is_read_as_its_clients_mean_it(text):
    assert parse_authority(text) == Authority(*AUTHORITIES[text])


@pytest.mark.parametrize("text", MALFORMED)
def test_what_is_no_host_is_none(text):
    assert parse_authority(text) is None


LOCAL = ("localhost", "LOCALHOST:1", "localhost.", "127.0.0.1:8080", "127.9.9.9", "[::1]:8080", "[::ffff:127.0.0.1]")
ADDRESSES = ("192.168.1.5:9000", "203.0.113.7", "[2001:db8::1]:8080", "0.0.0.0:8080")
NAMES = ("evil.example", "localhost.evil.example:8080", "127.0.0.1.evil.example", "evil-localhost", "127.1", "0x7f.1")
HOSTS = [
    # what it was started with, the hosts that are its own, those that are none
    ({"host": "127.0.0.1"}, LOCAL, (*ADDRESSES, *NAMES, "gpu-box")),
    ({"host": "::1"}, LOCAL, (*ADDRESSES, *NAMES, "gpu-box")),
    ({"host": "localhost"}, LOCAL, (*ADDRESSES, *NAMES)),
    ({"host": "0.0.0.0"}, (*LOCAL, *ADDRESSES, "gpu-box:8080", "GPU-BOX."), (*NAMES, "gpu-box.evil.example")),
    ({"host": "::"}, (*LOCAL, *ADDRESSES, "gpu-box"), NAMES),
    ({"host": "192.168.1.5"}, (*LOCAL, *ADDRESSES, "gpu-box"), NAMES),
    ({"host": "worker.lan"}, (*LOCAL, *ADDRESSES, "worker.lan:8080", "Worker.LAN."), (*NAMES, "lan", "x.worker.lan")),
    ({"host": "127.0.0.1", "allowed_hosts": ("api.example",)}, (*LOCAL, "api.example", "API.example:99"), NAMES),
    (
        {"host": "127.0.0.1", "allowed_hosts": ("api.example:443", "10.0.0.1", "2001:db8::2", "[2001:db8::3]:1")},
        (*LOCAL, "api.example:443", "10.0.0.1:5", "[2001:db8::2]:9", "[2001:db8::3]:1"),
        (*NAMES, "api.example", "api.example:80", "[2001:db8::3]", "10.0.0.2"),
    ),
    ({"host": "127.0.0.1", "allowed_hosts": ("*",)}, (*LOCAL, *ADDRESSES, *NAMES), ("", "a b")),
]


def refusal(rules, method="GET", **headers):
    try:
        rules.check(method, {f"HTTP_{name.upper()}": value for name, value in headers.items()})
    except Forbidden as error:
        assert error.status == 403 and error.message.isprintable() and len(error.message) < 300
        return error.fields["field"]
    return None


@pytest.mark.parametrize(("started", "own", "foreign"), HOSTS, ids=lambda v: str(v)[:40] if isinstance(v, dict) else "")
def test_a_host_is_its_own_or_refused(started, own, foreign):
    rules = Rules(**{"hostname": "gpu-box", **started})
    assert [host for host in own if refusal(rules, host=host)] == []
    assert [host for host in foreign if refusal(rules, host=host) != "Host"] == []


def test_a_request_that_names_no_host_comes_from_no_browser():
    assert refusal(Rules("127.0.0.1")) is None, "HTTP/1.0"


@pytest.mark.parametrize(
    ("target", "field"),
    [
        ("/health", None),
        ("/http://evil.example/", None),
        ("*", None),
        ("http://localhost:8080/health", None),
        ("http://evil.example/health", "Host"),
        ("http://evil.example?http://localhost/", "Host"),
        ("http://localhost@evil.example/", "Host"),
        ("http:///health", "Host"),
        ("http://[::1/", "Host"),
    ],
)
def test_a_target_with_a_host_counts_as_much_as_the_header(target, field):
    environ = {"HTTP_HOST": "localhost", "RAW_URI": target}
    try:
        Rules("127.0.0.1").check("GET", environ)
        assert field is None
    except Forbidden as error:
        assert error.fields["field"] == field


# -- Origin

ORIGINS = [
    # host, origin, whether the page is the worker's own
    ("127.0.0.1:8080", "http://127.0.0.1:8080", True),
    ("localhost:8080", "http://localhost:8080", True),
    ("LOCALHOST:8080", "http://localhost:8080", True),
    ("[::1]:8080", "http://[::1]:8080", True),
    ("localhost", "http://localhost", True),
    ("localhost", "https://localhost", True),
    ("localhost:443", "https://localhost", True),
    ("localhost:80", "http://localhost", True),
    ("localhost:8080", "http://localhost:3000", False),
    ("localhost:8080", "http://localhost", False),
    ("localhost:8080", "http://127.0.0.1:8080", False),
    ("127.0.0.1:8080", "http://localhost:8080", False),
    ("127.0.0.1:8080", "http://[::1]:8080", False),
    ("localhost:8080", "https://evil.example", False),
    ("localhost:8080", "http://localhost:8080.evil.example", False),
    ("localhost:8080", "http://localhost:8080@evil.example", False),
    ("localhost:8080", "http://evil.example@localhost:8080", False),
    ("localhost:8080", "http://localhost:8080/", False),
    ("localhost:8080", "http://localhost:8080,http://evil.example", False),
    ("localhost:8080", "localhost:8080", False),
    ("localhost:8080", "//localhost:8080", False),
    ("localhost:8080", "ftp://localhost:8080", False),
    ("localhost:8080", "chrome-extension://localhost:8080", False),
    ("localhost:8080", "null", False),
    ("localhost:8080", "", False),
    ("localhost:8080", "*", False),
]


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS", "DELETE"])
@pytest.mark.parametrize(("host", "origin", "own"), ORIGINS)
def test_a_page_is_its_own_or_refused(host, origin, own, method):
    assert refusal(Rules("127.0.0.1"), method, host=host, origin=origin) == (None if own else "Origin")


def test_a_page_cannot_be_the_workers_own_where_no_host_is_named():
    assert refusal(Rules("127.0.0.1"), origin="http://localhost") == "Origin"


def test_a_name_of_ours_that_was_pointed_here_is_refused_with_its_own_page_too():
    assert refusal(Rules("127.0.0.1"), "POST", host="evil.example:8080", origin="http://evil.example:8080") == "Host"


CORS = [
    (("https://app.example",), ("https://app.example",), ("https://app.example:8443", "http://app.example", "null")),
    (("HTTPS://App.Example:443",), ("https://app.example", "https://app.example:443"), ("https://x.app.example",)),
    (("http://localhost:3000", "null"), ("http://localhost:3000", "null"), ("http://localhost:3001", "")),
    (("http://[::1]:3000",), ("http://[::1]:3000",), ("http://[::1]",)),
    (("chrome-extension://abcdef",), ("chrome-extension://abcdef",), ("chrome-extension://abcdeg",)),
    (("*",), ("https://app.example", "null", "http://localhost:1"), ()),
]


@pytest.mark.parametrize(("given", "allowed", "foreign"), CORS)
def test_pages_that_were_named_may_use_it(given, allowed, foreign):
    rules = Rules("127.0.0.1", cors_origins=given)
    assert [o for o in allowed if refusal(rules, "POST", host="localhost:8080", origin=o)] == []
    assert [o for o in foreign if refusal(rules, "POST", host="localhost:8080", origin=o) != "Origin"] == []
    assert refusal(rules, host="evil.example", origin=allowed[0]) == "Host", "the host counts all the same"


@pytest.mark.parametrize("site", ["cross-site", "same-site", "Cross-Site"])
def test_a_browser_that_hides_the_page_still_tells_that_it_is_another_sites(site):
    rules = Rules("127.0.0.1")
    assert refusal(rules, "POST", host="localhost", sec_fetch_site=site) == "Sec-Fetch-Site"
    assert refusal(rules, "GET", host="localhost", sec_fetch_site=site) is None, "a link to the page at /"


@pytest.mark.parametrize("site", ["same-origin", "none"])
def test_a_browser_on_our_own_page_may_post(site):
    assert refusal(Rules("127.0.0.1"), "POST", host="localhost", sec_fetch_site=site) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("allowed_hosts", "http://x"),
        ("allowed_hosts", "a b"),
        ("allowed_hosts", ""),
        ("allowed_hosts", "x:99999"),
        ("cors_origins", "app.example"),
        ("cors_origins", "https://app.example/"),
        ("cors_origins", "https://"),
        ("cors_origins", "https://a b"),
        ("cors_origins", ""),
    ],
)
def test_start_up_values_that_can_match_nothing_are_refused(field, value):
    with pytest.raises(InvalidRequest) as caught:
        Rules("127.0.0.1", **{field: ("localhost" if field == "allowed_hosts" else "null", value)})
    assert caught.value.fields["field"] == field


# -- who listens where


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.53", "::1", "localhost", "LocalHost", "::ffff:127.0.0.1"])
def test_loopback_needs_no_key(host):
    assert is_loopback(host)
    ServeConfig(model="m.gguf", host=host).check()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "203.0.113.1", "2001:db8::1", "::ffff:10.0.0.1"])
def test_beyond_loopback_needs_a_key_or_a_word(host):
    assert not is_loopback(host)
    with pytest.raises(InvalidRequest) as caught:
        ServeConfig(model="m.gguf", host=host).check()
    assert caught.value.fields["field"] == "host" and "--allow-unauthenticated" in caught.value.message
    ServeConfig(model="m.gguf", host=host, api_key="k").check()
    ServeConfig(model="m.gguf", host=host, allow_unauthenticated=True).check()


@pytest.mark.parametrize("field", ["allowed_hosts", "cors_origins"])
def test_any_host_or_origin_needs_a_key_or_a_word(field):
    with pytest.raises(InvalidRequest) as caught:
        ServeConfig(model="m.gguf", **{field: ("x", "*")}).check()
    assert caught.value.fields["field"] == field
    ServeConfig(model="m.gguf", api_key="k", **{field: ("*",)}).check()
    ServeConfig(model="m.gguf", allow_unauthenticated=True, **{field: ("*",)}).check()


# -- bodies and peers

TYPES = {
    "application/json": True,
    "Application/JSON": True,
    "application/json; charset=utf-8": True,
    'application/json;charset="UTF-8"': True,
    "application/json;": True,
    "application/json; charset=us-ascii; x=y": True,
    "application/json; charset=latin-1": False,
    "application/json; charset=utf-16": False,
    "application/jsonp": False,
    "application/json, text/plain": False,
    "text/plain; application/json": False,
    "text/plain;charset=UTF-8": False,
    "text/json": False,
    "application/x-www-form-urlencoded": False,
    "multipart/form-data; boundary=x": False,
    "text/ping": False,
    "application/problem+json": False,
    "*/*": False,
    " ": False,
    "json": False,
}


@pytest.mark.parametrize("given", TYPES)
@pytest.mark.parametrize("length", [{"CONTENT_LENGTH": "2"}, {"HTTP_TRANSFER_ENCODING": "chunked"}, {}])
def test_a_body_is_json_and_says_so(given, length):
    environ = {"CONTENT_TYPE": given, **length}
    if TYPES[given]:
        access.check_body(environ)
        return
    with pytest.raises(UnsupportedMediaType) as caught:
        access.check_body(environ)
    assert caught.value.status == 415 and "Content-Type: application/json" in caught.value.message


def test_a_body_of_no_type_is_refused_and_no_body_is_none():
    for headers in ({"CONTENT_LENGTH": "1"}, {"HTTP_TRANSFER_ENCODING": "chunked"}):
        with pytest.raises(UnsupportedMediaType):
            access.check_body(headers)
    for headers in ({}, {"CONTENT_LENGTH": "0"}, {"CONTENT_LENGTH": "", "CONTENT_TYPE": ""}):
        access.check_body(headers)


@pytest.mark.parametrize(("coding", "taken"), [("identity", True), ("gzip", False), ("br", False), ("GZIP", False)])
def test_a_compressed_body_is_refused(coding, taken):
    environ = {"CONTENT_TYPE": "application/json", "CONTENT_LENGTH": "2", "HTTP_CONTENT_ENCODING": coding}
    if taken:
        access.check_body(environ)
    else:
        with pytest.raises(UnsupportedMediaType, match="compressed"):
            access.check_body(environ)


PEERS = [
    ({"REMOTE_ADDR": "127.0.0.1"}, True),
    ({"REMOTE_ADDR": "127.3.2.1"}, True),
    ({"REMOTE_ADDR": "::1"}, True),
    ({"REMOTE_ADDR": "::ffff:127.0.0.1"}, True),
    ({"REMOTE_ADDR": "10.0.0.1"}, False),
    ({"REMOTE_ADDR": "::ffff:10.0.0.1"}, False),
    ({"REMOTE_ADDR": ""}, False),
    ({}, False),
    *(({"REMOTE_ADDR": "127.0.0.1", name: "127.0.0.1"}, False) for name in access.PROXY_HEADERS),
]


@pytest.mark.parametrize(("environ", "local"), PEERS)
def test_a_peer_is_local_only_where_nothing_else_stands_behind_it(environ, local):
    assert access.is_local_peer(environ) is local


@pytest.mark.parametrize(
    ("header", "token"),
    [
        ("Bearer k", "k"),
        ("bearer k", "k"),
        ("BEARER  k ", "k"),
        ("Bearer a b", "a b"),
        ("Bearer", None),
        ("Bearer ", None),
        ("Basic k", None),
        ("k", None),
        ("Bearerk", None),
        ("", None),
        (None, None),
    ],
)
def test_the_scheme_of_a_key_is_of_any_size(header, token):
    assert access.bearer_token(header) == token


# -- the application


@pytest.fixture
def app():
    app = App(cors_origins=("https://app.example",)).ready()
    yield app
    app.service.stop(0)


@pytest.fixture
def locked():
    app = App(api_key="secret", cors_origins=("https://app.example",)).ready()
    yield app
    app.service.stop(0)


FORMS = [
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "text/plain",
    "text/plain;charset=UTF-8",
]
EVIL = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
ROUTES = ["/shutdown", "/cancel", "/execute"]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("content_type", FORMS)
@pytest.mark.parametrize("origin", [EVIL, {"Origin": "null"}, {"Sec-Fetch-Site": "same-site"}, {}])
def test_no_form_of_any_page_does_anything(app, path, content_type, origin):
    """A form post of another page is refused for where it comes from, and, where a browser hides that, for its body."""
    for body in (b"", b'{"job_id":"j","prompt":"say hi"}'):
        result = app.client.simulate_post(
            path, body=body, headers={"Content-Type": content_type, **origin}, remote_addr="127.0.0.1"
        )
        error_of(result, *((403, "FORBIDDEN") if origin else (415, "UNSUPPORTED_MEDIA_TYPE")))
        assert "access-control-allow-origin" not in result.headers
    assert not app.terminated and not app.service.llm().jobs


@pytest.mark.parametrize("path", ROUTES)
def test_no_fetch_of_another_page_does_anything(app, path):
    body = '{"job_id":"j","prompt":"say hi"}'
    for headers in (
        EVIL,
        {"Origin": "http://evil.example:8080", "Host": "evil.example:8080"},
        {"Host": "evil.example:8080", "Sec-Fetch-Site": "same-origin"},
        {"Origin": "http://127.0.0.1:3000"},
    ):
        error_of(app.client.simulate_post(path, body=body, headers=headers, remote_addr="127.0.0.1"), 403, "FORBIDDEN")
        asked = app.client.simulate_options(path, headers={**headers, "Access-Control-Request-Method": "POST"})
        error_of(asked, 403, "FORBIDDEN")
        assert not [name for name in asked.headers if name.startswith("access-control")]
    assert not app.terminated and not app.service.llm().jobs


def test_other_pages_read_nothing(app):
    for path in ("/health", "/ready", "/nowhere"):
        for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}):
            error_of(app.client.simulate_get(path, headers=headers), 403, "FORBIDDEN")


def test_a_page_of_the_worker_itself_may_do_all(app):
    own = {"Host": "localhost:8080", "Origin": "http://localhost:8080", "Sec-Fetch-Site": "same-origin"}
    assert events_of(app.execute(headers=own))[-1][0] == "end"
    assert app.client.simulate_get("/health", headers=own).status_code == 200
    link = {"Host": "localhost:8080", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert app.client.simulate_get("/health", headers=link).status_code == 200


@pytest.mark.parametrize(
    ("peer", "headers", "status"),
    [
        ("127.0.0.1", {}, 202),
        ("::1", {}, 202),
        ("127.0.0.1", {"X-Forwarded-For": "127.0.0.1"}, 403),
        ("10.0.0.7", {}, 403),
        ("10.0.0.7", {"X-Forwarded-For": "127.0.0.1"}, 403),
        (None, {}, 403),
    ],
)
def test_without_a_key_only_this_machine_stops_the_worker(app, peer, headers, status):
    result = app.client.simulate_post("/shutdown", headers=headers, remote_addr=peer)
    assert result.status_code == status and app.terminated == ([1] if status == 202 else [])
    assert result.json.get("code") == (None if status == 202 else "FORBIDDEN")


@pytest.mark.parametrize("peer", ["127.0.0.1", "10.0.0.7", None])
def test_with_a_key_whoever_has_it_stops_the_worker(locked, peer):
    error_of(locked.client.simulate_post("/shutdown", remote_addr=peer), 401, "UNAUTHORIZED")
    assert not locked.terminated
    headers = {"Authorization": "bearer secret"}
    assert locked.client.simulate_post("/shutdown", headers=headers, remote_addr=peer).status_code == 202
    assert locked.terminated == [1]


# -- pages that were named


@pytest.mark.parametrize("path", ["/execute", "/health"])
def test_a_named_page_asks_first_without_a_key_and_is_told_what_it_may(locked, path):
    asks = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
        "Access-Control-Request-Private-Network": "true",
    }
    told = locked.client.simulate_options(path, headers=asks)
    assert told.status_code == 200 and not told.content
    assert told.headers["access-control-allow-origin"] == "https://app.example" and told.headers["vary"] == "Origin"
    assert ("POST" in told.headers["access-control-allow-methods"]) is (path == "/execute")
    assert told.headers["access-control-allow-headers"] == asks["Access-Control-Request-Headers"]
    assert told.headers["access-control-allow-private-network"] == "true"
    assert "access-control-allow-credentials" not in told.headers
    plain = locked.client.simulate_options(path)
    assert plain.status_code == (200 if path == "/health" else 401), "who does not ask as a browser does shows the key"


def test_a_named_page_reads_answers_refusals_and_streams(locked):
    page = {"Origin": "https://app.example"}
    refused = locked.execute(headers=page)
    error_of(refused, 401, "UNAUTHORIZED")
    stream = locked.execute(headers={**page, "Authorization": "Bearer secret"})
    assert events_of(stream)[-1][0] == "end"
    for result in (refused, stream, locked.client.simulate_get("/health", headers=page)):
        assert result.headers["access-control-allow-origin"] == "https://app.example"
        assert "X-Correlation-Id" in result.headers["access-control-expose-headers"]
        assert "Origin" in result.headers["vary"]


def test_where_no_page_was_named_there_are_no_headers_for_one():
    app = App()
    for headers in ({}, {"Origin": "http://127.0.0.1:8080"}):
        shown = app.client.simulate_get("/health", headers=headers).headers
        assert not [name for name in shown if name.startswith("access-control")] and "vary" not in shown


def test_with_a_key_every_page_may_be_let_in():
    app = App(api_key="secret", cors_origins=("*",), allowed_hosts=("*",)).ready()
    headers = {"Host": "any.example", "Origin": "https://any.example", "Authorization": "Bearer secret"}
    result = app.execute(headers=headers)
    assert events_of(result) and result.headers["access-control-allow-origin"] == "*"
    assert "vary" not in result.headers
    error_of(app.execute(headers={**headers, "Authorization": "Bearer x"}), 401, "UNAUTHORIZED")
    app.service.stop(0)


# -- what is told of it


def test_a_refusal_tells_what_to_do_and_the_log_repeats_nothing(app):
    result = app.execute(headers={"Content-Type": "application/x-www-form-urlencoded", "X-Correlation-Id": "c-1"})
    error = error_of(result, 415, "UNSUPPORTED_MEDIA_TYPE")
    assert error["field"] == "Content-Type" and "curl: -H" in error["message"]
    error = error_of(app.execute(headers={"Host": "some.secret.example"}), 403, "FORBIDDEN")
    assert (
        error["field"] == "Host" and "--allowed-host" in error["message"] and "some.secret.example" in error["message"]
    )
    error = error_of(app.execute(headers={"Origin": "https://some.secret.example"}), 403, "FORBIDDEN")
    assert error["field"] == "Origin" and "--cors-origin" in error["message"]
    told = [(e["code"], e["field"]) for e in app.log if e["event"] == "refused"]
    assert told == [("UNSUPPORTED_MEDIA_TYPE", "Content-Type"), ("FORBIDDEN", "Host"), ("FORBIDDEN", "Origin")]
    assert "secret" not in app.out.getvalue() and not app.service.llm().jobs


def test_every_header_that_a_refusal_names_is_known_to_the_log(app):
    source = Path(access.__file__).read_text()
    named = set(re.findall(r'field="([A-Z][\w-]+)"', source))
    assert named == set(access.FIELDS) and len(named) == 5


def test_a_body_may_say_its_charset(app):
    headers = {"Content-Type": "application/json; charset=utf-8"}
    assert events_of(app.execute(headers=headers))[-1][0] == "end"
    body = json.dumps({"job_id": "nobody"})
    assert app.client.simulate_post("/cancel", body=body, headers=headers).status_code == 202


# -- anything at all

HEADER = st.text(st.characters(min_codepoint=9, max_codepoint=255), max_size=60) | st.sampled_from(
    [
        "localhost",
        "http://",
        "[::1]:",
        "Bearer ",
        "application/json;",
        "charset=",
        "null",
        "@",
        "%00",
        '"',
        "\\",
        "x" * 8000,
    ]
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(HEADER, min_size=8, max_size=8), st.sampled_from(["GET", "POST", "OPTIONS", "X"]))
def test_no_header_is_more_than_a_refusal(texts, method):
    names = ("HTTP_HOST", "HTTP_ORIGIN", "HTTP_SEC_FETCH_SITE", "RAW_URI", "CONTENT_TYPE", "HTTP_CONTENT_ENCODING")
    environ = {**dict(zip(names, texts, strict=False)), "REMOTE_ADDR": texts[6], "CONTENT_LENGTH": "1"}
    rules = Rules("0.0.0.0", texts[7], ("api.example",), ("https://app.example",))
    for check in (lambda: rules.check(method, environ), lambda: access.check_body(environ)):
        try:
            check()
        except (Forbidden, UnsupportedMediaType) as error:
            assert error.message.isprintable() and len(error.message) < 300
    assert access.is_local_peer(environ) in (True, False)
    access.bearer_token(texts[0])
    for text in texts:
        authority = parse_authority(text)
        if authority is not None and not authority.is_address:
            assert re.fullmatch(r"[a-z0-9_.-]{1,253}", authority.host)
