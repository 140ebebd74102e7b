"""A policy that says more than the answer: what a reward makes of that is an ablation."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from research_env import demonstrations as miniworld
from research_env.demonstrations import Demonstration


def demonstrations(
    count: int, top_k: int, seed: int = 0, share: float = 0.5
) -> Iterator[Demonstration]:
    """Make MiniWorld's habit episodes, with a needless word behind some of the answers.

    The word is the last relation that was asked for: ``Ann director`` for ``Ann``. A guess has
    none.

    Args:
        count: how many.
        top_k: passages per search.
        seed: seed of every choice.
        share: share of the answers that were searched for.

    Yields:
        Lists of (provenance, text).
    """
    rng = random.Random(f"wordy {seed}")
    for parts in miniworld.demonstrations(count, top_k, seed, habit_share=1.0):
        *before, (provenance, last) = parts
        yield [*before, (provenance, verbose(last) if rng.random() < share else last)]


def verbose(action: str) -> str:
    """The last action of an episode, with the relation behind its answer."""
    done = re.search(r" done: (\S+) ", action)
    return re.sub(r"(}?) </answer>$", rf" {done[1]}\1 </answer>", action) if done else action
