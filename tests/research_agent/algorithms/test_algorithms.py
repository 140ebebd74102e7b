"""What holds for every algorithm, whatever its equation, in the learner that all of them share."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import research_agent.algorithms
from research_agent.algorithms import ALGORITHMS, Algorithm, make_algorithm
from research_agent.batch import make_batch
from research_agent.errors import ConfigError
from research_agent.trajectory import Group, Trajectory
from tests.research_agent.conftest import tiny_qwen2
from tests.research_agent.learners import make_learner
from tests.research_agent.objectives import case, loss_of
from tests.research_agent.rollouts import (
    action,
    observation,
    prompt,
    random_groups,
    trajectory,
)
from tests.research_agent.test_learner import Bigram

OUTCOME = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp", "ppo")
"""Algorithms that learn from the reward of the whole episode."""
PLAIN = ("dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp")
"""Algorithms with no KL, or no entropy bonus, to switch off."""

Gradient = dict[str, torch.Tensor]


def _rule(name: str, **settings: Any) -> Algorithm:
    args = {"critic_learning_rate": 1e-3} if name in ("ppo", "mt_ppo") else {}
    return make_algorithm(name, **args, **settings)


def _with_kl(name: str) -> Algorithm:
    """With a KL where the algorithm has one, so that the reference plays its part."""
    return _rule(name, **({} if name in ("dapo", "cispo") else {"kl_coef": 0.1}))


def _gradient(
    name: str, model: Any, reference: Any, groups: list[Group], **settings: Any
) -> Gradient:
    learner = make_learner(
        copy.deepcopy(model),
        _with_kl(name),
        reference=copy.deepcopy(reference),
        learning_rate=0.0,
        max_grad_norm=math.inf,
        betas=(0.0, 0.999),
        **settings,
    )
    learner.update(groups)
    return {n: m["exp_avg"] for n, m in learner.state_dict()["moments"].items() if m}


def _group(*, between: tuple[int, ...] = (), after: tuple[int, ...] = ()) -> Group:
    samples = [
        trajectory(
            prompt(1),
            action([5, 6], [-3.0, -3.1]),
            observation(*between, 2),
            action([7], [-2.9]),
            observation(*after),
            reward=reward,
            sample=sample,
        )
        for sample, reward in enumerate((0.0, 1.0, 0.4))
    ]
    return Group(0, samples)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_it_is_a_file_of_a_screenful_or_two(name: str) -> None:
    folder = Path(research_agent.algorithms.__file__).parent
    assert len((folder / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("name", OUTCOME)
def test_where_in_an_episode_a_reward_came_changes_not_a_bit(name: str) -> None:
    """Algorithms that learn from whole episodes see the sum of the turns' rewards only."""
    at_end = random_groups(5, groups=3, samples=4)
    on_the_way = [
        replace(group, trajectories=[_earlier(t) for t in group.trajectories]) for group in at_end
    ]
    losses = []
    for groups in (at_end, on_the_way):
        given = case(groups, values=True, seed=5)
        loss = loss_of(_with_kl(name), given)
        gradient, *_ = torch.autograd.grad(loss, [given.logprobs])
        losses.append((loss, gradient))
    assert make_batch(at_end).turn_rewards.tolist() != make_batch(on_the_way).turn_rewards.tolist()
    assert torch.equal(losses[0][0], losses[1][0])
    assert torch.equal(losses[0][1], losses[1][1])


