"""What each rank of ``test_sharded.py`` runs: open models, save them, and read them again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from research_agent.algorithms.base import Algorithm
from research_agent.algorithms.grpo import GRPO
from research_agent.algorithms.ppo import PPO
from research_agent.config import LearnerConfig
from research_agent.distributed import init_distributed, rank_and_size
from research_agent.learner import Learner
from research_agent.models.deferred import load_deferred
from tests.research_agent.fsdp_worker import save

TOKENS = [[3, 4, 5, 6, 7, 8]]
CASES = ("gemma4", "glm4_moe", "gpt_neox")


def learner(folder: Path, algorithm: Algorithm | None = None) -> Learner:
    """A learner over the model in a folder; each rank has its shards."""
    rule = algorithm or GRPO(kl_coef=0.0)
    config = LearnerConfig(packing="off", bucket_bytes=8000)
    return Learner(load_deferred(folder), rule, config, device=torch.device("cpu"))


@torch.no_grad()
def logprobs(policy: Any) -> torch.Tensor:
    """Log-probabilities of all tokens after each one of ``TOKENS``."""

    def compute(model: Any) -> torch.Tensor:
        found: torch.Tensor = model(torch.tensor(TOKENS)).logits.log_softmax(-1)
        return found

    return policy._logprobs(compute) if isinstance(policy, Learner) else compute(policy)


def run(place: Path, case: str) -> dict[str, Any]:
    """Log-probabilities of a model as it is opened, saved and opened again, and rolled back."""
    first = learner(place / case)
    found: dict[str, Any] = {"opened": logprobs(first)}
    saved = save(first, place / f"{case}-run")
    found["again"] = logprobs(learner(saved))
    with torch.no_grad():
        for parameter in first.model.parameters():
            parameter.mul_(2)
    found["changed"] = logprobs(first)
    first.load_weights(place / case)
    found["rolled back"] = logprobs(first)
    return found


def main(place: Path) -> None:
    torch.set_num_threads(1)
    with init_distributed(2):
        for case in CASES:
            found = run(place, case)
            if case == "gemma4":
                critic: Any = learner(place / case, PPO(kl_coef=0.0))._critic
                found["critic"] = {n: b for n, b in critic.model.named_buffers() if "scalar" in n}
            torch.save(found, place / f"{case}-{rank_and_size()[0]}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
