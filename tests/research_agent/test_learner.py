from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.synthetic import reward_last_turn
from research_agent.algorithms.grpo import GRPO
from research_agent.batch import make_batch
from research_agent.errors import CheckpointError, ConfigError, NonFiniteError
from research_agent.learner import METRICS
from research_agent.models.policy import TokenLogprobs, batch_logprobs
from research_agent.trajectory import Group, Trajectory
from tests.research_agent.conftest import tiny_gpt2, tiny_llama, tiny_qwen2
from tests.research_agent.learners import make_learner, update_gradient
from tests.research_agent.rollouts import (
    action,
    observation,
    prompt,
    random_groups,
    trajectory,
)

VOCABULARY = 50
PLAIN = GRPO(kl_coef=0.0, entropy_coef=0.0)


class Bigram(nn.Module):
    """The simplest causal language model: the next token depends on this one alone."""

    def __init__(self, vocabulary: int = VOCABULARY, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn((vocabulary, vocabulary), generator=generator, dtype=torch.float64)
        self.table = nn.Parameter(table)
        self.head = nn.Linear(vocabulary, vocabulary, bias=False, dtype=torch.float64)
        self.head.requires_grad_(False)
        nn.init.eye_(self.head.weight)

    @property
    def base_model(self) -> Any:
        return lambda input_ids, use_cache: SimpleNamespace(last_hidden_state=self.table[input_ids])

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def _assert_same(one: dict[str, Tensor], other: dict[str, Tensor], relative: float) -> None:
    """Equal to a share of the largest entry of each parameter's gradient."""
    assert one.keys() == other.keys()
    assert any(value.abs().max() > 0 for value in one.values())
    for name, value in one.items():
        scale = max(value.abs().max().item(), max(v.abs().max().item() for v in one.values()) / 1e3)
        assert (value - other[name]).abs().max().item() <= relative * scale, name


# ---------------------------------------------------------------------------------------------
# The gradient


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), budget=st.integers(1, 300), shuffle=st.randoms())
def test_neither_micro_batches_nor_order_change_the_gradient(
    seed: int, budget: int, shuffle: random.Random
) -> None:
    model, reference = tiny_gpt2(VOCABULARY).double(), tiny_gpt2(VOCABULARY).double()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(0.9)
    groups = random_groups(seed)
    expected = update_gradient(model, groups, GRPO(), reference, micro_batch_tokens=10**6)
    mixed = [Group(g.episode, shuffle.sample(list(g.trajectories), 4)) for g in groups]
    shuffle.shuffle(mixed)
    got = update_gradient(model, mixed, GRPO(), reference, micro_batch_tokens=budget)
    _assert_same(got, expected, 1e-9)


@pytest.mark.parametrize("make", [tiny_qwen2, tiny_llama])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equals_one_trajectory_at_a_time(make: Any, temperature: float) -> None:
    """A tiny model's gradient against the whole model run on each trajectory alone."""
    model, groups, grpo = make(VOCABULARY), random_groups(5), GRPO(kl_coef=0.1, entropy_coef=0.01)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(0.8)
    options: dict[str, Any] = {"temperature": temperature, "micro_batch_tokens": 60}
    got = update_gradient(model, groups, grpo, reference, **options)

    batch = make_batch(groups)
    advantages = grpo.advantages(batch)
    total = torch.zeros(())
    for i, row in enumerate(batch.tokens):
        mine = batch.seq_ids == i
        places = batch.positions[mine]
        logits = model(input_ids=row[None]).logits[0] / temperature
        logprobs = logits.log_softmax(-1)
        with torch.no_grad():
            other = (reference(input_ids=row[None]).logits[0] / temperature).log_softmax(-1)
        for place, old, advantage in zip(
            places, batch.old_logprobs[mine], advantages[mine], strict=True
        ):
            now = logprobs[place - 1, row[place]]
            ratio = (now - old).exp()
            free = ratio * advantage
            bounded = ratio.clamp(0.8, 1.2) * advantage
            delta = other[place - 1, row[place]] - now
            entropy = -(logprobs[place - 1].exp() * logprobs[place - 1]).sum()
            value = torch.min(free, bounded) - 0.1 * (delta.exp() - delta - 1) + 0.01 * entropy
            total = total - value / (len(batch) * len(places))
    model.zero_grad()
    total.backward()  # type: ignore[no-untyped-call]
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    _assert_same(got, expected, 1e-4)


