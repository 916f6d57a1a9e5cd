"""Notifier: tells systemd (or whoever set NOTIFY_SOCKET, see sd_notify(3)) when the worker is ready and when it stops.

Only the main process is listened to, and only the worker process knows when the model is loaded: a pipe leads from one
to the other. gunicorn itself would say READY=1 before there is a worker, so it does not get to see the variable.
"""

from __future__ import annotations

import os
import socket

_VARIABLE = "NOTIFY_SOCKET"


class Notifier:
    """Made by the master before it forks. Nothing here waits or fails: a manager that does not listen is not told.

    Args:
        address: the manager's socket, None where there is no manager: then all of this does nothing.
    """

    def __init__(self, address: str | None) -> None:
        self._address = address
        self._read, self._write = os.pipe() if address else (-1, -1)
        if address:
            os.set_blocking(self._read, False)

    @classmethod
    def from_environment(cls) -> Notifier:
        """For the manager that the environment names; the name is taken out of it."""
        return cls(os.environ.pop(_VARIABLE, None) or None)

    def worker_is_ready(self) -> None:
        """In the worker process: jobs are accepted."""
        if self._write >= 0:
            try:
                os.write(self._write, b"1")
            except OSError:
                pass  # the master has gone

    def look(self) -> None:
        """In the master, now and then: pass on what the worker has said."""
        if self._read < 0:
            return
        try:
            said = os.read(self._read, 1)
        except BlockingIOError:
            return
        os.close(self._read)
        self._read = -1
        if said:
            self._send("READY=1")

    def stopping(self) -> None:
        """In the master: the server stops."""
        self._send("STOPPING=1")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)
                sock.sendto(message.encode("ascii"), address)
        except OSError:
            pass
