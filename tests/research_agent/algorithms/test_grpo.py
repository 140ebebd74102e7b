from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research_agent.algorithms import make_algorithm
from research_agent.algorithms.base import Tokens
from research_agent.algorithms.functional import (
    group_mean,
    group_std,
    importance_ratio,
    kl,
    sequence_mean,
)
from research_agent.algorithms.grpo import GRPO
from research_agent.batch import make_batch
from research_agent.errors import ConfigError
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
    random_turns,
    trajectory,
)

REWARDS = tuple(enumerate((0.0, 0.25, 1.0)))


def test_literal() -> None:
    """Three tokens, worked by hand.

    Advantages: (1 - 0.5) / (sqrt(0.5) + 1e-6) = 0.70710578, and its negative. The first token's
    ratio 1.25 is clipped to 1.2; the second's 0.5 to 0.8, as its advantage is negative; the third's
    1.5 is not clipped. k3: 2 - ln 2 - 1 = 0.30685282, 0, 0.5 - ln 0.5 - 1 = 0.19314718.

    objective   0.84852694 + 0.0005 - 0.00030685 =  0.84872009
               -0.56568462 + 0.0010              = -0.56468462
               -1.06065867 + 0.0015 - 0.00019315 = -1.05935182
    loss       -(0.84872009 / 2 - 0.56468462 / 4 - 1.05935182 / 4) = -0.01835093
    """
    winner = trajectory(prompt(1), action([5], [math.log(0.4)]), reward=1.0)
    loser = trajectory(prompt(1), action([6, 7], [math.log(0.8), math.log(0.2)]), reward=0.0)
    batch = make_batch([Group(0, [winner, loser])])
    logprobs = torch.tensor([0.5, 0.4, 0.3]).double().log().requires_grad_()
    reference = torch.tensor([1.0, 0.4, 0.15]).double().log()
    entropy = torch.tensor([0.5, 1.0, 1.5]).double().requires_grad_()

    grpo = GRPO()
    tokens = Tokens(
        logprobs=logprobs,
        old_logprobs=batch.old_logprobs.double(),
        reference_logprobs=reference,
        entropy=entropy,
        advantages=grpo.advantages(batch),
        seq_ids=batch.seq_ids,
    )
    objective, logged = grpo.objective(tokens)
    weights = grpo.weights(batch)
    loss = -(weights * objective).sum()
    loss.backward()  # type: ignore[no-untyped-call]

    assert weights.tolist() == [1 / 2, 1 / 4, 1 / 4]
    assert objective.tolist() == pytest.approx([0.84872009, -0.56468462, -1.05935182], abs=2e-7)
    assert loss.item() == pytest.approx(-0.01835093, abs=2e-7)
    # d objective / d log pi: 0.001 (KL alone), 0 (clipped), 1.5 x -0.70710578 - 0.0005
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-0.0005, 0, 0.26528967], abs=2e-7)
    assert entropy.grad is not None
    assert entropy.grad.tolist() == pytest.approx([-0.0005, -0.00025, -0.00025])
    assert logged["clip_fraction"].tolist() == [True, True, False]
    assert logged["kl"].tolist() == pytest.approx([0.30685282, 0, 0.19314718], abs=1e-7)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    clip=st.floats(0, 0.5),
    kl=st.sampled_from([0.0, 1e-3, 0.5]),
    entropy_coef=st.sampled_from([0.0, 1e-3]),
)
def test_equals_the_papers_sums(seed: int, clip: float, kl: float, entropy_coef: float) -> None:
    groups = random_groups(seed, groups=3, samples=3)
    example = case(groups, seed=seed)
    total = clipped_total(
        example,
        example.group_normalized(example.rewards()),
        sample_weights(groups),
        clip=(clip, clip),
        kl=kl,
        entropy_coef=entropy_coef,
    )
    assert_loss(GRPO(clip=clip, kl_coef=kl, entropy_coef=entropy_coef), example, total)


def test_group_statistics() -> None:
    rewards = torch.tensor([1, 2, 4, 10, 3, 7], dtype=torch.float64)
    groups = torch.tensor([0, 2, 0, 2, 2, 1])
    assert group_mean(rewards, groups).tolist() == [2.5, 5, 2.5, 5, 5, 7]
    expected = [math.sqrt(4.5), math.sqrt(19), math.sqrt(4.5), math.sqrt(19), math.sqrt(19), 0]
    assert group_std(rewards, groups).tolist() == pytest.approx(expected)


@given(st.floats(-1e3, 1e3), st.integers(1, 40))
def test_equal_rewards_have_advantage_zero_exactly(reward: float, samples: int) -> None:
    group = Group(0, [trajectory(prompt(1), action([2]), reward=reward) for _ in range(samples)])
    assert GRPO().advantages(make_batch([group])).tolist() == [0.0] * samples


def test_a_group_of_one_has_advantage_zero() -> None:
    alone = Group(0, [trajectory(prompt(1), action([2, 3]), reward=1.0)])
    pair = Group(1, [trajectory(prompt(1), action([2]), reward=r) for r in (0.0, 2.0)])
    advantages = GRPO().advantages(make_batch([alone, pair]))
    assert advantages[:2].tolist() == [0, 0]
    assert advantages[2:].tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)], rel=1e-5)


