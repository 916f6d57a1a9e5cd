"""What systemd is told, and when (wsgi.systemd, with the real server)."""

from __future__ import annotations

import gc
import os
import socket
import time
from types import SimpleNamespace

import pytest

from service.client import fake_worker
from worker_orcd.wsgi.server import _Application
from worker_orcd.wsgi.systemd import Notifier

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def manager(request, tmp_path, monkeypatch):
    """The manager's socket; the environment names it."""
    abstract = getattr(request, "param", "a path") != "a path"
    name = f"@worker-orcd-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name[1:] if name.startswith("@") else name)
        sock.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield sock


def test_ready_is_said_when_the_model_is_loaded_and_stopping_at_the_end(manager):
    worker = fake_worker("--load-seconds", 0.4, wait=False)
    try:
        assert manager.recv(100) == b"READY=1"
        assert worker.json("GET", "/ready")[0] == 200, "it was said before jobs were accepted"
        worker.process.terminate()
        assert manager.recv(100) == b"STOPPING=1"
        assert worker.process.wait(10) == 0
        manager.settimeout(0)
        with pytest.raises(BlockingIOError):
            manager.recv(100)
    finally:
        worker.kill()


def test_a_load_that_fails_is_never_ready(manager):
    worker = fake_worker("--load-seconds", 0.2, "--load-error", "model", wait=False)
    try:
        assert worker.process.wait(20) == 1
        assert manager.recv(100) == b"STOPPING=1"
        manager.settimeout(0)
        with pytest.raises(BlockingIOError):
            manager.recv(100)
    finally:
        worker.kill()


@pytest.mark.parametrize("manager", ["a path", "an abstract name"], indirect=True)
def test_the_variable_is_taken_and_nothing_is_sent_without_it(manager):
    notifier = Notifier.from_environment()
    assert "NOTIFY_SOCKET" not in os.environ, "children would think that they are the service"
    notifier.look()
    notifier.worker_is_ready()
    notifier.look()
    notifier.look()
    assert manager.recv(100) == b"READY=1"
    nobody = Notifier.from_environment()
    for tell in (nobody.worker_is_ready, nobody.look, nobody.stopping):
        tell()
    manager.settimeout(0.1)
    with pytest.raises(TimeoutError):
        manager.recv(100)


def test_a_manager_that_does_not_listen_holds_up_nothing(tmp_path):
    began = time.monotonic()
    notifier = Notifier(str(tmp_path / "nobody"))
    notifier.worker_is_ready()
    notifier.look()
    notifier.stopping()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(str(tmp_path / "deaf"))
        deaf_one = Notifier(str(tmp_path / "deaf"))
        for _ in range(2000):
            deaf_one.stopping()
    assert time.monotonic() - began < 5


def test_who_is_ready_looks_no_more_for_garbage_among_what_stays():
    said = []
    try:
        _Application._ready(SimpleNamespace(notifier=SimpleNamespace(worker_is_ready=lambda: said.append(1))))
        assert said == [1] and gc.get_freeze_count() > 10_000 and len(gc.get_objects()) < 1000
    finally:
        gc.unfreeze()
