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
from gymnasium.vector import AutoresetMode, VectorEnv


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


class DoorsVector(VectorEnv[Any, Any, Any]):
    """Many of them. Counts what branching and stepping cost."""

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012
    num_tasks = Doors.num_tasks

    def __init__(self, num_envs: int = 1, **settings: Any) -> None:
        self.envs = [Doors(**settings) for _ in range(num_envs)]
        self.num_envs = num_envs
        self.single_action_space = self.envs[0].action_space
        self.single_observation_space = self.envs[0].observation_space
        self.ready: list[tuple[Any, ...]] = []
        self.steps = self.branches = 0

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        assert options
        observations, infos = [""] * self.num_envs, dict[str, Any]()
        for i, (episode, chosen) in enumerate(
            zip(options["episodes"], options["reset_mask"], strict=True)
        ):
            if chosen:
                observations[i], info = self.envs[i].reset(options={"episode": episode})
                infos = self._add_info(infos, info, i)
        return tuple(observations), infos

    def branch(self, source: int, targets: Sequence[int]) -> None:
        """The targets continue from the source's present state."""
        for target in targets:
            self.envs[target].walk = self.envs[source].walk
        self.branches += len(targets)

    def send(self, env_ids: Sequence[int], actions: Sequence[str]) -> None:
        for i, action in zip(env_ids, actions, strict=True):
            self.ready.append((i, *self.envs[i].step(action)))
        self.steps += len(env_ids)

    def recv(self, timeout: float | None = None, min_results: int = 1) -> list[tuple[Any, ...]]:
        results, self.ready = self.ready, []
        return results


gym.register("DoorsSingle-v0", entry_point=f"{__name__}:Doors")
gym.register(
    "Doors-v0", entry_point=f"{__name__}:Doors", vector_entry_point=f"{__name__}:DoorsVector"
)
