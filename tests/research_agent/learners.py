"""Learners for tests, with their settings as keyword arguments, and their gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from research_agent.algorithms.base import Algorithm
from research_agent.config import LearnerConfig
from research_agent.learner import Learner
from research_agent.trajectory import Group


def make_learner(
    model: nn.Module,
    algorithm: Algorithm,
    *,
    reference: nn.Module | None = None,
    temperature: float = 1.0,
    **settings: Any,
) -> Learner:
    """A learner whose other arguments are fields of ``LearnerConfig``."""
    config = LearnerConfig(**settings)
    return Learner(model, algorithm, config, reference=reference, temperature=temperature)


def update_gradient(
    model: nn.Module,
    groups: Sequence[Group],
    algorithm: Algorithm,
    reference: nn.Module | None = None,
    **settings: Any,
) -> dict[str, Tensor]:
    """The gradient of an update, as the optimizer gets it; the model is left as it was.

    It is AdamW's first moment at beta 0. Weights of a critic after its step are added.
    """
    settings = {"learning_rate": 0.0, "max_grad_norm": math.inf, **settings}
    learner = make_learner(
        copy.deepcopy(model), algorithm, reference=reference, betas=(0.0, 0.999), **settings
    )
    learner.update(groups)
    state = learner.state_dict()
    critic = state.get("critic", {}).get("weights", {})
    found = {name: moments["exp_avg"] for name, moments in state["moments"].items() if moments}
    return found | {f"critic {name}": weight for name, weight in critic.items()}


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Length of the difference over the length of the other."""
    assert one.keys() == other.keys()
    apart = math.sqrt(sum(float((one[n] - other[n]).square().sum()) for n in one))
    length = math.sqrt(sum(float(value.square().sum()) for value in other.values()))
    assert length > 0
    return apart / length
