"""Several trajectories in a row: no padding, no leak, the same gradient."""

from __future__ import annotations

import copy
import math
import random
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.architectures import ARCHITECTURES, tiny
from research_agent.algorithms.grpo import GRPO
from research_agent.batch import Batch, make_batch, micro_batches
from research_agent.config import LearnerConfig
from research_agent.errors import CheckpointError, ConfigError, ModelError
from research_agent.learner import Learner
from research_agent.models import policy
from research_agent.models.policy import TokenLogprobs, token_logprobs
from research_agent.models.prepare import prepare
from research_agent.trajectory import Group
from tests.research_agent.conftest import sliding_qwen2, tiny_gpt2, tiny_llama, tiny_qwen2
from tests.research_agent.learners import distance, make_learner, update_gradient
from tests.research_agent.rollouts import (
    action,
    observation,
    prompt,
    random_groups,
    random_trajectory,
    trajectory,
)

V = 50


_gradient = partial(update_gradient, algorithm=GRPO(kl_coef=0.0, entropy_coef=0.01))


def test_literal() -> None:
    long = trajectory(prompt(10, 11), action([20, 21]), observation(30, 31), action([22]))
    short = trajectory(prompt(12), action([23, 24]), observation(32))
    tiny = trajectory(prompt(13), action([25]))
    batch = make_batch([Group(0, [short, long, tiny])])
    first, second = micro_batches(batch, max_tokens=7, packing="on")
    # Longest first; the last action token, and what follows it, is not read. The shortest (1 token)
    # goes where there is room: behind the longest (6 tokens).
    assert first.tokens.tolist() == [[10, 11, 20, 21, 30, 31, 13]]
    assert first.position_ids is not None and first.cu_seqlens is not None
    assert first.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0]]
    assert first.cu_seqlens.tolist() == [0, 6, 7]
    assert first.max_seqlen == 6
    assert first.logit_index.tolist() == [1, 2, 5, 6]
    assert first.part.targets.tolist() == [20, 21, 22, 25]
    assert second.tokens.tolist() == [[12, 23]]
    assert second.logit_index.tolist() == [0, 1]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 120))
def test_every_action_token_is_predicted_once_and_nothing_is_padding(
    seed: int, budget: int
) -> None:
    batch = make_batch(random_groups(seed))
    micros = list(micro_batches(batch, budget, packing="on"))
    assert sorted(torch.cat([m.token_index for m in micros]).tolist()) == list(
        range(len(batch.targets))
    )
    for micro in micros:
        assert micro.cu_seqlens is not None and micro.position_ids is not None
        bounds = micro.cu_seqlens.tolist()
        width = micro.tokens.shape[1]
        assert width <= budget or len(bounds) == 2
        assert bounds[-1] == width  # nothing else is in the row
        assert micro.max_seqlen == max(b - a for a, b in pairwise(bounds))
        for place, picked in zip(
            micro.logit_index.tolist(), micro.token_index.tolist(), strict=True
        ):
            number = int(batch.seq_ids[picked])
            before = int(micro.position_ids[0, place])  # tokens before it in its trajectory
            assert before == int(batch.positions[picked]) - 1
            seen = micro.tokens[0, place - before : place + 1]
            assert seen.tolist() == batch.tokens[number][: before + 1].tolist()
            assert place - before in bounds


def _with_widths(*widths: int) -> Batch:
    """Trajectories of which a pass reads so many tokens: all but the last."""
    made = [
        trajectory(prompt(*range(width)), action([7]), sample=i) for i, width in enumerate(widths)
    ]
    return make_batch([Group(0, made)])


def test_ranks_get_as_many_passes_of_equal_size() -> None:
    def sizes(batch: Batch, budget: int, ranks: int) -> list[int]:
        cut = micro_batches(batch, budget, packing="on", ranks=ranks)
        return [micro.tokens.shape[1] for micro in cut]

    batch = _with_widths(5, 4, 3, 3, 2, 1)
    assert sizes(batch, 9, 1) == [9, 9]
    assert sizes(batch, 9, 2) == [9, 9]
    assert sizes(batch, 100, 2) == [9, 9]  # one rank would take a single pass
    assert sizes(batch, 100, 3) == [6, 6, 6]
    # Two passes of 8 do not hold 18 tokens, so each rank takes two: 5, 4, 3 + 2, 3 + 1
    assert sizes(batch, 8, 2) == [5, 5, 4, 4]
    assert sizes(batch, 2, 4) == [5, 4, 3, 3, 2, 1]  # longer than a pass: alone
    assert sizes(batch, 100, 64) == [5, 4, 3, 3, 2, 1]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 120), st.integers(2, 5), st.booleans())
