"""How many connections, and streams among them, the limit of open files allows. It is raised as far as may be."""

from __future__ import annotations

import resource

from worker_orcd.config import SPARE_THREADS

#: connections that may be open at once, idle ones included
MAX_CONNECTIONS = 4096
#: file descriptors kept for everything that is no connection: at most, and at least
SPARE, SPARE_OF_FEW = 128, 32
#: connections that are allowed whatever the limit says; past it, accepting one ends another
LEAST_CONNECTIONS = 8


def raise_limit() -> int:
    """Raise the limit of open files to what `MAX_CONNECTIONS` need, or as far as may be; returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + SPARE
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit


def connections_within(limit: int) -> int:
    """How many connections fit into a limit of open files."""
    spare = min(SPARE, max(SPARE_OF_FEW, limit // 4))
    return max(LEAST_CONNECTIONS, min(MAX_CONNECTIONS, limit - spare))


def streams_within(n_connections: int, wanted: int) -> int:
    """How many of the connections may be streams, so that /health and whoever cancels get one too."""
    return max(1, min(wanted, n_connections - min(SPARE_THREADS, n_connections // 2)))
