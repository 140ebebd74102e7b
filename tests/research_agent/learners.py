"""Learners for tests, with their settings as keyword arguments."""

from __future__ import annotations

from typing import Any

from torch import nn

from research_agent.algorithms.base import Algorithm
from research_agent.config import LearnerConfig
from research_agent.learner import Learner


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
