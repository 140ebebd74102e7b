from __future__ import annotations

import copy
import math
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research_agent.algorithms import make_algorithm
from research_agent.algorithms.base import UsesCritic
from research_agent.algorithms.ppo import PPO
from research_agent.batch import make_batch
from research_agent.config import LearnerConfig
from research_agent.errors import CheckpointError, NonFiniteError
from research_agent.models.critic import METRICS, Critic, value_errors
from research_agent.trajectory import Group
from tests.research_agent.conftest import tiny_qwen2
from tests.research_agent.learners import make_learner
from tests.research_agent.objectives import assert_loss, case, clipped_total, with_values
from tests.research_agent.rollouts import (
    action,
    observation,
    prompt,
    random_groups,
    trajectory,
)

PLAIN = PPO(kl_coef=0.0, entropy_coef=0.0, critic_learning_rate=1e-3)


def _critic(
    model: Any, *, value_clip: float = 0.5, micro_batch_tokens: int = 10**6, packing: Any = "off"
) -> Critic:
    rule = PPO(critic_learning_rate=1e-3, critic_warmup_steps=0, value_clip=value_clip)
    config = LearnerConfig(weight_decay=0.0, micro_batch_tokens=micro_batch_tokens)
    return Critic(model, rule, config, packing=packing)


# ---------------------------------------------------------------------------------------------
# The equations


def test_literal() -> None:
    """Values 0.5, 0.25 and reward 1, gamma = lambda = 1: A = 0.5, 0.75; the other's: -0.25.

    Mean 1/3, variance (1/36 + 25/144 + 49/144) / 3 = 0.18055556, std 0.42491829; normalized
    0.39223227, 0.98058068, -1.37281295. Returns 1, 1, 0.
    """
    winner = trajectory(prompt(1), action([5]), observation(9, 9), action([6]), reward=1.0)
    loser = trajectory(prompt(1), action([7]), reward=0.0)
    batch = with_values([Group(0, [winner, loser])], [0.5, 0.25, 0.25])
    expected = [0.39223227, 0.98058068, -1.37281295]
    assert PLAIN.advantages(batch).tolist() == pytest.approx(expected)
    assert PLAIN.returns(batch).tolist() == pytest.approx([1, 1, 0])
    assert PLAIN.weights(batch).tolist() == pytest.approx([1 / 3] * 3)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    kl=st.sampled_from([0.0, 0.3]),
    gamma=st.sampled_from([0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
)
def test_equals_the_papers_sums(seed: int, kl: float, gamma: float, lam: float) -> None:
    example = case(seed, values=True)
    rule = PPO(kl_coef=kl, entropy_coef=0.1, gamma=gamma, lam=lam)
    batch, rewards = example.batch, example.rewards()
    reference, values = batch.reference_logprobs, batch.values
    assert reference is not None and values is not None
    raw: dict[int, float] = {}
    for i, tokens in example.rows:
        running, following = 0.0, 0.0
        for t in reversed(tokens):
            reward = (rewards[i] if t == tokens[-1] else 0.0) - kl * (
                batch.old_logprobs[t] - reference[t]
            ).item()
            running = reward + gamma * following - values[t].item() + gamma * lam * running
            raw[t], following = running, values[t].item()
    mean, std = statistics.fmean(raw.values()), statistics.pstdev(raw.values())
    count = len(batch.targets)
    advantages = [(raw[t] - mean) / std for t in range(count)]
    total = clipped_total(example, advantages, [1 / count] * count, entropy_coef=0.1)
    assert_loss(rule, example, total)
    used = batch if kl else replace(batch, reference_logprobs=None)
    returns = [raw[t] + values[t].item() for t in range(count)]
    assert rule.returns(used).tolist() == pytest.approx(returns)


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_observations_are_no_steps_in_time(lam: float) -> None:
    """verl 2337: GAE that runs over observations discounts by their length, and by their values."""
    rule = PPO(kl_coef=0.0, gamma=0.9, lam=lam)

    def advantages(observed: int) -> torch.Tensor:
        group = Group(
            0,
            [
                trajectory(
                    prompt(1), action([5, 6]), observation(*[9] * observed), action([7]), reward=r
                )
                for r in (1.0, 0.0)
            ],
        )
        return rule.advantages(with_values([group], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]))

    assert torch.equal(advantages(1), advantages(40))


def test_value_errors_literal() -> None:
    """V_old 0, return 1, clip 0.5: a value of 0.8 has moved too far, and counts as 0.5."""
    values = torch.tensor([0.8, 0.3, -0.8, 1.5], requires_grad=True)
    errors, clipped = value_errors(values, torch.zeros(4), torch.ones(4), 0.5)
    errors.sum().backward()  # type: ignore[no-untyped-call]
    assert errors.tolist() == pytest.approx([0.125, 0.245, 1.62, 0.125])
    assert clipped.tolist() == [True, False, False, False]
    assert values.grad is not None
    # 1.5 is as far off as the clipped 0.5: a tie, of which each half has the gradient's half
    assert values.grad.tolist() == pytest.approx([0, -0.7, -1.8, 0.25])


