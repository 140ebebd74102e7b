"""Signals that ask a run to stop after its present step."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP in a list; a second SIGINT exits at once.

    Outside the main thread Python delivers no signals, and the list stays empty.
    """
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if seen and number == signal.SIGINT:  # schedulers may send SIGTERM more than once
            raise KeyboardInterrupt
        seen.append(number)
        with suppress(OSError):  # the terminal may be gone
            print("\nstopping after this step; once more to leave at once", file=sys.stderr)

    before = {
        number: signal.signal(number, stop)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
