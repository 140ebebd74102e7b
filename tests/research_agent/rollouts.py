"""Trajectories made by hand or by chance, for the tests of what learns from them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.synthetic import reward_last_turn
from research_agent.trajectory import Group, Segment, Trajectory


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


def random_turns(seed: int, *, groups: int = 3, samples: int = 4) -> list[Group]:
    """Trajectories of one to four turns with rewards on the way, some turns without a token.

    States have one of two names, or none.
    """
    rng = random.Random(seed)

    def turn(*, last: bool) -> Segment:
        sampled = [rng.randrange(50) for _ in range(rng.randint(int(last), 4))]
        logprobs = [rng.uniform(-6, -0.1) for _ in sampled]
        reward = rng.choice([-0.25, 0.0, 0.5, 1.0])
        return action(sampled, logprobs, reward, rng.choice(["", "here", "there"]))

    def make(episode: int, sample: int) -> Trajectory:
        segments = [prompt(1)]
        count = rng.randint(1, 4)
        for place in range(count):
            segments += [turn(last=place == count - 1), observation(*range(rng.randint(0, 3)))]
        return trajectory(*segments, episode=episode, sample=sample)

    return [Group(e, [make(e, s) for s in range(samples)]) for e in range(groups)]


def random_trees(
    seed: int, vocabulary: int = 50, *, groups: int = 2, trees: int = 2, branches: int = 3
) -> list[Group]:
    """Groups of trees, written out in full: a branch leaves a trajectory somewhere."""
    rng = random.Random(seed)

    def grow(segments: list[Segment]) -> list[Segment]:
        for _ in range(rng.randint(1, 3)):
            sampled = [rng.randrange(vocabulary) for _ in range(rng.randint(1, 5))]
            said = action(sampled, [rng.uniform(-6, -0.1) for _ in sampled])
            observed = [rng.randrange(vocabulary) for _ in range(rng.randint(0, 4))]
            segments += [said, observation(*observed)]
        return segments

    def make(episode: int) -> Group:
        made: list[Trajectory] = []
        start = prompt(*(rng.randrange(vocabulary) for _ in range(rng.randint(1, 4))))
        for number in range(trees * (1 + branches)):
            reward = rng.choice([0.0, 0.1, 0.5, 1.0])
            if number < trees:
                made.append(
                    trajectory(*grow([start]), reward=reward, episode=episode, sample=number)
                )
                continue
            source = rng.choice(made)
            shared = rng.randint(0, len(source.turns))
            kept = list(source.segments[: 1 + 2 * shared])
            lineage = (*source.lineage, *[source.sample] * len(source.turns))[:shared]
            made.append(
                trajectory(
                    *grow([replace(segment, reward=0.0) for segment in kept]),
                    reward=reward,
                    episode=episode,
                    sample=number,
                    lineage=lineage,
                    tree=source.sample if source.tree is None else source.tree,
                )
            )
        return Group(episode, made)

    return [make(episode) for episode in range(groups)]
