"""The page in headless Chromium, against a stand-in for the OpenAI routes (page_stand_in): what a person sees, what is
sent, and what becomes of every way in which an answer can fail. Screenshots are left in build/page/."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from service.client import Worker
from service.page_stand_in import PageWorker
from worker_orcd.wsgi.app import ROUTES

pytestmark = pytest.mark.timeout(60)

SHOTS = Path(__file__).resolve().parents[2] / "build" / "page"
#: what `tab.eval` runs to have the worker asked at once, as where a person comes back to the page
LOOK = "document.dispatchEvent(new Event('visibilitychange'))"
READY = "document.getElementById('status').dataset.status === 'healthy'"
IDLE = "document.getElementById('stop').hidden && document.querySelectorAll('.assistant').length === {}"
LAST = "[...document.querySelectorAll('.assistant')].pop()"
PROBE = "<img src=x onerror=window.hit=1><script>window.hit=1</script>[a](javascript:window.hit=1)"
METRICS = """\
# HELP worker_orcd_num_requests_running Requests in the batch.
# TYPE worker_orcd_num_requests_running gauge
worker_orcd_num_requests_running{{model_name="a \\"b\\", c"}} 3.0
worker_orcd_num_requests_waiting 1.0
worker_orcd_generation_tokens_total{{kind="a"}} {0}
worker_orcd_generation_tokens_total{{kind="b"}} {0}
worker_orcd_prompt_tokens_total 1e3
worker_orcd_kv_cache_usage_perc 0.25
worker_orcd_prefix_cache_queries_total 400
worker_orcd_prefix_cache_hits_total 100
worker_orcd_vram_bytes{{part="weights"}} 3221225472
worker_orcd_vram_bytes{{part="kv_cache"}} 1.073741824e+09
worker_orcd_nan NaN
other_metric 1
"""


@pytest.fixture
def serve():
    """Start stand-ins, with `PageWorker`'s arguments, that are gone after the test."""
    workers = []

    def make(**kwargs):
        workers.append(PageWorker(**kwargs))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


@pytest.fixture
def open_page(browser):
    """Open a page in a tab of its own; after the test nothing may have gone wrong in it, and no other host been asked.

    An answer that is an error is shown in red by the browser itself; `network=False` says that the test has such.
    """
    tabs = []

    def make(worker, network=True, ready=True, **kwargs):
        tab = browser.tab(**kwargs)
        tabs.append((tab, worker, network))
        tab.open(worker.url)
        if ready:
            tab.wait(READY)
        return tab

    yield make
    for tab, worker, network in tabs:
        faults, hosts = tab.faults(network), tab.hosts()
        tab.close()
        assert faults == [] and hosts <= {worker.url.split("/")[2]}


def say(tab, text, n):
    """Send a message and wait for the n-th answer to end."""
    tab.type("#prompt", text)
    tab.enter()
    tab.wait(IDLE.format(n))


def answer(tab):
    return tab.eval(f"{LAST}.querySelector('.text').innerText")


def figures(tab):
    return tab.eval(f"{LAST}.querySelector('.figures').innerText").split("\n")


def problem(tab):
    return tab.eval(f"{LAST}.querySelector('.problem').innerText")


# -- chat


def test_a_message_is_answered_as_it_comes(serve, open_page):
    worker = serve(metrics=METRICS.format(1))
    tab = open_page(worker)
    tab.type("#prompt", "slow")
    tab.enter()
    seen = [len(tab.wait(f"{LAST}?.querySelector('.text').innerText"))]
    while len(seen) < 4:
        seen.append(tab.wait(f"(t => t.length > {seen[-1]} && t.length)({LAST}.querySelector('.text').innerText)"))
    assert tab.eval("document.getElementById('log').ariaBusy") == "true"
    assert tab.eval("document.querySelector('#log').getAttribute('aria-live')") == "polite"
    live = figures(tab)
    assert live[0].startswith("~") and live[1].endswith(" tokens/s") and live[2].startswith("first token ")
    assert tab.eval("document.getElementById('send').hidden && document.getElementById('mode').disabled")
    assert tab.eval(f"{LAST}.querySelector('.actions').innerText") == ""
    tab.click("#stop")
    tab.wait(IDLE.format(1))


