"""The narration log: one line an event, whole under threads, no text in it."""

import io
import json
import threading

import pytest

from worker_orcd.observe.events import EventLog, text_facts


def lines(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_event_is_one_json_line_with_base_fields_first():
    out = io.StringIO()
    EventLog(out, worker_id="w", model_ref="m.gguf", gpu_device=None).emit("ready", url="http://x", seconds=1.23456789)
    (record,) = lines(out)
    assert list(record)[:5] == ["ts", "level", "event", "worker_id", "model_ref"]
    assert record["event"] == "ready" and record["level"] == "info" and record["seconds"] == 1.234568
    assert "gpu_device" not in record and record["ts"].endswith("Z")


@pytest.mark.parametrize(
    "value", ["a\nb", "\x00", 'say "x"', "\u2028", "\udcff", "x" * 5000, b"\xff", {"a": ["\n"]}, float("nan"), object()]
)
@pytest.mark.parametrize("fmt", ["json", "text"])
def test_any_value_stays_one_line(fmt, value):
    out = io.StringIO()
    EventLog(out, fmt).emit("error", "error", message=value)
    text = out.getvalue()
    assert text.count("\n") == 1 and text.endswith("\n") and len(text.splitlines()) == 1 and len(text) < 2300
    if fmt == "json":
        assert json.loads(text)["event"] == "error"


def test_bind_adds_fields_and_leaves_the_parent_alone():
    out = io.StringIO()
    log = EventLog(out, worker_id="w")
    log.bind(job_id="j", correlation_id="c").emit("execute_start", tokens_in=3)
    log.emit("shutdown")
    first, second = lines(out)
    assert first["job_id"] == "j" and first["worker_id"] == "w" and first["tokens_in"] == 3
    assert "job_id" not in second


def test_text_facts_hold_no_text():
    facts = text_facts("prompt", "secret words")
    assert facts["prompt_chars"] == 12 and len(facts["prompt_sha256"]) == 64
    assert "secret" not in str(facts)


def test_threads_do_not_mix_lines():
    out = io.StringIO()
    log = EventLog(out)

    def work(n):
        bound = log.bind(job_id=str(n))
        for i in range(200):
            bound.emit("token", i=i)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    records = lines(out)
    assert len(records) == 1600
    for n in range(8):
        assert [r["i"] for r in records if r["job_id"] == str(n)] == list(range(200))


def test_a_closed_stream_is_no_error():
    out = io.StringIO()
    log = EventLog(out)
    out.close()
    log.emit("ready")


def test_text_form_shows_event_and_fields_but_not_the_base():
    out = io.StringIO()
    EventLog(out, "text", worker_id="w").emit("error", "error", code="NOT_READY", message="still loading")
    assert out.getvalue()[13:] == 'ERROR error code=NOT_READY message="still loading"\n'


def test_text_form_shows_where_a_value_with_quotes_ends():
    out = io.StringIO()
    EventLog(out, "text").emit("error", message='no "x" b=c', field="a")
    assert out.getvalue().split(" ", 1)[1] == 'error message="no \\"x\\" b=c" field=a\n'


def test_unknown_format_is_refused():
    with pytest.raises(ValueError, match="xml"):
        EventLog(None, "xml")


def test_text_shows_the_job_and_its_correlation_id():
    out = io.StringIO()
    log = EventLog(out, "text", worker_id="w")
    log.bind(job_id="j 1", correlation_id="c").bind(part=2).emit("execute_start", tokens_in=3)
    assert out.getvalue().split(" ", 1)[1] == 'execute_start job_id="j 1" correlation_id=c part=2 tokens_in=3\n'


@pytest.mark.parametrize("kind", ["none", "closed"])
def test_no_standard_error_is_no_error(monkeypatch, kind):
    """A program with a window has none, and a shell can close it."""
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr("sys.stderr", None if kind == "none" else stream)
    EventLog(None, worker_id="w").emit("ready")


def test_a_line_can_be_had_without_being_written(capsys):
    line = EventLog(None, worker_id="w").line("log_lines_dropped", "warning", n=3)
    assert json.loads(line)["n"] == 3 and line.endswith("\n") and capsys.readouterr().err == ""
