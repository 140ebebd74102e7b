from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research_agent.algorithms.base import UsesCritic
from research_agent.algorithms.functional import rewards_at_turn_ends
from research_agent.algorithms.mt_ppo import MTPPO
from research_agent.algorithms.ppo import PPO
from research_agent.batch import make_batch
from research_agent.trajectory import Group
from tests.research_agent.objectives import (
    assert_loss,
    case,
    clipped_total,
    loss_of,
    with_values,
)
from tests.research_agent.rollouts import (
    action,
    observation,
    prompt,
    random_groups,
    random_turns,
    trajectory,
)


def test_literal() -> None:
    """Two turns of two tokens and one, rewards 1 and 2, gamma 1/2, lambda 1, values 0.

    Over tokens the rewards are 0, 1, 2: returns 2 (= 2), 1 + 1 = 2, 0 + 1 = 1. Over turns the
    first has 1 + 2 / 2 = 2, for both of its tokens.
    """
    group = Group(
        0,
        [
            trajectory(
                prompt(1), action([5, 6], reward=1.0), observation(9), action([7], reward=2.0)
            )
        ],
    )
    batch = with_values([group], [0.0, 0.0, 0.0])
    tokens = MTPPO(kl_coef=0.0, gamma=0.5)
    assert tokens.returns(batch).tolist() == pytest.approx([1.0, 2.0, 2.0])
    turns = MTPPO(kl_coef=0.0, gamma=0.5, over="turns")
    assert turns.returns(batch).tolist() == pytest.approx([2.0, 2.0, 2.0])
    batch = with_values([group], [0.5, 9.0, 1.0])  # over turns the second value is not looked at
    advantage = 1 + 0.5 * 1.0 - 0.5 + 0.5 * (2 - 1.0)  # delta of turn 1, and half that of turn 2
    assert turns.returns(batch).tolist() == pytest.approx([0.5 + advantage] * 2 + [2.0])


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    over=st.sampled_from(["tokens", "turns"]),
    kl=st.sampled_from([0.0, 0.3]),
    gamma=st.sampled_from([0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
)
def test_equals_the_papers_sums(seed: int, over: str, kl: float, gamma: float, lam: float) -> None:
    groups = random_turns(seed)
    example = case(groups, values=True, seed=seed)
    rule = MTPPO(over=over, kl_coef=kl, entropy_coef=0.1, gamma=gamma, lam=lam)  # type: ignore[arg-type]
    batch = example.batch
    reference, values = batch.reference_logprobs, batch.values
    assert reference is not None and values is not None
    raw: dict[int, float] = {}
    returns: dict[int, float] = {}
    at = 0
    for group in groups:
        for t in group.trajectories:
            steps: list[tuple[list[int], float]] = []  # the tokens of a step, and its reward
            for turn in t.turns:
                own = list(range(at, at + len(turn.tokens)))
                at += len(own)
                pieces = [own] if over == "turns" else [[token] for token in own]
                for piece in pieces if own else []:
                    cost = sum((batch.old_logprobs[i] - reference[i]).item() for i in piece)
                    steps.append((piece, -kl * cost))
                if steps:  # a turn that says nothing leaves its reward to what was said before
                    steps[-1] = (steps[-1][0], steps[-1][1] + turn.reward)
            running = following = 0.0
            for tokens, reward in reversed(steps):
                value = values[tokens[0]].item()
                running = reward + gamma * following - value + gamma * lam * running
                following = value
                raw |= dict.fromkeys(tokens, running)
                returns |= dict.fromkeys(tokens, running + value)
    count = len(batch.targets)
    mean, std = statistics.fmean(raw.values()), statistics.pstdev(raw.values())
    advantages = [(raw[i] - mean) / std for i in range(count)]
    total = clipped_total(example, advantages, [1 / count] * count, entropy_coef=0.1)
    assert_loss(rule, example, total)
    used = batch if kl else replace(batch, reference_logprobs=None)
    assert isinstance(rule, UsesCritic)
    assert rule.returns(used).tolist() == pytest.approx([returns[i] for i in range(count)])


def test_with_the_reward_at_the_end_it_is_ppo_to_the_bit() -> None:
    example = case(random_groups(3), values=True)
    mine, theirs = MTPPO(entropy_coef=1e-3), PPO()
    assert torch.equal(mine.advantages(example.batch), theirs.advantages(example.batch))
    assert torch.equal(loss_of(mine, example), loss_of(theirs, example))


def test_a_reward_is_not_lost_behind_an_observation_or_in_a_silent_turn() -> None:
    """verl 7278 lost rewards across observations. A silent first turn has nobody to reward."""
    episode = trajectory(
        prompt(1),
        action([], reward=8.0),
        observation(9),
        action([5, 6], reward=1.0),
        observation(9, 9),
        action([], reward=2.0),
        action([7], reward=4.0),
    )
    batch = make_batch([Group(0, [episode]), Group(1, [episode])])
    rewards = rewards_at_turn_ends(batch.turn_rewards, batch.turn_ids, batch.turn_seq_ids)
    assert rewards.tolist() == [0.0, 3.0, 4.0] * 2


@pytest.mark.parametrize("over", ["tokens", "turns"])
def test_what_came_later_gets_no_credit_for_what_came_before(over: str) -> None:
    """A reward of the first turn does not reach the second one's advantage."""
    rule = MTPPO(over=over, kl_coef=0.0)  # type: ignore[arg-type]

    def returns(reward: float) -> list[float]:
        turns = (action([5], reward=reward), observation(9), action([6], reward=0.5))
        batch = with_values([Group(0, [trajectory(prompt(1), *turns)])], [0.0, 0.0])
        found: list[float] = rule.returns(batch).tolist()
        return found

    assert returns(0.0) == [0.5, 0.5]
    assert returns(1.0) == [1.5, 0.5]
