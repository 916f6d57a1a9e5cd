"""What becomes of every way in which an answer of the page's chat can fail."""

from __future__ import annotations

import pytest
from service.page.steps import IDLE, LAST, LOOK, READY, answer, problem, say

pytestmark = pytest.mark.timeout(60)


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
