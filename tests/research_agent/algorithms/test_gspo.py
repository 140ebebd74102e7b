from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research_agent.algorithms.grpo import GRPO
from research_agent.algorithms.gspo import GSPO
from research_agent.trajectory import Group
from tests.research_agent.objectives import (
    assert_loss,
    assert_same,
    case,
    loss_of,
)
from tests.research_agent.rollouts import action, prompt, trajectory


def test_literal() -> None:
    """Ratios 2 and 0.5 of the winner's tokens make s = 1; the loser's 1.21 and 1 make s = 1.1.

    With clips of 0.05 the loser's counts in full (its advantage is negative): per trajectory
    0.70710578 and -1.1 x 0.70710578, half of each: loss 0.03535529. The gradient of s by each of
    two log-probabilities is s / 2: -0.70710578 / 4 for the winner's, 1.1 times that up for the
    loser's.
    """
    winner = trajectory(prompt(1), action([5, 6], [math.log(0.2), math.log(0.8)]), reward=1.0)
    loser = trajectory(prompt(1), action([6, 7], [math.log(0.5), math.log(0.3)]), reward=0.0)
    example = case([Group(0, [winner, loser])], noise=0.0)
    with torch.no_grad():
        example.logprobs.copy_(torch.tensor([0.4, 0.4, 0.605, 0.3]).double().log())
    loss = loss_of(GSPO(clip_low=0.05, clip_high=0.05), example)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(0.03535529, rel=1e-6)
    quarter = 0.70710578 / 4
    assert example.logprobs.grad is not None
    expected = [-quarter, -quarter, 1.1 * quarter, 1.1 * quarter]
    assert example.logprobs.grad.tolist() == pytest.approx(expected, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), kl=st.sampled_from([0.0, 0.3]))
def test_equals_the_papers_sums(seed: int, kl: float) -> None:
    example, rule = case(seed), GSPO(clip_low=0.05, clip_high=0.1, kl_coef=kl, entropy_coef=0.1)
    advantages, count = example.group_normalized(example.rewards()), len(example.batch)
    reference = example.batch.reference_logprobs
    assert reference is not None
    total = torch.zeros((), dtype=torch.float64)
    for _, tokens in example.rows:
        advantage = advantages[tokens[0]]
        logs = [example.logprobs[t] - example.batch.old_logprobs[t] for t in tokens]
        s = (torch.stack(logs).sum() / len(tokens)).exp()
        total = total - torch.min(s * advantage, s.clamp(0.95, 1.1) * advantage) / count
        for t in tokens:
            r = (reference[t] - example.logprobs[t]).exp()
            extra = 0.1 * example.entropy[t] - kl * (r - r.log() - 1)
            total = total - extra / (count * len(tokens))
    assert_loss(rule, example, total)


def test_where_nothing_has_moved_it_has_the_gradient_of_grpo() -> None:
    """At ratio 1, d s / d log pi = 1 / |o|: GRPO's weights."""
    example = case(3, noise=0.0)
    plain = GRPO(kl_coef=0.0, entropy_coef=0.0)
    assert_same(example, loss_of(GSPO(), example), loss_of(plain, example))


def test_a_trajectory_is_clipped_as_a_whole() -> None:
    """One token that became much likelier takes the others' gradient with it."""
    samples = [
        trajectory(prompt(1), action([5, 6, 7], [-3.0] * 3), reward=float(i)) for i in range(2)
    ]
    example = case([Group(0, samples)], noise=0.0)
    with torch.no_grad():
        example.logprobs[3].add_(1.0)  # the winner's first token
    loss_of(GSPO(), example).backward()  # type: ignore[no-untyped-call]
    assert example.logprobs.grad is not None
    assert example.logprobs.grad[3:].tolist() == [0, 0, 0]
    assert (example.logprobs.grad[:3] != 0).all()
