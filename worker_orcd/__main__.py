"""The program: `worker-orcd`, and `python -m worker_orcd`."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line. Entry point of the installed program."""
    if sys.argv[1:2] == ["serve"]:  # before the imports, which take longer than anything else until it listens
        from worker_orcd.wsgi import signals

        signals.leave_at_once()
        # NumPy multiplies no matrices here. Its OpenBLAS would start a thread a core before the fork, and where it gets
        # none it raises SIGINT, which would pass for somebody's Ctrl-C
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        from worker_orcd.cli import main as command_line
    except KeyboardInterrupt:  # as the command line itself ends then
        sys.exit(130)
    command_line.main()


if __name__ == "__main__":
    main()
