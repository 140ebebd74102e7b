"""Demonstrations of answers with a needless word, for the ablation of answer rewards."""

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

    The word is the last relation that was asked for: ``Ann director`` for ``Ann``. Guesses stay as
    they are.

    Args:
        count: number of demonstrations.
        top_k: passages per search.
        seed: seed of all random choices.
        share: fraction of the answers, guesses aside, that get the word.

    Yields:
        Lists of (provenance, text).
    """
    rng = random.Random(f"wordy {seed}")
    for parts in miniworld.demonstrations(count, top_k, seed, habit_share=1.0):
        *before, (provenance, last) = parts
        yield [*before, (provenance, verbose(last) if rng.random() < share else last)]


def verbose(action: str) -> str:
    """Put the last relation behind the answer of an episode's last action; a guess has none."""
    done = re.search(r" done: (\S+) ", action)
    return re.sub(r"(}?) </answer>$", rf" {done[1]}\1 </answer>", action) if done else action