def test_ranks_share_every_action_token_once(
    seed: int, budget: int, ranks: int, packed: bool
) -> None:
    batch = make_batch(random_groups(seed))
    micros = list(micro_batches(batch, budget, packing="on" if packed else "off", ranks=ranks))
    picked = torch.cat([micro.token_index for micro in micros])
    assert sorted(picked.tolist()) == list(range(len(batch.targets)))
    assert all(m.tokens.numel() <= budget or len(m.part) == 1 for m in micros)
    if packed:
        sizes = [micro.tokens.numel() for micro in micros]
        assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("make", [tiny_qwen2, tiny_llama, tiny_gpt2])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), budget=st.integers(1, 300))
def test_the_gradient_is_that_of_one_trajectory_at_a_time(
    make: Any, seed: int, budget: int
) -> None:
    model, groups = make(V).double(), random_groups(seed)
    alone = _gradient(model, groups, packing="off", micro_batch_tokens=1)
    packed = _gradient(model, groups, packing="on", micro_batch_tokens=budget)
    assert distance(packed, alone) < 1e-9


RECURRENT = ["Qwen3.5", "Qwen3-Next", "LFM2", "Falcon-H1", "Granite 4 hybrid", "Mamba"]


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_state_ends_with_its_trajectory(name: str, gradient_checkpointing: bool) -> None:
    """Recurrent layers carry nothing across a bound, in the backward pass neither."""
    model, groups = tiny(*ARCHITECTURES[name]), random_groups(7)
    alone = _gradient(model, groups, packing="off", micro_batch_tokens=1)
    packed = _gradient(
        model,
        groups,
        packing="on",
        micro_batch_tokens=200,
        gradient_checkpointing=gradient_checkpointing,
    )
    assert distance(packed, alone) < 1e-4  # in float32; a state that leaks gives 0.1 and more


def test_nothing_leaks_from_one_trajectory_to_another() -> None:
    model = tiny_qwen2(V)
    prepare(model, packing="on")
    rng = random.Random(0)
    shown = [random_trajectory(rng, V, episode=i) for i in range(2)]
    others = [
        trajectory(prompt(*(9 for _ in one.segments[0].tokens)), *one.segments[1:]) for one in shown
    ]
    for before, after in ((shown[0], others[0]), (shown[1], others[1])):
        kept = shown[1] if before is shown[0] else shown[0]
        both = []
        for companion in (before, after):
            batch = make_batch([Group(0, [companion, kept])])
            (micro,) = micro_batches(batch, 1000, packing="on")
            of_kept = batch.seq_ids[micro.token_index] == 1
            both.append(token_logprobs(model, micro)[0][of_kept])
        assert torch.equal(both[0], both[1])


def test_a_model_whose_attention_cannot_be_replaced_is_refused() -> None:
    class Fixed(torch.nn.Module):
        def set_attn_implementation(self, name: str) -> None:
            raise ValueError(f"{name} is not supported")

    with pytest.raises(ModelError, match="use --packing off"):
        prepare(Fixed(), packing="on")


def test_a_sliding_window_is_refused_and_not_ignored() -> None:
    with pytest.raises(ModelError, match="a sliding window"):
        _gradient(sliding_qwen2(V), random_groups(0), packing="on")


def test_a_window_that_only_later_trajectories_exceed_is_refused_at_once() -> None:
    """The check's own sequences are shorter than the window."""
    model, groups = sliding_qwen2(V, window=255), random_groups(0)  # it has 256 positions
    with pytest.raises(ModelError, match=r"a sliding window of 255 tokens.*use --packing off"):
        make_learner(copy.deepcopy(model), GRPO(kl_coef=0.0), packing="on")
    with pytest.warns(UserWarning, match="packing is auto, so it is off"):
        learner = Learner(model, GRPO(kl_coef=0.0), LearnerConfig(packing="auto"), trees=True)
    assert learner.update(groups)["optimizer_steps"] == 1


@pytest.mark.parametrize("packing", ["on", "tree"])
def test_a_window_of_the_whole_context_packs_rows_longer_than_itself(packing: Any) -> None:
    model, groups = sliding_qwen2(V, window=256).double(), random_groups(1, samples=12)
    (micro,) = micro_batches(make_batch(groups), 4096, packing="on")
    assert micro.tokens.shape[1] > 256
    alone = _gradient(model, groups, packing="off", micro_batch_tokens=1)
    packed = _gradient(model, groups, packing=packing, micro_batch_tokens=4096)
    assert distance(packed, alone) < 1e-6


