"""The page's chat in headless Chromium against a stand-in for the OpenAI routes: what is shown, and what is sent."""

from __future__ import annotations

import time

import pytest
from service.page.steps import IDLE, LAST, METRICS, PROBE, READY, answer, figures, problem, say

pytestmark = pytest.mark.timeout(60)


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