def _with_context(before: Sequence[int], between: Sequence[int], after: Sequence[int]) -> Group:
    """Two samples whose actions follow token 1 and token 2, whatever stands before these."""
    return Group(
        0,
        [
            trajectory(
                prompt(*before, 1),
                action([5, 6], [-3.0, -3.0]),
                observation(*between, 2),
                action([7], [-3.0]),
                observation(*after),
                reward=reward,
                sample=sample,
            )
            for sample, reward in enumerate((0.0, 1.0))
        ],
    )


@settings(max_examples=25, deadline=None)
@given(*[st.lists(st.integers(10, 48), max_size=6) for _ in range(3)])
def test_prompt_and_observation_tokens_are_context_and_nothing_else(
    before: list[int], between: list[int], after: list[int]
) -> None:
    """Where only the token just before an action is its context, no other one changes a bit."""
    model, reference = Bigram(), Bigram(seed=1)
    expected = update_gradient(model, [_with_context([], [], [])], GRPO(), reference)
    got = update_gradient(model, [_with_context(before, between, after)], GRPO(), reference)
    assert torch.equal(got["table"], expected["table"])
    # Only what predicts an action token learns: tokens 1, 5, 2.
    assert got["table"].abs().sum(1).nonzero().flatten().tolist() == [1, 2, 5]


def test_what_is_not_finite_outside_actions_does_no_harm() -> None:
    """NaN times a mask of 0 is NaN; what is never indexed is nothing."""
    model, reference = Bigram(), Bigram(seed=1)
    expected = update_gradient(model, [_with_context([], [], [])], GRPO(), reference)
    for broken in (model, reference):
        with torch.no_grad():
            broken.table[49] = math.nan
            broken.table[48] = math.inf
            broken.table[0] = math.nan  # the padding
    group = _with_context([49, 48], [49], [49])
    longer = replace(group.trajectories[0], segments=group.trajectories[0].segments * 2)
    got = update_gradient(model, [group], GRPO(), reference)
    assert torch.equal(got["table"], expected["table"])
    ragged = update_gradient(model, [Group(0, [longer, *group.trajectories])], GRPO(), reference)
    assert ragged["table"].isfinite().all()


def _rewarded(trajectory_: Trajectory, reward: float) -> Trajectory:
    segments = reward_last_turn(trajectory_.segments, reward)
    return replace(trajectory_, reward=reward, segments=segments)


def test_a_group_of_equal_rewards_teaches_nothing() -> None:
    groups = [
        Group(g.episode, [_rewarded(t, 0.1) for t in g.trajectories]) for g in random_groups(0)
    ]
    gradient = update_gradient(tiny_qwen2(VOCABULARY), groups, PLAIN)
    assert max(value.abs().max().item() for value in gradient.values()) == 0


