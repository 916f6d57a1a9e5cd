"""What the page and the browser keep: modes, conversations, storage, the clipboard."""

from __future__ import annotations

import json
import time

import pytest
from service.page.steps import IDLE, LAST, LOOK, READY, answer, say

pytestmark = pytest.mark.timeout(60)


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
