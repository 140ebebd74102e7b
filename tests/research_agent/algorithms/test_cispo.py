from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research_agent.algorithms.cispo import CISPO
from research_agent.trajectory import Group
from tests.research_agent.objectives import (
    assert_loss,
    case,
    loss_of,
)
from tests.research_agent.rollouts import action, prompt, trajectory


def test_literal() -> None:
    """Ratios 8 (bounded to 5), 0.5 and 1.5; the gradient is weight x bound x advantage, for all."""
    winner = trajectory(prompt(1), action([5], [math.log(0.1)]), reward=1.0)
    loser = trajectory(prompt(1), action([6, 7], [math.log(0.8), math.log(0.2)]), reward=0.0)
    example = case([Group(0, [winner, loser])], noise=0.0)
    with torch.no_grad():
        example.logprobs.copy_(torch.tensor([0.8, 0.4, 0.3]).double().log())
    loss = loss_of(CISPO(), example)
    loss.backward()  # type: ignore[no-untyped-call]
    a = 0.70710578
    logs = [math.log(0.8), math.log(0.4), math.log(0.3)]
    expected = -a * (5 * logs[0] - 0.5 * logs[1] - 1.5 * logs[2]) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert example.logprobs.grad is not None
    gradient = [-a * 5 / 3, a * 0.5 / 3, a * 1.5 / 3]
    assert example.logprobs.grad.tolist() == pytest.approx(gradient, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), low=st.sampled_from([0.1, 1.0]))
def test_equals_the_papers_sums(seed: int, low: float) -> None:
    example, rule = case(seed), CISPO(clip_low=low, clip_high=0.2, entropy_coef=0.1)
    advantages = example.group_normalized(example.rewards())
    total = torch.zeros((), dtype=torch.float64)
    for t, advantage in enumerate(advantages):
        ratio = math.exp((example.logprobs[t] - example.batch.old_logprobs[t]).item())
        bounded = min(max(ratio, 1 - low), 1.2)
        inner = bounded * advantage * example.logprobs[t] + 0.1 * example.entropy[t]
        total = total - inner / len(advantages)
    assert_loss(rule, example, total)


def test_no_token_loses_its_gradient() -> None:
    """PPO drops a winner's token that became too likely; here it keeps a bounded gradient."""
    samples = [trajectory(prompt(1), action([5], [-9.0]), reward=float(i)) for i in range(2)]
    example = case([Group(0, samples)], noise=0.0)
    with torch.no_grad():
        example.logprobs.add_(8.0)
    loss_of(CISPO(), example).backward()  # type: ignore[no-untyped-call]
    assert example.logprobs.grad is not None
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert example.logprobs.grad.tolist() == pytest.approx([a * 5 / 2, -a * 5 / 2])
