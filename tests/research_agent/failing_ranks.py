"""What each rank of ``test_distributed.py`` runs: pieces of work that one rank or both fail at.

Each rank prints a line of JSON: by piece, the error or the result.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from research_agent import distributed
from research_agent.algorithms.grpo import GRPO
from research_agent.config import LearnerConfig
from research_agent.distributed import alike, gather, init_distributed
from research_agent.errors import ConfigError
from research_agent.learner import Learner
from research_agent.models import prepare
from research_agent.weight_files import WeightFolder
from tests.research_agent.conftest import tiny_qwen2
from tests.research_agent.rollouts import random_groups


def fail_alone() -> None:
    with alike():
        if dist.get_rank():
            raise ConfigError("rank 1 alone")


def fail_alike() -> None:
    with alike():
        raise ConfigError("both")


def fill_the_disk() -> None:
    """The folder of the rank that writes is gone, so that it cannot write."""
    folder = WeightFolder()
    if dist.get_rank() == 0:
        shutil.rmtree(folder.root)
    folder.share(gathered(), "1")


def gathered() -> Iterator[tuple[str, Tensor]]:
    for name in "abc":
        total = torch.ones(2)
        dist.all_reduce(total)
        yield name, total


def pack_on_one_rank() -> float:
    """Rank 1 finds that trajectories cannot share rows: no rank lets them."""
    if dist.get_rank():
        prepare.logit_difference = lambda *_: "something else"  # type: ignore[attr-defined]
    config = LearnerConfig(micro_batch_tokens=40)
    learner = Learner(tiny_qwen2(50), GRPO(kl_coef=0.0), config, trees=True)
    return learner.update(random_groups(1))["loss"]


def run() -> None:
    distributed._RANK_0_TIMEOUT = timedelta(seconds=0.5)
    said: dict[str, object] = {}
    try:
        with init_distributed():
            for work in (fail_alone, fail_alike, fill_the_disk, pack_on_one_rank):
                try:
                    said[work.__name__] = work()
                except Exception as error:
                    said[work.__name__] = f"{type(error).__name__}: {error}"
                dist.barrier()
            if dist.get_rank() == 0:
                print(json.dumps(said), flush=True)
                os._exit(0)
            gather([1])
    except Exception as error:
        print(json.dumps(said | {"lost": f"{type(error).__name__}: {error}"}), flush=True)
        os._exit(0)


if __name__ == "__main__":
    run()
