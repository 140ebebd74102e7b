"""Stages with their own tasks or reward, and a monitor that notices a collapse.

R1-Searcher (Song et al. 2025, section 3.1) rewards retrieving and the format first, and the answer
when the policy can do both. A stage is written as words: ``steps`` and ``until`` say when the next
one begins; every other word is an argument of the environment, on top of ``--env-args``::

    --stages "steps=20 until=1.4 reward=r1-searcher-stage1" "reward=r1-searcher-stage2"
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from research_agent.errors import ConfigError
from research_agent.settings import parse_settings

STAGE_WINDOW = 5  # steps over which ``until`` averages the reward
COLLAPSE_WINDOW = 10  # steps over which a ``CollapseMonitor`` averages the reward


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a run.

    Attributes:
        env_args: arguments of the environment of this stage, on top of the run's.
        steps: length of the stage, at most; None: ``until`` alone decides.
        until: mean reward that ends the stage, over the last five steps in which an episode was
            played; None: no reward does.
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
        except ValueError as error:  # an unclosed quote, or a word without KEY=
            raise ConfigError(f"--stages {text!r}: {error}") from error
        steps, until = words.pop("steps", None), words.pop("until", None)
        if steps is not None and (type(steps) is not int or steps < 1):
            raise ConfigError(f"--stages {text!r}: steps is a number from 1 on, not {steps!r}")
        if until is not None and (type(until) not in (int, float) or not math.isfinite(until)):
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
    steps: int = 0  # steps of this stage that are done
    rewards: list[float] = field(default_factory=list)  # the last ``STAGE_WINDOW`` that there were

    def advance(self, stages: Sequence[Stage], reward: float | None) -> bool:
        """Count a step; returns whether the next stage begins after it.

        Args:
            stages: all of them.
            reward: the step's mean; None if no episode was played.
        """
        self.steps += 1
        if reward is not None:
            self.rewards = [*self.rewards, reward][-STAGE_WINDOW:]
        if self.stage + 1 >= len(stages):
            return False
        now = stages[self.stage]
        spent = now.steps is not None and self.steps >= now.steps
        reached = (
            now.until is not None
            and len(self.rewards) == STAGE_WINDOW
            and sum(self.rewards) / STAGE_WINDOW >= now.until
        )
        if spent or reached:
            self.stage, self.steps, self.rewards = self.stage + 1, 0, []
        return spent or reached


@dataclass
class CollapseMonitor:
    """Notice when a policy loses what it had learned.

    A run has collapsed when the reward of training, averaged over ``window`` steps, falls below a
    share of the best such average.

    Args:
        share: share of the best average, from 0 to 1.
        window: steps of an average.
        history: (step, mean reward) since the start or the last rollback, oldest first; a
            checkpoint keeps it.
    """

    share: float
    window: int = COLLAPSE_WINDOW
    history: list[tuple[int, float]] = field(default_factory=list)

    def add(self, step: int, reward: float) -> int | None:
        """Take in the reward of a step.

        Args:
            step: its number.
            reward: mean over its episodes.

        Returns:
            None while all is well; else the last step of the best average.
        """
        self.history.append((step, reward))
        ends = range(self.window, len(self.history) + 1)
        means = [sum(r for _, r in self.history[e - self.window : e]) / self.window for e in ends]
        if not means:
            return None
        best = max(range(len(means)), key=lambda i: (means[i], i))  # the latest of equal ones
        if means[best] <= 0 or means[-1] >= self.share * means[best]:
            return None
        return self.history[best + self.window - 1][0]
