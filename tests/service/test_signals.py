"""Every signal that ends the server, at any moment, once or several times, to master, worker or both: an orderly end.

Here are storms of a fixed kind and twelve drawn ones; `signal_storm.py` runs as many as one likes, also with a model.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.client import Worker
from service.signal_storm import SIGNALS, TARGETS, a_storm, fake_command, serve_command, while_serving, while_starting
from worker_orcd.wsgi import signals

pytestmark = pytest.mark.timeout(120)


def check(outcome):
    told = f"{outcome.storm}: exit {outcome.code} after {outcome.seconds:.2f} s, {outcome.ends}\n{outcome.log[-2000:]}"
    assert outcome.code == 0, told
    assert None not in outcome.ends, f"a stream was cut: {told}"
    assert outcome.seconds < 5, told
    assert "Traceback" not in outcome.log and '"level":"error"' not in outcome.log, told


def at_once(calls):
    """Run calls beside each other and check what came of them: most of their time is waiting."""
    with ThreadPoolExecutor(6) as pool:
        for future in [pool.submit(*call) for call in calls]:
            check(future.result())


def test_the_second_signal_cuts_no_stream():
    """Ctrl-C twice, SIGTERM and then the others: gunicorn would end its streams at once."""
    command = fake_command("--grace", 0.6)
    pairs = [("SIGINT", "SIGINT"), ("SIGTERM", "SIGINT"), ("SIGTERM", "SIGQUIT"), ("SIGHUP", "SIGHUP")]
    at_once(
        (while_serving, command, ["slow", "quiet"], random.Random(n), [(0.1, first, target), (0.2, second, target)])
        for n, (first, second) in enumerate(pairs)
        for target in ("group", "master")
    )


def test_one_signal_alone():
    at_once(
        (while_serving, fake_command("--grace", 0.3), ["quiet"], random.Random(0), [(0.1, number.name, target)])
        for number in SIGNALS
        for target in TARGETS
    )


def test_a_worker_that_has_lost_its_master_ends_as_at_a_signal():
    """In order, and soon: it would keep the port from the next server."""
    worker = Worker(fake_command("--grace", 0.2))
    try:
        stream = worker.execute("quiet")
        assert stream.next()[0] == "started"
        os.kill(worker.process.pid, 9)
        began = time.monotonic()
        assert stream.all()[-1][1]["code"] == "NOT_READY"
        assert worker.event("shutdown")["grace_sec"] <= 0.2
        while True:
            try:
                socket.create_connection(("127.0.0.1", worker.port), timeout=1).close()
            except ConnectionRefusedError:
                break
            except OSError:
                pass  # it closes
            time.sleep(0.02)
        assert time.monotonic() - began < 2.5
    finally:
        worker.kill()


def test_drawn_storms_while_serving():
    rngs = [random.Random(seed) for seed in range(12)]
    at_once((while_serving, fake_command("--grace", 0.6), ["slow", "quiet"], rng, a_storm(rng)) for rng in rngs)


def test_drawn_storms_while_starting(goldens_dir):
    """From the first line of the command on: imports, listening, the fork, the load, ready."""
    commands = [serve_command(goldens_dir / "llama-F16.gguf"), fake_command("--load-seconds", 5)]
    rngs = [random.Random(seed) for seed in range(12)]
    at_once((while_starting, commands[n % 2], rng, a_storm(rng)) for n, rng in enumerate(rngs))


def test_ctrl_c_during_the_imports_of_another_command_is_no_traceback():
    code = """
import sys
sys.argv = ["worker-orcd", "inspect"]
class CtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == "click":
            raise KeyboardInterrupt
sys.meta_path.insert(0, CtrlC())
from worker_orcd.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_the_command_has_one_thread_when_it_forks(goldens_dir):
    """Libraries that start threads where they are imported would leave their locks, held, to the worker."""
    worker = Worker(serve_command(goldens_dir / "llama-F16.gguf"))
    try:
        assert len(os.listdir(f"/proc/{worker.process.pid}/task")) == 1
        assert worker.stop()[0] == 0
    finally:
        worker.kill()


FORKED = """
import os, signal, sys, time
from worker_orcd.wsgi import signals
with signals.held_back():
    pid = os.fork()
    if pid == 0:
        time.sleep(0.3)  # no handler yet
        signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
        signals.let_through()
        time.sleep(10)
        os._exit(1)
    os.kill(pid, signal.SIGTERM)
assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(signals.STOP_SIGNALS)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_signal_between_fork_and_handler_waits():
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == "7\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_before_anything_has_begun_the_process_leaves_with_0_and_at_its_end_with_its_own_code(number):
    assert number in signals.STOP_SIGNALS
    code = "import sys, os, time; from worker_orcd.wsgi import signals; signals.{}(); print('on', flush=True); {}"
    for prepare, then, expected in (
        ("leave_at_once", "time.sleep(20)", 0),
        ("ignore", "time.sleep(0.3); sys.exit(5)", 5),
    ):
        process = subprocess.Popen([sys.executable, "-c", code.format(prepare, then)], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"on\n"
        os.kill(process.pid, number)
        assert process.wait(10) == expected
        process.stdout.close()


def test_the_command_handles_signals_before_its_imports():
    """What takes longest until it listens is the import of its libraries: none has begun when the handlers are set."""
    code = """
import sys
sys.argv = ["worker-orcd", "serve"]
from worker_orcd.wsgi import signals
def look():
    print(sorted({"click", "gunicorn", "falcon", "numpy"} & set(sys.modules)))
    sys.exit(0)
signals.leave_at_once = look
from worker_orcd.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False)
    assert done.stdout == "[]\n", done.stderr
