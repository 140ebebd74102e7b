"""Episodes of which some are void, as when a server is down. Registers ``Failing-v0``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.spaces import Text


class BrokenError(Exception):
    """An error of the environment's own kind."""


class Failing(gym.Env[str, str]):
    """Every ``each``-th episode is void, from the first on, until the file ``up`` exists."""

    metadata = {"render_modes": []}  # noqa: RUF012 (Gymnasium's own type)

    def __init__(self, each: int = 1, up: str = "", broken: bool = False) -> None:
        if each < 1:
            raise ValueError(f"each is {each}; it must be at least 1")
        self.each, self.up, self.broken = each, up, broken
        self.num_tasks = 4
        self.action_space = self.observation_space = Text(max_length=4096)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode = (options or {}).get("episode", 0)
        return "a=", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self.broken:
            raise BrokenError("line 3 of the questions is no question")
        is_up = bool(self.up) and Path(self.up).exists()
        void = self.episode % self.each == 0 and not is_up
        reason = "backend_error" if void else "answer"
        info = {"metrics": {"length": float(len(action))}, "stop_reason": reason, "void": void}
        return "", 0.0 if void else float("a" in action), not void, void, info


gym.register("Failing-v0", entry_point=f"{__name__}:Failing")
