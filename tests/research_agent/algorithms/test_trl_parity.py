"""Loss and gradient of our algorithms and of TRL's own loss functions, on the same frozen batch.

TRL's trainers are made with a tiny model on the CPU and asked for their loss; they never train.
Both sides run the whole model. Where TRL's definition is another one, a test pins the difference.
"""

from __future__ import annotations

import copy
import math
import os
import random
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from research_agent.algorithms.base import Algorithm
from research_agent.algorithms.cispo import CISPO
from research_agent.algorithms.dapo import DAPO
from research_agent.algorithms.dr_grpo import DrGRPO
from research_agent.algorithms.grpo import GRPO
from research_agent.algorithms.gspo import GSPO
from research_agent.algorithms.rloo import RLOO
from research_agent.batch import make_batch
from research_agent.models.policy import TokenLogprobs, batch_logprobs
from research_agent.trajectory import Group, Segment
from tests.research_agent.conftest import byte_tokenizer, tiny_qwen2
from tests.research_agent.learners import make_learner
from tests.research_agent.rollouts import action, observation, prompt, trajectory

if find_spec("trl") is None and os.environ.get("CI") != "true":
    pytest.skip("TRL is not installed", allow_module_level=True)
trl = import_module("trl")
pytestmark = pytest.mark.filterwarnings("ignore")

VOCABULARY = 264
GROUPS, SAMPLES = 3, 4
TRL_EPSILON = 1e-4  # what TRL adds to standard deviations


def _frozen_rollout(
    *, turns: int = 2, noise: float = 1.0
) -> tuple[nn.Module, nn.Module, list[Group]]:
    """Policy, reference, and a rollout whose log-probabilities are the policy's but for noise.

    It is large enough for the loss not to be the small difference of large terms. The models are
    in float64, so that what is left of a difference is no processor's rounding.
    """
    model, reference = tiny_qwen2(VOCABULARY).double(), tiny_qwen2(VOCABULARY).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    rng = random.Random(0)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(1, VOCABULARY) for _ in range(rng.randint(low, high))]

    def rollout(logprobs: Sequence[float]) -> list[Group]:
        left = list(logprobs)

        def act() -> Segment:
            sampled = tokens(2, 7)
            return action(sampled, [left.pop(0) if left else -1.0 for _ in sampled])

        groups = []
        for number in range(GROUPS):
            begin = prompt(*tokens(2, 6))
            samples = []
            for sample in range(SAMPLES):
                segments = [begin, act()]
                for _ in range(rng.randint(1, turns) - 1):
                    segments += [observation(*tokens(1, 5)), act()]
                reward = rng.choice([0.0, 0.1, 0.4, 1.0])
                samples.append(trajectory(*segments, reward=reward, sample=sample))
            groups.append(Group(number, samples))
        return groups

    state = rng.getstate()
    batch = make_batch(rollout([]))
    exact = batch_logprobs(TokenLogprobs(model), batch, 10**6)
    moved = exact + noise * torch.randn(len(exact), generator=generator)
    rng.setstate(state)
    return model, reference, rollout(moved.tolist())


