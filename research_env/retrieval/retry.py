"""When to ask a search engine again: one deadline a batch, exponential pauses with jitter.

Pure: it neither sleeps nor sends. A retriever's loop is meant to read like this::

    deadline = Deadline.after(retry.deadline)
    for attempt in itertools.count():
        answer = ask(timeout=deadline.left())          # or what went wrong, and its Retry-After
        if answer is good: return it
        pause = retry.pause(attempt, deadline.left(), retry_after(header))
        if pause is None: return RetrievalError(...)   # spent
        time.sleep(pause)
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP status codes of failures that may pass; any other is answered the same way again."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """An instant of the monotonic clock (seconds) after which nobody waits any more."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """The instant that many seconds from now."""
        return cls(time.monotonic() + seconds)

    def left(self) -> float:
        """Seconds until then, 0 where it has passed."""
        return max(0.0, self.at - time.monotonic())


@dataclass(frozen=True, slots=True)
class Retry:
    """How long a batch may take in all (``deadline``), and the pauses between its attempts.

    All in seconds. The pause after attempt n (0, 1, ...) is drawn from the upper half of
    ``min(longest, first * 2**n)`` ("equal jitter", M. Brooker, AWS Architecture Blog, 2015).
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
        """Seconds to wait before the next attempt; None: there is no time for one, give up.

        Args:
            attempt: how many attempts failed before the one that just did.
            left: seconds until the deadline.
            asked: seconds that the server asked for (Retry-After); never less is waited, and the
                jitter comes on top, so that many clients do not come back at the same instant.
            draw: gives a number from [0, 1).
        """
        whole = min(self.longest, self.first * 2.0 ** min(attempt, 64))
        pause = whole / 2 * (1 + draw()) if asked is None else asked + whole / 2 * draw()
        return pause if pause < left else None


def retry_after(header: str | None, now: datetime | None = None) -> float | None:
    """Seconds that a Retry-After header asks for (RFC 9110, 10.2.3), in either of its forms.

    Args:
        header: the header's value; None where there is none.
        now: the current time; None: the clock's.

    Returns:
        Seconds, 0 for an instant that has passed; None where there is none or it makes no sense.
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
