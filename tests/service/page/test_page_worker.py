"""What the page shows of the worker: health, metrics, how often it asks; and the page with a real worker and model."""

from __future__ import annotations

import re
import sys
import time
from types import SimpleNamespace

import pytest
from service.client import Worker
from service.page.steps import IDLE, LAST, LOOK, METRICS, READY, SHOTS, answer, figures, say

from worker_orcd.wsgi.app import ROUTES

pytestmark = pytest.mark.timeout(60)


def test_loading_is_shown_and_ends(serve, open_page):
    worker = serve(ready=False)
    tab = open_page(worker, network=False, ready=False)
    tab.wait("document.getElementById('status').textContent === 'Loading 40 %'")
    assert tab.eval("document.querySelector('#loading progress').value") == 40
    assert tab.eval("!document.getElementById('loading').hidden && document.getElementById('send').disabled")
    tab.type("#prompt", "say a")
    tab.enter()
    assert tab.eval("document.getElementById('prompt').value") == "say a"
    worker.percent = 75
    tab.wait("document.getElementById('status').textContent === 'Loading 75 %'")
    worker.loaded.set()
    tab.wait(READY)
    assert tab.eval("document.getElementById('loading').hidden")
    tab.enter()
    tab.wait(IDLE.format(1))
    assert answer(tab) == "a"


def test_what_health_tells_is_shown(serve, open_page):
    worker = serve(served_model_name="Some Model")
    tab = open_page(worker)
    facts = tab.text("#facts").split("\n")
    shown = dict(zip(facts[::2], facts[1::2], strict=True))
    assert shown.pop("Up").endswith(" s")
    assert shown == {"Model": "Some Model", "Weights": "Q4_K_M", "Device": "cpu", "Context": "40,000 tokens"}
    assert tab.text("#model") == "Some Model" and tab.eval("document.title").startswith("Some Model")


def test_a_worker_that_refuses_to_say_how_it_is(serve, open_page):
    tab = open_page(serve(health=403), network=False, ready=False)
    tab.wait("document.getElementById('status').textContent === 'Refused (403)'")
    say(tab, "say a", 1)
    assert answer(tab) == "a"


def test_metrics_are_shown_as_they_are(serve, open_page):
    tokens = [500]
    worker = serve(metrics=lambda: METRICS.format(tokens[-1]))
    tab = open_page(worker)
    tab.wait("document.querySelector('#metrics').innerText.includes('Generated\\n1,000')")
    shown = tab.text("#metrics")
    for words in ("Running\n3", "Waiting\n1", "Prefix cache hits\n25 %", "KV cache\n25 %", "VRAM\n4.00 GiB"):
        assert words in shown, (words, shown)
    assert "weights 3.00 GiB" in shown and "kv cache 1.00 GiB" in shown
    assert tab.eval("document.querySelector('#metrics .piece').style.width") == "25%"
    assert tab.text("#metrics .rate") == "–", "one look gives no rate"
    for n in (600, 0):  # 0: as after a restart
        tokens.append(n)
        tab.eval(LOOK)
        tab.wait(f"document.querySelector('#metrics').innerText.includes('Generated\\n{2 * n:,}\\n')")
        assert float(tab.text("#metrics .rate").replace(",", "")) > 0
    assert len(tab.eval("document.querySelector('#metrics polyline').getAttribute('points')").split()) == 1


RATES = """async (looks) => {
    const { Metrics } = await import('/static/metrics.js');
    const made = new Metrics(document.createElement('div'));
    const now = performance.now;
    const rates = [];
    for (const [ms, tokens] of looks) {
        performance.now = () => ms;
        made.update(`worker_orcd_generation_tokens_total ${tokens}`);
        rates.push(made.rate.textContent);
    }
    performance.now = now;
    return rates; }"""


def test_rates_are_differences_over_seconds(serve, open_page):
    tab = open_page(serve())
    looks = [[0, 1000], [2000, 1100], [4000, 1100], [6000, 40], [8000, 5000040], [9000, 5000041]]  # ms, tokens
    rates = tab.eval(f"({RATES})({looks})")
    assert rates == ["–", "50.0", "0.0", "0.0", "2,500,000", "1.0"]


