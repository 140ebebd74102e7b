from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research_agent.algorithms.gigpo import GiGPO
from research_agent.batch import make_batch
from research_agent.trajectory import Group, Trajectory
from tests.research_agent.objectives import (
    assert_loss,
    case,
    clipped_total,
    normalized,
)
from tests.research_agent.rollouts import action, prompt, random_turns, trajectory


def _episode(sample: int, *turns: tuple[str, float]) -> Trajectory:
    return trajectory(
        prompt(1), *(action([5], reward=r, state_key=key) for key, r in turns), sample=sample
    )


def test_literal() -> None:
    """gamma 0.5, means only. Returns: a: 0 + 0.5 x 1 = 0.5, then 1; b: 0.25, then 0.

    Episodes have 1 and 0.25, mean 0.625: +-0.375. In "s" there are 0.5 and 0.25, mean 0.375:
    +-0.125. In "t" only a ever was, and b's second state has no name: 0.
    """
    a = _episode(0, ("s", 0.0), ("t", 1.0))
    b = _episode(1, ("s", 0.25), ("", 0.0))
    rule = GiGPO(gamma=0.5, normalize=False)
    advantages = rule.advantages(make_batch([Group(0, [a, b])])).tolist()
    assert advantages == pytest.approx([0.375 + 0.125, 0.375, -0.375 - 0.125, -0.375])
    twice = GiGPO(gamma=0.5, normalize=False, step_coef=2.0)
    advantages = twice.advantages(make_batch([Group(0, [a, b])])).tolist()
    assert advantages == pytest.approx([0.375 + 0.25, 0.375, -0.375 - 0.25, -0.375])
    unit = 0.5 / (math.sqrt(0.5) + 1e-6)  # two values; their distance hardly counts
    advantages = GiGPO(gamma=0.5).advantages(make_batch([Group(0, [a, b])])).tolist()
    assert advantages == pytest.approx([2 * unit, unit, -2 * unit, -unit], rel=1e-5)


def _distinct(groups: list[Group]) -> list[list[tuple[Trajectory, list[float]]]]:
    """Each trajectory with the returns of its turns, discounted by 0.9."""
    made = []
    for group in groups:
        rows = []
        for t in group.trajectories:
            returns: list[float] = []
            running = 0.0
            for turn in reversed(t.turns):
                running = turn.reward + 0.9 * running
                returns.insert(0, running)
            rows.append((t, returns))
        made.append(rows)
    return made


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), omega=st.sampled_from([0.0, 0.8, 1.0]), normalize=st.booleans())
def test_equals_the_papers_sums(seed: int, omega: float, normalize: bool) -> None:
    groups = random_turns(seed)
    example = case(groups, seed=seed)
    rule = GiGPO(step_coef=omega, gamma=0.9, normalize=normalize, kl_coef=0.2, entropy_coef=0.1)

    def relative(value: float, values: list[float]) -> float:
        return normalized(value, values) if normalize else value - sum(values) / len(values)

    advantages, weights = [], []
    turns = sum(len(t.turns) for group in groups for t in group.trajectories)
    for rows in _distinct(groups):
        rewards = [t.reward for t, _ in rows]
        for t, returns in rows:
            for turn, value in zip(t.turns, returns, strict=True):
                here = [
                    r
                    for other, others in rows
                    for o, r in zip(other.turns, others, strict=True)
                    if o.state_key == turn.state_key
                ]
                step = relative(value, here) if turn.state_key else 0.0
                advantage = relative(t.reward, rewards) + omega * step
                advantages += [advantage] * len(turn.tokens)
                weights += [1 / (turns * len(turn.tokens)) for _ in turn.tokens]
    total = clipped_total(example, advantages, weights, kl=0.2, entropy_coef=0.1)
    assert_loss(rule, example, total)


def test_states_of_other_tasks_are_other_states() -> None:
    """A name is good within a group: "start" of one task is not "start" of the next."""
    rule = GiGPO(normalize=False, gamma=1.0)
    groups = [Group(n, [_episode(0, ("start", float(n)))]) for n in range(2)]
    assert rule.advantages(make_batch(groups)).tolist() == [0.0, 0.0]


def test_states_without_a_name_are_not_one_state() -> None:
    rule = GiGPO(normalize=False, gamma=1.0)
    group = Group(0, [_episode(0, ("", 1.0), ("", 0.0)), _episode(1, ("", 0.0), ("", 1.0))])
    assert rule.advantages(make_batch([group])).tolist() == [0.0] * 4


def test_a_turn_alone_in_its_state_keeps_no_raw_return() -> None:
    """A group of one has nothing to be compared with; verl's GRPO would keep the raw value."""
    group = Group(0, [_episode(0, ("x", 1.0)), _episode(1, ("y", 1.0))])
    assert GiGPO().advantages(make_batch([group])).tolist() == [0.0, 0.0]


def test_a_state_seen_twice_in_one_episode_compares_the_two_visits() -> None:
    """Going in a circle: the later visit is nearer to the reward, and worth more."""
    circle = _episode(0, ("s", 0.0), ("s", 1.0))
    first, second = GiGPO(gamma=0.5).advantages(make_batch([Group(0, [circle])])).tolist()
    assert first == pytest.approx(-second)
    assert second > 0