def test_what_is_sent_and_what_is_shown(serve, open_page):
    worker = serve(metrics="")
    tab = open_page(worker)
    say(tab, "say Hello **you**", 1)
    assert answer(tab) == "Hello you" and tab.eval(f"{LAST}.querySelector('strong').textContent") == "you"
    shown = figures(tab)
    assert shown[0] == "5 tokens" and shown[-1] == "prompt 40, 12 cached"
    assert tab.eval("document.getElementById('log').ariaBusy") == "false"
    say(tab, "say Again", 2)
    path, body, headers = worker.requests[1]
    assert path == "/v1/chat/completions" and headers["CONTENT-TYPE"] == "application/json"
    assert "AUTHORIZATION" not in headers
    assert body == {
        "model": "fake",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [
            {"role": "user", "content": "say Hello **you**"},
            {"role": "assistant", "content": "Hello **you**"},
            {"role": "user", "content": "say Again"},
        ],
    }
    tab.click(".assistant:last-child .actions button:last-child")
    tab.wait("document.getElementById('stop').hidden && document.querySelectorAll('.assistant').length === 2")
    end = time.monotonic() + 5
    while len(worker.requests) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    assert worker.bodies()[2] == body, "regenerate asks the same question"


def test_every_setting_is_sent_and_kept(serve, open_page):
    worker = serve()
    tab = open_page(worker)
    numbers = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.25,
        "max_tokens": 2,
        "seed": 9007199254740991,
    }
    for name, value in numbers.items():
        tab.type(f"[name={name}]", str(value))
    tab.type("[name=stop]", "END\n\\n\\nUser:\n")
    tab.type("[name=system]", " Be brief. ")
    say(tab, "say 123456", 1)
    body = worker.bodies()[0]
    assert {name: body[name] for name in numbers} == numbers and body["stop"] == ["END", "\n\nUser:"]
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "say 123456"},
    ]
    assert figures(tab)[-1] == "ended at the token limit"
    tab.open(worker.url)
    tab.wait(READY)
    say(tab, "say b", 2)
    assert {name: worker.bodies()[1][name] for name in numbers} == numbers
    tab.click("#settings [type=reset]")
    say(tab, "say c", 3)
    assert set(worker.bodies()[2]) == {"model", "stream", "stream_options", "messages"}


def test_a_setting_that_breaks_its_rule_is_not_sent(serve, open_page):
    worker = serve()
    tab = open_page(worker)
    tab.type("#prompt", "say a")
    for name, value in (
        ("temperature", "2.5"),
        ("top_k", "1.5"),
        ("seed", "-1"),
        ("min_p", "1e9"),
        ("max_tokens", "0"),
    ):
        tab.type(f"[name={name}]", value)
        tab.focus("#prompt")
        tab.enter()
        assert tab.eval("document.activeElement.name") == name
        assert not worker.requests and tab.eval("document.getElementById('prompt').value") == "say a"
        tab.eval(f"document.querySelector('[name={name}]').value = ''")
    tab.type("[name=min_p]", "-0")
    tab.focus("#prompt")
    tab.enter()
    tab.wait(IDLE.format(1))
    assert worker.bodies()[0]["min_p"] == 0


@pytest.mark.parametrize("how", ["click", "key"])
def test_stop_cancels_and_keeps_what_came(serve, open_page, how):
    worker = serve()
    tab = open_page(worker)
    tab.type("#prompt", "slow")
    tab.enter()
    tab.wait(f"{LAST}?.querySelector('.text').innerText.includes('w2')")
    began = time.monotonic()
    tab.click("#stop") if how == "click" else tab.press("Escape", 27)
    assert worker.cancelled.wait(5)
    print(f"the worker saw it after {1e3 * (time.monotonic() - began):.0f} ms")
    tab.wait(IDLE.format(1))
    text = answer(tab)
    assert text.startswith("w0 w1 w2") and figures(tab)[-1] == "stopped"
    say(tab, "say on", 2)
    assert [m["content"].strip() for m in worker.bodies()[1]["messages"]] == ["slow", text, "say on"]


def test_an_answer_is_text_whatever_it_holds(serve, open_page):
    worker = serve(served_model_name=PROBE)
    tab = open_page(worker, network=False)
    say(tab, f"say {PROBE}\n\n- {PROBE}\n\n# {PROBE}\n\n**{PROBE}** `{PROBE}`\n\n```{PROBE}\n{PROBE}\n```", 1)
    assert answer(tab).count("onerror") == 6 and tab.text("#model") == PROBE
    tags = set(tab.eval("[...document.querySelectorAll('#log *')].map((e) => e.localName)"))
    assert tags.isdisjoint({"img", "script", "a", "iframe"}), tags
    say(tab, "refuse 400", 2)
    assert "no <b>such</b> value" in problem(tab)
    tab.click("#clear")
    say(tab, "think", 1)
    assert tab.eval(f"{LAST}.querySelector('.thoughts p').textContent") == "Let me see <b>this</b>"
    assert tab.eval("window.hit") is None


