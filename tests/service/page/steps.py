"""What the tests of the page do with it and ask of it, in a tab of headless Chromium."""

from __future__ import annotations

from pathlib import Path

#: where pictures of the page are left
SHOTS = Path(__file__).resolve().parents[3] / "build" / "page"
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
