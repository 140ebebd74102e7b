"""Ends the process when a piece of work hangs: nothing else stops a kernel that never returns."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading

HUNG = 75  # the exit status: "try again later" in sysexits.h


class Watchdog:
    """Watches over what is done ``with`` it, from a thread, until it is closed.

    Args:
        message: printed to standard error when the work hangs, with what each thread is doing.
        patience: seconds that a piece of work may take. Time in which the process is stopped
            (SIGSTOP, a suspended machine) does not count.
    """

    def __init__(self, message: str, patience: float) -> None:
        self._message = message
        self._tick = patience / 20
        self._started = 0  # pieces of work so far
        self._busy = False
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def __enter__(self) -> None:
        self._started += 1
        self._busy = True

    def __exit__(self, *_: object) -> None:
        self._busy = False

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        seen = looks = 0
        while not self._closed.wait(self._tick):
            looks = looks + 1 if self._busy and self._started == seen else 0
            seen = self._started
            if looks >= 20:
                print(self._message, file=sys.stderr, flush=True)
                faulthandler.dump_traceback(sys.stderr)
                os._exit(HUNG)
