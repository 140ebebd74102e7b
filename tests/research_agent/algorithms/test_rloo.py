from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research_agent.algorithms.rloo import RLOO
from research_agent.batch import make_batch
from research_agent.trajectory import Group
from tests.research_agent.objectives import (
    assert_loss,
    case,
    loss_of,
)
from tests.research_agent.rollouts import action, prompt, trajectory


def test_literal() -> None:
    """Rewards 1, 0, 0.5: advantages 0.75, -0.75, 0. Nothing has moved: the gradient is A_i / N.

    loss -(0.75 - 0.75 + 0) / 3 = 0.
    """
    samples = [
        trajectory(prompt(1), action([5] * n, [-1.0] * n), reward=r)
        for n, r in ((1, 1.0), (2, 0.0), (1, 0.5))
    ]
    example = case([Group(0, samples)], noise=0.0)
    loss = loss_of(RLOO(), example)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert example.logprobs.grad is not None
    assert example.logprobs.grad.tolist() == pytest.approx([-0.25, 0.25, 0.25, 0])


def test_literal_of_the_kl() -> None:
    """Summed over the trajectory, before the baseline: R = 1 - 0.1 x (0.5 + 0.5), and 0."""
    samples = [trajectory(prompt(1), action([5, 6], [-1.0] * 2), reward=r) for r in (1.0, 0.0)]
    batch = make_batch([Group(0, samples)])
    batch = replace(batch, reference_logprobs=torch.tensor([-1.5, -1.5, -1.0, -1.0]))
    advantages = RLOO(kl_coef=0.1).advantages(batch)
    assert advantages.tolist() == pytest.approx([0.9, 0.9, -0.9, -0.9])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), kl=st.sampled_from([0.0, 0.3]))
def test_equals_the_equations_sums(seed: int, kl: float) -> None:
    example, rule = case(seed, noise=0.05), RLOO(kl_coef=kl, entropy_coef=0.1)
    batch, count = example.batch, len(example.batch)
    reference = batch.reference_logprobs
    assert reference is not None
    rewards = example.rewards()
    for i, tokens in example.rows:
        rewards[i] -= kl * sum((batch.old_logprobs[t] - reference[t]).item() for t in tokens)
    total = torch.zeros((), dtype=torch.float64)
    for i, tokens in example.rows:
        advantage = rewards[i] - statistics.fmean(rewards[j] for j in example.group_of(i) if j != i)
        s = torch.stack([example.logprobs[t] - batch.old_logprobs[t] for t in tokens]).sum().exp()
        total = total - torch.min(s * advantage, s.clamp(0.8, 1.2) * advantage) / count
        for t in tokens:
            total = total - 0.1 * example.entropy[t] / (count * len(tokens))
    assert_loss(rule, example, total)


def test_on_policy_it_is_reinforce() -> None:
    """grad = -1/N sum A_i grad log pi(o_i), the paper's, which has no ratio."""
    example = case(4, noise=0.0)
    advantages = RLOO().advantages(example.batch)
    total = torch.zeros((), dtype=torch.float64)
    for _, tokens in example.rows:
        log_of_whole = torch.stack([example.logprobs[t] for t in tokens]).sum()
        total = total - advantages[tokens[0]] * log_of_whole / len(example.batch)
    got, expected = (
        torch.autograd.grad(loss, example.logprobs)[0] for loss in (loss_of(RLOO(), example), total)
    )
    torch.testing.assert_close(got, expected)


def test_a_group_of_one_has_advantage_zero() -> None:
    batch = make_batch([Group(0, [trajectory(prompt(1), action([2]), reward=5.0)])])
    assert RLOO().advantages(batch).tolist() == [0]