# ---------------------------------------------------------------------------------------------
# Number formats, memory


@pytest.mark.parametrize("packing", ["off", "on"])
def test_bfloat16_products_leave_weights_and_softmax_in_float32(packing: Any) -> None:
    model, groups = tiny_qwen2(V), random_groups(1)
    with torch.no_grad():  # a gentler model than the others': bf16 is exact to 1/256
        for parameter in model.parameters():
            parameter.mul_(0.3)
    exact = _gradient(model, groups, packing="off")
    half = _gradient(model, groups, packing=packing, precision="bfloat16", micro_batch_tokens=60)
    assert 1e-5 < distance(half, exact) < 0.05
    assert {value.dtype for value in half.values()} == {torch.float32}
    prepare(model, packing=packing)
    micro = next(micro_batches(make_batch(groups), 100, packing=packing))
    logprobs, entropy = TokenLogprobs(model, precision="bfloat16")(micro)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}


class _Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Entries of the largest tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, Tensor):
                self.largest = max(self.largest, each.numel())
        return out


def test_the_logits_of_a_large_vocabulary_are_never_whole() -> None:
    words = 150_000
    model = tiny_qwen2(words, hidden=8)
    groups = random_groups(3, words)
    (micro,) = micro_batches(make_batch(groups), 10**6)
    tokens = len(micro.part.targets)
    with _Sizes() as sizes:
        logprobs, entropy = token_logprobs(model, micro, max_logits=8 * words)
        torch.autograd.backward(logprobs.sum() + entropy.sum())
    assert tokens * words > 10 * sizes.largest  # the whole matrix would be ten times as large
    assert sizes.largest == 8 * words


