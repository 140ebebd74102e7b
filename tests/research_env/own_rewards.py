"""A user's own rewards, valid and invalid ones; tests name them "module:function"."""

from __future__ import annotations

from typing import Any

import numpy as np

from research_env import Episode


def nothing(episode: Episode) -> Any:
    return None


def pair(episode: Episode) -> Any:
    return 1.0, {"extra": 2}


async def later(episode: Episode) -> float:
    return 1.0


def promise(episode: Episode) -> Any:
    return later(episode)


def not_a_number(episode: Episode) -> float:
    return float("nan")


def words(episode: Episode) -> Any:
    return "1.0"


def fails(episode: Episode) -> float:
    return episode.question.difficulty  # type: ignore[attr-defined, no-any-return]


def half(episode: Episode) -> Any:
    return np.float32(0.5)


def by_difficulty(episode: Episode) -> float:
    return 1.0 if episode.question.extra.get("difficulty") == "hard" else 0.5