def test_groups_are_told_apart_by_place_not_by_episode_number() -> None:
    """Two groups of the same task, from two passes over the data, are two groups."""
    first = Group(7, [trajectory(prompt(1), action([2]), reward=r) for r in (0.0, 1.0)])
    second = Group(7, [trajectory(prompt(1), action([2]), reward=r) for r in (5.0, 6.0)])
    advantages = GRPO().advantages(make_batch([first, second])).tolist()
    assert advantages[:2] == pytest.approx(advantages[2:])


def test_weights_of_trajectories_of_any_length_sum_to_one_each() -> None:
    batch = make_batch(random_groups(3))
    weights = sequence_mean(batch.lengths, batch.seq_ids)
    sums = torch.zeros(len(batch), dtype=torch.float64).index_add(0, batch.seq_ids, weights)
    assert sums.tolist() == pytest.approx([1 / len(batch)] * len(batch))


@pytest.mark.parametrize("far", [100.0, -100.0])
def test_policies_that_are_far_apart_give_finite_gradients(far: float) -> None:
    """exp(100) is infinite in float32, and its gradient NaN, even where the ratio is clipped."""
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    other = logprobs.detach() - far
    value = importance_ratio(logprobs, other).minimum(torch.tensor(1.2)) + kl("k3", logprobs, other)
    value.sum().backward()  # type: ignore[no-untyped-call]
    assert logprobs.grad is not None
    assert value.isfinite().all() and logprobs.grad.isfinite().all()


def test_no_kl_needs_no_reference() -> None:
    assert GRPO().needs_reference
    assert not GRPO(kl_coef=0.0).needs_reference


def test_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_algorithm("grpo", clip=0.1) == GRPO(clip=0.1)
    (tmp_path / "my_module.py").write_text("class Mine:\n    needs_reference = False\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert type(make_algorithm("my_module:Mine")).__name__ == "Mine"
    with pytest.raises(ConfigError, match=r"unknown algorithm 'grop'; known: .*grpo"):
        make_algorithm("grop")
    with pytest.raises(ConfigError, match="cannot be imported"):
        make_algorithm("my_module:Yours")
    with pytest.raises(ConfigError, match="does not take"):
        make_algorithm("grpo", beta=1)
    with pytest.raises(ConfigError) as caught:
        make_algorithm("grpo", clip=0.1, kl_coeff=0.0)
    message = str(caught.value)
    assert message.startswith("algorithm 'grpo' does not take the setting 'kl_coeff'; known: clip")
    assert message.endswith("; did you mean 'kl_coef'?")
    with pytest.raises(ConfigError) as caught:
        make_algorithm("my_module:Min")
    assert str(caught.value) == (
        "algorithm 'my_module:Min' cannot be imported: the module my_module has no class 'Min'; "
        "did you mean 'Mine'?"
    )
    for name in ("no_module:Mine", "./my_module.py:Mine", ":Mine"):
        with pytest.raises(ConfigError, match="on PYTHONPATH"):
            make_algorithm(name)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("grpo", {"turn_rewards": "no"}, "grpo: turn_rewards is 'no'; give true or false"),
        ("gigpo", {"normalize": "off"}, "gigpo: normalize is 'off'; give true or false"),
        ("grpo", {"clip": "abc"}, "grpo: clip is 'abc'; give a number"),
        ("grpo", {"clip": True}, "grpo: clip is True; give a number"),
        ("dapo", {"max_rounds": 2.5}, r"dapo: max_rounds is 2\.5; give a whole number"),
        ("ppo", {"gamma": 2}, "ppo: gamma is 2; give a finite number, 0 or more and at most 1"),
        ("mt_ppo", {"lam": 1.5}, "mt_ppo: lam is 1.5; give a finite number"),
    ],
)
def test_a_setting_of_another_kind_is_refused(
    name: str, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_algorithm(name, **settings)


def test_choosing_an_algorithm_loads_no_torch() -> None:
    code = (
        "import sys; from research_agent.algorithms import make_algorithm; make_algorithm('grpo');"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_turn_rewards_literal() -> None:
    """Turns 1, 0 and 0.5, 0.5: mean 0.5, std sqrt(1/6); each has its own and what follows."""
    first = trajectory(prompt(1), action([2, 3], reward=1.0), action([4], reward=0.0), sample=0)
    second = trajectory(prompt(1), action([2], reward=0.5), action([4], reward=0.5), sample=1)
    batch = make_batch([Group(0, [first, second])])
    unit = 0.5 / (math.sqrt(1 / 6) + 1e-6)
    advantages = GRPO(turn_rewards=True).advantages(batch).tolist()
    assert advantages == pytest.approx([0, 0, -unit, 0, 0], abs=1e-12)
    assert GRPO().advantages(batch).tolist() == [0.0] * 5  # the sums are equal


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_turn_rewards_equal_the_papers_sums(seed: int) -> None:
    groups = random_turns(seed)
    expected = []
    for group in groups:
        rewards = [turn.reward for t in group.trajectories for turn in t.turns]
        for t in group.trajectories:
            for k, turn in enumerate(t.turns):
                later = sum(normalized(after.reward, rewards) for after in t.turns[k:])
                expected += [later] * len(turn.tokens)
    got = GRPO(turn_rewards=True).advantages(make_batch(groups))
    assert got.tolist() == pytest.approx(expected, abs=1e-9)


def test_where_episodes_have_one_turn_turn_rewards_are_rewards() -> None:
    group = Group(0, [trajectory(prompt(1), action([2]), reward=r, sample=i) for i, r in REWARDS])
    batch = make_batch([group])
    assert torch.equal(GRPO(turn_rewards=True).advantages(batch), GRPO().advantages(batch))
