"""When to retry a request: one deadline per batch, exponential pauses with jitter.

This module neither sleeps nor sends. A retriever loops like this::

    deadline = Deadline.after(retry.deadline)
    for attempt in itertools.count():
        answer = ask(timeout=deadline.left())          # or an error and its Retry-After
        if answer is good: return it
        pause = retry.pause(attempt, deadline.left(), retry_after(header))
        if pause is None: return RetrievalError(...)   # no time for another attempt
        time.sleep(pause)
"""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

log = logging.getLogger(__name__)

RETRYABLE_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP status codes that are worth a retry. After any other the server would answer the same."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """An instant of the monotonic clock, in seconds, after which nobody waits."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """Return the deadline that many seconds from now."""
        return cls(time.monotonic() + seconds)

    def left(self) -> float:
        """Return the seconds that are left, 0 if the deadline has passed."""
        return max(0.0, self.at - time.monotonic())


@dataclass(frozen=True, slots=True)
class Retry:
    """How long a batch may take in all (``deadline``), and the pauses between attempts, in seconds.

    The pause after attempt n (0, 1, ...) is drawn from the upper half of the interval from 0 to
    ``min(longest, first * 2**n)``.

    References:
        "Equal jitter" in M. Brooker, Exponential Backoff and Jitter, AWS Architecture Blog, 2015.
    """

    deadline: float = 30.0
    first: float = 0.1
    longest: float = 5.0

    def pause(
        self,
        attempt: int,
        left: float,
        asked: float | None = None,
        draw: Callable[[], float] = random.random,
    ) -> float | None:
        """Choose the pause before the next attempt.

        Args:
            attempt: how many attempts failed before the one that just failed.
            left: seconds until the deadline.
            asked: seconds that the server asks to wait (Retry-After). The pause is at least as
                long; jitter comes on top, so that many clients do not return at the same instant.
            draw: returns a number from [0, 1).

        Returns:
            Seconds to wait; None if there is no time for another attempt.
        """
        whole = min(self.longest, self.first * 2.0 ** min(attempt, 64))
        pause = whole / 2 * (1 + draw()) if asked is None else asked + whole / 2 * draw()
        return pause if pause < left else None


def log_retry(server: object, problem: object, left: float) -> None:
    """Log, at level INFO, that a request is retried for up to ``left`` seconds."""
    log.info(
        "%s: %s; trying again for up to %.0f s, in case the server is still starting",
        server,
        problem,
        left,
    )


def retry_after(header: str | None, now: datetime | None = None) -> float | None:
    """Parse a Retry-After header, in seconds or as a date.

    Args:
        header: the value of the header; None if there is none.
        now: the current time; None: read the clock.

    Returns:
        Seconds to wait, 0 for a date in the past; None without a header that makes sense.

    References:
        RFC 9110, section 10.2.3.
    """
    text = (header or "").strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        return float(text)
    try:
        at = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    if at.tzinfo is None:  # "-0000": UTC, says RFC 5322
        at = at.replace(tzinfo=UTC)
    return max(0.0, (at - (now or datetime.now(UTC))).total_seconds())