def test_gradient_follows_reward_and_not_length_of_observations() -> None:
    winner = trajectory(prompt(1), action([5]), observation(*[9] * 30), action([6]), reward=1.0)
    loser = trajectory(prompt(1), action([7, 8]), reward=0.0, sample=1)
    old = make_batch([Group(0, [winner, loser])])
    model = Bigram()
    exact = batch_logprobs(TokenLogprobs(model), old, 100).tolist()
    winner = trajectory(
        prompt(1),
        action([5], exact[:1]),
        observation(*[9] * 30),
        action([6], exact[1:2]),
        reward=1.0,
    )
    loser = trajectory(prompt(1), action([7, 8], exact[2:]), reward=0.0, sample=1)
    gradient = update_gradient(model, [Group(0, [winner, loser])], PLAIN)["table"]
    probabilities = model.table.detach().softmax(-1)
    # Ratio 1: d loss / d logits = -weight x advantage x (one-hot - softmax), by hand.
    half = 0.5 / (math.sqrt(0.5) + 1e-6) / 4
    one_hot = torch.eye(VOCABULARY, dtype=torch.float64)
    row_1 = -half * (one_hot[5] - probabilities[1]) + half * (one_hot[7] - probabilities[1])
    row_9 = -half * (one_hot[6] - probabilities[9])
    row_7 = half * (one_hot[8] - probabilities[7])
    for row, expected in ((1, row_1), (9, row_9), (7, row_7)):
        torch.testing.assert_close(gradient[row], expected, rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------------------------------------
# References, old log-probabilities, several updates


def test_without_kl_no_reference_is_run() -> None:
    class Forbidden(Bigram):
        @property
        def base_model(self) -> Any:
            raise AssertionError("the reference was run")

    make_learner(Bigram(), PLAIN, reference=Forbidden()).update(random_groups(0))
    with pytest.raises(AssertionError, match="reference was run"):
        make_learner(Bigram(), GRPO(), reference=Forbidden()).update(random_groups(0))


def test_the_reference_stays_and_draws_the_policy_to_itself() -> None:
    model, reference = Bigram(), Bigram(seed=1).requires_grad_(False)
    before = copy.deepcopy(reference.state_dict())
    groups = [
        Group(g.episode, [_rewarded(t, 0.0) for t in g.trajectories]) for g in random_groups(0)
    ]
    grpo = GRPO(kl_coef=1.0, entropy_coef=0.0)
    learner = make_learner(model, grpo, reference=reference, learning_rate=0.05, weight_decay=0.0)
    kls = [learner.update(groups)["kl"] for _ in range(20)]
    assert kls[-1] < kls[0] / 2
    assert all(torch.equal(v, before[k]) for k, v in reference.state_dict().items())


def test_recomputed_old_logprobs_do_not_believe_the_sampler() -> None:
    """With one update per rollout the ratio is 1: nothing is clipped; the difference shows."""
    groups = random_groups(0)
    model = tiny_qwen2(VOCABULARY)
    options: dict[str, Any] = {"learning_rate": 1e-3}
    metrics = make_learner(model, PLAIN, old_logprobs="recomputed", **options).update(groups)
    assert metrics["clip_fraction"] == 0
    # The log-probabilities of random_groups are arbitrary.
    assert metrics["sampling_logprob_difference"] > 0.5
    other = make_learner(tiny_qwen2(VOCABULARY), PLAIN, **options).update(groups)
    assert other["clip_fraction"] > 0


def test_several_updates_are_those_of_the_parts_one_after_the_other() -> None:
    groups = random_groups(4, groups=5)
    one, other = tiny_qwen2(VOCABULARY), tiny_qwen2(VOCABULARY)
    metrics = make_learner(one, PLAIN, learning_rate=1e-3, minibatches=2).update(groups)
    assert metrics["optimizer_steps"] == 2
    learner = make_learner(other, PLAIN, learning_rate=1e-3)
    reports = [learner.update(groups[:3]), learner.update(groups[3:])]
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert metrics["grad_norm"] == pytest.approx(sum(r["grad_norm"] for r in reports) / 2)
    assert metrics["sampling_logprob_difference"] == reports[0]["sampling_logprob_difference"]


def test_old_logprobs_are_those_before_the_first_of_several_updates() -> None:
    """Both parts hold the same trajectories: by the second, the policy has moved off."""
    group = random_groups(4, groups=1)[0]
    learner = make_learner(
        Bigram(),
        PLAIN,
        learning_rate=1.0,
        minibatches=2,
        old_logprobs="recomputed",
        weight_decay=0.0,
    )
    assert learner.update([group, group])["clip_fraction"] > 0


def test_more_updates_than_groups() -> None:
    metrics = make_learner(Bigram(), PLAIN, minibatches=7).update(random_groups(0, groups=2))
    assert metrics["optimizer_steps"] == 2


# ---------------------------------------------------------------------------------------------
# Metrics


def test_every_metric_is_defined_and_right() -> None:
    model, reference = Bigram(), Bigram(seed=1)
    groups = [
        Group(
            0,
            [
                trajectory(prompt(1), action([5, 6], [-1, -2]), observation(3), reward=1.0),
                trajectory(prompt(1), action([7], [-3]), reward=0.0, sample=1),
            ],
        )
    ]
    learner = make_learner(model, GRPO(), reference=reference, learning_rate=1e-9)
    metrics = learner.update(groups)
    assert metrics.keys() == METRICS.keys()

    logits = Bigram().table.detach()[[1, 5, 1]]
    now = logits.log_softmax(-1)[range(3), [5, 6, 7]]
    other = reference.table.detach()[[1, 5, 1]].log_softmax(-1)[range(3), [5, 6, 7]]
    difference = (now - torch.tensor([-1.0, -2.0, -3.0])).abs().mean()
    delta = other - now
    expected = {
        "sampling_logprob_difference": difference.item(),
        "kl": (delta.exp() - delta - 1).mean().item(),
        "entropy": torch.special.entr(logits.softmax(-1)).sum(-1).mean().item(),
        "learning_rate": 1e-9,
        "length": 3.0,
        "action_length": 1.5,
        "max_length": 4.0,
        "trajectories": 2.0,
        "optimizer_steps": 1.0,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_grad_norm_is_that_before_clipping() -> None:
    groups = random_groups(0)
    gradient = update_gradient(Bigram(), groups, PLAIN)["table"]
    learner = make_learner(Bigram(), PLAIN, max_grad_norm=1e-3)
    assert learner.update(groups)["grad_norm"] == pytest.approx(gradient.norm().item())
    clipped = update_gradient(Bigram(), groups, PLAIN, max_grad_norm=1e-3)["table"]
    assert clipped.norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_the_difference_is_zero_when_sampler_and_learner_agree() -> None:
    model = tiny_qwen2(VOCABULARY)
    batch = make_batch(random_groups(0))
    exact = iter(batch_logprobs(TokenLogprobs(model, 0.7), batch, 10**6).tolist())
    groups = [
        Group(
            g.episode,
            [
                replace(
                    t,
                    segments=tuple(
                        replace(s, logprobs=tuple(next(exact) for _ in s.tokens))
                        if s.logprobs
                        else s
                        for s in t.segments
                    ),
                )
                for t in g.trajectories
            ],
        )
        for g in random_groups(0)
    ]
    metrics = make_learner(model, PLAIN, temperature=0.7, micro_batch_tokens=50).update(groups)
    assert metrics["sampling_logprob_difference"] < 1e-5
    assert metrics["clip_fraction"] == 0


# ---------------------------------------------------------------------------------------------
# The optimizer


def test_warm_up_and_the_first_step_by_hand() -> None:
    """AdamW's first step moves each weight by lr x gradient / (|gradient| + 1e-8)."""
    model, groups = Bigram(), random_groups(0)
    before = model.table.detach().clone()
    gradient = update_gradient(Bigram(), groups, PLAIN)["table"]
    options: dict[str, Any] = {"learning_rate": 0.4, "warmup_steps": 4, "weight_decay": 0.0}
    learner = make_learner(model, PLAIN, max_grad_norm=math.inf, **options)
    rates = [learner.update(groups)["learning_rate"]]
    torch.testing.assert_close(
        model.table.detach(), before - 0.1 * gradient / (gradient.abs() + 1e-8)
    )
    rates += [learner.update(groups)["learning_rate"] for _ in range(5)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_it_learns_which_token_is_rewarded() -> None:
    model = Bigram(4)
    learner = make_learner(model, PLAIN, learning_rate=0.1, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        logprobs = model.table[0].detach().log_softmax(-1)
        drawn = torch.multinomial(logprobs.exp(), 8, replacement=True, generator=generator)
        samples = [
            trajectory(prompt(0), action([t], [logprobs[t].item()]), reward=float(t == 3))
            for t in drawn.tolist()
        ]
        learner.update([Group(step, samples)])
    assert model.table[0].softmax(-1)[3] > 0.9


def test_frozen_parameters_stay() -> None:
    model = Bigram()
    make_learner(model, PLAIN, learning_rate=0.1).update(random_groups(0))
    assert torch.equal(model.head.weight, torch.eye(VOCABULARY, dtype=torch.float64))


def test_resume_continues_to_the_same_bits() -> None:
    rollouts = [random_groups(seed) for seed in range(6)]
    options: dict[str, Any] = {"learning_rate": 1e-3, "warmup_steps": 5, "minibatches": 2}
    model = tiny_qwen2(VOCABULARY)
    learner = make_learner(model, PLAIN, **options)
    reports = [learner.update(groups) for groups in rollouts]

    first = tiny_qwen2(VOCABULARY)
    begun = make_learner(first, PLAIN, **options)
    for groups in rollouts[:3]:
        begun.update(groups)
    second = tiny_qwen2(VOCABULARY)
    second.load_state_dict(first.state_dict())
    resumed = make_learner(second, PLAIN, **options)
    resumed.load_state_dict(begun.state_dict())
    assert [resumed.update(groups) for groups in rollouts[3:]] == reports[3:]
    for name, value in second.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert resumed.steps == learner.steps == 12


def test_the_state_of_a_learner_that_has_not_stepped() -> None:
    state = make_learner(Bigram(), PLAIN).state_dict()
    learner = make_learner(Bigram(), PLAIN)
    learner.load_state_dict(state)
    assert learner.update(random_groups(0))["optimizer_steps"] == 1


def test_the_state_of_another_model_is_refused() -> None:
    small = make_learner(tiny_qwen2(VOCABULARY), PLAIN)
    small.update(random_groups(0))
    with pytest.raises(CheckpointError, match="another model: they differ in"):
        make_learner(tiny_gpt2(VOCABULARY), PLAIN).load_state_dict(small.state_dict())
    with pytest.raises(CheckpointError, match=r"has the shape \(51, 32\) here and \(50, 32\)"):
        make_learner(tiny_qwen2(VOCABULARY + 1), PLAIN).load_state_dict(small.state_dict())


# ---------------------------------------------------------------------------------------------
# Guards


def _void(trajectory_: Trajectory) -> Trajectory:
    return replace(trajectory_, void=True, reward=0.0)


@pytest.mark.parametrize("kind", ["nothing", "all void", "no action tokens"])
def test_nothing_to_learn_from_changes_nothing(kind: str) -> None:
    groups = {
        "nothing": [],
        "all void": [Group(0, [_void(t) for t in random_groups(0)[0].trajectories])],
        "no action tokens": [Group(0, [trajectory(prompt(1), action([]), reward=1.0)])],
    }[kind]
    model = Bigram()
    learner = make_learner(model, PLAIN, learning_rate=1.0)
    learner.update(random_groups(0))
    before = copy.deepcopy((model.state_dict(), learner.state_dict()))
    metrics = learner.update(groups)
    assert metrics["optimizer_steps"] == 0
    assert torch.equal(model.table, before[0]["table"])
    assert learner.steps == before[1]["steps"] == 1


def test_void_trajectories_change_nothing() -> None:
    groups = random_groups(0)
    wild = _void(trajectory(prompt(1), action([2] * 9), reward=5.0))
    with_void = [Group(g.episode, [wild, *g.trajectories, wild]) for g in groups]
    one, other = (update_gradient(Bigram(), each, PLAIN)["table"] for each in (groups, with_void))
    assert torch.equal(one, other)


class Cause:
    """Ways to make an update fail; each a change of model or rollout."""

    @staticmethod
    def weights(model: Bigram) -> list[Group]:
        with torch.no_grad():
            model.table[7] = math.nan
        return random_groups(0)

    @staticmethod
    def reward(model: Bigram) -> list[Group]:
        groups = random_groups(0)
        return [Group(0, [replace(t, reward=math.inf) for t in groups[0].trajectories])]

    @staticmethod
    def sampler(model: Bigram) -> list[Group]:
        return [Group(0, [trajectory(prompt(1), action([2], [math.nan]))])]

    @staticmethod
    def gradient(model: Bigram) -> list[Group]:
        model.table.register_hook(  # type: ignore[no-untyped-call]
            lambda grad: grad * math.inf
        )
        return random_groups(0)


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        ("weights", r"a log-probability of episode \d+, sample \d+ is nan after 1 optimizer steps"),
        ("reward", r"episode 0, sample 0: the environment gave the reward inf"),
        ("sampler", r"episode 0, sample 0: the engine reported a log-probability"),
        ("gradient", r"the gradient is not finite \(its norm is (nan|inf)\) after 1 optimizer"),
    ],
)
def test_what_is_not_finite_stops_before_anything_changes(cause: str, message: str) -> None:
    model = Bigram()
    learner = make_learner(model, PLAIN, learning_rate=0.1)
    learner.update(random_groups(1))
    groups = getattr(Cause, cause)(model)
    before = copy.deepcopy((model.state_dict(), learner.state_dict()))
    with pytest.raises(NonFiniteError, match=message):
        learner.update(groups)
    torch.testing.assert_close(model.state_dict(), before[0], rtol=0, atol=0, equal_nan=True)
    assert learner.steps == 1
    torch.testing.assert_close(learner.state_dict(), before[1], rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_an_objective_that_is_not_finite_stops() -> None:
    class Broken(GRPO):
        def objective(self, tokens: Any) -> Any:
            return tokens.logprobs * math.inf, {}

    model = Bigram()
    with pytest.raises(NonFiniteError, match="the loss is"):
        make_learner(model, Broken(kl_coef=0.0)).update(random_groups(0))
    assert torch.equal(model.table, Bigram().table)


class Shapes:
    """Algorithms with one mistake each, and what is said about it."""

    class Scores(GRPO):  # a value per trajectory; of a single trajectory it would broadcast
        def advantages(self, batch: Any) -> Any:
            return batch.rewards

    class Column(GRPO):
        def advantages(self, batch: Any) -> Any:
            return super().advantages(batch)[:, None]

    class Weights(GRPO):
        def weights(self, batch: Any) -> Any:
            return super().weights(batch)[:, None]

    class Numbers(GRPO):
        def weights(self, batch: Any) -> Any:
            return super().weights(batch).tolist()

    class Mean(GRPO):
        def objective(self, tokens: Any) -> Any:
            return tokens.logprobs.mean(), {}

    class Logged(GRPO):
        def objective(self, tokens: Any) -> Any:
            return tokens.logprobs, {"ratio": tokens.logprobs.mean()}

    class Alone(GRPO):
        def objective(self, tokens: Any) -> Any:
            return tokens.logprobs

    class Swapped(GRPO):
        def objective(self, tokens: Any) -> Any:
            return {}, tokens.logprobs


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        (Shapes.Scores, r"Scores\.advantages gives \(2,\), not the shape \(7,\)"),
        (Shapes.Column, r"Column\.advantages gives \(7, 1\), not the shape \(7,\)"),
        (Shapes.Weights, r"Weights\.weights gives \(7, 1\), not the shape \(7,\)"),
        (Shapes.Numbers, r"Numbers\.weights gives list, not the shape \(7,\)"),
        (Shapes.Mean, r"Mean\.objective gives \(\), not the shape \(7,\)"),
        (Shapes.Logged, r"Logged\.objective \('ratio' to log\) gives \(\), not the shape \(7,\)"),
    ],
)
def test_values_of_another_shape_are_refused(algorithm: type[GRPO], said: str) -> None:
    one = trajectory(prompt(1), action([5, 6, 7]), reward=1.0)
    other = trajectory(prompt(1), action([8, 9, 8, 9]), reward=0.0, sample=1)
    model = Bigram()
    with pytest.raises(ConfigError, match=rf"^{said}; return a tensor with one value per action"):
        make_learner(model, algorithm(kl_coef=0.0)).update([Group(0, [one, other])])
    assert torch.equal(model.table, Bigram().table)


@pytest.mark.parametrize(
    ("algorithm", "given"), [(Shapes.Alone, "Tensor"), (Shapes.Swapped, "tuple")]
)
def test_an_objective_without_values_to_log_is_refused(algorithm: type[GRPO], given: str) -> None:
    one = trajectory(prompt(1), action([5]), reward=1.0)
    other = trajectory(prompt(1), action([8]), reward=0.0, sample=1)
    said = (
        rf"{algorithm.__name__}\.objective must return \(values, {{name: values}}\), not {given};"
    )
    with pytest.raises(ConfigError, match=said):  # two tokens: their tensor could be unpacked
        make_learner(Bigram(), algorithm(kl_coef=0.0)).update([Group(0, [one, other])])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minibatches": 0}, "minibatches is 0"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm is nan"),
        ({"old_logprobs": "guessed"}, "known: 'sampler', 'recomputed'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_learner(Bigram(), PLAIN, **options)


def test_a_reference_that_is_needed_and_not_given() -> None:
    with pytest.raises(ConfigError, match="needs a reference policy"):
        make_learner(Bigram(), GRPO())
