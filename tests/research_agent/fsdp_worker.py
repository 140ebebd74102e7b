"""What each process of ``test_fsdp.py`` runs: five updates, and the weights into a file."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from research_agent.algorithms.grpo import GRPO
from research_agent.distributed import rank_and_size
from research_agent.errors import NonFiniteError
from research_agent.learner import Learner
from tests.research_agent.conftest import tiny_qwen2
from tests.research_agent.learners import make_learner
from tests.research_agent.rollouts import random_groups


def learn(file: str, **settings: Any) -> None:
    """Five updates from the first weights; then saved, loaded and continued by one more."""
    metrics = []
    learner = _learner(**settings)
    sharded = {isinstance(p, DTensor) for p in learner.model.parameters()}
    assert sharded == {rank_and_size()[1] > 1}
    for seed in range(5):
        # A different number of trajectories each time, once fewer passes than processes.
        metrics.append(learner.update(random_groups(seed, groups=3 - seed % 3, samples=2)))
    weights = {name: weight.clone() for name, weight in learner.weights()}
    state = learner.state_dict()
    again = _learner(weights, **settings)
    again.load_state_dict(state)
    again.update(random_groups(9))
    after = {name: weight.clone() for name, weight in again.weights()}
    try:
        with torch.no_grad():
            for parameter in again.model.parameters():
                parameter.fill_(torch.nan)
        again.update(random_groups(10))
        cause = ""
    except NonFiniteError as error:
        cause = str(error)
    if rank_and_size()[0] == 0:
        torch.save({"weights": weights, "after": after, "metrics": metrics, "cause": cause}, file)


def _learner(weights: dict[str, torch.Tensor] | None = None, **settings: Any) -> Learner:
    model, reference = tiny_qwen2(50).double(), tiny_qwen2(50).double()
    if weights is not None:
        model.load_state_dict(weights, strict=False)
    return make_learner(
        model,
        GRPO(kl_coef=0.1),
        reference=reference,
        learning_rate=1e-3,
        max_grad_norm=0.1,
        micro_batch_tokens=40,
        old_logprobs="recomputed",
        **settings,
    )


if __name__ == "__main__":
    dist.init_process_group("gloo")
    learn(sys.argv[1], **json.loads(sys.argv[2]))
    dist.destroy_process_group()
