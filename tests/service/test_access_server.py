"""Who may talk to a real server: what arrives as bytes, over IPv6, at an address of all interfaces (wsgi.access)."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess

import pytest

from service.client import fake_worker


@pytest.fixture(scope="module")
def worker():
    worker = fake_worker("--cors-origin", "https://app.example")
    yield worker
    worker.kill()


def answer(worker, request, host="127.0.0.1"):
    """(status, headers in small letters, body) of bytes sent on a connection of their own."""
    with socket.create_connection((host, worker.port), timeout=10) as sock:
        sock.sendall(request)
        data = b""
        while part := sock.recv(65536):
            data += part
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    return int(lines[0].split()[1]), headers, body


def get(*headers, version="1.1", target="/health"):
    return "\r\n".join((f"GET {target} HTTP/{version}", *headers, "Connection: close", "", "")).encode()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (get("Host: localhost:1"), 200),
        (get("HOST: [::1]:9"), 200),
        (get("Host: evil.example"), 403),
        (get("Host: localhost", "Host: localhost"), 400),
        (get("Host: localhost", "Host: evil.example"), 400),
        (get("Host: evil.example", version="1.0"), 403),
        (get(version="1.0"), 200),
        (get("Host:"), 403),
        (get("Host: localhost", target="http://evil.example/health"), 403),
        (get("Host: evil.example", target="http://localhost/health"), 403),
        (get("Host: localhost", target="http://localhost/health"), 200),
        (get("Host: localhost", "Origin: http://localhost"), 200),
        (get("Host: localhost", "Origin: http://localhost", "Origin: https://app.example"), 403),
        (get("Host: localhost", "Origin: https://app.example"), 200),
        # what only a proxy that is trusted could say
        (get("Host: localhost", "SCRIPT_NAME: /health"), 200),
        (get("Host: localhost", "SCRIPT_NAME: /x"), 200),
        (get("Host: localhost", "X-Forwarded-Proto: https", "X-Forwarded-Ssl: off"), 200),
        (get("Host: evil.example", "X-Forwarded-Host: localhost"), 403),
    ],
)
def test_what_arrives_as_bytes(worker, request_, status):
    told, headers, body = answer(worker, request_)
    assert told == status and headers["x-correlation-id"] == headers["x-request-id"]
    if status != 200:
        assert json.loads(body)["code"] == {400: "INVALID_REQUEST", 403: "FORBIDDEN"}[status]


def test_no_page_stops_the_worker(worker):
    form = "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 3\r\nConnection: close\r\n\r\na=b"
    for headers, status in (
        (f"Origin: https://evil.example\r\n{form}", 403),
        ("Origin: null\r\n" + form, 403),
        (form, 415),
    ):
        assert answer(worker, f"POST /shutdown HTTP/1.1\r\nHost: localhost\r\n{headers}".encode())[0] == status
    worker.event("refused", path="/shutdown", code="UNSUPPORTED_MEDIA_TYPE")
    refused = [e for e in worker.log if e["event"] == "refused" and e.get("path") == "/shutdown"]
    assert [e["code"] for e in refused] == ["FORBIDDEN", "FORBIDDEN", "UNSUPPORTED_MEDIA_TYPE"]
    assert all(e["peer"].startswith("127.0.0.1:") and e["correlation_id"] for e in refused)
    assert worker.process.poll() is None and not worker.events("shutdown")


@pytest.mark.parametrize(("n_bytes", "lives"), [(1000, True), (300_000, False)])
def test_a_body_of_another_kind_is_refused_unread(worker, n_bytes, lives):
    body = b"x" * n_bytes
    head = b"POST /execute HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n"
    status, _, rest = answer(worker, head % len(body) + body + get("Host: localhost"))
    assert status == 415 and (b"HTTP/1.1 200" in rest) is lives, "a short rest is skipped, or the connection ends"


def test_a_key_opens_all_addresses_over_ipv4_and_ipv6():
    worker = fake_worker("--host", "::", "--api-key", "secret", "--allowed-host", "api.example")
    try:
        mine = socket.gethostname().lower()
        for host, status in ((f"[::1]:{worker.port}", 200), ("192.0.2.1:80", 200), ("api.example", 200), (mine, 200)):
            assert answer(worker, get(f"Host: {host}"), "::1")[0] == status, host
        assert answer(worker, get("Host: 127.0.0.1"))[0] == 200
        assert answer(worker, get("Host: evil.example"), "::1")[0] == 403
        shutdown = b"POST /shutdown HTTP/1.1\r\nHost: localhost\r\n%sConnection: close\r\n\r\n"
        assert answer(worker, shutdown % b"", "::1")[0] == 401
        assert answer(worker, shutdown % b"Authorization: BEARER secret\r\n", "::1")[0] == 202
        assert worker.process.wait(10) == 0 and "secret" not in "".join(worker.raw_log)
    finally:
        worker.kill()


def test_without_a_key_all_addresses_need_a_word_and_it_is_told():
    worker = fake_worker("--host", "0.0.0.0", "--allow-unauthenticated")
    try:
        (warning,) = worker.events("server")
        assert warning["level"] == "warning" and "no API key" in warning["message"]
        assert worker.json("POST", "/shutdown")[0] == 202 and worker.process.wait(10) == 0
    finally:
        worker.kill()


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl_stops_a_worker_on_its_own_machine():
    worker = fake_worker()
    try:
        url = f"http://localhost:{worker.port}"

        def curl(*args):
            done = subprocess.run(["curl", "-s", "-4", *args], capture_output=True, text=True, timeout=20, check=True)
            return json.loads(done.stdout)

        refused = curl("-d", '{"job_id":"x"}', f"{url}/cancel")
        assert refused["code"] == "UNSUPPORTED_MEDIA_TYPE" and "curl: -H" in refused["message"]
        sent = curl("-H", "Content-Type: application/json", "-d", '{"job_id":"x"}', f"{url}/cancel")
        assert sent["state"] == "unknown"
        assert curl("-X", "POST", f"{url}/shutdown") == {"status": "stopping"} and worker.process.wait(10) == 0
    finally:
        worker.kill()