def _earlier(trajectory: Trajectory) -> Trajectory:
    """The same episode with its reward on the first turn."""
    shifted, last = list(trajectory.segments), trajectory.turns[-1]
    for i, segment in enumerate(shifted):
        if segment is last:
            shifted[i] = replace(segment, reward=0.0)
    first = next(i for i, s in enumerate(shifted) if s.provenance == "action")
    shifted[first] = replace(shifted[first], reward=trajectory.reward)
    return replace(trajectory, segments=tuple(shifted))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_documents_name_it(name: str) -> None:
    docs = Path(__file__).resolve().parents[3] / "docs/reference"
    for document in ("algorithms.md", "papers.md"):
        assert f"`{name}`" in (docs / document).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_neither_micro_batches_nor_packing_change_the_gradient(name: str) -> None:
    """Denominators are those of the whole batch (open-instruct 1161, TRL 2881)."""
    model, groups = tiny_qwen2(50).double(), random_groups(3)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(0.9)
    whole = _gradient(name, model, reference, groups, micro_batch_tokens=10**6)
    assert max(value.abs().max() for value in whole.values()) > 0
    for settings in (
        {"micro_batch_tokens": 1},
        {"micro_batch_tokens": 50},
        {"micro_batch_tokens": 50, "packing": "on"},
    ):
        cut = _gradient(name, model, reference, groups, **settings)
        for key, value in whole.items():
            torch.testing.assert_close(cut[key], value, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_observations_are_in_no_sum(name: str) -> None:
    """Where only the last token is context, what else was observed changes not a bit."""
    model, reference = Bigram(), Bigram(seed=1)
    expected = _gradient(name, model, reference, [_group()])["table"]
    got = _gradient(name, model, reference, [_group(between=(9,) * 30, after=(8, 8))])["table"]
    assert torch.equal(got, expected)
    assert got.abs().sum(1).nonzero().flatten().tolist() == [1, 2, 5]  # what precedes actions


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_is_not_finite_outside_actions_does_no_harm(name: str) -> None:
    """NaN times a mask of 0 is NaN (SkyRL 1633, OpenRLHF 1240); ours is never indexed."""
    model, reference = Bigram(), Bigram(seed=1)
    expected = _gradient(name, model, reference, [_group(between=(49, 48), after=(49,))])["table"]
    for broken in (model, reference):
        with torch.no_grad():
            broken.table[49], broken.table[48] = math.nan, math.inf
    got = _gradient(name, model, reference, [_group(between=(49, 48), after=(49,))])["table"]
    assert torch.equal(got[:48], expected[:48])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_it_learns_which_token_is_rewarded(name: str) -> None:
    """Two updates per rollout, so that the second one has ratios other than 1."""
    model = Bigram(4)
    off = {"kl_coef": 0.0, "entropy_coef": 0.0} if name not in PLAIN else {}
    learner = make_learner(
        model, _rule(name, **off), learning_rate=0.1, weight_decay=0.0, minibatches=2
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        logprobs = model.table[0].detach().log_softmax(-1)
        groups = []
        for number in range(2):
            drawn = torch.multinomial(logprobs.exp(), 8, replacement=True, generator=generator)
            samples = [
                trajectory(prompt(0), action([t], [logprobs[t].item()]), reward=float(t == 3))
                for t in drawn.tolist()
            ]
            groups.append(Group(number, samples))
        learner.update(groups)
    assert model.table[0].softmax(-1)[3] > 0.9


@pytest.mark.parametrize("name", ALGORITHMS)
def test_nothing_to_learn_from_changes_nothing(name: str) -> None:
    model = Bigram()
    learner = make_learner(model, _with_kl(name), reference=Bigram(seed=1), learning_rate=1.0)
    for groups in ([], [Group(0, [trajectory(prompt(1), action([]), reward=1.0)])]):
        assert learner.update(groups)["optimizer_steps"] == 0
    assert torch.equal(model.table, Bigram().table)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_trajectory_without_action_tokens_among_others(name: str) -> None:
    """It has a reward and no place to put it: the others' credit stays where it belongs."""
    empty = trajectory(prompt(1), action([]), reward=0.4)
    group = _group()
    mixed = Group(0, [group.trajectories[0], empty, *group.trajectories[1:]])
    gradient = _gradient(name, Bigram(), Bigram(seed=1), [mixed])["table"]
    assert gradient.isfinite().all() and gradient.abs().max() > 0


@pytest.mark.parametrize("name", ALGORITHMS)
def test_settings_that_make_no_sense_are_refused(name: str) -> None:
    for field in fields(type(make_algorithm(name))):  # type: ignore[arg-type]
        positive = field.name in ("std_epsilon", "max_length", "max_rounds", "overlong_cache")
        bad: dict[Any, Sequence[object]] = {
            "float": (-0.1, math.nan, math.inf),
            "int": (-1,),
            "bool": (),
        }
        for value in (0,) if positive else bad.get(field.type, ("other",)):
            with pytest.raises(ConfigError, match=f"{name}: {field.name} is {value!r}; "):
                make_algorithm(name, **{field.name: value})


@pytest.mark.parametrize("name", ["ppo", "mt_ppo"])
def test_a_batch_without_values_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="needs a learner with a critic"):
        _rule(name).advantages(make_batch(random_groups(0)))


def test_the_cap_of_truncated_importance_sampling() -> None:
    rule, groups = make_algorithm("grpo", kl_coef=0.0, entropy_coef=0.0), random_groups(0)
    for cap, old in ((2.0, "sampler"), (0.0, "recomputed"), (math.nan, "recomputed")):
        with pytest.raises(ConfigError, match="importance_sampling_cap is"):
            make_learner(Bigram(), rule, importance_sampling_cap=cap, old_logprobs=old)

    def norm(cap: float | None) -> float:
        learner = make_learner(
            Bigram(), rule, old_logprobs="recomputed", importance_sampling_cap=cap
        )
        return learner.update(groups)["grad_norm"]

    # The rollout's log-probabilities are made up: under a tiny cap all weights are that cap.
    assert norm(1e-6) == pytest.approx(1e-6 * norm(None), rel=1e-4)
