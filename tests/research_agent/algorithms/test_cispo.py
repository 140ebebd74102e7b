from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research_agent.algorithms import algorithm
from research_agent.algorithms.cispo import CISPO
from research_agent.errors import ConfigError
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
    given_ = case([Group(0, [winner, loser])], noise=0.0)
    with torch.no_grad():
        given_.logprobs.copy_(torch.tensor([0.8, 0.4, 0.3]).double().log())
    loss = loss_of(CISPO(), given_)
    loss.backward()  # type: ignore[no-untyped-call]
    a = 0.70710578
    logs = [math.log(0.8), math.log(0.4), math.log(0.3)]
    expected = -a * (5 * logs[0] - 0.5 * logs[1] - 1.5 * logs[2]) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert given_.logprobs.grad is not None
    gradient = [-a * 5 / 3, a * 0.5 / 3, a * 1.5 / 3]
    assert given_.logprobs.grad.tolist() == pytest.approx(gradient, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), low=st.sampled_from([0.1, 1.0]))
def test_equals_the_papers_sums(seed: int, low: float) -> None:
    given_, rule = case(seed), CISPO(clip_low=low, clip_high=0.2, entropy_coef=0.1)
    rewards, count = given_.rewards(), len(given_.batch.targets)
    total = torch.zeros((), dtype=torch.float64)
    for i, tokens in given_.rows:
        of_group = [rewards[j] for j in given_.group_of(i)]
        advantage = (rewards[i] - statistics.fmean(of_group)) / (statistics.stdev(of_group) + 1e-6)
        for t in tokens:
            ratio = math.exp((given_.logprobs[t] - given_.batch.old_logprobs[t]).item())
            bounded = min(max(ratio, 1 - low), 1.2)
            inner = bounded * advantage * given_.logprobs[t] + 0.1 * given_.entropy[t]
            total = total - inner / count
    assert_loss(rule, given_, total)


def test_no_token_loses_its_gradient() -> None:
    """PPO drops a winner's token that became too likely; here it keeps a bounded gradient."""
    samples = [trajectory(prompt(1), action([5], [-9.0]), reward=float(i)) for i in range(2)]
    given_ = case([Group(0, samples)], noise=0.0)
    with torch.no_grad():
        given_.logprobs.add_(8.0)
    loss_of(CISPO(), given_).backward()  # type: ignore[no-untyped-call]
    assert given_.logprobs.grad is not None
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert given_.logprobs.grad.tolist() == pytest.approx([a * 5 / 2, -a * 5 / 2])


@pytest.mark.parametrize("setting", [{"clip_low": math.nan}, {"std_epsilon": 0}])
def test_settings_that_make_no_sense_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"cispo: {next(iter(setting))} is"):
        algorithm("cispo", **setting)
