"""The smallest environments: what each framework's loop costs without an environment of value.

A search waits as long as the search server takes, batched as ours, and the observation is always
the same text. No session, server or reward is involved, so an adapter can hardly be faster.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import gymnasium as gym

from benchmarks.adapter_script import SEARCHES
from benchmarks.adapter_server import DOCUMENT
from research_env.retrieval.batching import Found, QueryBatcher
from research_env.spaces import UnicodeText

Waits = QueryBatcher[Any]

ALONE = "framework alone"
OBSERVATION = "\n".join([str(DOCUMENT["contents"])] * 3)


def make_waits(seconds: float) -> Waits:
    """Searches that take this many seconds per batch and find nothing."""

    def wait(queries: Sequence[Any]) -> list[Found]:
        time.sleep(seconds)
        return [[] for _ in queries]

    return QueryBatcher(wait, max_batch=256, max_wait=0.002)


class WaitingEnv(gym.Env[str, str]):
    """Waits at each search; the turn after the last search ends the episode."""

    def __init__(self, waits: Waits) -> None:
        """Share the searches of :func:`make_waits` with the other environments."""
        self.action_space = UnicodeText()
        self.observation_space = UnicodeText()
        self._waits = waits
        self._turns = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Begin an episode."""
        self._turns = 0
        return "Who founded it?", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Wait if this turn searches."""
        self._turns += 1
        over = self._turns > SEARCHES
        if not over:
            self._waits.request(action).result()
        return OBSERVATION, 0.0, over, False, {}
