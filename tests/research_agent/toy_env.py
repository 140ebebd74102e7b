"""A copy game, which has nothing to do with search: say the letter that the prompt shows.

Importing the module registers ``CopyLetter-v0``, and ``CopyLetterNative-v0``, whose vector
environment has ``send`` and ``recv``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
from gymnasium.spaces import Text
from gymnasium.vector import AutoresetMode, VectorEnv

LETTERS = "abcd"


class CopyLetter(gym.Env[str, str]):
    """Prompt ``b=``; reward 1 for an action that begins with ``b``, in each of ``turns`` turns.

    The episode number picks the letter. Between turns the environment says ``?c=``, with the
    next letter. ``end`` is a terminator.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 (Gymnasium's own type)

    def __init__(self, turns: int = 1, letters: str = LETTERS, end: str = "") -> None:
        self.letters = letters
        self.num_tasks = len(letters)
        self.turns = turns
        self.action_space = Text(max_length=4096)
        self.observation_space = Text(max_length=64)
        if end:
            self.action_space.terminators = (end,)  # type: ignore[attr-defined]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.at = (options or {}).get("episode", 0)
        self.rights = self.taken = 0
        prompt = f"{self.letter}="
        return prompt, {"messages": [{"role": "user", "content": prompt}]}

    @property
    def letter(self) -> str:
        return self.letters[(self.at + self.taken) % len(self.letters)]

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        right = action.startswith(self.letter)
        self.rights += right
        self.taken += 1
        over = self.taken == self.turns
        metrics = {"right": self.rights / self.turns} if over else {}
        info = {"metrics": metrics, "stop_reason": "answer" if over else "", "void": False}
        return ("" if over else f"?{self.letter}="), float(right), over, False, info


class CopyLetterVector(VectorEnv[Any, Any, Any]):
    """Many of them, with ``send`` and ``recv``."""

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012
    kind: Any = CopyLetter

    def __init__(self, num_envs: int = 1, **settings: Any) -> None:
        self.envs = [self.kind(**settings) for _ in range(num_envs)]
        self.num_envs = num_envs
        self.num_tasks = self.envs[0].num_tasks
        self.single_action_space = self.envs[0].action_space
        self.single_observation_space = self.envs[0].observation_space
        self.ready: list[tuple[Any, ...]] = []

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

    def send(self, env_ids: Sequence[int], actions: Sequence[str]) -> None:
        for i, action in zip(env_ids, actions, strict=True):
            self.ready.append((i, *self.envs[i].step(action)))

    def recv(self, timeout: float | None = None, min_results: int = 1) -> list[tuple[Any, ...]]:
        results, self.ready = self.ready, []
        return results


gym.register("CopyLetter-v0", entry_point=f"{__name__}:CopyLetter")
gym.register(
    "CopyLetterNative-v0",
    entry_point=f"{__name__}:CopyLetter",
    vector_entry_point=f"{__name__}:CopyLetterVector",
)
