"""What each rank of ``test_fsdp.py`` runs: updates, checkpoints, and what it holds meanwhile.

Three processes meet as two ranks and as three. The test's own process is the run of one rank.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from research_agent import checkpoint
from research_agent.algorithms.grpo import GRPO
from research_agent.algorithms.ppo import PPO
from research_agent.config import LearnerConfig
from research_agent.distributed import local_tensor, rank_and_size, together
from research_agent.errors import NonFiniteError
from research_agent.learner import Learner
from research_agent.models.deferred import load_deferred
from research_agent.models.policy import load_model, save_settings
from research_agent.sharded import write_weights
from research_agent.weight_files import WeightFolder
from tests.research_agent.live_bytes import LiveBytes
from tests.research_agent.rollouts import random_groups

GRPO_KL = GRPO(kl_coef=0.1)
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "packed": (GRPO_KL, {"packing": "on"}),
    "rows": (GRPO_KL, {"packing": "off", "gradient_checkpointing": True, "minibatches": 2}),
    "offload": (GRPO(kl_coef=0.0), {"packing": "on", "optimizer": "adamw_offload"}),
    "copies": (GRPO(kl_coef=0.0), {"packing": "on", "shard_ranks": 1}),
    "adapters": (GRPO_KL, {"packing": "on", "lora_rank": 2}),
    "critic": (PPO(kl_coef=0.0, critic_learning_rate=1e-3), {"packing": "on"}),
}
MEASURED: dict[str, tuple[Any, dict[str, Any]]] = {
    "policy": (GRPO(kl_coef=0.0), {}),
    "critic": (PPO(kl_coef=0.1, critic_learning_rate=1e-3), {}),  # and a reference
    "adapters": (GRPO_KL, {"lora_rank": 2}),
}
BUCKET = 650_000
RESUMED = ("packed", "offload", "copies", "adapters", "critic")


def make(case: str, model: Path, weights: Path | None = None) -> Learner:
    """A learner of a case, over the model in a folder or over its weights in a checkpoint."""
    algorithm, settings = CASES[case]
    load: Callable[..., Any] = load_deferred
    if rank_and_size()[1] == 1:
        load = partial(load_model, device="cpu")
    torch.manual_seed(0)  # new adapters begin at random
    start = model if weights is None or "lora_rank" in settings else weights
    needs = algorithm.needs_reference and "lora_rank" not in settings
    config = LearnerConfig(
        learning_rate=1e-3,
        max_grad_norm=0.1,
        micro_batch_tokens=40,
        old_logprobs="recomputed",
        bucket_bytes=8000,
        **settings,
    )
    return Learner(
        load(start, dtype="float64"),
        algorithm,
        config,
        reference=load(model, dtype="float64") if needs else None,
        device=torch.device("cpu"),
    )


def save(learner: Learner, root: Path, step: int = 1) -> Path:
    def write(folder: Path) -> None:
        write_weights(folder, learner.weight_buckets())
        with together():
            if rank_and_size()[0] == 0:
                save_settings(learner.model, folder)

    state = {"learner": learner.state_dict()}
    return checkpoint.save(
        root, step, write_model=write, state=state, config={}, keep=9, bucket_bytes=8000
    )


def resume(case: str, model: Path, folder: Path) -> Learner:
    saved = checkpoint.load(folder, deferred=("learner",))
    learner = make(case, model, folder)
    learner.load_state_dict(saved.state["learner"], saved.read)
    return learner


def run(folder: Path) -> None:
    """All cases at the present number of ranks; results into files that the first rank writes."""
    rank, size = rank_and_size()
    for case in CASES:
        if size == 3 and case == "copies":
            continue
        learner = make(case, folder / "model")
        sharded = {isinstance(p, DTensor) for p in learner.model.parameters()}
        assert sharded == {size > 1}
        # A different number of trajectories each time, once fewer than ranks.
        data = [random_groups(seed, groups=3 - seed % 3, samples=2) for seed in range(3)]
        metrics = [learner.update(groups) for groups in data]
        found: dict[str, Any] = {"weights": whole(learner), "metrics": metrics}
        if case in RESUMED:
            save(learner, folder / f"{case}-{size}")
        learner.update(random_groups(9))
        found["after"] = whole(learner)
        if case == "packed":
            found["cause"] = broken(learner)
        if rank == 0:
            torch.save(found, folder / f"{case}-{size}.pt")
    resume_all(folder)


def resume_all(folder: Path) -> None:
    """Continue the checkpoints that there are by one update."""
    rank, size = rank_and_size()
    for case in RESUMED:
        for before in (1, 2, 3) if (case, size) != ("copies", 3) else ():
            saved = folder / f"{case}-{before}" / "step-000001"
            result = folder / f"{case}-{before}-{size}.pt"
            if saved.is_dir() and not result.exists():
                learner = resume(case, folder / "model", saved)
                learner.update(random_groups(9))
                after = whole(learner)
                if rank == 0:
                    torch.save(after, result)


def whole(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in learner.weights()}


def broken(learner: Learner) -> str:
    """What an update says of weights that are not numbers; all ranks must say it."""
    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter.fill_(torch.nan)
    try:
        learner.update(random_groups(10))
    except NonFiniteError as error:
        return str(error)
    return ""


def measure(folder: Path, case: str) -> dict[str, Any]:
    """The most bytes of tensors that this rank holds while it loads, steps, saves and resumes."""
    place, root = folder / "large", folder / f"large-{case}-{rank_and_size()[1]}"
    algorithm, settings = MEASURED[case]
    config = LearnerConfig(packing="on", micro_batch_tokens=40, bucket_bytes=BUCKET, **settings)

    def load(source: Path) -> Learner:
        reference = load_deferred(place) if case == "critic" else None
        model = load_deferred(place if case == "adapters" else source)
        return Learner(model, algorithm, config, reference=reference, device=torch.device("cpu"))

    peaks: dict[str, int] = {}

    @contextmanager
    def watched(name: str, held: list[torch.Tensor]) -> Iterator[None]:
        with LiveBytes(held) as live:
            yield
        peaks[name] = live.peak

    with watched("load", []):
        learner = load(place)
    policies = [learner._logprobs, learner._reference_logprobs, learner._critic]
    models: list[Any] = [getattr(p, "model", p) for p in policies if p is not None]
    weights = [local_tensor(p) for model in models for p in model.parameters()]
    policy = [local_tensor(p) for p in learner.model.parameters()]
    with watched("step", weights):
        learner.update(random_groups(1, groups=1, samples=3))
    state = learner.state_dict()
    kept = [state["moments"], state["critic"]["moments"] if "critic" in state else {}]
    moments = [local_tensor(t) for each in kept for one in each.values() for t in one.values()]
    with watched("save", [*weights, *moments]):
        saved = save(learner, root)
    with watched("send", [*weights, *moments]):
        WeightFolder().share(learner.weights(torch.bfloat16), "1")
    del learner, policies, models, state, kept
    with watched("resume", []):
        found = checkpoint.load(saved, deferred=("learner",))
        learner = load(saved)
        learner.load_state_dict(found.state["learner"], found.read)
    # Counted in storages: FSDP pads the last rank's shard to the size of the others.
    return {
        "shard": sum(t.untyped_storage().nbytes() for t in weights),
        "policy": sum(t.untyped_storage().nbytes() for t in policy),
        "files": len(list((saved / "state").iterdir())),
        "moments": sum(t.numel() * t.element_size() for t in moments),
        "peaks": peaks,
    }


def half_precision(folder: Path, precision: str = "bfloat16") -> dict[str, Any]:
    """One update where weights are gathered in bfloat16."""
    load: Callable[..., Any] = load_deferred
    if rank_and_size()[1] == 1:
        load = partial(load_model, device="cpu")
    learner = Learner(
        load(folder / "model"),
        PPO(kl_coef=0.1, critic_learning_rate=1e-3),
        LearnerConfig(packing="on", micro_batch_tokens=40, precision=precision),  # type: ignore
        reference=load(folder / "model", dtype=precision),
        device=torch.device("cpu"),
    )
    assert learner._reference_logprobs is not None and learner._critic is not None
    critic: Any = learner._critic.model
    gathered: set[torch.dtype] = set()
    layer = critic.body.layers[0].mlp.up_proj
    layer.register_forward_pre_hook(lambda module, _: gathered.add(module.weight.dtype))
    seen: dict[str, Any] = {
        "gathered": learner._logprobs(lambda model: model.get_output_embeddings().weight.dtype),
        "kept": {p.dtype for p in learner.model.parameters()},
        "reference": {p.dtype for p in learner._reference_logprobs.parameters()},
        "critic": {(isinstance(p, DTensor), p.dtype) for p in critic.parameters()},
        "critic_gathered": gathered,
    }
    seen["metrics"] = learner.update(random_groups(0))
    moments = learner.state_dict()["moments"].values()
    seen["moments"] = {tensor.dtype for each in moments for tensor in each.values()}
    return seen


def main(folder: Path, rank: int, what: str) -> None:
    torch.set_num_threads(1)
    for phase, size in enumerate((2, 3, 2) if what == "learn" else (2, 3)):
        if rank < size:
            meeting = f"file://{folder}/meeting-{what}-{phase}"
            dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
            if what == "measure":
                for case in MEASURED:
                    torch.save(measure(folder, case), folder / f"bytes-{case}-{size}-{rank}.pt")
                torch.save(half_precision(folder), folder / f"half-{size}-{rank}.pt")
            elif phase < 2:
                run(folder)
            else:
                resume_all(folder)
            dist.barrier()
            dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
