"""Stages: parts of a run with other tasks or another reward, one after the other.

R1-Searcher (Song et al. 2025, section 3.1) rewards retrieving and the format first, and the answer
when the policy can do both. A stage is written as words: ``steps`` and ``until`` say when the next
one begins, every other word is an argument of the environment, laid over ``--env-args``::

    --stages "steps=20 until=1.4 reward=r1-searcher-stage1" "reward=r1-searcher-stage2"
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from research_agent.config import parse_settings
from research_agent.errors import ConfigError

WINDOW = 5  # steps that the reward is averaged over


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a run.

    Attributes:
        env_args: of the environment of this stage, on top of the run's.
        steps: after which the next stage begins; None: ``until`` alone decides.
        until: mean reward of the last five steps at which the next stage begins; None: never.
    """

    env_args: Mapping[str, Any]
    steps: int | None = None
    until: float | None = None


def parse_stages(texts: Sequence[str]) -> tuple[Stage, ...]:
    """Read stages from their words.

    Raises:
        ConfigError: a stage that cannot be read, or one before the last that never ends.
    """
    stages = []
    for text in texts:
        try:
            words = parse_settings(shlex.split(text))
        except ValueError as error:  # a quote that is not closed
            raise ConfigError(f"--stages {text!r}: {error}") from error
        steps, until = words.pop("steps", None), words.pop("until", None)
        if steps is not None and (type(steps) is not int or steps < 1):
            raise ConfigError(f"--stages {text!r}: steps is a number from 1 on, not {steps!r}")
        if until is not None and type(until) not in (int, float):
            raise ConfigError(f"--stages {text!r}: until is a reward, not {until!r}")
        stages.append(Stage(words, steps, until))
    for text, stage in zip(texts[:-1], stages, strict=False):
        if stage.steps is None and stage.until is None:
            raise ConfigError(f"--stages {text!r} never ends; give it steps=N or until=REWARD")
    if stages and (stages[-1].steps is not None or stages[-1].until is not None):
        raise ConfigError(
            f"--stages {texts[-1]!r} is the last, which ends with the run (--steps); leave out its "
            "steps and until"
        )
    return tuple(stages)


@dataclass
class CurriculumState:
    """How far a run has come in its stages; a checkpoint keeps the fields."""

    stage: int = 0
    steps: int = 0  # of this stage that are done
    rewards: list[float] = field(default_factory=list)  # of its last steps, at most ``WINDOW``

    def moves_on(self, stages: Sequence[Stage], reward: float) -> bool:
        """Take in a step's mean reward; True where the next stage begins after it."""
        self.steps += 1
        self.rewards = [*self.rewards, reward][-WINDOW:]
        if self.stage + 1 >= len(stages):
            return False
        now = stages[self.stage]
        spent = now.steps is not None and self.steps >= now.steps
        reached = (
            now.until is not None
            and len(self.rewards) == WINDOW
            and sum(self.rewards) / WINDOW >= now.until
        )
        if spent or reached:
            self.stage, self.steps, self.rewards = self.stage + 1, 0, []
        return spent or reached
