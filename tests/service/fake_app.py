"""Serve a `FakeLLM` under the real server: `python fake_app.py PORT [--load-seconds S] [--load-error CODE] [...]`."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from service.fake_llm import FakeLLM
from worker_orcd.config import ServeConfig
from worker_orcd.errors import InsufficientVram, ModelLoadError
from worker_orcd.wsgi import collecting_worker, server, sse


class Panic(BaseException):
    """What a library written in Rust raises: no Exception."""


def limit_processes(args):
    """Refuse threads and forks as a container's limit on processes does."""
    start = threading.Thread.start

    def start_or_refuse(thread):
        if thread.name == args.no_thread or (args.no_threads_while and args.no_threads_while.exists()):
            raise RuntimeError("can't start new thread")
        start(thread)

    def refuse_fork():
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    threading.Thread.start = start_or_refuse
    if args.no_fork:
        os.fork = refuse_fork


def limit_send_buffers(n_bytes):
    """Let the buffers of connections be full after a few answers."""
    listen = server._listen

    def listen_with_small_buffers(host, port):
        listener = listen(host, port)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, n_bytes)
        return listener

    server._listen = listen_with_small_buffers


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--load-seconds", type=float, default=0.0)
    parser.add_argument("--load-error", choices=["model", "vram", "crash", "panic", "kill"])
    parser.add_argument("--max-seqs", type=int, default=24)
    parser.add_argument("--max-queue", type=int, default=4)
    parser.add_argument("--max-tokens-in", type=int)
    parser.add_argument("--max-tokens-out", type=int, default=2048)
    parser.add_argument("--grace", type=float, default=1.0)
    parser.add_argument("--timeout", type=float, default=300.0)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--api-key")
    parser.add_argument("--allow-unauthenticated", action="store_true")
    parser.add_argument("--allowed-host", action="append", default=[])
    parser.add_argument("--cors-origin", action="append", default=[])
    parser.add_argument("--ping-sec", type=float, default=sse.PING_SEC)
    parser.add_argument("--read-limit-sec", type=float, default=collecting_worker.READ_LIMIT_SEC)
    parser.add_argument("--max-received-bytes", type=int, default=collecting_worker.MAX_RECEIVED_BYTES)
    parser.add_argument("--send-buffer", type=int, help="bytes of each connection's")
    parser.add_argument("--hold-files", type=int, default=0, help="files that the model keeps open")
    parser.add_argument("--print-curl", action="store_true")
    parser.add_argument("--no-thread", help="threads of this name cannot be started")
    parser.add_argument("--no-threads-while", type=Path, help="no thread can be started while there is this file")
    parser.add_argument("--no-fork", action="store_true")
    args = parser.parse_args()
    sse.PING_SEC = args.ping_sec
    collecting_worker.READ_LIMIT_SEC = args.read_limit_sec
    collecting_worker.MAX_RECEIVED_BYTES = args.max_received_bytes
    if args.send_buffer:
        limit_send_buffers(args.send_buffer)
    limit_processes(args)
    held = []

    def load(config, progress, on_fatal, on_plan):
        held.extend(os.open(os.devnull, os.O_RDONLY) for _ in range(args.hold_files))
        end = time.monotonic() + args.load_seconds
        while time.monotonic() < end:
            progress(int(1000 - 1000 * (end - time.monotonic()) / args.load_seconds), 1000)
            time.sleep(0.02)
        if args.load_error == "model":
            raise ModelLoadError("the tensor table is cut short", path=config.model, offset=24)
        if args.load_error == "vram":
            raise InsufficientVram("the model needs more", bytes_required=100, bytes_available=10)
        if args.load_error == "crash":
            raise RuntimeError("nobody expected this")
        if args.load_error == "panic":
            raise Panic("a library of another language broke")
        if args.load_error == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return FakeLLM(config, on_fatal)

    server.serve(
        ServeConfig(
            model="/nowhere/fake.gguf",
            port=args.port,
            device="cpu",
            max_seqs=args.max_seqs,
            max_queue=args.max_queue,
            max_tokens_in=args.max_tokens_in,
            max_tokens_out=args.max_tokens_out,
            grace_sec=args.grace,
            inference_timeout_sec=args.timeout,
            host=args.host,
            api_key=args.api_key,
            allow_unauthenticated=args.allow_unauthenticated,
            allowed_hosts=("x", *args.allowed_host),  # as tests that write bytes call the server
            cors_origins=tuple(args.cors_origin),
            print_curl=args.print_curl,
        ),
        load,
    )


if __name__ == "__main__":
    main()
