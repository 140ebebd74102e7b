from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research_agent.batch import make_batch, micro_batches
from research_agent.errors import EnvironmentContractError, NonFiniteError
from research_agent.trajectory import Group, Segment, Trajectory
from tests.research_agent.rollouts import action, observation, prompt, random_groups, trajectory

TWO_TURNS = trajectory(
    prompt(10, 11), action([20, 21], [-0.5, -0.25]), observation(30, 31), action([22], [-2.0])
)


def test_literal() -> None:
    short = trajectory(prompt(12), action([23], [-1.0]), reward=0.5, sample=1)
    batch = make_batch([Group(0, [TWO_TURNS, short])])
    assert [row.tolist() for row in batch.tokens] == [[10, 11, 20, 21, 30, 31, 22], [12, 23]]
    assert batch.lengths.tolist() == [3, 1]
    assert batch.seq_ids.tolist() == [0, 0, 0, 1]
    assert batch.positions.tolist() == [2, 3, 6, 1]
    assert batch.targets.tolist() == [20, 21, 22, 23]
    assert batch.sampler_logprobs.tolist() == [-0.5, -0.25, -2.0, -1.0]
    assert batch.rewards.tolist() == [0.0, 0.5]

    (micro,) = micro_batches(batch, max_tokens=100)
    # The last action token is predicted and never read; neither is what follows it.
    assert micro.tokens.tolist() == [[10, 11, 20, 21, 30, 31], [12, 0, 0, 0, 0, 0]]
    assert micro.logit_index.tolist() == [1, 2, 5, 6]
    assert micro.part.targets.tolist() == [20, 21, 22, 23]
    assert micro.token_index.tolist() == [0, 1, 2, 3]


def test_void_trajectories_are_left_out_and_groups_keep_apart() -> None:
    good = trajectory(prompt(1), action([2]))
    void = trajectory(prompt(1), action([2]), reward=math.nan, void=True)
    batch = make_batch([Group(0, [void, good]), Group(1, [void]), Group(2, [good, good])])
    assert batch.groups.tolist() == [0, 2, 2]


def test_a_trajectory_without_action_tokens_is_counted_and_never_forwarded() -> None:
    silent = trajectory(prompt(1, 2), action([]), observation(3), reward=1.0)
    batch = make_batch([Group(0, [silent, TWO_TURNS, silent])])
    assert batch.lengths.tolist() == [0, 3, 0]
    assert batch.seq_ids.tolist() == [1, 1, 1]
    (micro,) = micro_batches(batch, max_tokens=100)
    assert micro.tokens.tolist() == [[10, 11, 20, 21, 30, 31]]


@pytest.mark.parametrize("groups", [[], [Group(0, [])]])
def test_nothing(groups: list[Group]) -> None:
    batch = make_batch(groups)
    assert len(batch) == 0
    assert list(micro_batches(batch, 10)) == []


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 120))
def test_every_action_token_is_predicted_once_whatever_the_cut(seed: int, budget: int) -> None:
    batch = make_batch(random_groups(seed))
    micros = list(micro_batches(batch, budget))
    picked = torch.cat([micro.token_index for micro in micros])
    assert sorted(picked.tolist()) == list(range(len(batch.targets)))
    for micro in micros:
        rows, width = micro.tokens.shape
        assert rows == 1 or rows * width <= budget
        for predictor, picked_, target in zip(
            micro.logit_index.tolist(), micro.token_index.tolist(), micro.part.targets, strict=True
        ):
            row, column = divmod(predictor, width)
            whole = batch.tokens[int(batch.seq_ids[picked_])]
            place = int(batch.positions[picked_])
            assert column == place - 1
            assert whole[place] == target == batch.targets[picked_]
            assert micro.tokens[row, :place].tolist() == whole[:place].tolist()
    widths = [micro.tokens.shape[1] for micro in micros]
    assert widths == sorted(widths, reverse=True)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.permutations(range(8)), st.integers(0, 8))
