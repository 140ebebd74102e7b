"""A player with a scripted engine and characters for tokens: quick to start in a child process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from research_agent.config import (
    EnvironmentConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    TrainConfig,
)
from research_agent.engines.base import Completion, SamplingParams
from research_agent.engines.scripted import ScriptedEngine
from research_agent.errors import NonFiniteError

SLOTS = 3
SAMPLING = SamplingConfig(temperature=1.0, max_prompt=20, max_response=60, overlap=True)
CONFIG = TrainConfig(
    environment=EnvironmentConfig(
        env="tests.research_agent.toy_env:CopyLetter-v0", env_args={"turns": 3}
    ),
    sampling=SAMPLING,
    rollout=RolloutConfig(max_staleness=1),
    run=RunConfig(eval_every=1, eval_temperature=1.0),
)
END = 0


class Characters:
    """A renderer whose tokens are characters."""

    end_ids = frozenset({END})

    def encode_text(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def encode_prompt(self, observation: str, messages: Any = None, tools: Any = ()) -> list[int]:
        return self.encode_text(observation)

    def encode_observation(self, observation: str, *framing: Any) -> list[int]:
        return self.encode_text(observation)

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(chr(token) for token in tokens if token != END)

    def stop_flags(self, stop: tuple[str, ...]) -> list[bool]:
        assert not stop
        return [False] * 128


RENDERER: Any = Characters()


def say(context: Sequence[int], params: SamplingParams) -> list[int]:
    """A turn that depends on the trajectory's seed and on all that was said."""
    words = ["a", "bcd", "abcdabcd", "dd"]
    return [*RENDERER.encode_text(words[(params.seed + sum(context)) % len(words)]), END]


class Checked(ScriptedEngine):
    """It looks at the weights: they are all ``version``. A version of 99 has no finite number."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        weights = list(weights)
        assert [name for name, _ in weights] == ["first", "second"]
        assert all(weight.eq(version).all() for _, weight in weights)
        super().load_weights(weights, version)

    def step(self) -> list[Completion]:
        if self._version == 99:
            raise NonFiniteError("the logits are not finite")
        return super().step()


def scripted() -> tuple[Checked, Any]:
    """Made in the child: turns take one engine step more or less."""
    steps = iter(range(10**9))
    return Checked(say, RENDERER, delay=lambda: next(steps) % 3), RENDERER


def weights(version: int) -> list[tuple[str, torch.Tensor]]:
    return [(name, torch.full((3, 2), float(version))) for name in ("first", "second")]