# ---------------------------------------------------------------------------------------------
# The critic


def test_a_critic_begins_at_zero_and_is_that_of_each_actions_context() -> None:
    model = tiny_qwen2(50)
    batch = make_batch(random_groups(0))
    critic = _critic(model)
    assert critic.values(batch).tolist() == [0.0] * len(batch.targets)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        critic.model.head.weight.normal_(generator=generator)
    values = critic.values(batch)
    for t in range(len(batch.targets)):
        row, place = batch.tokens[int(batch.seq_ids[t])], int(batch.positions[t])
        states = model.base_model(input_ids=row[None, :place]).last_hidden_state
        assert values[t].item() == pytest.approx(critic.model.head(states[0, -1]).item(), abs=1e-4)


@pytest.mark.parametrize("budget", [1, 40, 10**6])
@pytest.mark.parametrize("packing", ["off", "on", "tree"])
def test_neither_micro_batches_nor_packing_change_what_it_learns(budget: int, packing: Any) -> None:
    model = tiny_qwen2(50).double()
    whole = _critic(copy.deepcopy(model))
    if packing != "off":
        model.set_attn_implementation(_packed_attention())
    cut = _critic(model, micro_batch_tokens=budget, packing=packing)
    for critic in (whole, cut):
        batch = make_batch(random_groups(0))
        with torch.no_grad():
            critic.model.head.weight.fill_(0.05)
        values = critic.values(batch)
        critic.step(replace(batch, values=values, returns=batch.rewards[batch.seq_ids]))
    for name, value in whole.state_dict()["weights"].items():
        torch.testing.assert_close(cut.state_dict()["weights"][name], value, rtol=1e-7, atol=1e-9)


def _packed_attention() -> str:
    from research_agent.models.attention import PACKED

    return PACKED


def test_a_critic_learns_what_follows_from_a_prompt() -> None:
    """Prompt 1 always earns 1, prompt 2 nothing: the values go there, and explain the returns."""
    groups = [
        Group(n, [trajectory(prompt(n), action([5, 6]), reward=float(n == 1))] * 2) for n in (1, 2)
    ]
    batch = make_batch(groups)
    critic = _critic(tiny_qwen2(50), value_clip=10.0)
    returns = batch.rewards[batch.seq_ids]
    for _ in range(60):
        values = critic.values(batch)
        metrics = critic.step(replace(batch, values=values, returns=returns))
    assert metrics.keys() == METRICS.keys()
    assert metrics["explained_variance"] > 0.95
    assert (critic.values(batch) - returns).abs().max() < 0.2


def test_what_is_not_finite_stops_before_anything_changes() -> None:
    batch = make_batch(random_groups(0))
    critic = _critic(tiny_qwen2(50))
    before = copy.deepcopy(critic.state_dict())
    with pytest.raises(NonFiniteError, match="the critic's gradient is not finite"):
        critic.step(
            replace(
                batch,
                values=critic.values(batch),
                returns=batch.rewards[batch.seq_ids] * math.inf,
            )
        )
    torch.testing.assert_close(critic.state_dict(), before, rtol=0, atol=0)


def test_the_state_of_another_critic_is_refused() -> None:
    with pytest.raises(CheckpointError, match="the critic's state is that of another model"):
        _critic(tiny_qwen2(50)).load_state_dict(_critic(tiny_qwen2(51)).state_dict())


# ---------------------------------------------------------------------------------------------
# In the learner


def test_the_learner_teaches_the_critic_and_resumes_it_to_the_same_bits() -> None:
    assert isinstance(PLAIN, UsesCritic) and not isinstance(make_algorithm("grpo"), UsesCritic)
    options: dict[str, Any] = {"learning_rate": 1e-3, "minibatches": 2}
    rollouts = [random_groups(seed) for seed in range(4)]
    model = tiny_qwen2(50)
    learner = make_learner(model, PLAIN, **options)
    reports = [learner.update(groups) for groups in rollouts]
    assert METRICS.keys() <= reports[0].keys()
    assert reports[0]["value"] == 0 and reports[-1]["value"] != 0

    first = tiny_qwen2(50)
    begun = make_learner(first, PLAIN, **options)
    for groups in rollouts[:2]:
        begun.update(groups)
    second = tiny_qwen2(50)
    second.load_state_dict(first.state_dict())
    resumed = make_learner(second, PLAIN, **options)
    resumed.load_state_dict(copy.deepcopy(begun.state_dict()))
    assert [resumed.update(groups) for groups in rollouts[2:]] == reports[2:]
    for name, value in second.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_the_critic_does_not_share_the_policys_weights() -> None:
    model = tiny_qwen2(50)
    before = copy.deepcopy(model.state_dict())
    learner = make_learner(model, PLAIN, learning_rate=0.0, weight_decay=0.0)
    for seed in range(3):
        learner.update(random_groups(seed))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
