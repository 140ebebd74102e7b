from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research_agent.algorithms.reinforce_pp import ReinforcePP
from research_agent.batch import make_batch
from research_agent.trajectory import Group
from tests.research_agent.objectives import (
    assert_loss,
    case,
    clipped_total,
    loss_of,
)
from tests.research_agent.rollouts import action, observation, prompt, trajectory


def test_literal() -> None:
    """Rewards 1, 1, 0 over three tokens: mean 2/3, std sqrt(2)/3, advantages 0.7071 and -1.4142.

    All ratios 1: loss -(0.70710678 - 1.41421356) / 2 = 0.35355339.
    """
    winner = trajectory(prompt(1), action([5, 6], [-1.0, -1.0]), reward=1.0)
    loser = trajectory(prompt(1), action([7], [-1.0]), reward=0.0)
    example = case([Group(0, [winner, loser])], noise=0.0)
    advantages = ReinforcePP().advantages(replace(example.batch, reference_logprobs=None))
    assert advantages.tolist() == pytest.approx([math.sqrt(0.5)] * 2 + [-math.sqrt(2)])
    assert loss_of(ReinforcePP(), example).item() == pytest.approx(0.35355339)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    kl=st.sampled_from([0.0, 0.3]),
    baseline=st.sampled_from(["none", "group"]),
    kl_in=st.sampled_from(["reward", "loss"]),
)
def test_equals_the_papers_sums(
    seed: int, kl: float, baseline: Literal["none", "group"], kl_in: Literal["reward", "loss"]
) -> None:
    example = case(seed)
    rule = ReinforcePP(kl_coef=kl, baseline=baseline, kl_in=kl_in, entropy_coef=0.1)
    batch, count, rewards = example.batch, len(example.batch), example.rewards()
    reference = batch.reference_logprobs
    assert reference is not None
    raw: dict[int, float] = {}
    for i, tokens in example.rows:
        reward = rewards[i]
        if baseline == "group":
            reward -= statistics.fmean(rewards[j] for j in example.group_of(i))
        for place, t in enumerate(tokens):
            logs = [(batch.old_logprobs[u] - reference[u]).item() for u in tokens[place:]]
            raw[t] = reward - (kl * sum(logs) if kl_in == "reward" else 0)
    mean, std = statistics.fmean(raw.values()), statistics.pstdev(raw.values())
    advantages = [(raw[t] - mean) / std for t in sorted(raw)]
    weights = [1 / (count * len(tokens)) for _, tokens in example.rows for _ in tokens]
    total = clipped_total(example, advantages, weights, entropy_coef=0.1)
    if kl_in == "loss":
        k2 = (example.logprobs - reference) ** 2 / 2
        total = total + kl * (torch.tensor(weights, dtype=torch.float64) * k2).sum()
    assert_loss(rule, example, total)


def test_the_reward_reaches_the_actions_before_an_observation() -> None:
    """verl 7278: returns that are reset where the mask is 0 leave the first action nothing."""
    winner = trajectory(
        prompt(1), action([5, 6]), observation(*[9] * 20), action([7]), observation(8), reward=1.0
    )
    loser = trajectory(prompt(1), action([5]), observation(9, 9), action([6, 7]), reward=0.0)
    advantages = ReinforcePP().advantages(make_batch([Group(0, [winner, loser])]))
    assert advantages.tolist() == pytest.approx([1, 1, 1, -1, -1, -1])


def test_normalization_sees_no_observation() -> None:
    """R1-Searcher's change: mean and std are those of the policy's own tokens."""
    rule = ReinforcePP(baseline="group")

    def rollout(observed: int) -> torch.Tensor:
        samples = [
            trajectory(prompt(1), action([5]), observation(*[9] * observed), action([6]), reward=r)
            for r in (0.0, 0.5, 1.0)
        ]
        return rule.advantages(make_batch([Group(0, samples)]))

    assert torch.equal(rollout(1), rollout(50))
    root = math.sqrt(1.5)
    assert rollout(1).tolist() == pytest.approx([-root, -root, 0, 0, root, root])


def test_the_whole_rollout_is_normalized_and_not_each_group() -> None:
    """A group of equal rewards still learns something, unless its mean is the baseline."""
    groups = [
        Group(n, [trajectory(prompt(1), action([5]), reward=r) for _ in range(2)])
        for n, r in enumerate((0.0, 1.0))
    ]
    assert ReinforcePP().advantages(make_batch(groups)).tolist() == [-1, -1, 1, 1]
    with_baseline = ReinforcePP(baseline="group").advantages(make_batch(groups))
    assert with_baseline.tolist() == [0, 0, 0, 0]