def test_metrics_that_are_missing_are_not_shown(serve, open_page):
    worker = serve(metrics='worker_orcd_num_requests_running 2\nworker_orcd_vram_bytes{part="weights"} 0.0\n')
    tab = open_page(worker)
    tab.wait("!document.getElementById('metrics').hidden")
    assert tab.text("#metrics").split("\n")[-2:] == ["Running", "2"] and "tokens/s" not in tab.text("#metrics")
    without = serve(metrics=None)
    tab = open_page(without, network=False)
    say(tab, "say a", 1)
    assert tab.eval("document.getElementById('metrics').hidden")
    for _ in range(4):
        tab.eval(LOOK)
        time.sleep(0.2)
    asked = [p for p in tab.of("Network.requestWillBeSent") if p["request"]["url"].endswith("/metrics")]
    assert len(asked) == 1, "what is not there is asked for once"


def test_the_worker_is_asked_every_two_seconds_while_the_page_is_seen(serve, open_page):
    tab = open_page(serve(), network=False)

    def n_asked():
        return sum(p["request"]["url"].endswith("/health") for p in tab.of("Network.requestWillBeSent"))

    def wait_for(n):
        end = time.monotonic() + 10
        while n_asked() < n:
            assert time.monotonic() < end
            time.sleep(0.01)
        return time.monotonic()

    tab.eval("Object.defineProperty(document, 'visibilityState', {value: 'hidden', configurable: true})")
    time.sleep(0.1)
    before = n_asked()
    tab.eval(LOOK)
    time.sleep(2.2)
    assert n_asked() == before
    tab.eval("delete document.visibilityState")
    tab.eval(LOOK)
    first = wait_for(before + 1)
    seconds = wait_for(before + 2) - first
    print(f"asked again after {seconds:.2f} s")
    assert seconds > 1.5


@pytest.mark.skipif(
    not any(path == "/v1/chat/completions" for path, _ in ROUTES), reason="the worker has no OpenAI routes"
)
def test_with_a_real_model(open_page, model_path):
    command = [sys.executable, "-m", "worker_orcd", "serve", "--device", "cpu", "--port", "0"]
    worker = Worker([*command, "--model", str(model_path("smollm2"))])
    try:
        tab = open_page(SimpleNamespace(url=f"http://127.0.0.1:{worker.port}/"))
        tab.type("[name=temperature]", "0")
        tab.type("[name=max_tokens]", "12")
        say(tab, "What is the capital of France?", 1)
        text = answer(tab)
        assert "Paris" in text
        shown = figures(tab)
        print(text, shown)
        assert re.fullmatch(r"\d+ tokens", shown[0]) and int(shown[0].split()[0]) <= 12
        assert shown[1].endswith(" tokens/s") and shown[2].startswith("first token ") and "prompt " in shown[3]
        say(tab, "And of Italy?", 2)
        assert answer(tab)
        tab.click(".assistant:last-child .actions button:last-child")
        tab.wait(IDLE.format(2))
        tab.eval("document.querySelector('[name=max_tokens]').value = '2000'")
        tab.type("#prompt", "Write a very long story about a robot.")
        tab.enter()
        tab.wait(f"{LAST}.querySelector('.text').innerText.length > 20")
        tab.click("#stop")
        tab.wait(IDLE.format(3))
        ended = worker.event("execute_end", outcome="disconnected")
        assert ended["text_chars"] > 20 and ended["seconds"] < 20
        tab.click("label:has([value=completion])")
        tab.eval("document.querySelector('[name=max_tokens]').value = '4'")
        say(tab, "1, 2, 3, 4,", 1)
        assert "5" in answer(tab)
        tab.eval(LOOK)
        tab.wait("document.querySelector('#metrics').innerText.includes('Generated')")
        tab.screenshot(SHOTS / "real.png")
    finally:
        code, _ = worker.stop()
        worker.kill()
    assert code == 0