def _inputs(groups: Sequence[Group], reference: Any) -> dict[str, Tensor]:
    """The rollout as TRL's trainers hand it to their losses: prompts left, completions right."""
    rows = [t for group in groups for t in group.trajectories]
    begins = [list(t.segments[0].tokens) for t in rows]
    rests = [t.tokens[len(b) :] for t, b in zip(rows, begins, strict=True)]
    masks = [t.action_mask[len(b) :] for t, b in zip(rows, begins, strict=True)]
    olds = [
        [p for s in t.segments[1:] for p in (s.logprobs or [0.0] * len(s.tokens))] for t in rows
    ]
    wide, long = max(map(len, begins)), max(map(len, rests))

    def left(values: Sequence[Sequence[float]]) -> Tensor:
        return torch.tensor([[0] * (wide - len(v)) + list(v) for v in values])

    def right(values: Sequence[Sequence[float]]) -> Tensor:
        return torch.tensor([list(v) + [0] * (long - len(v)) for v in values])

    tool_mask = right([[int(m) for m in mask] for mask in masks])
    inputs = {
        "prompt_ids": left(begins),
        "prompt_mask": left([[1] * len(b) for b in begins]),
        "completion_ids": right(rests),
        "completion_mask": right([[1] * len(r) for r in rests]),
        "tool_mask": tool_mask,
        "old_per_token_logps": right(olds).float(),
        "num_items_in_batch": tool_mask.sum(),
    }
    with torch.no_grad():
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        logprobs = reference(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        shifted = logprobs[:, wide - 1 : -1]
        of_targets = shifted.gather(2, inputs["completion_ids"][..., None]).squeeze(2)
        inputs["ref_per_token_logps"] = of_targets
    return inputs


def _grouped(groups: Sequence[Group]) -> Tensor:
    rewards = [[t.reward for t in group.trajectories] for group in groups]
    return torch.tensor(rewards, dtype=torch.float64)  # as ours are


def _normalized(groups: Sequence[Group]) -> Tensor:
    """As GRPOTrainer does it with scale_rewards="group"."""
    rewards = _grouped(groups)
    centered = rewards - rewards.mean(1, keepdim=True)
    return (centered / (rewards.std(1, keepdim=True) + TRL_EPSILON)).flatten()


def _trainer(kind: str, folder: Path, model: Any, **settings: Any) -> Any:
    from datasets import Dataset

    make, configure = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "bf16": False,
        "per_device_train_batch_size": GROUPS * SAMPLES,
        "num_generations": SAMPLES,
        "temperature": 1.0,
        "beta": 0.0,
        "gradient_checkpointing": False,
    }
    model.save_pretrained(folder / "model")  # from where TRL takes a reference for its KL
    model.config._name_or_path = str(folder / "model")
    trainer = make(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=configure(**{**options, **settings}),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 32),
        processing_class=byte_tokenizer(),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    return trainer


Result = tuple[float, dict[str, Tensor]]


