"""Trajectories made by hand or by chance, for the tests of what learns from them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from research_agent.trajectory import Group, Segment, Trajectory, reward_last_turn


def prompt(*tokens: int) -> Segment:
    return Segment("prompt", tokens)


def action(
    tokens: Sequence[int],
    logprobs: Sequence[float] | None = None,
    reward: float = 0.0,
    state_key: str = "",
) -> Segment:
    given = [-1.0] * len(tokens) if logprobs is None else logprobs
    return Segment("action", tuple(tokens), tuple(given), reward=reward, state_key=state_key)


def observation(*tokens: int) -> Segment:
    return Segment("observation", tokens)


def trajectory(
    *segments: Segment,
    reward: float | None = None,
    episode: int = 0,
    sample: int = 0,
    void: bool = False,
    lineage: tuple[int, ...] = (),
    tree: int | None = None,
) -> Trajectory:
    """One whose reward is for its last turn; None: the sum of what the turns have."""
    if reward is None:
        reward = sum(segment.reward for segment in segments)
    else:
        segments = reward_last_turn(segments, reward)
    return Trajectory(
        episode, sample, segments, reward, True, False, void=void, lineage=lineage, tree=tree
    )


def random_trajectory(
    rng: random.Random, vocabulary: int, *, episode: int = 0, sample: int = 0
) -> Trajectory:
    """Prompt, then one to three actions with an observation between them, some of them empty."""

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(rng.randint(low, high))]

    segments = [prompt(*tokens(1, 5))]
    for turn in range(rng.randint(1, 3)):
        if turn:
            segments.append(observation(*tokens(0, 6)))
        sampled = tokens(1, 7)
        segments.append(action(sampled, [rng.uniform(-6, -0.1) for _ in sampled]))
    reward = rng.choice([0.0, 0.1, 0.5, 1.0])
    return trajectory(*segments, reward=reward, episode=episode, sample=sample)


def random_groups(
    seed: int, vocabulary: int = 50, *, groups: int = 3, samples: int = 4
) -> list[Group]:
    rng = random.Random(seed)
    return [
        Group(e, [random_trajectory(rng, vocabulary, episode=e, sample=s) for s in range(samples)])
        for e in range(groups)
    ]
