"""The page without a browser: wsgi.page, its files, headers and refusals. Its use in a browser is tested in page/."""

from __future__ import annotations

import hashlib
import http.client
import re
from pathlib import Path

import pytest

from service.in_process import App, error_of
from worker_orcd.wsgi import page

FOLDER = Path(page.__file__).parent / "static"
FILES = sorted(FOLDER.iterdir())
SCRIPTS = [path for path in FILES if path.suffix == ".js"]
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
#: ways to make elements or programs of text
MAKERS = (
    r"innerHTML|outerHTML|insertAdjacentHTML|setHTML|document\.write|DOMParser|srcdoc|\beval\b|\bFunction\(|javascript:"
)
MAX_LINES = 250


@pytest.fixture(scope="module")
def app():
    app = App(api_key="secret").ready()
    yield app
    app.service.stop(0)


@pytest.mark.parametrize("name", ["/", *(f"/static/{path.name}" for path in FILES)])
def test_each_file_comes_with_its_headers_and_without_a_key(app, name):
    path = FOLDER / ("index.html" if name == "/" else name.rpartition("/")[2])
    answer = app.client.simulate_get(name)
    assert answer.status_code == 200 and answer.content == path.read_bytes()
    kinds = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    assert answer.headers["content-type"].split(";")[0] == kinds[path.suffix]
    assert answer.headers["content-security-policy"] == POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["etag"] == f'"{hashlib.sha256(path.read_bytes()).hexdigest()[:32]}"'
    assert answer.headers["x-correlation-id"]
    head = app.client.simulate_head(name)
    length = head.headers["content-length"]
    assert head.status_code == 200 and head.content == b"" and int(length) == path.stat().st_size
    same = [
        {k: v for k, v in a.headers.items() if not k.startswith("x-") or k.endswith("options")} for a in (head, answer)
    ]
    assert same[0] == same[1]
    error_of(app.client.simulate_post(name, headers={"Authorization": "Bearer secret"}), 405)


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ("{}", 304),
        ("W/{}", 304),
        ('"other", {}', 304),
        ("*", 304),
        ('"other"', 200),
        ("", 200),
        ('"', 200),
        (",,", 200),
        ("x" * 8000, 200),
        ("\xff", 200),
    ],
)
def test_a_client_that_has_the_file_is_told_so(app, given, status):
    etag = app.client.simulate_get("/").headers["etag"]
    answer = app.client.simulate_get("/", headers={"If-None-Match": given.replace("{}", etag)})
    assert answer.status_code == status and (answer.content == b"") == (status == 304)
    assert answer.headers["etag"] == etag and answer.headers["content-security-policy"] == POLICY


@pytest.mark.parametrize(
    "path",
    [
        "/static",
        "/static/",
        "/static/nothing.js",
        "/static/../page.py",
        "/static/..%2fpage.py",
        "/static/%2e%2e/page.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/static/main.js/",
        "/static/main.js%00",
        "/static/static/main.js",
        "/static/MAIN.JS",
        "/static/.",
        "/static/\u00e9",
        "/index.html",
        "/main.js",
    ],
)
def test_nothing_else_is_served(app, path):
    for method in ("GET", "HEAD"):
        answer = app.client.simulate_request(method, path, headers={"Authorization": "Bearer secret"})
        assert answer.status_code == 404, (method, path)


def test_only_the_page_is_open(app):
    for path in ("/execute", "/static", "/index.html"):
        error_of(app.client.simulate_get(path), 401, "UNAUTHORIZED")


def test_the_page_is_there_while_the_model_loads():
    app = App()
    assert app.client.simulate_get("/health").status_code == 503
    assert app.client.simulate_get("/").status_code == 200
    assert app.client.simulate_get("/static/main.js").status_code == 200


def test_a_file_of_another_kind_is_not_served(tmp_path, monkeypatch):
    for name in ("index.html", "main.js", "main.js.bak", ".swp", "notes"):
        (tmp_path / name).write_text(name)
    (tmp_path / "folder.js").mkdir()
    (tmp_path / "link.js").symlink_to("/etc/hostname")
    monkeypatch.setattr(page, "_FOLDER", tmp_path)
    assert sorted(page._files.__wrapped__()) == ["index.html", "main.js"]


def test_the_files_change_nothing_while_the_worker_runs(tmp_path, monkeypatch):
    """They are read once: what is put beside them later is not served."""
    app = App()
    monkeypatch.setattr(page, "_FOLDER", tmp_path)
    (tmp_path / "later.js").write_text("1")
    assert app.client.simulate_get("/static/later.js").status_code == 404
    assert app.client.simulate_get("/").status_code == 200


def test_over_a_socket_a_path_is_no_way_out(start):
    worker = start()
    for path in ("/static/../page.py", "/static/..%2f..%2ferrors.py", "/../../etc/passwd"):
        connection = http.client.HTTPConnection("127.0.0.1", worker.port, timeout=10)
        connection.putrequest("GET", path, skip_accept_encoding=True)
        connection.endheaders()
        assert connection.getresponse().status == 404, path
        connection.close()
    status, headers, body = worker.request("HEAD", "/")
    assert status == 200 and body == b"" and int(headers["Content-Length"]) == (FOLDER / "index.html").stat().st_size
    status, headers, body = worker.request("GET", "/static/main.js", headers={"If-None-Match": "*"})
    assert status == 304 and body == b""
    assert worker.request("GET", "/")[2] == (FOLDER / "index.html").read_bytes()


# -- the files themselves


def test_the_page_names_only_its_own_files():
    names = {path.name for path in FILES}
    index = (FOLDER / "index.html").read_text()
    asked = re.findall(r'(?:src|href)="([^"#][^"]*)"', index)
    asked += [f"static/{name}" for path in SCRIPTS for name in re.findall(r'from "\./([^"]+)"', path.read_text())]
    assert len(asked) > 10 and {name.removeprefix("static/") for name in asked} | {"index.html"} == names
    assert all(name.startswith("static/") for name in asked)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_reaches_nowhere_and_makes_no_program_of_text(path):
    text = path.read_text()
    assert set(re.findall(r"[a-z]+://[^\s\"')]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"@import|url\(", text)
    assert not re.findall(MAKERS, text)
    if path.suffix in (".html", ".svg"):
        assert not re.findall(r"<style|\sstyle=|\son\w+=|<script(?! type=\"module\" src=)|<script[^>]*>[^<]", text)
    if path.suffix == ".js":
        assert text.startswith("// ") and len(text.splitlines()) <= MAX_LINES


def test_the_patterns_of_this_test_find_what_they_look_for():
    for text in ("e.innerHTML = t", "document.write(t)", "new Function(t)", "eval(t)"):
        assert re.findall(MAKERS, text), text