def test_the_policy_holds_and_its_violations_are_seen(serve, browser):
    worker = serve()
    tab = browser.tab()
    tab.open(worker.url)
    tab.eval("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.hit=1>')")
    tab.eval("fetch('http://192.0.2.1/').catch(() => 0)")
    tab.wait("performance.now() > 0")
    end = time.monotonic() + 5
    while len(tab.faults(network=False)) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    faults = " ".join(tab.faults(network=False))
    assert "script-src" in faults and "connect-src" in faults and tab.eval("window.hit") is None
    tab.close()


def test_thoughts_are_shown_apart(serve, open_page):
    worker = serve()
    tab = open_page(worker)
    tab.type("#prompt", "think")
    tab.enter()
    tab.wait(f"{LAST}?.querySelector('.thoughts').open")
    tab.wait(IDLE.format(1))
    assert answer(tab) == "The answer"
    say(tab, "say b", 2)
    assert worker.bodies()[1]["messages"][1] == {"role": "assistant", "content": "The answer"}


# -- what goes wrong


#: message, title of the error, words of it, its small print
ERRORS = [
    ("refuse 400", "The request was refused", "top_k: no <b>such</b> value", "400 · invalid_request_error"),
    ("refuse 403", "Not allowed", "top_k", "403"),
    ("refuse 429", "The worker is busy", "Try again in 3 s.", "429"),
    ("refuse 500", "The worker failed", "top_k", "500"),
    ("refuse 503", "The worker is not ready", "Try again in 3 s.", "503"),
    ("fail", "The answer broke off", "no room in the KV cache", "VRAM_OOM"),
    ("junk", "The answer broke off", "something that is no answer", "correlation id"),
    ("end", "No connection", "lost before the answer was complete", "correlation id"),
    ("reset", "No connection", "lost before the answer was complete", ""),
]


def test_an_error_is_told_in_the_conversation(serve, open_page):
    worker = serve()
    tab = open_page(worker, network=False)
    for message, title, words, small in ERRORS:
        say(tab, message, 1)
        lines = problem(tab).split("\n")
        assert lines[0] == title and words in problem(tab) and small in lines[-1], message
        assert answer(tab) == ("" if message.startswith("refuse") else "so far")
        assert tab.eval(f"{LAST}.querySelector('[role=alert]') !== null")
        # a question that had no answer and the next one are one turn: templates want turns that alternate
        tab.type("#prompt", "say well")
        tab.enter()
        tab.wait(IDLE.format(2))
        turns = worker.bodies()[-1]["messages"]
        roles = ["user"] if message.startswith("refuse") else ["user", "assistant", "user"]
        assert [t["role"] for t in turns] == roles and turns[-1]["content"].endswith("say well")
        tab.click("#clear")


def test_a_worker_that_is_gone(serve, open_page):
    worker = serve()
    tab = open_page(worker, network=False)
    say(tab, "say a", 1)
    tab.offline()
    say(tab, "say b", 2)
    assert problem(tab).startswith("No connection") and "cannot be reached" in problem(tab)
    tab.eval(LOOK)
    tab.wait("document.getElementById('status').textContent === 'Not reachable'")
    assert tab.text("#facts") != "", "what was known stays"
    tab.offline(False)
    tab.click(".assistant:last-child .actions button:last-child")
    tab.wait(f"{LAST}.querySelector('.text').innerText === 'b'")
    assert tab.eval(f"{LAST}.querySelector('.problem').hidden")
    tab.eval(LOOK)
    tab.wait(READY)