def _theirs(trainer: Any, inputs: dict[str, Tensor], parts: int = 1) -> Result:
    """Loss and gradient of TRL, over as many micro-batches."""
    trainer.model.zero_grad()
    loss, rows = 0.0, len(inputs["prompt_ids"])
    for part in range(parts):
        chosen = slice(part * rows // parts, (part + 1) * rows // parts)
        micro = {k: v[chosen] if v.dim() else v for k, v in inputs.items()}
        of_part = trainer._compute_loss(trainer.model, micro)
        of_part.backward()
        loss += of_part.item()
    found = trainer.model.named_parameters()
    return loss, {n: p.grad.clone() for n, p in found if p.grad is not None}


def _ours(
    model: nn.Module,
    rule: Algorithm,
    groups: Sequence[Group],
    reference: nn.Module,
    **settings: Any,
) -> Result:
    """Loss and gradient of a learner; AdamW's first moment is the gradient where beta_1 is 0."""
    learner = make_learner(
        copy.deepcopy(model),
        rule,
        reference=reference,
        learning_rate=0.0,
        max_grad_norm=math.inf,
        betas=(0.0, 0.999),
        **settings,
    )
    loss = learner.update(groups)["loss"]
    moments = learner.state_dict()["moments"].items()
    return loss, {name: m["exp_avg"] for name, m in moments if m}


def _difference(ours: Result, theirs: Result) -> tuple[float, float]:
    """Return how far the losses differ, and the gradients, relative to their largest entry."""
    assert ours[1].keys() == theirs[1].keys()
    scale = max(value.abs().max().item() for value in theirs[1].values())
    worst = max((value - theirs[1][name]).abs().max().item() for name, value in ours[1].items())
    return abs(ours[0] - theirs[0]) / abs(theirs[0]), worst / scale


def _assert_equal(ours: Result, theirs: Result) -> None:
    of_loss, of_gradient = _difference(ours, theirs)
    assert of_loss < 1e-5
    assert of_gradient < 1e-5


CASES: dict[str, tuple[Algorithm, dict[str, Any]]] = {
    "grpo": (
        GRPO(kl_coef=0.0, entropy_coef=0.0, std_epsilon=TRL_EPSILON),
        {"loss_type": "grpo"},
    ),
    "grpo with KL": (
        GRPO(kl_coef=0.05, entropy_coef=0.0, std_epsilon=TRL_EPSILON),
        {"loss_type": "grpo", "beta": 0.05, "use_bias_correction_kl": False},
    ),
    "dr_grpo": (
        DrGRPO(max_length=64),
        {"loss_type": "dr_grpo", "max_completion_length": 64, "scale_rewards": "none"},
    ),
    "dapo": (
        DAPO(std_epsilon=TRL_EPSILON),
        {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28},
    ),
    "gspo": (
        GSPO(clip_low=0.02, clip_high=0.03, std_epsilon=TRL_EPSILON),
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 0.02,
            "epsilon_high": 0.03,
        },
    ),
    "cispo": (
        CISPO(clip_high=0.2, std_epsilon=TRL_EPSILON),
        {"loss_type": "cispo", "epsilon_high": 1.2},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_trl(name: str, tmp_path: Path) -> None:
    rule, settings = CASES[name]
    model, reference, groups = _frozen_rollout()
    inputs = _inputs(groups, reference)
    centered = _grouped(groups) - _grouped(groups).mean(1, keepdim=True)
    inputs["advantages"] = centered.flatten() if name == "dr_grpo" else _normalized(groups)
    trainer = _trainer("GRPO", tmp_path, copy.deepcopy(model), **settings)
    theirs = _theirs(trainer, inputs)
    for budget in (10**6, 40):
        _assert_equal(_ours(model, rule, groups, reference, micro_batch_tokens=budget), theirs)


@pytest.mark.parametrize("kl", [0.0, 0.05])
def test_rloo_equals_trl(kl: float, tmp_path: Path) -> None:
    """TRL's RLOO knows no observations: trajectories of one action."""
    model, reference, groups = _frozen_rollout(turns=1, noise=0.5)
    inputs = _inputs(groups, reference)
    mask = inputs["completion_mask"]
    old, of_reference = inputs["old_per_token_logps"], inputs["ref_per_token_logps"]
    rewards = _grouped(groups) - kl * ((old - of_reference) * mask).sum(1).view(GROUPS, SAMPLES)
    others = (rewards.sum(1, keepdim=True) - rewards) / (SAMPLES - 1)  # as RLOOTrainer does it
    inputs["advantages"] = (rewards - others).flatten()
    inputs["old_logps"] = (old * mask).sum(1)
    trainer = _trainer("RLOO", tmp_path, copy.deepcopy(model), beta=kl)
    rule = RLOO(kl_coef=kl)
    _assert_equal(_ours(model, rule, groups, reference), _theirs(trainer, inputs))


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_equals_trl_under_gradient_accumulation(name: str, tmp_path: Path) -> None:
    """TRL takes denominators of the window (TRL 2881 was that it did not); ours know no windows.

    Its parts are of equal size, as its batches are; ours are of whatever size the tokens make.
    """
    rule, settings = CASES[name]
    model, reference, groups = _frozen_rollout()
    inputs = _inputs(groups, reference) | {"advantages": _normalized(groups)}
    trainer = _trainer(
        "GRPO",
        tmp_path,
        copy.deepcopy(model),
        **settings,
        gradient_accumulation_steps=3,
        per_device_train_batch_size=SAMPLES,
    )
    theirs = _theirs(trainer, inputs, parts=3)
    _assert_equal(_ours(model, rule, groups, reference, micro_batch_tokens=30), theirs)


# ---------------------------------------------------------------------------------------------
# Where the definitions differ


def test_trl_multiplies_the_kl_by_the_ratio(tmp_path: Path) -> None:
    """By default since 1.13 (``use_bias_correction_kl``): the KL's samples are the old policy's.

    The papers' equation has no such factor. Where ratios are 1, as in the first update of a
    rollout, the losses agree, and their gradients do not: the factor has one.
    """
    model, reference, groups = _frozen_rollout()
    rule = CASES["grpo with KL"][0]
    inputs = _inputs(groups, reference) | {"advantages": _normalized(groups)}
    trainer = _trainer("GRPO", tmp_path, copy.deepcopy(model), loss_type="grpo", beta=0.05)
    of_loss, of_gradient = _difference(
        _ours(model, rule, groups, reference), _theirs(trainer, inputs)
    )
    assert of_loss > 1e-4
    assert of_gradient > 1e-4
    model, reference, groups = _frozen_rollout(noise=0.0)
    inputs = _inputs(groups, reference) | {"advantages": _normalized(groups)}
    ours, theirs = _ours(model, rule, groups, reference), _theirs(trainer, inputs)
    # The loss itself is near 0 here: its terms are 1e-1, and cancel. So no relative difference.
    assert abs(ours[0] - theirs[0]) < 1e-6
    assert _difference(ours, theirs)[1] > 1e-4


def test_trls_bound_of_cispo_is_the_ratio_itself(tmp_path: Path) -> None:
    """``epsilon_high=5`` bounds weights at 5, as our ``clip_high=4`` does."""
    rule, _ = CASES["cispo"]
    model, reference, groups = _frozen_rollout()
    inputs = _inputs(groups, reference) | {"advantages": _normalized(groups)}
    trainer = _trainer("GRPO", tmp_path, copy.deepcopy(model), loss_type="cispo", epsilon_high=0.2)
    assert _difference(_ours(model, rule, groups, reference), _theirs(trainer, inputs))[0] > 1e-2
    five = _trainer("GRPO", tmp_path, copy.deepcopy(model), loss_type="cispo", epsilon_high=5.0)
    ours = _ours(model, CISPO(std_epsilon=TRL_EPSILON), groups, reference)
    _assert_equal(ours, _theirs(five, inputs))


def test_our_delta_is_verls(tmp_path: Path) -> None:
    """1e-6 is added to a group's standard deviation, TRL adds 1e-4: less than a thousandth off."""
    model, reference, groups = _frozen_rollout()
    inputs = _inputs(groups, reference) | {"advantages": _normalized(groups)}
    trainer = _trainer("GRPO", tmp_path, copy.deepcopy(model), loss_type="grpo")
    rule = GRPO(kl_coef=0.0, entropy_coef=0.0)
    _, of_gradient = _difference(_ours(model, rule, groups, reference), _theirs(trainer, inputs))
    assert 1e-5 < of_gradient < 1e-3


def test_truncated_importance_sampling_equals_trls(tmp_path: Path) -> None:
    """TRL's ``token_truncate``: old log-probabilities recomputed, weights capped, KL left alone."""
    model, reference, groups = _frozen_rollout()
    inputs = _inputs(groups, reference) | {"advantages": _normalized(groups)}
    sampled = inputs["old_per_token_logps"]
    rule, settings = CASES["grpo with KL"]
    trainer = _trainer("GRPO", tmp_path, copy.deepcopy(model), **settings)
    with torch.no_grad():
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        recomputed, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, inputs["completion_ids"].shape[1]
        )
    inputs["old_per_token_logps"] = recomputed
    inputs["importance_sampling_ratio"] = (recomputed - sampled).exp().clamp(max=1.1)
    trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, True
    ours = _ours(
        model, rule, groups, reference, old_logprobs="recomputed", importance_sampling_cap=1.1
    )
    _assert_equal(ours, _theirs(trainer, inputs))
