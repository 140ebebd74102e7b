from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research_agent.algorithms import make_algorithm
from research_agent.algorithms.base import SelectsGroups
from research_agent.algorithms.dapo import DAPO
from research_agent.batch import make_batch
from research_agent.config import (
    AlgorithmConfig,
    EnvironmentConfig,
    LearnerConfig,
    PolicyConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    TrainConfig,
)
from research_agent.run_logger import METRICS, read_lines
from research_agent.trainer import train
from research_agent.trajectory import Group
from tests.research_agent.conftest import save_letter_model
from tests.research_agent.objectives import (
    assert_loss,
    case,
    clipped_total,
    loss_of,
    normalized,
)
from tests.research_agent.rollouts import action, observation, prompt, trajectory


def test_literal() -> None:
    """Clip-higher: the winner's ratio 1.5 counts as 1.28; the loser's 0.5 as 0.8, its 1.5 in full.

    Three tokens, each with weight 1/3; advantages 0.70710578 and its negative.
    loss -(1.28 - 0.8 - 1.5) x 0.70710578 / 3 = 0.24041597.
    """
    winner = trajectory(prompt(1), action([5], [math.log(0.2)]), reward=1.0)
    loser = trajectory(prompt(1), action([6, 7], [math.log(0.8), math.log(0.2)]), reward=0.0)
    example = case([Group(0, [winner, loser])], noise=0.0)
    with torch.no_grad():
        example.logprobs.copy_(torch.tensor([0.3, 0.4, 0.3]).double().log())
    loss = loss_of(DAPO(), example)
    assert loss.item() == pytest.approx(0.24041597, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), limit=st.sampled_from([0, 9]))
def test_equals_the_papers_sums(seed: int, limit: int) -> None:
    example = case(seed)
    rule = DAPO(clip_low=0.1, clip_high=0.4, overlong_limit=limit, overlong_cache=4)
    rewards = example.rewards()
    if limit:
        for i, tokens in example.rows:
            over = len(tokens) - (limit - 4)
            rewards[i] += 0 if over <= 0 else -over / 4 if len(tokens) <= limit else -1
    weights = [1 / len(example.batch.targets)] * len(example.batch.targets)
    advantages = example.group_normalized(rewards)
    assert_loss(rule, example, clipped_total(example, advantages, weights, clip=(0.1, 0.4)))


def test_every_token_counts_the_same() -> None:
    short, long = (trajectory(prompt(1), action([2] * n)) for n in (1, 9))
    assert DAPO().weights(make_batch([Group(0, [short, long])])).tolist() == [0.1] * 10


def test_observations_do_not_make_a_response_overlong() -> None:
    group = Group(0, [trajectory(prompt(1), action([2]), observation(*[9] * 50), action([3]))] * 2)
    rule = DAPO(overlong_limit=10, overlong_cache=4)
    assert rule.advantages(make_batch([group])).tolist() == [0, 0, 0, 0]
    longer = trajectory(prompt(1), action([2] * 10))  # 10 action tokens: one less
    advantages = rule.advantages(make_batch([Group(0, [*group.trajectories, longer])]))
    assert advantages[-1] < 0 < advantages[0]


def test_overlong_literal() -> None:
    """L_max 10, L_cache 4: nothing up to 6 tokens, half at 8, all from 10 on."""
    lengths = (6, 8, 10, 12)
    group = Group(0, [trajectory(prompt(1), action([2] * n), reward=1.0) for n in lengths])
    rule = DAPO(overlong_limit=10, overlong_cache=4)
    rewards = [1.0, 0.5, 0.0, 0.0]
    expected = [
        normalized(r, rewards) for n, r in zip(lengths, rewards, strict=True) for _ in range(n)
    ]
    assert rule.advantages(make_batch([group])).tolist() == pytest.approx(expected)


def test_which_groups_are_kept() -> None:
    assert isinstance(DAPO(), SelectsGroups)
    assert not isinstance(make_algorithm("grpo"), SelectsGroups)
    assert not DAPO().keeps([1.0, 1.0, 1.0])
    assert not DAPO().keeps([0.0])
    assert not DAPO().keeps([])
    assert DAPO().keeps([0.1, 0.0, 0.1])
    assert DAPO(dynamic=False).keeps([1.0, 1.0])


@pytest.fixture
def configured(tmp_path: Path) -> Callable[..., TrainConfig]:
    """Runs of a tiny policy that copies a letter, by DAPO."""
    save_letter_model(tmp_path / "model", "abcd=?!")

    def make(name: str, steps: int, samples: int = 3, **args: Any) -> TrainConfig:
        return TrainConfig(
            environment=EnvironmentConfig(env="tests.research_agent.toy_env:CopyLetter-v0"),
            policy=PolicyConfig(model=str(tmp_path / "model"), device="cpu"),
            sampling=SamplingConfig(
                temperature=1.0, max_prompt=8, max_response=8, max_turn_tokens=2
            ),
            rollout=RolloutConfig(prompts_per_step=4, group_size=samples),
            algorithm=AlgorithmConfig(algorithm="dapo", algorithm_args=args),
            learner=LearnerConfig(learning_rate=1e-3),
            run=RunConfig(steps=steps, output=tmp_path / name, save_every=1, quiet=True),
        )

    return make


def test_dynamic_sampling_plays_on_until_the_step_is_full(
    configured: Callable[..., TrainConfig],
) -> None:
    train(configured("run", 3))
    lines = read_lines(configured("run", 3).run.output / METRICS)
    assert any(line["episodes"] > 12 for line in lines)  # some group had no contrast
    for line in lines:
        assert line["episodes"] % 3 == 0
        assert line["learner/trajectories"] <= 12
        if line["episodes"] < 4 * 3 * 10:
            assert line["learner/trajectories"] == 12


def test_groups_of_one_never_have_a_contrast(configured: Callable[..., TrainConfig]) -> None:
    """All rounds are played, nothing is learned, and nothing breaks."""
    config = configured("run", 1, samples=1, max_rounds=3)
    train(config)
    (line,) = read_lines(config.run.output / METRICS)
    assert (line["episodes"], line["learner/trajectories"], line["learner/optimizer_steps"]) == (
        12,
        0,
        0,
    )


def test_a_stopped_run_goes_on_to_the_same_numbers(configured: Callable[..., TrainConfig]) -> None:
    train(configured("whole", 4))
    train(configured("parts", 2))
    train(configured("parts", 4))
    whole, parts = (
        read_lines(configured(name, 4).run.output / METRICS) for name in ("whole", "parts")
    )
    assert whole == parts
