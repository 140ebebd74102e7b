"""A paper of one's own: other tags, another prompt, a limit on searches and a reward.

    python docs/examples/own_paper.py

A protocol is a value; this one starts from ReSearch's and replaces what differs. To add a paper to
the package, write a module in research_env/papers/ and add its name to the registry.
"""

from __future__ import annotations

from dataclasses import replace

import gymnasium as gym

import research_env  # noqa: F401  (registers the ids)
from research_env import RESEARCH, Episode, Tag
from research_env.rewards import f1_reward

PROMPT = (
    "Answer the question. You may look things up: write <ask>what you want to know</ask>, and read "
    "what comes back between <found> and </found>. End with <answer> \\boxed{answer} </answer>. "
    "Question: {question}\n"
)

ASK = replace(
    RESEARCH,
    name="ask",
    query=Tag("<ask>", "</ask>"),
    result=Tag("<found>", "</found>"),
    terminators=("</ask>",),
    prompts={"base": (("user", PROMPT),), "instruct": (("user", PROMPT),)},
    max_searches=3,
    top_k=2,
)


def careful(episode: Episode) -> float:
    """F1 of the answer, and nothing for an answer that was not looked up."""
    return f1_reward(episode) if episode.searches else 0.0


def main() -> None:
    """Play one episode in the new protocol."""
    env = gym.make("ReSearch-MiniWorld-v0", protocol=ASK, reward=careful)
    prompt, _ = env.reset(seed=7)
    print(prompt)
    observation, *_ = env.step("<think> First the company. </think> <ask>a company</ask>")
    print(observation)
    right = env.unwrapped.episode.question.answers[0]
    *_, reward, terminated, _, info = env.step(f"<answer> \\boxed{{{right}}} </answer>")
    print(f"reward {reward}, ended {terminated}: {info['stop_reason']}")
    env.close()


if __name__ == "__main__":
    main()
