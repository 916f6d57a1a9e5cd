"""How the page looks and how it is used: keyboard, narrow screens, Markdown, colours. Pictures go to build/page/."""

from __future__ import annotations

import json

import pytest
from service.page.steps import IDLE, METRICS, SHOTS, say

pytestmark = pytest.mark.timeout(60)


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
