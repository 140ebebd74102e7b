from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research_agent.algorithms import make_algorithm
from research_agent.algorithms.arpo import ARPO
from research_agent.batch import make_batch
from research_agent.trajectory import Group, Trajectory
from tests.research_agent.objectives import (
    assert_loss,
    case,
    clipped_total,
    loss_of,
    normalized,
    sample_weights,
)
from tests.research_agent.rollouts import action, prompt, random_trees, trajectory


def _forked(*rewards: float) -> Group:
    """One first turn, then as many second turns as there are rewards."""
    return Group(
        0,
        [
            trajectory(
                prompt(1),
                action([2]),
                action([3 + sample]),
                reward=reward,
                sample=sample,
                lineage=(0,) if sample else (),
                tree=0 if sample else None,
            )
            for sample, reward in enumerate(rewards)
        ],
    )


def test_literal() -> None:
    """Rewards 1, 0, 0: mean 1/3, std sqrt(1/3). What they share has the mean of all: 0."""
    batch = make_batch([_forked(1.0, 0.0, 0.0)])
    high, low = (value / (math.sqrt(1 / 3) + 1e-6) for value in (2 / 3, -1 / 3))
    soft = ARPO().advantages(batch).tolist()
    assert soft == pytest.approx([high, high, low, low, low, low])
    hard = ARPO(attribution="hard").advantages(batch).tolist()
    assert hard == pytest.approx([0, high, 0, low, 0, low], abs=1e-9)


def _path(t: Trajectory) -> tuple[int, ...]:
    """The samples that its turns were sampled in."""
    return (*t.lineage, *[t.sample] * (len(t.turns) - len(t.lineage)))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), attribution=st.sampled_from(["soft", "hard"]))
def test_equals_the_papers_sums(seed: int, attribution: str) -> None:
    groups = random_trees(seed)
    example = case(groups, seed=seed)
    rule = make_algorithm("arpo", attribution=attribution, kl_coef=0.2, entropy_coef=0.1)
    advantages = []
    for group in groups:
        rewards = [t.reward for t in group.trajectories]
        each = {t.sample: normalized(t.reward, rewards) for t in group.trajectories}
        for t in group.trajectories:
            for k, turn in enumerate(t.turns):
                sharing = [
                    o for o in group.trajectories if k < len(o.turns) and _path(o)[k] == _path(t)[k]
                ]
                mean = sum(each[o.sample] for o in sharing) / len(sharing)
                advantage = each[t.sample] if attribution == "soft" else mean
                advantages += [advantage] * len(turn.tokens)
    total = clipped_total(example, advantages, sample_weights(groups), kl=0.2, entropy_coef=0.1)
    assert_loss(rule, example, total)


def test_soft_and_hard_have_the_same_gradient_where_nothing_is_clipped() -> None:
    """On policy, with trajectories of equal length: the paper's argument for soft."""
    groups = [_forked(1.0, 0.0, 0.5)]
    example = case(groups, noise=0.0)
    gradients = []
    for attribution in ("soft", "hard"):
        rule = make_algorithm("arpo", attribution=attribution, kl_coef=0.0)
        (gradient,) = torch.autograd.grad(loss_of(rule, example), [example.logprobs])
        shared = gradient[[0, 2, 4]].sum()  # the one turn that they share
        gradients.append([float(shared), *gradient[[1, 3, 5]].tolist()])
    assert gradients[0] == pytest.approx(gradients[1])


def test_the_same_words_in_two_chains_are_not_shared() -> None:
    """They were sampled twice, and say twice what comes of them."""
    apart = [replace(t, lineage=(), tree=None) for t in _forked(1.0, 0.0).trajectories]
    batch = make_batch([Group(0, apart)])
    hard, soft = ARPO(attribution="hard").advantages(batch), ARPO().advantages(batch)
    assert torch.equal(hard, soft)
