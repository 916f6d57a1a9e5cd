"""Headless Chromium, driven by its DevTools protocol over a pair of pipes: no port, no driver program, no library.

A message is JSON that ends in a NUL byte; Chromium reads them from descriptor 3 and writes them to descriptor 4.
"""

from __future__ import annotations

import base64
import json
import os
import queue
import shutil
import subprocess
import threading
import time
from pathlib import Path

#: names of the program, in the order in which they are tried
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_SWITCHES = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    # no name is looked up: what asks another host fails, and is seen
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)


def find() -> str | None:
    """The path of the program, or None."""
    return next((path for path in map(shutil.which, PROGRAMS) if path), None)


class Browser:
    """One process. `call` sends a command and waits for its answer; events go to the `Tab` of their session."""

    def __init__(self, profile: Path):
        self._tabs = {}
        self._answers = {}
        self._lock = threading.Lock()
        self._n_calls = 0
        to_read, self._write_end = os.pipe()
        self._read_end, to_write = os.pipe()
        switches = [*_SWITCHES, f"--user-data-dir={profile}"]
        if os.geteuid() == 0:
            switches.append("--no-sandbox")  # which root has none of
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "chromium", find(), *switches, "about:blank"],
            pass_fds=(to_read, to_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_read)
        os.close(to_write)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        rest = b""
        while data := os.read(self._read_end, 1 << 16):
            *messages, rest = (rest + data).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message:
                    self._answers[message["id"]].put(message)
                elif tab := self._tabs.get(message.get("sessionId")):
                    tab.events.append((message["method"], message["params"]))

    def call(self, method, session=None, timeout=20.0, **params):
        """The result of a command."""
        with self._lock:
            self._n_calls += 1
            n = self._n_calls
            self._answers[n] = queue.SimpleQueue()
            message = {"id": n, "method": method, "params": params} | ({"sessionId": session} if session else {})
            os.write(self._write_end, json.dumps(message).encode() + b"\0")
        answer = self._answers[n].get(timeout=timeout)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def tab(self, width=1280, height=800, dark=False):
        """A new tab with storage of its own."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = self._tabs[session] = Tab(self, session, context)
        for domain in ("Page", "Runtime", "Network", "Log"):
            tab.call(f"{domain}.enable")
        tab.resize(width, height)
        tab.prefer("color-scheme", "dark" if dark else "light")
        return tab

    def close(self):
        """End the process."""
        try:
            self.call("Browser.close", timeout=5)
            self._process.wait(5)
        except (queue.Empty, OSError, RuntimeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._reader.join(5)
        os.close(self._write_end)
        os.close(self._read_end)


class Tab:
    """A page. `events` grows with what the browser tells of it: (method, parameters)."""

    def __init__(self, browser, session, context):
        self._browser = browser
        self._session = session
        self._context = context
        self.events = []

    def call(self, method, **params):
        return self._browser.call(method, self._session, **params)

    def open(self, url):
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def close(self):
        self._browser.call("Target.disposeBrowserContext", browserContextId=self._context)

    def eval(self, expression):
        """The value of a JavaScript expression; of a promise, what it becomes."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise AssertionError(details.get("exception", {}).get("description") or details["text"])
        return result["result"].get("value")

    def wait(self, expression, timeout=10.0):
        """The first value of an expression that is true."""
        end = time.monotonic() + timeout
        while not (value := self.eval(expression)):
            assert time.monotonic() < end, f"not true in {timeout} s: {expression}\n{self.text()[:2000]}"
            time.sleep(0.02)
        return value

    def text(self, selector="body"):
        return self.eval(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")

    def click(self, selector):
        """A press of the mouse in the middle of an element that can be seen."""
        place = self.eval(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'nearest'}); const b = e.getBoundingClientRect();"
            " const x = b.x + b.width / 2, y = b.y + b.height / 2;"
            " const top = document.elementFromPoint(x, y);"
            " return {x, y, hit: e.contains(top) || top?.contains(e) === true}; })()"
        )
        assert place["hit"], f"{selector} is covered or not seen"
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place["x"], y=place["y"], button="left", clickCount=1)

    def focus(self, selector):
        self.eval(f"document.querySelector({json.dumps(selector)}).focus()")

    def type(self, selector, text):
        """Put text into a field as a person does."""
        self.focus(selector)
        self.call("Input.insertText", text=text)

    def press(self, key, code, text="", modifiers=0):
        """A key: its name, its number, the character it makes, 8 with Shift."""
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def enter(self):
        self.press("Enter", 13, "\r")

    def resize(self, width, height):
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def prefer(self, *features):
        """What the person prefers: names of media features and their values."""
        pairs = zip(features[::2], features[1::2], strict=True)
        listed = [{"name": f"prefers-{name}", "value": value} for name, value in pairs]
        self.call("Emulation.setEmulatedMedia", features=listed)

    def offline(self, off=True):
        self.call(
            "Network.emulateNetworkConditions", offline=off, latency=0, downloadThroughput=-1, uploadThroughput=-1
        )

    def screenshot(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def of(self, method):
        """Parameters of the events of one kind."""
        return [params for name, params in list(self.events) if name == method]

    def hosts(self):
        """Where requests went."""
        return {
            p["request"]["url"].split("/")[2]
            for p in self.of("Network.requestWillBeSent")
            if "//" in p["request"]["url"]
        }

    def faults(self, network=True):
        """What a developer would see in red: exceptions, rejections, console errors, violations of the policy."""
        found = [
            p["exceptionDetails"].get("exception", {}).get("description") or p["exceptionDetails"]["text"]
            for p in self.of("Runtime.exceptionThrown")
        ]
        found += [str(p["args"]) for p in self.of("Runtime.consoleAPICalled") if p["type"] in ("error", "assert")]
        entries = [p["entry"] for p in self.of("Log.entryAdded")]
        found += [e["text"] for e in entries if e["level"] == "error" and (network or e["source"] != "network")]
        return found
