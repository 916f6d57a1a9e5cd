"""What a ready worker does beside serving: residency checks, the digest of its file; and the VRAM plan in the log."""

from __future__ import annotations

import hashlib
import io
import threading
import time
from types import SimpleNamespace

import pytest

from service.fake_llm import FakeLLM
from service.in_process import App
from worker_orcd.cuda.vram import VramPlan
from worker_orcd.errors import CudaError
from worker_orcd.observe.events import EventLog
from worker_orcd.wsgi.background import Background

pytestmark = pytest.mark.timeout(30)
DIGEST = hashlib.sha256(b"fake").hexdigest()


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()


class GpuLLM(FakeLLM):
    """Says that it is on a GPU."""

    def __init__(self, config, on_fatal):
        super().__init__(config, on_fatal)
        self.info.device = "cuda:0"
        self.checks = 0

    def check_residency(self):
        self.checks += 1
        if isinstance(self.faults, Exception):
            raise self.faults
        return super().check_residency()


@pytest.fixture
def gpu_app():
    app = App(lambda config, progress, on_fatal, on_plan: GpuLLM(config, on_fatal), residency_check_sec=0.1).ready()
    app.codes = []
    app.service.on_exit = app.codes.append
    yield app
    app.service.stop(0)


def events(app, name):
    return [e for e in app.log if e["event"] == name]


def test_the_digest_is_logged_after_ready_and_shown_by_health():
    app = App().ready()
    until(lambda: events(app, "provenance"))
    assert events(app, "provenance")[0]["sha256"] == DIGEST
    names = [e["event"] for e in app.log]
    assert names.index("provenance") > names.index("ready")
    assert app.client.simulate_get("/health").json["sha256"] == DIGEST
    assert not events(app, "residency_check"), "there is nothing to check on the CPU"
    app.service.stop(0)


def test_a_digest_that_was_demanded_is_logged_before_ready():
    app = App(expect_sha256="ab" * 32).ready()
    names = [e["event"] for e in app.log]
    assert names.index("provenance") < names.index("ready")
    assert events(app, "provenance")[0]["sha256"] == "ab" * 32
    app.service.stop(0)


def test_stopping_does_not_wait_for_a_long_hash():
    class Slow(FakeLLM):
        ended = None
        reading = False

        def digest(self, progress):
            self.reading = True
            try:
                while True:
                    progress(0)
                    time.sleep(0.01)
            except Exception as error:
                self.ended = error
                raise

        def close(self):
            assert self.ended is not None, "the file was closed while it was read"
            super().close()

    app = App(lambda config, progress, on_fatal, on_plan: Slow(config, on_fatal)).ready()
    until(lambda: app.service.llm().reading)
    began = time.monotonic()
    app.service.stop(0)
    assert time.monotonic() - began < 1
    assert not [t for t in threading.enumerate() if t.name == "provenance"]
    assert not events(app, "provenance")


def test_background_work_that_was_stopped_does_not_begin():
    """The worker may be told to stop between the moment it is ready and the start of its background work."""
    log = io.StringIO()
    llm = FakeLLM(SimpleNamespace(model="m.gguf", expect_sha256=None, max_seqs=1, max_queue=1), print)
    background = Background(llm, EventLog(log), 0.1, print, print, print)
    background.stop()
    background.start()
    assert not [t for t in threading.enumerate() if t.name == "provenance"] and not log.getvalue()


def test_a_file_that_cannot_be_hashed_is_told():
    class Gone(FakeLLM):
        def digest(self, progress):
            raise OSError("the disk is gone")

    app = App(lambda config, progress, on_fatal, on_plan: Gone(config, on_fatal)).ready()
    until(lambda: events(app, "provenance"))
    assert events(app, "provenance")[0]["level"] == "error" and app.service.state == "ready"
    app.service.stop(0)


def test_residency_is_checked_again_and_again(gpu_app):
    until(lambda: len(events(gpu_app, "residency_check")) >= 3)
    assert all(e["level"] == "info" and e["resident"] is True for e in events(gpu_app, "residency_check"))
    assert gpu_app.client.simulate_get("/health").json["resident"] is True


def test_a_failed_check_makes_the_worker_unhealthy(gpu_app):
    gpu_app.service.llm().faults = ["weights (4,096 bytes): managed"]
    until(lambda: gpu_app.service.state == "unhealthy")
    failed = [e for e in events(gpu_app, "residency_check") if e["level"] == "error"]
    assert len(failed) == 1 and failed[0]["resident"] is False
    assert failed[0]["faults"] == ["weights (4,096 bytes): managed"]
    health = gpu_app.client.simulate_get("/health")
    assert health.status_code == 503 and health.json["status"] == "unhealthy" and health.json["resident"] is False
    assert gpu_app.execute().status_code == 503
    assert gpu_app.codes == [], "unhealthy, not dead: whoever watches decides"


def test_a_check_that_finds_the_context_lost_ends_the_process(gpu_app):
    gpu_app.service.llm().faults = CudaError("illegal address", call="cuPointerGetAttributes", sticky=True)
    until(lambda: gpu_app.codes)
    assert gpu_app.codes == [70] and gpu_app.service.state == "unhealthy"


def test_an_engine_that_dies_after_a_failed_check_still_ends_the_process(gpu_app):
    gpu_app.service.llm().faults = ["gone"]
    until(lambda: gpu_app.service.state == "unhealthy")
    gpu_app.service.engine_died(CudaError("illegal address", sticky=True))
    until(lambda: gpu_app.codes)
    assert gpu_app.codes == [70]


def test_the_vram_plan_is_logged_before_loading_goes_on():
    def load(config, progress, on_fatal, on_plan):
        on_plan(VramPlan(100, 200, 300, reserve=50, staging=40), 10_000)
        progress(1, 2)
        return FakeLLM(config, on_fatal)

    app = App(load).ready()
    plan = events(app, "vram_plan")[0]
    assert (
        plan["weights_bytes"],
        plan["kv_bytes"],
        plan["workspace_bytes"],
        plan["reserve_bytes"],
        plan["bytes_required"],
        plan["bytes_free"],
    ) == (100, 200, 300, 50, 650, 10_000)
    app.service.stop(0)
