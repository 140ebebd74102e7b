"""The ids of this package for ``gymnasium.make`` and ``gymnasium.make_vec``."""

from __future__ import annotations

from typing import Any

import gymnasium as gym

IDS: dict[str, dict[str, Any]] = {
    "ReSearch-MiniWorld-v0": {"dataset": "miniworld"},
    "ReSearch-MuSiQue-v0": {"dataset": "musique"},
    "ReSearch-HotpotQA-v0": {"dataset": "hotpotqa"},
    "ReSearch-2Wiki-v0": {"dataset": "2wiki"},
    "ReSearch-Bamboogle-v0": {"dataset": "bamboogle", "split": "test"},
    "SearchQA-v0": {"dataset": "custom"},
}


def register_envs() -> None:
    """Register every id; doing so again changes nothing."""
    for name, settings in IDS.items():
        if name not in gym.registry:
            gym.register(
                name,
                entry_point="research_env.env:SearchQAEnv",
                vector_entry_point="research_env.vector_env:SearchQAVectorEnv",
                order_enforce=False,  # the environment does it itself, with errors that say more
                kwargs=settings,
            )