@pytest.mark.parametrize("make", [tiny_qwen2, tiny_gpt2])
@pytest.mark.parametrize("packing", ["off", "on"])
def test_checkpointing_keeps_less_and_changes_nothing(make: Any, packing: Any) -> None:
    model, groups = make(V).double(), random_groups(4)
    plain = _gradient(model, groups, packing=packing)
    assert (
        distance(_gradient(model, groups, packing=packing, gradient_checkpointing=True), plain)
        < 1e-12
    )

    kept = []
    (micro,) = micro_batches(make_batch(groups), 10**6, packing=packing)
    for gradient_checkpointing in (False, True):
        twin = copy.deepcopy(model)
        prepare(twin, packing=packing, gradient_checkpointing=gradient_checkpointing)
        saved: list[int] = []

        def keep(value: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(value.numel())
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            twin.base_model(input_ids=micro.tokens[:, :20], use_cache=False)
        kept.append(sum(saved))
    assert kept[1] < kept[0] / 3


def test_compiling_captures_each_layer_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a compiler that runs the captured operations as they are."""
    graphs: list[Any] = []

    def as_it_is(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=as_it_is))
    model, groups = tiny_qwen2(V).double(), random_groups(5)
    plain = _gradient(model, groups, packing="off")
    policy._compiled_logprobs_and_entropy.cache_clear()
    try:
        got = _gradient(model, groups, packing="off", compile=True, micro_batch_tokens=60)
    finally:
        policy._compiled_logprobs_and_entropy.cache_clear()
        torch.compiler.reset()
    assert graphs
    assert distance(got, plain) < 1e-12


@pytest.mark.slow
def test_compiled_for_real_the_gradient_is_the_same() -> None:
    model, groups = tiny_qwen2(V), random_groups(5)
    plain = _gradient(model, groups, packing="off")
    got = _gradient(model, groups, packing="off", compile=True, micro_batch_tokens=60)
    torch.compiler.reset()
    assert distance(got, plain) < 1e-4


def test_what_names_no_layers_cannot_be_checkpointed_or_compiled() -> None:
    both: list[dict[str, Any]] = [{"gradient_checkpointing": True}, {"compile": True}]
    for wanted in both:
        with pytest.raises(ModelError, match="names no layers"):
            prepare(torch.nn.Linear(2, 2), **wanted)


# ---------------------------------------------------------------------------------------------
# Optimizers and adapters


def _after(steps: int, **settings: Any) -> tuple[Learner, dict[str, Tensor]]:
    learner = make_learner(
        tiny_qwen2(V, hidden=64), GRPO(kl_coef=0.0), learning_rate=1e-2, **settings
    )
    for seed in range(steps):
        learner.update(random_groups(seed))
    return learner, {name: weight.clone() for name, weight in learner.weights()}


def test_an_offloaded_optimizer_makes_the_same_steps() -> None:
    _, plain = _after(3)
    learner, offloaded = _after(3, optimizer="adamw_offload")
    assert all(torch.equal(plain[name], offloaded[name]) for name in plain)
    moments = learner.state_dict()["moments"]["model.norm.weight"]
    assert moments["exp_avg"].device.type == "cpu"


def test_moments_of_eight_bits() -> None:
    pytest.importorskip("bitsandbytes")
    _, plain = _after(3)
    learner, quantized = _after(3, optimizer="adamw_8bit")
    moved = {n: plain[n] - w.detach() for n, w in tiny_qwen2(V, hidden=64).named_parameters()}
    assert distance(quantized, plain) > 0
    apart = math.sqrt(sum(float((quantized[n] - plain[n]).square().sum()) for n in plain))
    length = math.sqrt(sum(float(value.square().sum()) for value in moved.values()))
    assert apart < 0.3 * length  # most of the way is the same
    large = learner.state_dict()["moments"]["model.layers.0.mlp.up_proj.weight"]
    assert large["state1"].dtype == large["state2"].dtype == torch.uint8


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adamw_offload"])
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_learner_continues_to_the_same_bits(optimizer: Any, lora_rank: int) -> None:
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    if lora_rank:
        pytest.importorskip("peft")
    settings: dict[str, Any] = {"optimizer": optimizer, "lora_rank": lora_rank}
    _, through = _after(4, **settings)
    learner, _ = _after(2, **settings)
    state = copy.deepcopy(learner.state_dict())
    begun, _ = _after(0, **settings)
    if not lora_rank:
        begun.model.load_state_dict(learner.model.state_dict())
    begun.load_state_dict(state)
    for seed in (2, 3):
        begun.update(random_groups(seed))
    again = dict(begun.weights())
    assert all(torch.equal(again[name], weight) for name, weight in through.items())


def test_moments_of_another_kind_are_refused() -> None:
    learner, _ = _after(1)
    state = learner.state_dict()
    for moments in state["moments"].values():
        moments["state1"] = moments.pop("exp_avg")
    begun, _ = _after(0)
    with pytest.raises(CheckpointError, match="give the --optimizer of before"):
        begun.load_state_dict(state)


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="known: 'adamw', 'adamw_8bit', 'adamw_offload'"):
        _after(0, optimizer="sgd")


def test_adapters_learn_and_the_weights_beside_them_stay() -> None:
    pytest.importorskip("peft")
    before = {name: p.detach().clone() for name, p in tiny_qwen2(V, hidden=64).named_parameters()}
    learner, after = _after(2, lora_rank=2)
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "proj.weight" in name}
    assert all(".lora_" in name for name in learner.state_dict()["moments"])
    # Rank 2: of 64 singular values, two are not zero.
    name = "model.layers.1.self_attn.q_proj.weight"
    values = torch.linalg.svdvals((after[name] - before[name]).double())
    assert values[1] > 1e-6 and values[2] < 1e-6

    # Added into the weights, they make the same model.
    plain = tiny_qwen2(V, hidden=64)
    plain.load_state_dict(after, strict=False)
    (micro,) = micro_batches(make_batch(random_groups(9)), 10**6)
    ours, theirs = (token_logprobs(m, micro)[0] for m in (learner.model, plain))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_with_adapters_off_the_policy_is_its_own_reference() -> None:
    pytest.importorskip("peft")
    algorithm, groups = GRPO(kl_coef=0.5), random_groups(2)
    adapters = make_learner(tiny_qwen2(V), algorithm, learning_rate=1e-2, lora_rank=2)
    copied = make_learner(
        tiny_qwen2(V), algorithm, reference=tiny_qwen2(V), learning_rate=1e-2, lora_rank=2
    )
    with torch.no_grad():  # adapters begin at random
        for theirs, weight in zip(
            copied.model.parameters(), adapters.model.parameters(), strict=True
        ):
            theirs.copy_(weight)
    for _ in range(3):
        alone, beside = adapters.update(groups), copied.update(groups)
        assert alone["kl"] == pytest.approx(beside["kl"], abs=1e-6)
    assert alone["kl"] > 1e-4
