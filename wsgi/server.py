"""serve: the worker under gunicorn - one master, one worker process, the model loaded by the worker after the fork.

The master (`arbiter`) only listens, waits and passes signals on. It never starts a second worker: a worker that ends
takes the server with it, with an exit code a supervisor can act on (0 as told, 1 failed, 70 the engine died).
CUDA does not survive a fork, so nothing is loaded before it.

Here is what ties them to the `Service`: settings, the log, and how the worker process begins and ends.
"""

from __future__ import annotations

import errno
import gc
import math
import os
import signal
import socket
import sys
import threading
from typing import Any

from gunicorn import glogging
from gunicorn.app.base import BaseApplication

import worker_orcd
from worker_orcd.config import EXIT_LIMIT_SEC, ServeConfig
from worker_orcd.errors import InvalidRequest
from worker_orcd.machine import share_heaps
from worker_orcd.observe.events import EventLog
from worker_orcd.observe.unblocked import UnblockedWriter, unblock_standard_streams
from worker_orcd.runtime import streams
from worker_orcd.wsgi import signals
from worker_orcd.wsgi.access import Rules
from worker_orcd.wsgi.app import create_app, first_request
from worker_orcd.wsgi.arbiter import WorkerArbiter
from worker_orcd.wsgi.descriptors import connections_within, raise_limit, streams_within
from worker_orcd.wsgi.event_writer import EventWriter
from worker_orcd.wsgi.exits import ExitTimer, ProcessEnd, StopTime
from worker_orcd.wsgi.gunicorn_worker import StreamWorker
from worker_orcd.wsgi.service import EXIT_FAILED, Loader, Service, load_llm
from worker_orcd.wsgi.systemd import Notifier

#: seconds a worker's main loop may be silent; its threads may compute for longer
SILENCE_LIMIT_SEC = 120
#: seconds a worker that shall end gets beyond its jobs' grace time
EXIT_SLACK_SEC = 0.6
#: seconds for answers under way once all streams have ended; idle connections are not waited for
LAST_ANSWER_SEC = 0.2
#: seconds for freeing the model once all streams have ended; a step that still computes is left to the kernel
CLOSE_LIMIT_SEC = 0.25
#: seconds a process that ends waits for who reads its log
LOG_FLUSH_SEC = 0.1
#: seconds after which a thread of the worker lets another one that waits have the Python lock
SWITCH_SEC = 0.0002
#: seconds between the end of a worker that took all its time and the master's noticing it
LAST_LOOK_SEC = 0.05
#: what gunicorn's master says at its end; the narration has told why
_FAREWELLS = ("Shutting down: %s", "Reason: %s")


def serve(config: ServeConfig, load: Loader = load_llm) -> None:
    """Serve until told to stop. Does not return: ends the process.

    Args:
        config: start-up values; checked here.
        load: makes the LLM in the worker process.

    Raises:
        InvalidRequest: a value breaks its rule, or the address cannot be listened on.
    """
    config.check()
    Rules.of(config)
    streams.open_missing()
    listener = _listen(config.host, config.port)
    config.check_reach(listener.getsockname()[0])  # a name may stand for anything
    signals.leave_at_once()
    _, log_writer = unblock_standard_streams()
    port = listener.getsockname()[1]
    host = f"[{config.host}]" if ":" in config.host else config.host
    events = EventLog(
        None,
        config.log_format,
        worker_id=config.worker_id,
        model_ref=os.path.basename(config.model),
        gpu_device=config.gpu_device,
    )
    log_writer.tell_lost = lambda n: events.line("log_lines_dropped", "warning", n=n)
    events.emit(
        "startup",
        version=worker_orcd.__version__,
        pid=os.getpid(),
        device=config.device,
        path=config.model,
        host=config.host,
        port=port,
        max_seqs=config.max_seqs,
        max_queue=config.max_queue,
    )
    if config.api_key is None and config.allow_unauthenticated:
        events.emit("server", "warning", message="there is no API key: whoever reaches this worker may use it")
    _Application(config, events, log_writer, load, listener, f"http://{host}:{port}").run()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except (OSError, UnicodeError) as error:
        reason = "the port is in use" if getattr(error, "errno", None) == errno.EADDRINUSE else str(error)
        raise InvalidRequest(f"cannot listen on {host}:{port}: {reason}", field="port") from None
    return listener


