"""Random models, and random search trajectories of any length, to measure with."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from research_agent.trajectory import Group, Segment, Trajectory

QWEN_1_5B = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
}


def make_model(sizes: dict[str, int], device: str) -> Any:
    """Make a Qwen2 of random float32 weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: PLC0415

    torch.manual_seed(0)
    config = Qwen2Config(**sizes, max_position_embeddings=32768, tie_word_embeddings=True)
    with torch.device(device):
        return Qwen2ForCausalLM(config).eval()


def make_groups(
    lengths: Sequence[int], vocabulary: int, samples: int = 4, seed: int = 0
) -> list[Group]:
    """Make search trajectories of given lengths: actions and observations take turns.

    Their lengths are drawn like those of 625 real ones of R1-Searcher: actions of about 90 tokens,
    observations of 350 to 770, so that roughly a fifth of the tokens are actions.
    """
    rng = random.Random(seed)

    def some(count: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(vocabulary), k=count))

    def make(number: int, length: int) -> Trajectory:
        segments = [Segment("prompt", some(min(200, length // 4)))]
        left = length - len(segments[0].tokens)
        while left:
            acts = min(left, max(10, round(rng.gauss(92, 30))))
            seen = 0 if left < acts + 800 else rng.randint(350, 770)
            if left < acts + 800:
                acts = left if left < 400 else acts
                seen = max(0, left - acts - 92) if acts < left else 0
            logprobs = tuple(rng.uniform(-1.1, -0.9) * math.log(vocabulary) for _ in range(acts))
            segments.append(Segment("action", some(acts), logprobs))
            if seen:
                segments.append(Segment("observation", some(seen)))
            left -= acts + seen
        episode, sample = divmod(number, samples)
        reward = rng.random()
        ended = reward_last_turn(segments, reward)
        return Trajectory(episode, sample, ended, reward, True, False)

    made = [make(number, length) for number, length in enumerate(lengths)]
    return [Group(i, made[i : i + samples]) for i in range(0, len(made), samples)]


def reward_last_turn(segments: Sequence[Segment], reward: float) -> tuple[Segment, ...]:
    """Put the reward of a whole episode on its last turn.

    Args:
        segments: the trajectory's segments.
        reward: the trajectory's reward. It is lost if there is no turn.

    Returns:
        The segments, the last action's with this reward.
    """
    last = max((i for i, s in enumerate(segments) if s.provenance == "action"), default=-1)
    return tuple(replace(s, reward=reward) if i == last else s for i, s in enumerate(segments))
