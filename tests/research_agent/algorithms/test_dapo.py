from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research_agent.algorithms import algorithm
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
from research_agent.errors import ConfigError
from research_agent.run_logger import METRICS, read_lines
from research_agent.trainer import train
from research_agent.trajectory import Group
from tests.research_agent.conftest import save_letter_model
from tests.research_agent.objectives import (
    assert_loss,
    case,
    loss_of,
)
from tests.research_agent.rollouts import action, observation, prompt, trajectory


def test_literal() -> None:
    """Clip-higher: the winner's ratio 1.5 counts as 1.28; the loser's 0.5 as 0.8, its 1.5 in full.

    Three tokens, each with weight 1/3; advantages 0.70710578 and its negative.
    loss -(1.28 - 0.8 - 1.5) x 0.70710578 / 3 = 0.24041597.
    """
    winner = trajectory(prompt(1), action([5], [math.log(0.2)]), reward=1.0)
    loser = trajectory(prompt(1), action([6, 7], [math.log(0.8), math.log(0.2)]), reward=0.0)
    given_ = case([Group(0, [winner, loser])], noise=0.0)
    with torch.no_grad():
        given_.logprobs.copy_(torch.tensor([0.3, 0.4, 0.3]).double().log())
    loss = loss_of(DAPO(), given_)
    assert loss.item() == pytest.approx(0.24041597, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), limit=st.sampled_from([0, 9]))
def test_equals_the_papers_sums(seed: int, limit: int) -> None:
    given_ = case(seed)
    rule = DAPO(clip_low=0.1, clip_high=0.4, overlong_limit=limit, overlong_cache=4)
    rewards = given_.rewards()
    if limit:
        for i, tokens in given_.rows:
            over = len(tokens) - (limit - 4)
            rewards[i] += 0 if over <= 0 else -over / 4 if len(tokens) <= limit else -1
    total = torch.zeros((), dtype=torch.float64)
    count = len(given_.batch.targets)
    for i, tokens in given_.rows:
        of_group = [rewards[j] for j in given_.group_of(i)]
        advantage = (rewards[i] - statistics.fmean(of_group)) / (statistics.stdev(of_group) + 1e-6)
        for t in tokens:
            ratio = (given_.logprobs[t] - given_.batch.old_logprobs[t]).exp()
            total = total - torch.min(ratio * advantage, ratio.clamp(0.9, 1.4) * advantage) / count
    assert_loss(rule, given_, total)


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


def test_which_groups_are_kept() -> None:
    assert isinstance(DAPO(), SelectsGroups)
    assert not isinstance(algorithm("grpo"), SelectsGroups)
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


@pytest.mark.parametrize("setting", [{"max_rounds": 0}, {"clip_high": -1}, {"overlong_cache": 0}])
def test_settings_that_make_no_sense_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"dapo: {next(iter(setting))} is"):
        algorithm("dapo", **setting)
