from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research_agent.algorithms.dr_grpo import DrGRPO
from research_agent.batch import make_batch
from research_agent.trajectory import Group
from tests.research_agent.objectives import (
    assert_loss,
    case,
    clipped_total,
    loss_of,
)
from tests.research_agent.rollouts import action, prompt, trajectory


def test_literal() -> None:
    """Advantages 0.5 and -0.5, nothing clipped but the first token (1.25 to 1.2); L = 10, N = 2.

    loss -(1.2 x 0.5 - 0.5 x 0.5 - 1.5 x 0.5) / 20 = 0.02; the second token's ratio 0.5 is held at
    0.8, its term is -0.4: loss -(0.6 - 0.4 - 0.75) / 20 = 0.0275.
    """
    winner = trajectory(prompt(1), action([5], [math.log(0.4)]), reward=1.0)
    loser = trajectory(prompt(1), action([6, 7], [math.log(0.8), math.log(0.2)]), reward=0.0)
    example = case([Group(0, [winner, loser])], noise=0.0)
    with torch.no_grad():
        example.logprobs.copy_(torch.tensor([0.5, 0.4, 0.3]).double().log())
    loss = loss_of(DrGRPO(max_length=10), example)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(0.0275, rel=1e-6)
    assert example.logprobs.grad is not None
    assert example.logprobs.grad.tolist() == pytest.approx([0, 0, 0.0375], rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), kl=st.sampled_from([0.0, 0.3]))
def test_equals_the_papers_sums(seed: int, kl: float) -> None:
    example, rule = case(seed), DrGRPO(max_length=20, kl_coef=kl, entropy_coef=0.1)
    rewards = example.rewards()
    advantages = [
        rewards[i] - statistics.fmean(rewards[j] for j in example.group_of(i))
        for i, tokens in example.rows
        for _ in tokens
    ]
    weights = [1 / (len(example.batch) * 20)] * len(advantages)
    total = clipped_total(example, advantages, weights, kl=kl, entropy_coef=0.1)
    assert_loss(rule, example, total)


def test_a_wrong_answer_costs_the_same_per_token_whatever_its_length() -> None:
    """GRPO's 1 / |o_i| makes long wrong answers cheap; its 1 / std makes easy tasks loud."""
    short = trajectory(prompt(1), action([2]), reward=0.0)
    long = trajectory(prompt(1), action([3] * 9), reward=0.0)
    right = trajectory(prompt(1), action([4]), reward=1.0)
    batch = make_batch([Group(0, [short, long, right])])
    rule = DrGRPO()
    per_token = rule.weights(batch) * rule.advantages(batch)
    assert len(set(per_token[:10].tolist())) == 1
    easy = make_batch([Group(0, [right] * 7 + [short]), Group(1, [right] * 4 + [short] * 4)])
    advantages = rule.advantages(easy)
    assert advantages[0].item() == pytest.approx(1 / 8)  # 1 - 7/8, not blown up by a small std
    assert advantages[8].item() == pytest.approx(1 / 2)
