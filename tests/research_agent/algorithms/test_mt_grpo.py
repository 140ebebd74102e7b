from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research_agent.algorithms import make_algorithm
from research_agent.algorithms.mt_grpo import MTGRPO
from research_agent.batch import make_batch
from research_agent.trajectory import Group, Trajectory
from tests.research_agent.objectives import (
    assert_loss,
    case,
    clipped_total,
    normalized,
    sample_weights,
)
from tests.research_agent.rollouts import action, observation, prompt, random_turns, trajectory


def _two_turns(sample: int, turn: float, outcome: float) -> Trajectory:
    search = action([5], reward=turn)
    answer = action([6, 7], reward=outcome)
    return trajectory(prompt(1), search, observation(2), answer, sample=sample)


def test_literal() -> None:
    """Turns 1 and 0: +-0.70710578; outcomes 0 and 1: -+0.70710578. The first turn has the sum."""
    group = Group(0, [_two_turns(0, 1.0, 0.0), _two_turns(1, 0.0, 1.0)])
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert MTGRPO().advantages(make_batch([group])).tolist() == pytest.approx(
        [0.0, -a, -a, 0.0, a, a], abs=1e-12
    )
    half = MTGRPO(turn_coef=0.5).advantages(make_batch([group])).tolist()
    assert half == pytest.approx([-a / 2, -a, -a, a / 2, a, a])
    assert MTGRPO().weights(make_batch([group])).tolist() == pytest.approx([1 / 6] * 6)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    coef=st.sampled_from([0.0, 0.5, 1.0]),
    kl=st.sampled_from([0.0, 0.3]),
)
def test_equals_the_papers_sums(seed: int, coef: float, kl: float) -> None:
    groups = random_turns(seed)
    example = case(groups, seed=seed)
    rule = MTGRPO(turn_coef=coef, kl_coef=kl, entropy_coef=0.1)
    advantages = []
    for group in groups:
        for t in group.trajectories:
            outcomes = [other.turns[-1].reward for other in group.trajectories]
            outcome = normalized(t.turns[-1].reward, outcomes)
            for k, turn in enumerate(t.turns):
                own = 0.0
                if k < len(t.turns) - 1:
                    others = [o for o in group.trajectories if len(o.turns) - 1 > k]
                    own = coef * normalized(turn.reward, [o.turns[k].reward for o in others])
                advantages += [own + outcome] * len(turn.tokens)
    total = clipped_total(example, advantages, sample_weights(groups), kl=kl, entropy_coef=0.1)
    assert_loss(rule, example, total)


def test_the_turn_that_earned_it_is_told_apart() -> None:
    """The same sum: GRPO sees no difference between the samples, MT-GRPO does."""
    group = Group(0, [_two_turns(0, 0.5, 0.0), _two_turns(1, 0.0, 0.5)])
    batch = make_batch([group])
    assert make_algorithm("grpo").advantages(batch).tolist() == [0.0] * 6
    first, *_, last = MTGRPO(turn_coef=2.0).advantages(batch).tolist()
    assert first > 0 and last > 0


def test_a_group_is_not_compared_with_another() -> None:
    """Wrong group ids (Search-R1 88): a turn of another task is no peer."""
    alone = [Group(0, [_two_turns(0, 1.0, 1.0)]), Group(1, [_two_turns(0, 0.0, 0.0)])]
    assert MTGRPO().advantages(make_batch(alone)).tolist() == [0.0] * 6


def test_a_longer_episode_is_no_peer_of_a_shorter_one_at_its_last_turn() -> None:
    """The reward of a last turn is an outcome, whatever its number."""
    short = trajectory(prompt(1), action([5], reward=1.0), sample=0)
    long = _two_turns(1, 0.25, 1.0)
    assert MTGRPO().advantages(make_batch([Group(0, [short, long])])).tolist() == [0.0] * 4