def test_the_key_is_asked_for_and_kept_in_the_tab(serve, open_page):
    worker = serve(api_key="s3cret")
    tab = open_page(worker, network=False)
    tab.wait("!document.getElementById('key').hidden")  # /metrics asks for it already
    say(tab, "say a", 1)
    assert problem(tab).startswith("An API key is needed") and not worker.requests
    for key, words in (("wrong", "An API key is needed"), ("schlüssel", None)):
        tab.type("#key-field", key)
        tab.enter()
        if words is None:
            assert not tab.eval("document.getElementById('key-problem').hidden")
        else:
            tab.wait("!document.getElementById('key').hidden && document.getElementById('key-field').value === ''")
            assert problem(tab).startswith(words)
    tab.eval("document.getElementById('key-field').value = ''")
    tab.type("#key-field", "s3cret")
    tab.enter()
    tab.wait(f"{LAST}.querySelector('.text').innerText === 'a'")
    assert tab.eval("document.getElementById('key').hidden")
    assert worker.requests[0][2]["AUTHORIZATION"] == "Bearer s3cret"
    assert "s3cret" in tab.eval("JSON.stringify(sessionStorage)")
    assert "s3cret" not in tab.eval("JSON.stringify(localStorage) + document.documentElement.outerHTML")
    tab.open(worker.url)
    tab.wait(READY)
    say(tab, "say b", 2)
    assert answer(tab) == "b" and tab.eval("document.getElementById('key').hidden")


# -- the worker


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


# -- modes, memory, keyboard


def test_a_model_without_template_continues_text(serve, open_page):
    worker = serve(template=False)
    tab = open_page(worker)
    tab.wait("document.querySelector('[name=mode][value=completion]').checked")
    assert "no chat template" in tab.text("#empty") and tab.eval("document.getElementById('system-field').hidden")
    tab.type("[name=max_tokens]", "7")
    say(tab, "say **Once** upon ", 1)
    assert answer(tab) == "**Once** upon ", "a continuation is no Markdown"
    path, body, _ = worker.requests[0]
    assert path == "/v1/completions" and body["prompt"] == "say **Once** upon " and body["max_tokens"] == 7
    assert "messages" not in body and body["stream"] is True
    tab.enter()  # nothing typed: the text goes on
    tab.wait(IDLE.format(2))
    assert worker.bodies()[1]["prompt"] == "say **Once** upon **Once** upon "
    tab.click("label:has([value=chat])")
    assert tab.eval("document.querySelectorAll('.message').length") == 0
    say(tab, "say a", 1)
    assert worker.requests[2][0] == "/v1/chat/completions" and len(worker.bodies()[2]["messages"]) == 1
    tab.eval(LOOK)
    time.sleep(0.3)
    assert tab.eval("document.querySelector('[value=chat]').checked"), "a choice is not undone"


def test_a_conversation_outlives_a_reload_until_it_is_cleared(serve, open_page):
    worker = serve()
    tab = open_page(worker)
    say(tab, "say first", 1)
    tab.type("#prompt", "slow")
    tab.enter()
    tab.wait(f"{LAST}.querySelector('.text').innerText.includes('w3')")
    tab.open(worker.url)
    assert worker.cancelled.wait(5), "leaving closes the connection"
    tab.wait(READY)
    assert tab.eval("document.querySelectorAll('.message').length") == 4 and "w0 w1" in answer(tab)
    say(tab, "say more", 3)
    assert [m["content"][:5] for m in worker.bodies()[2]["messages"]] == ["say f", "first", "slow", "w0 w1", "say m"]
    assert "first" in tab.eval("localStorage.getItem('worker-orcd.conversation')")
    tab.type("#prompt", "slow")
    tab.enter()
    tab.wait(f"{LAST}.querySelector('.text').innerText.includes('w1')")
    tab.click("#clear")
    tab.wait(IDLE.format(0))
    time.sleep(0.1)
    assert "conversation" not in tab.eval("JSON.stringify(localStorage) + JSON.stringify(sessionStorage)")
    assert tab.eval("document.querySelectorAll('.message').length") == 0 and "Start" in tab.text("#empty")
    say(tab, "say anew", 1)
    assert len(worker.bodies()[-1]["messages"]) == 1


#: what may lie in the storage
KEPT = [
    "{",
    "null",
    "[]",
    '{"chat": 1}',
    '{"chat": [null, 1, {"role": "system", "content": "x"}, {"role": "user", "content": {}}]}',
    '{"chat": [{"role": "assistant", "content": "kept", "figures": {"tokens": 1}, "error": {"message": "e"}}]}',
    '{"chat": [{"role": "assistant", "content": "kept", "figures": {"tokens": "<b>"}, "finish": {}, "error": 3}]}',
]


