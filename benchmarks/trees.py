"""What trees of trajectories save, against chains: ``python -m benchmarks.trees [--tiny]``.

The same tasks are played as chains and as trees, with as many samples each, by the transformers
engine in MiniWorld. Counted are, per sample: action tokens sampled, tokens that went through the
model while sampling, and steps of the environment. Then the learner makes one update on the chains
and one on the trees, with trajectories in rows of their own, end to end, and as sequence trees:
tokens that its passes run over, and seconds. Last, what it costs the environment to branch an
episode, alone and into 64 targets.

Ratios are trees over chains, and packings over trajectories end to end. A sequence tree shares all
that is equal: prompts, turns before a branch, and turns that were sampled alike by chance, which a
trained policy does often.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.tables import print_table
from research_agent.batch import Packing, make_batch, micro_batches
from research_agent.presets import PRESETS
from research_agent.trajectory import Group, Trajectory
from research_agent.tree_plan import CHAINS, TreePlan

MINIWORLD = PRESETS["miniworld"]
ENV = "research_env:ReSearch-MiniWorld-v0"
TARGET_MICROSECONDS = 20.0
PACKINGS: tuple[Packing, ...] = ("off", "on", "tree")


def play(
    model: Any, plan: TreePlan, tasks: int, samples: int, env_args: dict[str, Any]
) -> tuple[list[Trajectory], int]:
    """Play tasks; returns the trajectories, and the tokens that went through the model."""
    from research_agent.engines.transformers import TransformersEngine  # noqa: PLC0415
    from research_agent.environments import make_environments  # noqa: PLC0415
    from research_agent.models.source import resolve_model  # noqa: PLC0415
    from research_agent.renderer import load_renderer  # noqa: PLC0415 - loads torch
    from research_agent.rollout import collect  # noqa: PLC0415

    renderer = load_renderer(resolve_model("miniworld-starter"))
    slots = tasks * samples
    sampling = replace(MINIWORLD.sampling, max_response=512)
    context = sampling.max_prompt + sampling.max_response
    engine = TransformersEngine(model, renderer, max_slots=slots, max_context=context)
    environments = make_environments(ENV, slots, env_args)
    wanted = [(task, sample) for task in range(tasks) for sample in range(samples)]
    try:
        played = collect(engine, environments, renderer, wanted, sampling, plan=plan)
    finally:
        environments.close()
    return played, engine.forwarded_tokens


def sampling_costs(played: Sequence[Trajectory], forwarded: int) -> dict[str, float]:
    """Means per sample."""
    count = len(played)
    return {
        "sampled tokens": sum(len(turn.tokens) for t in played for turn in t.own_turns) / count,
        "tokens through the sampler": forwarded / count,
        "environment steps": sum(len(t.own_turns) for t in played) / count,
        "turns of a trajectory": sum(len(t.turns) for t in played) / count,
    }


def learning_costs(model: Any, played: Sequence[Trajectory], rounds: int) -> dict[str, Any]:
    """Tokens of the learner's passes, and the least seconds of an update, for each packing."""
    from research_agent.algorithms.tree_grpo import TreeGRPO  # noqa: PLC0415
    from research_agent.learner import Learner  # noqa: PLC0415 - loads torch

    tasks = itertools.groupby(played, key=lambda t: t.episode)
    groups = [Group(episode, tuple(samples)) for episode, samples in tasks]
    batch = make_batch(groups)
    budget = MINIWORLD.learner.micro_batch_tokens
    tokens, seconds = {}, {}
    learners = {}
    for packing in PACKINGS:
        passes = micro_batches(batch, budget, packing=packing)
        tokens[packing] = sum(micro.tokens.numel() for micro in passes)
        config = replace(MINIWORLD.learner, packing=packing)
        learners[packing] = Learner(copy.deepcopy(model), TreeGRPO(kl_coef=0.0), config)
        seconds[packing] = float("inf")
    for _ in range(rounds):
        for packing, learner in learners.items():
            start = time.perf_counter()
            learner.update(groups)
            seconds[packing] = min(seconds[packing], time.perf_counter() - start)
    return {"tokens": tokens, "seconds": seconds}


def branch_microseconds(targets: int, rounds: int) -> float:
    """What a branched episode costs the environment: the median over rounds."""
    import gymnasium as gym  # noqa: PLC0415

    import research_env  # noqa: F401, PLC0415 - registers the ids

    args: dict[str, Any] = {"split": "dev", "template": "question", "top_k": 1}
    made: Any = gym.make_vec("ReSearch-MiniWorld-v0", num_envs=targets + 1, **args)
    environments = made.unwrapped
    environments.reset(seed=0)
    environments.send([0], ["<search>Dilani birthplace</search>"])
    environments.recv(min_results=1)
    others, times = range(1, targets + 1), []
    for _ in range(rounds):
        start = time.perf_counter()
        environments.branch(0, others)
        times.append((time.perf_counter() - start) / targets * 1e6)
    made.close()
    return statistics.median(times)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trees", description=__doc__)
    parser.add_argument("--model", default="miniworld-starter", help="the policy that plays")
    parser.add_argument("--difficulty", type=int, default=0, help="difficulty of MiniWorld")
    parser.add_argument("--tasks", type=int, default=24)
    parser.add_argument("--trees", type=int, default=2, help="trees of a task (M)")
    parser.add_argument("--branches", type=int, default=3, help="branches of a round (N)")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of a tree (L)")
    parser.add_argument("--tiny", action="store_true", help="two tasks: to see that it works")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    words = parser.parse_args(argv)
    tasks, rounds = (2, 1) if words.tiny else (words.tasks, 5)

    from research_agent.models.policy import load_model  # noqa: PLC0415 - loads torch

    model = load_model(words.model, device="cpu")
    plan = TreePlan(words.branches, words.rounds)
    samples = words.trees * plan.size
    env_args = {"split": "train", "template": "question", "top_k": 1}
    env_args |= {"difficulty": words.difficulty}
    chains, trees = (play(model, p, tasks, samples, env_args) for p in (CHAINS, plan))
    costs = {"chains": sampling_costs(*chains), "trees": sampling_costs(*trees)}
    learning = {
        name: learning_costs(model, played, rounds)
        for name, (played, _) in (("chains", chains), ("trees", trees))
    }
    branching = {n: branch_microseconds(n, 20 if words.tiny else 2000) for n in (1, 64)}
    if words.json:
        print(json.dumps({"sampling": costs, "learning": learning, "branch": branching}))
        return
    title = f"{tasks} tasks, {samples} samples each; trees of {plan.size}"
    rows = [
        [name, f"{value:.1f}", f"{costs['trees'][name]:.1f}", f"{costs['trees'][name] / value:.2f}"]
        for name, value in costs["chains"].items()
    ]
    headings = ["per sample", "chains", "trees", "ratio"]
    print_table(title, headings, rows)
    rows = [
        [
            f"{name}, {packing}",
            f"{tokens[packing]}",
            f"{tokens[packing] / tokens['on']:.2f}",
            f"{seconds[packing]:.2f}",
            f"{seconds[packing] / seconds['on']:.2f}",
        ]
        for name, (tokens, seconds) in ((n, cost.values()) for n, cost in learning.items())
        for packing in PACKINGS
    ]
    headings = ["packing", "tokens of an update", "ratio", "seconds", "ratio"]
    print_table("an update", headings, rows)
    print(
        f"Branching an episode costs the environment {branching[1]:.2f} microseconds, and into 64 "
        f"targets {branching[64]:.2f} each (target: {TARGET_MICROSECONDS:.0f})."
    )


if __name__ == "__main__":
    main()
