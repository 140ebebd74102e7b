"""Runs a program and ends it, with all that it started, when whoever started this has ended.

``python supervisor.py PROGRAM ARGUMENT...``. Whoever starts it holds the other end of the pipe that
is its standard input, and writes into it or closes it to stop the program. If that process ends, in
whatever way, the system closes the pipe, unless a process that it had forked holds it open; so the
parent is looked at, too. This file imports nothing of the package, so that it starts at once.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

GRACE = 20.0  # seconds that the program has to end by itself
LOOK = 1.0  # seconds between looks at the parent


def main(command: list[str]) -> int:
    """Run the program; returns its exit status."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the pipe says when to stop
        signal.signal(number, lambda *_: None)  # unlike SIG_IGN, the program does not inherit it
    parent = os.getppid()
    program = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # its processes are ended together
    )
    arguments = (program.pid, parent)
    threading.Thread(target=_stop_with_parent, args=arguments, daemon=True).start()
    status = program.wait()
    with suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGKILL)  # what it left behind
    return status if status >= 0 else 128 - status


def _stop_with_parent(group: int, parent: int) -> None:
    """Wait for the pipe or for the end of the parent, and end the processes of a group."""
    while os.getppid() == parent and not select.select([0], [], [], LOOK)[0]:
        pass
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)
        time.sleep(GRACE)
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
