from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research_agent.algorithms import make_algorithm
from research_agent.algorithms.tree_grpo import TreeGRPO
from research_agent.batch import make_batch
from research_agent.trajectory import Group
from tests.research_agent.objectives import (
    assert_loss,
    case,
    clipped_total,
    normalized,
    sample_weights,
)
from tests.research_agent.rollouts import (
    action,
    prompt,
    random_groups,
    random_trees,
    trajectory,
)


def test_literal() -> None:
    """Tree 0 has 1 and 0, tree 1 has 1 and 1: intra +-0.7071, 0, 0; inter 0.5, -1.5, 0.5, 0.5."""
    a, b = action([2]), action([3])
    group = Group(
        0,
        [
            trajectory(prompt(1), a, b, reward=1.0, sample=0),
            trajectory(prompt(1), a, a, reward=0.0, sample=1, lineage=(0,), tree=0),
            trajectory(prompt(1), b, reward=1.0, sample=2),
            trajectory(prompt(1), a, reward=1.0, sample=3, tree=2),
        ],
    )
    intra = 0.5 / (math.sqrt(0.5) + 1e-6)
    inter = [value / (0.5 + 1e-6) for value in (0.25, -0.75, 0.25, 0.25)]
    expected = [inter[0] + intra] * 2 + [inter[1] - intra] * 2 + [inter[2], inter[3]]
    batch = make_batch([group])
    assert TreeGRPO().advantages(batch).tolist() == pytest.approx(expected)
    only = TreeGRPO(inter_coef=0.0).advantages(batch).tolist()
    assert only == pytest.approx([intra, intra, -intra, -intra, 0, 0])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), intra=st.sampled_from([0.0, 1.0]), kl=st.sampled_from([0, 0.3]))
def test_equals_the_papers_sums(seed: int, intra: float, kl: float) -> None:
    groups = random_trees(seed)
    example = case(groups, seed=seed)
    rule = TreeGRPO(intra_coef=intra, kl_coef=kl, entropy_coef=0.1)
    advantages = []
    for group in groups:
        roots = [t.sample if t.tree is None else t.tree for t in group.trajectories]
        for t, root in zip(group.trajectories, roots, strict=True):
            everyone = [other.reward for other in group.trajectories]
            tree = [o.reward for o, r in zip(group.trajectories, roots, strict=True) if r == root]
            advantage = intra * normalized(t.reward, tree) + normalized(t.reward, everyone)
            advantages += [advantage] * t.num_action_tokens
    total = clipped_total(example, advantages, sample_weights(groups), kl=kl, entropy_coef=0.1)
    assert_loss(rule, example, total)


def test_with_chains_it_is_grpo_to_the_bit() -> None:
    """Every chain is a tree of its own, though all have the same prompt."""
    groups = [
        Group(
            g.episode,
            [trajectory(*t.segments, episode=t.episode, sample=t.sample) for t in g.trajectories],
        )
        for g in random_groups(4)
    ]
    batch = make_batch(groups)
    assert torch.equal(TreeGRPO().advantages(batch), make_algorithm("grpo").advantages(batch))


def test_trees_of_other_tasks_are_other_trees() -> None:
    """Root 0 of one task is not root 0 of the next."""
    groups = [
        Group(n, [trajectory(prompt(1), action([2]), reward=float(n), sample=0)]) for n in range(2)
    ]
    assert TreeGRPO().advantages(make_batch(groups)).tolist() == [0.0, 0.0]
