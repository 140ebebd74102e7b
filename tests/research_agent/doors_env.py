"""A walk through doors, whose state is a value: it can be branched, and states have names.

Importing the module registers ``Doors-v0``, a vector environment with ``send``, ``recv`` and
``branch``, and ``DoorsSingle-v0``, a single one with ``state_key`` but no branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym
from gymnasium.spaces import Text

from tests.research_agent.toy_env import CopyLetterVector


@dataclass(frozen=True)
class Walk:
    """Where a walk is. The way out of task n is the binary digits of n, the lowest first."""

    task: int
    doors: int
    way: str = ""

    @property
    def key(self) -> str:
        return f"{self.task}:{self.way}"

    def through(self, action: str) -> tuple[Walk, float]:
        """Go left for an action that begins with a letter up to m, right otherwise."""
        step = "0" if action[:1] <= "m" else "1"
        after = replace(self, way=self.way + step)
        return after, 0.25 * (step == str(self.task >> len(self.way) & 1))

    @property
    def is_over(self) -> bool:
        return len(self.way) == self.doors


class Doors(gym.Env[str, str]):
    """Reward 0.25 for each door that is on the way out."""

    metadata = {"render_modes": []}  # noqa: RUF012 (Gymnasium's own type)
    num_tasks = 8

    def __init__(self, doors: int = 3) -> None:
        self.action_space = self.observation_space = Text(max_length=4096)
        self.doors = doors

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.walk = Walk((options or {}).get("episode", 0) % self.num_tasks, self.doors)
        return f"{self.walk.task}=", {"state_key": self.walk.key}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.walk, reward = self.walk.through(action)
        over = self.walk.is_over
        info = {
            "state_key": self.walk.key,
            "metrics": {"found": float(reward > 0)} if over else {},
            "void": False,
        }
        return ("" if over else f"?{self.walk.way}="), reward, over, False, info


class DoorsVector(CopyLetterVector):
    """Many of them. Counts what branching and stepping cost."""

    kind = Doors
    steps = branches = 0

    def branch(self, source: int, targets: Sequence[int]) -> None:
        """The targets continue from the source's present state."""
        for target in targets:
            self.envs[target].walk = self.envs[source].walk
        self.branches += len(targets)

    def send(self, env_ids: Sequence[int], actions: Sequence[str]) -> None:
        super().send(env_ids, actions)
        self.steps += len(env_ids)


gym.register("DoorsSingle-v0", entry_point=f"{__name__}:Doors")
gym.register(
    "Doors-v0", entry_point=f"{__name__}:Doors", vector_entry_point=f"{__name__}:DoorsVector"
)
