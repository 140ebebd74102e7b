"""Shared beginnings are learned from once, and the gradient is that of trajectories written out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from research_agent.algorithms.base import Algorithm
from research_agent.algorithms.grpo import GRPO
from research_agent.algorithms.gspo import GSPO
from research_agent.algorithms.mt_ppo import MTPPO
from research_agent.algorithms.tree_grpo import TreeGRPO
from research_agent.batch import make_batch, micro_batches
from research_agent.errors import ModelError
from research_agent.learner import Learner
from research_agent.models.policy import token_logprobs
from research_agent.models.prepare import prepare
from research_agent.trajectory import Group
from tests.research_agent.conftest import sliding_qwen2, tiny_gpt2, tiny_llama, tiny_qwen2
from tests.research_agent.learners import distance, update_gradient
from tests.research_agent.rollouts import (
    action,
    observation,
    prompt,
    random_groups,
    random_trees,
    trajectory,
)

V = 50
ALGORITHMS: dict[str, Algorithm] = {
    "grpo": GRPO(kl_coef=0.1, entropy_coef=0.01),
    "tree_grpo": TreeGRPO(kl_coef=0.0),
    "gspo": GSPO(kl_coef=0.0),
    "mt_ppo": MTPPO(kl_coef=0.0, critic_learning_rate=1e-2),
}


def _learned(
    model: Any, groups: list[Group], algorithm: Algorithm, **settings: Any
) -> dict[str, Tensor]:
    """The gradient, against a reference that is not the model, with recomputed probabilities."""
    reference = copy.deepcopy(model) if algorithm.needs_reference else None
    if reference is not None:
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.mul_(0.9)
    return update_gradient(
        model, groups, algorithm, reference, old_logprobs="recomputed", **settings
    )


def test_literal() -> None:
    """Two samples share a prompt of two tokens and a first turn; a third shares the prompt.

    Sorted: [1 2 3 4 5], [1 2 3 4 6 7] and [1 2 8], as far as the model reads them.
    """
    first = trajectory(prompt(1, 2), action([3, 4]), observation(5), action([9]))
    branch = trajectory(prompt(1, 2), action([3, 4]), observation(6, 7), action([9]), lineage=(0,))
    other = trajectory(prompt(1, 2), action([8, 9]))
    batch = make_batch([Group(0, [other, branch, first])])
    (micro,) = micro_batches(batch, max_tokens=100, packing="tree")
    assert micro.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert micro.position_ids is not None and micro.cu_seqlens is not None and micro.tree
    assert micro.position_ids.tolist() == [[0, 1, 2, 3, 4, 4, 5, 2]]
    assert micro.cu_seqlens.tolist() == [0, 5, 7, 8]  # three runs
    assert micro.tree.cu_keys.tolist() == [0, 5, 11, 14]
    assert micro.tree.key_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 5, 6, 0, 1, 7]
    assert micro.part.targets.tolist() == [3, 4, 9, 3, 4, 9, 8, 9]
    assert micro.logit_index.tolist() == [1, 2, 4, 1, 2, 6, 1, 7]
    assert micro.distinct is not None and micro.distinct_of is not None
    assert len(micro.distinct) == 6  # 3 and 4 of the shared turn count once
    assert micro.distinct[micro.distinct_of].tolist() == [0, 1, 2, 0, 1, 5, 6, 7]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 200))
def test_a_row_holds_each_beginning_once_and_each_action_token_finds_its_own(
    seed: int, budget: int
) -> None:
    batch = make_batch(random_trees(seed))
    micros = list(micro_batches(batch, budget, packing="tree"))
    assert sorted(torch.cat([m.token_index for m in micros]).tolist()) == list(
        range(len(batch.targets))
    )
    for micro in micros:
        assert micro.tree is not None
        assert micro.tokens.shape[1] <= budget or len(micro.part) == 1
        beginnings = set()
        for path, row in zip(micro.tree.paths, micro.part.tokens, strict=True):
            read = row[: len(path)].tolist()
            assert micro.tokens[0][path].tolist() == read
            beginnings |= {tuple(read[: n + 1]) for n in range(len(read))}
        if len(set(micro.part.groups.tolist())) == 1 and budget >= sum(map(len, batch.tokens)):
            assert micro.tokens.shape[1] == len(beginnings)  # one group: nothing stands twice
        for a, place in enumerate(micro.logit_index.tolist()):
            path = micro.tree.paths[int(micro.part.seq_ids[a])]
            assert place == int(path[int(micro.part.positions[a]) - 1])


@pytest.mark.parametrize("name", list(ALGORITHMS))
@pytest.mark.parametrize("make", [tiny_qwen2, tiny_llama, tiny_gpt2])
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10**6), budget=st.integers(1, 300))
def test_the_gradient_is_that_of_trajectories_written_out(
    make: Any, name: str, seed: int, budget: int
) -> None:
    model, groups, algorithm = make(V).double(), random_trees(seed), ALGORITHMS[name]
    written_out = _learned(model, groups, algorithm, packing="off", micro_batch_tokens=1)
    tree = _learned(model, groups, algorithm, packing="tree", micro_batch_tokens=budget)
    norms_are_float64 = make is tiny_gpt2  # the others' are float32, whatever the model is
    assert distance(tree, written_out) < (1e-9 if norms_are_float64 else 1e-6)


def test_float32_with_checkpointed_layers_and_logits_in_pieces() -> None:
    model, groups = tiny_qwen2(V), random_trees(1)
    whole = _learned(model, groups, ALGORITHMS["grpo"], packing="off")
    tree = _learned(model, groups, ALGORITHMS["grpo"], packing="tree", gradient_checkpointing=True)
    assert distance(tree, whole) < 1e-5
    prepare(model, packing="tree")
    (micro,) = micro_batches(make_batch(groups), 10**6, packing="tree")
    for once, pieces in zip(
        token_logprobs(model, micro), token_logprobs(model, micro, max_logits=3 * V), strict=True
    ):
        torch.testing.assert_close(once, pieces, rtol=1e-5, atol=1e-6)


def test_a_branch_does_not_see_its_siblings() -> None:
    model = tiny_qwen2(V)
    prepare(model, packing="tree")
    kept = trajectory(prompt(1, 2), action([3, 4]), observation(5), action([9]))
    found = []
    for token in (6, 7):
        sibling = trajectory(prompt(1, 2), action([3, 4]), observation(token), action([8]))
        (micro,) = micro_batches(make_batch([Group(0, [kept, sibling])]), 100, packing="tree")
        found.append(token_logprobs(model, micro)[0][micro.part.seq_ids == 0])
    assert torch.equal(*found)


def test_trees_are_packed_as_trees_unless_told_otherwise() -> None:
    """With packing auto: as trees where samples branch, and as before where they do not."""
    model, groups = tiny_qwen2(V), random_trees(0)
    read = []
    for trees in (False, True):
        learner = Learner(copy.deepcopy(model), GRPO(kl_coef=0.0), trees=trees)
        tokens: list[int] = []
        body: Any = learner.model.base_model
        body.register_forward_pre_hook(
            lambda _, args, options, tokens=tokens: tokens.append(options["input_ids"].numel()),
            with_kwargs=True,
        )
        learner.update(groups)
        read.append(sum(tokens))
    assert read[1] < read[0]


def test_chains_without_a_common_prompt_learn_the_same_in_tree_packing() -> None:
    model, groups = tiny_qwen2(V).double(), random_groups(3)
    written_out = _learned(model, groups, ALGORITHMS["grpo"], packing="on")
    tree = _learned(model, groups, ALGORITHMS["grpo"], packing="tree")
    assert distance(tree, written_out) < 1e-6


def test_a_model_that_cannot_is_refused_or_learns_from_trajectories_written_out() -> None:
    model, groups = sliding_qwen2(V), random_trees(0)
    with pytest.raises(ModelError, match="a sliding window"):
        _learned(model, groups, ALGORITHMS["tree_grpo"], packing="tree")
    with pytest.warns(UserWarning, match="packing is auto, so it is off"):
        learner = Learner(model, ALGORITHMS["tree_grpo"], trees=True)
    assert learner.update(groups)["optimizer_steps"] == 1
