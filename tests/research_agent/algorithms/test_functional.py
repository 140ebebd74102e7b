from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research_agent.algorithms.functional import (
    batch_normalized,
    clipped_surrogate,
    discounted_sum,
    gae,
    group_normalized,
    kl,
    leave_one_out_mean,
    rewards_at_end,
    sequence_ratio,
    token_mean,
    truncated_importance,
)
from research_agent.batch import make_batch
from tests.research_agent.rollouts import random_groups

DOUBLE = torch.float64


def test_kl_estimators_literal() -> None:
    """pi = 0.5, pi_ref = 0.25: k1 = ln 2, k2 = (ln 2)^2 / 2, k3 = 0.5 + ln 2 - 1."""
    now, reference = (torch.tensor([p], dtype=DOUBLE).log() for p in (0.5, 0.25))
    assert kl("k1", now, reference).item() == pytest.approx(math.log(2))
    assert kl("k2", now, reference).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl("k3", now, reference).item() == pytest.approx(math.log(2) - 0.5)


def test_kl_estimators_against_the_whole_distribution() -> None:
    """k1 and k3 have the KL as their mean; k2 has its gradient, and k1 in a loss has none."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=DOUBLE, requires_grad=True)
    reference = torch.tensor([0.1, -0.5, 0.2, 0.4], dtype=DOUBLE).log_softmax(0)
    logprobs = logits.log_softmax(0)
    chances = logprobs.exp().detach()
    exact = (logprobs.exp() * (logprobs - reference)).sum()
    (slope,) = torch.autograd.grad(exact, logits, retain_graph=True)
    means = {k: (chances * kl(k, logprobs, reference)).sum() for k in ("k1", "k2", "k3")}
    slopes = {k: torch.autograd.grad(m, logits, retain_graph=True)[0] for k, m in means.items()}
    assert means["k1"].item() == pytest.approx(exact.item())
    assert means["k3"].item() == pytest.approx(exact.item())
    assert means["k2"].item() != pytest.approx(exact.item(), rel=1e-3)
    torch.testing.assert_close(slopes["k2"], slope)
    assert slopes["k1"].abs().max() < 1e-12
    assert (slopes["k3"] - slope).abs().max() > 1e-3  # k3's is that of the other direction


def test_clipped_surrogate_literal() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    value, clipped = clipped_surrogate(ratio, advantages, 0.2, 0.3)
    value.sum().backward()  # type: ignore[no-untyped-call]
    assert value.tolist() == pytest.approx([1.3, -1.5, 0.5, -0.8, 2.2])
    assert clipped.tolist() == [True, False, False, True, False]
    assert ratio.grad is not None
    assert ratio.grad.tolist() == [0, -1, 1, 0, 2]


def test_sequence_ratio_literal() -> None:
    """Two trajectories, of ratios 2, 0.5, 2 and of 4: geometric means 2 ** (1 / 3) and 4."""
    now = torch.tensor([2.0, 0.5, 2.0, 4.0], dtype=DOUBLE).log()
    old, seq_ids = torch.zeros(4, dtype=DOUBLE), torch.tensor([0, 0, 0, 1])
    mean = sequence_ratio(now, old, seq_ids, mean=True)
    assert mean.tolist() == pytest.approx([2 ** (1 / 3)] * 3 + [4])
    whole = sequence_ratio(now, old, seq_ids, mean=False)
    assert whole.tolist() == pytest.approx([2, 2, 2, 4])


def test_truncated_importance_literal() -> None:
    """The learner finds the tokens 3 times, 1.5 times and half as likely as the sampler said."""
    recomputed = torch.tensor([0.6, 0.3, 0.2], dtype=DOUBLE).log()
    reported = torch.tensor([0.2, 0.2, 0.4], dtype=DOUBLE).log()
    assert truncated_importance(recomputed, reported, 2.0).tolist() == pytest.approx([2, 1.5, 0.5])


def test_leave_one_out_literal() -> None:
    values, groups = torch.tensor([1, 2, 6, 5], dtype=DOUBLE), torch.tensor([0, 0, 0, 1])
    assert leave_one_out_mean(values, groups).tolist() == pytest.approx([4, 3.5, 1.5, 5])


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=9))
def test_leaving_one_out_is_the_group_mean_scaled(values: list[float]) -> None:
    """r - mean of the others = (r - mean) G / (G - 1): what makes RLOO and Dr. GRPO cousins."""
    rewards = torch.tensor(values, dtype=DOUBLE)
    others = leave_one_out_mean(rewards, torch.zeros(len(values), dtype=torch.long))
    for i, value in enumerate(values):
        rest = values[:i] + values[i + 1 :]
        assert others[i].item() == pytest.approx(statistics.fmean(rest), abs=1e-9)
        scaled = (value - statistics.fmean(values)) * len(values) / (len(values) - 1)
        assert value - others[i].item() == pytest.approx(scaled, abs=1e-9)


def test_group_normalized_literal() -> None:
    values = torch.tensor([0, 1, 7, 7], dtype=DOUBLE)
    normal = group_normalized(values, torch.tensor([0, 0, 1, 1]), 1e-6)
    half = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert normal.tolist() == pytest.approx([-half, half, 0, 0])


def test_batch_normalized_literal() -> None:
    assert batch_normalized(torch.tensor([1, 2, 3], dtype=DOUBLE)).tolist() == pytest.approx(
        [-math.sqrt(1.5), 0, math.sqrt(1.5)]
    )
    assert batch_normalized(torch.tensor([5, 5], dtype=DOUBLE)).tolist() == [0, 0]


def test_rewards_at_end_literal() -> None:
    """The second trajectory has no action token: its reward has no place, and shifts nothing."""
    rewards, lengths = torch.tensor([1, 2, 3], dtype=DOUBLE), torch.tensor([2, 0, 1])
    assert rewards_at_end(rewards, lengths).tolist() == [0, 1, 3]


def test_discounted_sum_and_gae_literal() -> None:
    """Rewards 0, 0, 1 with gamma 0.5: 0.25, 0.5, 1; and a second trajectory that sees none of it.

    GAE with values 0.1, 0.2, 0.4 and lambda 0.5: deltas 0.5 x 0.2 - 0.1 = 0, 0.5 x 0.4 - 0.2 = 0
    and 1 - 0.4 = 0.6; advantages 0.0375, 0.15, 0.6. The second: 2 - 0.3.
    """
    seq_ids = torch.tensor([0, 0, 0, 1])
    rewards = torch.tensor([0, 0, 1, 2], dtype=DOUBLE)
    values = torch.tensor([0.1, 0.2, 0.4, 0.3], dtype=DOUBLE)
    assert discounted_sum(rewards, seq_ids, 0.5).tolist() == [0.25, 0.5, 1, 2]
    advantages = gae(rewards, values, seq_ids, 0.5, 0.5)
    assert advantages.tolist() == pytest.approx([0.0375, 0.15, 0.6, 1.7])


def test_one_token_and_no_token() -> None:
    one, none = torch.tensor([3.0], dtype=DOUBLE), torch.zeros(0, dtype=DOUBLE)
    number, nothing = torch.tensor([0]), torch.zeros(0, dtype=torch.long)
    assert gae(one, one / 3, number, 1.0, 1.0).tolist() == [2]
    assert gae(none, none, nothing, 1.0, 1.0).tolist() == []
    assert sequence_ratio(none, none, nothing, mean=True).tolist() == []


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    seed=st.integers(0, 999),
)
def test_gae_is_the_definitions_sum(
    lengths: list[int], gamma: float, lam: float, seed: int
) -> None:
    """A_t = sum over l of (gamma lambda)^l delta_(t+l), one trajectory at a time."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    rewards, values = torch.randn((2, count), generator=generator, dtype=DOUBLE)
    seq_ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    got = gae(rewards, values, seq_ids, gamma, lam).tolist()
    at, expected = 0, []
    for length in lengths:
        r, v = rewards[at : at + length].tolist(), [*values[at : at + length].tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        expected += [
            sum((gamma * lam) ** step * delta for step, delta in enumerate(deltas[t:]))
            for t in range(length)
        ]
        at += length
    assert got == pytest.approx(expected)


def test_weights_sum_to_one() -> None:
    batch = make_batch(random_groups(1))
    assert token_mean(batch.lengths, batch.seq_ids).sum().item() == pytest.approx(1)


@pytest.mark.parametrize("far", [300.0, -300.0])
@pytest.mark.parametrize("mean", [True, False])
def test_sequences_that_are_far_apart_give_finite_gradients(far: float, mean: bool) -> None:
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    ratio = sequence_ratio(logprobs, logprobs.detach() - far, torch.tensor([0, 0]), mean=mean)
    value, _ = clipped_surrogate(ratio, torch.tensor([1.0, -1.0]), 0.2, 0.2)
    value.sum().backward()  # type: ignore[no-untyped-call]
    assert logprobs.grad is not None
    assert value.isfinite().all() and logprobs.grad.isfinite().all()