class _Application(BaseApplication):
    """Gunicorn's settings, and the hooks that tie the worker process to its `Service`."""

    def __init__(
        self,
        config: ServeConfig,
        events: EventLog,
        log_writer: UnblockedWriter,
        load: Loader,
        listener: socket.socket,
        url: str,
    ) -> None:
        self._config = config
        self._events = events
        self._log_writer = log_writer
        self._load = load
        self._listener = listener
        self._url = url
        self._service: Service | None = None
        self._stopped = threading.Event()
        self.notifier = Notifier.from_environment()
        self._exit = ExitTimer(self._leave)
        self._end = ProcessEnd(lambda: log_writer.flush(LOG_FLUSH_SEC))
        self.stop_time = StopTime()
        self.stop_limit_sec = config.grace_sec + EXIT_SLACK_SEC + LOG_FLUSH_SEC + LAST_LOOK_SEC
        super().__init__()

    def load_config(self) -> None:
        """The settings. Called by gunicorn."""
        limit = raise_limit()
        n_connections = connections_within(limit)
        self._max_streams = streams_within(n_connections, self._config.max_streams)
        if self._max_streams < self._config.max_streams:
            message = f"at most {self._max_streams} streams at once, as at most {limit} files may be open"
            self._events.emit("server", "warning", message=message)
        settings: dict[str, Any] = {
            "bind": f"fd://{self._listener.detach()}",
            "workers": 1,
            "worker_class": StreamWorker,
            "threads": self._config.threads,
            "worker_connections": n_connections,
            "preload_app": False,
            "max_requests": 0,
            "keepalive": 5,
            "timeout": SILENCE_LIMIT_SEC,
            "graceful_timeout": max(1, min(int(EXIT_LIMIT_SEC), math.ceil(self._config.grace_sec) + 1)),
            "limit_request_fields": 64,
            "limit_request_field_size": 8190,
            "control_socket_disable": True,
            "forwarded_allow_ips": "",  # nobody, this machine included, says by headers what path or scheme is meant
            "logger_class": self._logger_class(),
            "loglevel": "warning",
            "accesslog": None,
            "proc_name": "worker-orcd",
            "post_worker_init": self._worker_started,
            "worker_exit": self._worker_ended,
        }
        if os.access("/dev/shm", os.W_OK):
            settings["worker_tmp_dir"] = "/dev/shm"  # a heartbeat file on a slow disk can look like a dead worker
        for name, value in settings.items():
            self.cfg.set(name, value)

    def load(self) -> Any:
        """The WSGI application, in the worker process. Called by gunicorn."""
        master = os.getppid()
        self._service = Service(
            self._config, self._events, self._load, self._url, terminate=lambda: os.kill(master, signal.SIGTERM)
        )
        self._service.places.limit = self._max_streams
        app = create_app(self._service)
        self._service.warm_up = lambda: first_request(app, self._url)
        return app

    def run(self) -> None:
        """Run the master, and end the process."""
        code: object = EXIT_FAILED
        try:
            WorkerArbiter(self).run()
        except SystemExit as end:
            code = end.code
        signals.ignore()
        self._end(code if isinstance(code, int) else EXIT_FAILED)

    def _worker_started(self, worker: StreamWorker) -> None:
        """In the worker process, before its first request."""
        service = self._service
        assert service is not None, "gunicorn loads the application first"
        # requests that arrive would keep the Python lock from the engine's thread for 5 ms at a time: with 64 of them
        # at once p99 of the gap between tokens was 11.6 ms so, and 9.7 with 0.5 ms; and the last first token came after
        # 122 ms with 0.5, 101 ms with 0.2 and 97 ms with 0.1 (H200, Qwen2.5 0.5B)
        sys.setswitchinterval(SWITCH_SEC)
        share_heaps()
        # the library of the tokenizer works in the threads that call it, and then lets others run: see its calls
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        worker.events = self._events
        worker.on_refused = service.metrics.refused

        def end(code: int) -> None:
            self._exit.within(EXIT_SLACK_SEC)
            worker.leave()

        def stop_when_told() -> None:
            worker.stop_requested.wait()
            grace = max(0.0, self._config.grace_sec - self.stop_time.seconds_ago())
            self._exit.within(grace + EXIT_SLACK_SEC)
            service.stop(grace, lambda: self._exit.within(CLOSE_LIMIT_SEC))
            self._stopped.set()
            worker.wait_for_answers(LAST_ANSWER_SEC)
            self._exit.within(0.0)

        service.on_exit = end
        service.writer = worker.writer = EventWriter()
        service.keep_thread = worker.keep_thread
        service.on_ready = self._ready
        self._log_writer.start()
        try:
            # these are there from the start, so that no end waits for a thread, and who is ready can serve
            self._exit.start()
            service.writer.start()
            threading.Thread(target=stop_when_told, name="stop", daemon=True).start()
            worker.start_threads()
        except RuntimeError as error:
            self._stopped.set()
            service.load_failed(error)
            return
        service.start()

    def _ready(self) -> None:
        """In the worker process: jobs are accepted."""
        # what is there now stays; looking through it again for garbage would stop all threads for 10 ms now and then
        gc.collect()
        gc.freeze()
        self.notifier.worker_is_ready()

    def _worker_ended(self, server: object, worker: StreamWorker) -> None:
        """In the worker process, after its main loop. A thread may hang in a read or a load: leave without it."""
        if str(worker.pid) != str(os.getpid()):  # a text until the fork
            return  # gunicorn also tells the master of a worker that vanished
        service = self._service
        if service is not None and worker.stop_requested.is_set():
            self._stopped.wait(self._config.grace_sec + EXIT_SLACK_SEC)
        elif service is not None:
            # its load failed, its engine died, or gunicorn found it silent
            service.exit_code = service.exit_code or EXIT_FAILED
            self._exit.within(EXIT_SLACK_SEC)
            service.stop(0.0)
        self._leave()

    def _leave(self) -> None:
        """End the worker process. Who reads the log gets a moment to take its last lines. In the main thread when its
        loop has ended, or in the timer's, or in both."""
        self._end(EXIT_FAILED if self._service is None else self._service.exit_code)

    def worker_failed(self, message: str) -> None:
        """In the master: say what ended the worker, which could not say it itself."""
        self._events.emit("error", "error", code="INTERNAL", message=message)

    def _logger_class(self) -> type[glogging.Logger]:
        events = self._events

        class ServerLog(glogging.Logger):
            """What gunicorn has to say, as events. Its texts may quote a request, so only their fixed part is kept."""

            def critical(self, msg: object, *args: object, **kwargs: object) -> None:
                _emit("error", msg, args)

            error = critical

            def warning(self, msg: object, *args: object, **kwargs: object) -> None:
                _emit("warning", msg, args)

            def exception(self, msg: object, *args: object, **kwargs: object) -> None:
                kind = sys.exc_info()[0]
                _emit("error", msg, args, kind.__name__ if kind else None)

            def info(self, msg: object, *args: object, **kwargs: object) -> None:
                """Nothing of gunicorn's own life: the narration tells the worker's."""

            debug = info

        def _emit(level: str, msg: object, args: tuple[object, ...], exception: str | None = None) -> None:
            text = str(msg)
            if text in _FAREWELLS:
                return
            events.emit("server", level, message=text if args else text.split(":", 1)[0], exception=exception)

        return ServerLog
