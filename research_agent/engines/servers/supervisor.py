"""Runs a program and ends it, with all that it started, when its own standard input is closed.

``python supervisor.py PROGRAM ARGUMENT...``. Whoever starts it holds the other end of the pipe; if
that process ends, in whatever way, the system closes the pipe. This file imports nothing of the
package, so that it starts at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

GRACE = 20.0  # seconds that the program has to end by itself


def main(command: list[str]) -> int:
    """Run the program; returns its exit status."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the pipe says when to stop
        signal.signal(number, lambda *_: None)  # unlike SIG_IGN, the program does not inherit it
    program = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # its processes are ended together
    )
    threading.Thread(target=_stop_with_parent, args=(program.pid,), daemon=True).start()
    status = program.wait()
    with suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGKILL)  # what it left behind
    return status if status >= 0 else 128 - status


def _stop_with_parent(group: int) -> None:
    """Wait until the pipe is closed, and end the processes of a group."""
    os.read(0, 1)  # nobody writes into the pipe
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)
        time.sleep(GRACE)
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