def test_what_is_kept_may_be_anything(serve, open_page):
    worker = serve()
    tab = open_page(worker)
    for kept in KEPT:
        script = f"localStorage.setItem('worker-orcd.conversation', {json.dumps(kept)}); sessionStorage.clear();"
        script += "localStorage.setItem('worker-orcd.settings', '[1, {}]');"
        tab.eval(f"addEventListener('pagehide', () => {{ {script} }})")  # after the page has kept what it has
        tab.open(worker.url)
        tab.wait(READY)
        n = kept.count("kept")
        assert tab.eval("document.querySelectorAll('.message').length") == n, kept
        say(tab, "say on", n + 1)
        assert answer(tab) == "on", kept


def test_a_full_storage_costs_only_the_keeping(serve, open_page):
    worker = serve()
    tab = open_page(worker)
    tab.eval("Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }")
    say(tab, "say a", 1)
    say(tab, "say b", 2)
    assert answer(tab) == "b"


def test_copy(serve, open_page, browser):
    worker = serve()
    tab = open_page(worker)
    browser.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    say(tab, "say a **b**", 1)
    button = ".assistant .actions button:first-child"
    tab.click(button)
    tab.wait(f"document.querySelector('{button}').textContent === 'Copied'")
    tab.eval("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    tab.click(button)
    tab.wait(f"document.querySelector('{button}').textContent.startsWith('Co')")
    assert tab.eval("document.querySelectorAll('body > textarea').length") == 0


def test_with_the_keyboard_alone(serve, open_page):
    worker = serve()
    tab = open_page(worker, width=1280)
    tab.eval("document.body.focus(); document.activeElement.blur()")
    reached = []
    for _ in range(30):
        tab.press("Tab", 9)
        shown = (
            "(e => [e.id || e.name || (e === document.body ? 'body' : e.textContent.trim()),"
            " getComputedStyle(e).outlineStyle])(document.activeElement)"
        )
        reached.append(tuple(tab.eval(shown)))
    names = [name for name, _ in reached]
    for wanted in ("prompt", "mode", "panel-toggle", "send", "temperature", "stop", "system", "Reset"):
        assert wanted in names, (wanted, names)
    hidden = {name for name, outline in reached if outline == "none"} - {"mode", "prompt", "body"}  # seen otherwise
    assert not hidden, f"focus is not seen on {hidden}"
    tab.focus("#prompt")
    tab.call("Input.insertText", text="say a")
    tab.press("Enter", 13, "\r", modifiers=8)
    tab.call("Input.insertText", text="b")
    assert tab.eval("document.getElementById('prompt').value") == "say a\nb" and not worker.requests
    tab.enter()
    tab.wait(IDLE.format(1))
    assert worker.bodies()[0]["messages"][0]["content"] == "say a\nb"
    tab.enter()  # nothing typed: nothing sent
    assert len(worker.requests) == 1


def test_on_a_narrow_screen(serve, open_page):
    worker = serve(served_model_name="A model with quite a long name for a telephone")
    tab = open_page(worker, width=360, height=640)
    overflow = "document.documentElement.scrollWidth > 360 || document.body.scrollWidth > 360"
    assert tab.eval("document.getElementById('panel').hidden") and not tab.eval(overflow)
    tab.click("#panel-toggle")
    assert tab.eval("document.activeElement.id") == "panel" and not tab.eval(overflow)
    tab.type("[name=seed]", "7")
    tab.press("Escape", 27)
    assert tab.eval("document.getElementById('panel').hidden && document.activeElement.id === 'panel-toggle'")
    tab.type("#prompt", "say " + "x" * 300 + "\n\n```\n" + "y" * 300 + "\n```")
    tab.click("#send")
    tab.wait(IDLE.format(1))
    assert worker.bodies()[0]["seed"] == 7 and not tab.eval(overflow)
    tab.prefer("reduced-motion", "reduce")
    assert tab.eval("matchMedia('(prefers-reduced-motion: reduce)').matches")
    assert tab.eval("getComputedStyle(document.querySelector('.text'), '::after').animationName") == "none"


# -- Markdown

SHAPE = """async (text, step) => {
    const { MarkdownView } = await import('/static/markdown.js');
    const root = document.createElement('div');
    const view = new MarkdownView(root);
    for (let i = 0; i <= text.length; i += step) view.update(text.slice(0, i));
    view.update(text);
    const walk = (n) => n.nodeType === 3 ? n.data
        : `<${n.localName}${n.start > 1 ? ' ' + n.start : ''}>${[...n.childNodes].map(walk).join('')}</>`;
    return [...root.childNodes].map(walk).join(''); }"""
MARKDOWN = [
    ("", ""),
    ("a\nb\n\nc", "<p>a\nb</><p>c</>"),
    ("a `b` c", "<p>a <code>b</> c</>"),
    ("``a`b`` `c", "<p><code>a`b</> `c</>"),
    ("**a `b` c** *d* 2 * 3 * 4 **", "<p><strong>a <code>b</> c</> <em>d</> 2 * 3 * 4 **</>"),
    ("snake_case_name <b>x</b> &amp;", "<p>snake_case_name <b>x</b> &amp;</>"),
    ("# A\n## B #c\n#no", "<h3>A</><h4>B #c</><p>#no</>"),
    ("- a\n- b\n  - c\n  - d\n- e", "<ul><li>a</><li>b<ul><li>c</><li>d</></></><li>e</></>"),
    ("3. a\n4. b\n\n9) c", "<ol 3><li>a</><li>b</></><ol 9><li>c</></>"),
    ("* a\n  more\nend", "<ul><li>a\nmore</></><p>end</>"),
    ("text\n- a", "<p>text</><ul><li>a</></>"),
    ("```py\nx = 1\n\n- no\n```\nafter", "<pre><code>x = 1\n\n- no</></><p>after</>"),
    ("````\n```\n````", "<pre><code>```</></>"),
    ("```a``` b", "<p><code>a</> b</>"),
    ("```\nopen", "<pre><code>open</></>"),
    ("~~~\na\n```\n~~~", "<pre><code>a\n```</></>"),
    ("- a\n\n  ```\n  b\n  ```", "<ul><li>a</></><pre><code>  b</></>"),
]


def test_markdown_whole_and_piece_by_piece(serve, open_page):
    tab = open_page(serve())
    for text, want in MARKDOWN:
        for step in (len(text) or 1, 1, 3):
            got = tab.eval(f"({SHAPE})({json.dumps(text)}, {step})")
            assert got == want, (text, step)


def test_no_text_holds_the_page_up(serve, open_page):
    tab = open_page(serve())
    texts = ["`" * 20_000, "a " + "`" * 20_000, "*" * 20_000, "** " * 7000, "*a " * 7000, "` `` " * 5000, "# " * 10_000]
    texts += ["- " * 10_000, " " * 20_000 + "x", "\n" * 20_000, "#" + " " * 20_000, "1. a\n" * 3000, "a **b" * 5000]
    for text in texts:
        ms = tab.eval(
            "import('/static/markdown.js').then(({MarkdownView}) => { const began = performance.now();"
            f" new MarkdownView(document.createElement('div')).update({json.dumps(text)});"
            " return performance.now() - began; })"
        )
        print(f"{ms:7.1f} ms: {text[:12]!r}")
        assert ms < 1000, text[:12]


# -- pictures


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures(serve, open_page, scheme):
    """To be looked at; that the colours differ and text can be read on them is checked."""
    worker = serve(metrics=METRICS.format(1), served_model_name="Qwen2.5 Coder 0.5B Instruct")
    text = (
        "say The sea is never **quite** the same.\n\n1. Waves, `sum`\n2. Tides, which *wait*\n"
        "   - spring\n   - neap\n\n"
        "```python\ndef tide(t):\n    return 1.2 * math.sin(2 * math.pi * t / 12.42)\n```\n\nThat is all."
    )
    for width, height in ((1280, 800), (390, 844)):
        tab = open_page(worker, network=False, width=width, height=height, dark=scheme == "dark")
        tab.wait("!document.getElementById('metrics').hidden")
        tab.screenshot(SHOTS / f"{scheme}-{width}-empty.png")
        say(tab, text, 1)
        say(tab, "refuse 429", 2)
        tab.screenshot(SHOTS / f"{scheme}-{width}.png")
        if width < 600:
            tab.click("#panel-toggle")
            tab.screenshot(SHOTS / f"{scheme}-{width}-panel.png")
        for selector in (".assistant .text", ".user .text", ".figures", "#status", ".problem p", ".problem strong"):
            ratio = tab.eval(f"({CONTRAST})(document.querySelector('{selector}'))")
            print(f"{scheme} {width} {selector}: {ratio:.1f}")
            assert ratio >= 4.5, selector
    dark = tab.eval("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every((c) => c < 128)")
    assert dark == (scheme == "dark")


CONTRAST = """(e) => { const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const clear = 'rgba(0, 0, 0, 0)';
    let ground = e; while (getComputedStyle(ground).backgroundColor === clear) ground = ground.parentElement;
    const [a, b] = [light(getComputedStyle(e).color), light(getComputedStyle(ground).backgroundColor)];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); }"""
