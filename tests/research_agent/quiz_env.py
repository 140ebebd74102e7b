"""A quiz whose infos look like those of a search environment. Registers ``Quiz-v0``."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.spaces import Text

LETTERS = "abcd"


class Quiz(gym.Env[str, str]):
    """Say the letter that the prompt shows; an action that begins with ``?`` looks it up first.

    Args:
        count: questions.
        fuse: a file; while it exists, the process kills itself in the middle of question 3.
        down: a file; while it exists, the engine is down and every second question is void.
        long: the number of a question whose prompt is long.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 (Gymnasium's own type)

    def __init__(self, count: int = 6, fuse: str = "", down: str = "", long: int = -1) -> None:
        self.num_tasks, self.fuse, self.down, self.long = count, fuse, down, long
        self.action_space = self.observation_space = Text(max_length=4096)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.number = (options or {}).get("episode", 0)
        self.letter = LETTERS[self.number % len(LETTERS)]
        prompt = self.letter * (20 if self.number == self.long else 1) + "="
        return prompt, self.info(messages=[{"role": "user", "content": prompt}])

    def info(self, **more: Any) -> dict[str, Any]:
        kind = "odd" if self.number % 2 else ""
        said = {"question_id": f"q{self.number}", "question": f"Letter {self.number}?"}
        strata = {"hops": str(1 + self.number % 2), "type": kind}
        return said | {"strata": strata, "query": "", "ids": (), "metrics": {}} | more

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self.number == 3 and self.fuse and Path(self.fuse).exists():
            Path(self.fuse).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if action.startswith("?"):
            return f"!{self.letter}=", 0.0, False, False, self.info(query=action[1:], ids=(7, 8))
        if self.number % 2 and self.down and Path(self.down).exists():
            void = self.info(void=True, stop_reason="backend_error", prediction="")
            return "", 0.0, False, True, void
        right = float(action.startswith(self.letter))
        ended = {
            "metrics": {"f1": right / 2, "em": right},
            "prediction": action,
            "answers": (self.letter,),
            "stop_reason": "answer",
            "void": False,
        }
        return "", right, True, False, self.info(**ended)

    def fingerprints(self) -> dict[str, str]:
        return {"questions": str(self.num_tasks)}


gym.register("Quiz-v0", entry_point=f"{__name__}:Quiz")
