"""A reward of one's own: try it on episodes written by hand, then train with it.

python docs/examples/own_reward.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gymnasium as gym

import research_env  # noqa: F401  (registers the ids)
from research_agent import PRESETS, train
from research_env import Episode
from research_env.rewards import em_reward


def thrifty(episode: Episode) -> float:
    """Exact match, less 0.05 for each search."""
    return em_reward(episode) - 0.05 * episode.searches


def main() -> None:
    """Show the reward of three episodes, then train two steps with it."""
    env = gym.make("ReSearch-MiniWorld-v0", reward=thrifty, template="question")
    env.reset(seed=7, options={"episode": 0})
    right = env.unwrapped.episode.question.answers[0]
    answer = f"<answer> \\boxed{{{right}}} </answer>"
    search = "<search>the city of the company</search>"
    for name, actions in {
        "right at once": [answer],
        "right after two searches": [search, search, answer],
        "wrong": ["<answer> \\boxed{nobody knows} </answer>"],
    }.items():
        env.reset(seed=7, options={"episode": 0})
        for action in actions:
            _, reward, *_ = env.step(action)
        print(f"{name}: {reward:.2f}")
    env.close()

    preset = PRESETS["miniworld"]  # the environment's arguments are plain data: name the reward
    arguments = {**preset.environment.env_args, "reward": f"{__name__}:thrifty"}
    summary = train(
        replace(
            preset,
            environment=replace(preset.environment, env_args=arguments),
            rollout=replace(preset.rollout, prompts_per_step=2),
            run=replace(preset.run, steps=2, eval_every=0, quiet=True, output=Path("runs/thrifty")),
        )
    )
    print(summary.message)


if __name__ == "__main__":
    main()