def test_select_is_the_batch_of_those_trajectories(seed: int, order: list[int], n: int) -> None:
    groups = random_groups(seed, groups=2, samples=4)
    every = [(g, t) for g, group in enumerate(groups) for t in group.trajectories]
    chosen = order[:n]
    got = make_batch(groups).select(chosen)
    expected = make_batch([Group(0, [every[i][1] for i in chosen])])
    per_token = ("seq_ids", "positions", "targets", "sampler_logprobs", "turn_ids")
    for name in ("lengths", "rewards", *per_token, "turn_seq_ids", "turn_rewards"):
        assert getattr(got, name).tolist() == getattr(expected, name).tolist(), name
    assert got.state_keys == expected.state_keys
    assert got.names == expected.names
    assert [t.tolist() for t in got.tokens] == [t.tolist() for t in expected.tokens]
    assert got.groups.tolist() == [every[i][0] for i in chosen]


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (trajectory(action([1])), EnvironmentContractError, "episode 0, sample 0: the prompt is"),
        (trajectory(prompt(), action([1])), EnvironmentContractError, "the prompt is empty"),
        (trajectory(prompt(1), action([1]), reward=math.nan), NonFiniteError, "reward nan"),
        (trajectory(prompt(1), action([1], [-math.inf])), NonFiniteError, "not finite"),
        (trajectory(prompt(1), action([1, 2], [-1.0])), ValueError, "2 tokens has 1 log"),
        (trajectory(prompt(1), Segment("action", (1,))), ValueError, "1 tokens has None log"),
        (
            trajectory(prompt(1), action([1]), Segment("observation", (1,), (-1.0,))),
            ValueError,
            "provenance observation has log-probabilities",
        ),
    ],
)
def test_broken_trajectories_are_refused(
    wrong: Trajectory, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_batch([Group(0, [TWO_TURNS, wrong])])


# ---------------------------------------------------------------------------------------------
# Turns


def test_turns_literal() -> None:
    long = trajectory(
        prompt(1),
        action([2, 3], reward=0.25, state_key="start"),
        observation(4),
        action([], reward=0.5, state_key="found"),  # a turn of no token is a turn
        action([5], reward=-1.0),
    )
    short = trajectory(prompt(1), action([6], reward=2.0, state_key="start"), sample=1)
    batch = make_batch([Group(0, [long, short])])
    assert batch.turn_ids.tolist() == [0, 0, 2, 3]
    assert batch.turn_seq_ids.tolist() == [0, 0, 0, 1]
    assert batch.turn_rewards.tolist() == [0.25, 0.5, -1.0, 2.0]
    assert batch.turn_rewards.dtype == torch.float64
    assert batch.state_keys == ("start", "found", "", "start")
    assert batch.turn_nodes.tolist() == [0, 1, 2, 3]
    assert batch.trees.tolist() == [0, 1]
    assert batch.rewards.tolist() == [-0.25, 2.0]


def _tree(episode: int) -> Group:
    """Sample 1 leaves sample 0 after one turn, sample 2 leaves 1 after two, 3 starts at the root.

    Sample 4 is a chain of its own, though it says the same.
    """
    a, b, c = action([2]), action([3]), action([4])
    return Group(
        episode,
        [
            trajectory(prompt(1), a, b, sample=0),
            trajectory(prompt(1), a, c, c, sample=1, lineage=(0,), tree=0),
            trajectory(prompt(1), a, c, b, sample=2, lineage=(0, 1), tree=0),
            trajectory(prompt(1), b, sample=3, tree=0),
            trajectory(prompt(1), a, b, sample=4),
        ],
    )


def test_branches_literal() -> None:
    batch = make_batch([_tree(0), _tree(1)])
    one = [0, 1, 0, 3, 4, 0, 3, 7, 8, 9, 10]
    assert batch.turn_nodes.tolist() == one + [11 + node for node in one]
    assert batch.trees.tolist() == [0, 0, 0, 0, 4, 5, 5, 5, 5, 9]


def test_a_branch_whose_source_is_void_keeps_its_own_copy_of_the_turns() -> None:
    source, one, two, *_ = _tree(0).trajectories
    void = Trajectory(0, 0, source.segments, 0.0, False, True, void=True)
    batch = make_batch([Group(0, [void, one, two])])
    assert batch.turn_nodes.tolist() == [0, 1, 2, 0, 1, 5]
    assert batch.trees.tolist() == [0, 0]


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(10)), st.integers(0, 10))
def test_select_keeps_what_is_shared_shared(order: list[int], n: int) -> None:
    whole = make_batch([_tree(0), _tree(1)])
    got = whole.select(order[:n])
    turns = [t for i in order[:n] for t in (whole.turn_seq_ids == i).nonzero().flatten().tolist()]
    for here, there in enumerate(turns):
        same = [other for other in turns if whole.turn_nodes[other] == whole.turn_nodes[there]]
        assert turns[int(got.turn_nodes[here])] == same[0]
    assert got.trees.tolist() == [int(whole.trees[i]) for i in order[:n]]


def test_rewards_of_turns_that_are_not_the_trajectorys_are_refused() -> None:
    wrong = Trajectory(0, 0, (prompt(1), action([2], reward=0.5)), 1.0, True, False)
    with pytest.raises(ValueError, match=r"turns sum to 0\.5, and its reward is 1\.0"):
        make_batch([Group(0, [wrong])])
