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

    def stop_with_parent() -> None:
        while os.read(0, 4096):
            pass
        _signal_all(program.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        while program.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        _signal_all(program.pid, signal.SIGKILL)

    threading.Thread(target=stop_with_parent, daemon=True).start()
    status = program.wait()
    _signal_all(program.pid, signal.SIGKILL)  # what it left behind
    return status if status >= 0 else 128 - status


def _signal_all(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
