"""Watch a small policy learn to search: ``make demo``.

The starter can read a passage and write a query, and seldom does either. It is evaluated on
questions held out from training, trained by GRPO through the real environment, and evaluated again:
also in a world of another seed, and with its search results blanked.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.blanked import BlankRetriever
from research_agent.config import SamplingConfig, TrainConfig
from research_agent.errors import ResearchAgentError, TooManyVoidError
from research_agent.presets import PRESETS
from research_env.datasets import miniworld
from research_env.errors import ResearchEnvError
from research_env.retrieval import open_retriever

MINIWORLD = PRESETS["miniworld"]

OTHER_WORLD = 1
SLOTS = 128  # episodes of an evaluation that are played at the same time
PLAN, GO_ON = "<think> plan:", " <think> next:"  # how the starter begins a turn that searches


@dataclass(frozen=True)
class DemoConfig:
    """Train the starter policy in MiniWorld, and show what it learned."""

    seed: int = 0
    """Seed of the training run."""
    seconds: float = 120.0
    """Seconds of training; evaluations come on top."""
    steps: int = MINIWORLD.run.steps
    """Training steps at most."""
    limit: int = 400
    """Held-out questions per evaluation."""
    model: str = MINIWORLD.policy.model
    """The policy to start from."""
    output: Path = Path("runs/demo")
    """Folder of the run; a subfolder is made for the seed."""
    json: bool = False
    """Print the results as one line of JSON on standard output."""


class SearchAlways:
    """Environments that begin every turn of the policy, until it has searched for each hop."""

    def __init__(self, inner: Any, hops: Mapping[str, int]) -> None:
        self._inner = inner
        self._hops = hops  # question id -> searches that its gold decomposition has
        self._left: dict[int, int] = {}
        self._words: dict[int, str] = {}
        self.num_envs: int = inner.num_envs
        self.num_tasks: int | None = inner.num_tasks
        self.terminators: tuple[str, ...] = inner.terminators

    def _begin(self, env_id: int, words: str) -> str:
        started = words if self._left[env_id] > 0 else ""
        self._left[env_id] -= 1
        self._words[env_id] = started
        return started

    def reset(
        self, assignments: Mapping[int, int], seed: int
    ) -> dict[int, tuple[str, Mapping[str, Any]]]:
        """Reset, with the beginning of a plan behind each prompt."""
        started = self._inner.reset(assignments, seed)
        for env_id, (_, info) in started.items():
            self._left[env_id] = self._hops[info["question_id"]]
        return {i: (text + self._begin(i, PLAN), info) for i, (text, info) in started.items()}

    def send(self, env_ids: Sequence[int], actions: Sequence[str]) -> None:
        """Put the beginnings before the actions, which continue them."""
        self._inner.send(
            env_ids, [self._words[i] + a for i, a in zip(env_ids, actions, strict=True)]
        )

    def recv(self, min_results: int) -> list[Any]:
        """Results, each observation followed by the beginning of the next turn."""
        return [
            result
            if result.terminated or result.truncated
            else result._replace(observation=result.observation + self._begin(result.env_id, GO_ON))
            for result in self._inner.recv(min_results)
        ]

    def truncate(self, env_id: int) -> Any:
        """End an episode whose budget of tokens is spent."""
        return self._inner.truncate(env_id)

    def close(self) -> None:
        """Close the environments behind it."""
        self._inner.close()


def measure(
    model: str,
    folder: Path,
    limit: int,
    *,
    temperature: float = 0.0,
    world: int = 0,
    blank: bool = False,
    always: bool = False,
) -> dict[str, float]:
    """Evaluate a policy on held-out questions, the same ones in every variant.

    Args:
        model: the policy.
        folder: where its episodes are written.
        limit: number of questions.
        temperature: 0 is greedy.
        world: seed of the world.
        blank: search results say nothing.
        always: the policy is forced to search.

    Returns:
        Means of the environment's metrics.
    """
    from research_agent.engines import make_engine  # noqa: PLC0415
    from research_agent.environments import make_environments  # noqa: PLC0415
    from research_agent.evaluation.evaluate import evaluate  # noqa: PLC0415
    from research_agent.models.policy import load_model  # noqa: PLC0415
    from research_agent.models.source import resolve_model  # noqa: PLC0415
    from research_agent.renderer import load_renderer  # noqa: PLC0415 - loads torch

    args: dict[str, Any] = MINIWORLD.environment.env_args | {"split": "dev", "world_seed": world}
    if blank:
        args["retriever"] = BlankRetriever(open_retriever(None, miniworld.world(world)))
    environments: Any = make_environments(MINIWORLD.environment.env, SLOTS, args)
    if always:
        questions = miniworld.load("dev", world).questions
        environments = SearchAlways(environments, {q.id: len(q.decomposition) for q in questions})
    sampling: SamplingConfig = replace(MINIWORLD.sampling, temperature=temperature)
    context = sampling.max_prompt + sampling.max_response
    renderer = load_renderer(resolve_model(model))
    engine = make_engine(
        "transformers", load_model(model), renderer, max_slots=SLOTS, max_context=context
    )
    summary = evaluate(engine, environments, renderer, sampling, folder, limit=limit)
    environments.close()
    if not summary.episodes:
        raise TooManyVoidError(
            f"all {summary.void} episodes of the evaluation {folder.name} are void"
        )
    return {**summary.metrics, "reward": summary.reward, "void": float(summary.void)}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo and print what came of it."""
    config = tyro.cli(DemoConfig, args=argv, prog="python -m benchmarks.demo")
    try:
        results = run(config)
    except (ResearchAgentError, ResearchEnvError) as error:
        print(f"benchmarks.demo: {error}", file=sys.stderr)
        sys.exit(2)
    if config.json:
        print(json.dumps(results))


def _table(
    config: DemoConfig, rows: Sequence[tuple[tuple[str, str], Mapping[str, float]]]
) -> Table:
    table = Table(title=f"MiniWorld, {config.limit} held-out questions, seed {config.seed}")
    for heading in ("policy", "sampling", "exact match", "F1", "searches"):
        table.add_column(heading, justify="left" if heading in ("policy", "sampling") else "right")
    for names, numbers in rows:
        table.add_row(*names, *(f"{numbers[k]:.3f}" for k in ("em", "f1", "searches")))
    return table


def run(config: DemoConfig) -> dict[str, Any]:
    """Evaluate, train, evaluate again; prints to standard error where JSON is asked for."""
    from transformers.utils import logging  # noqa: PLC0415

    from research_agent.config import ReportConfig  # noqa: PLC0415
    from research_agent.report import make_report  # noqa: PLC0415
    from research_agent.trainer import train  # noqa: PLC0415

    logging.disable_progress_bar()  # transformers' bars would break ours
    console = Console(stderr=config.json)
    folder = config.output / f"seed-{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"

    def evaluated(name: str, model: str, **variant: Any) -> dict[str, float]:
        return measure(model, folder / "evaluations" / name, config.limit, **variant)

    console.print(f"[bold]1. The starter[/bold], on {config.limit} held-out questions")
    before = {
        "greedy": evaluated("before-greedy", config.model),
        "T = 1": evaluated("before-sampled", config.model, temperature=1.0),
    }
    able = evaluated("before-always", config.model, always=True)

    console.print("[bold]2. Training[/bold] by GRPO, through the environment")
    training: TrainConfig = replace(
        MINIWORLD,
        policy=replace(MINIWORLD.policy, model=config.model),
        run=replace(
            MINIWORLD.run,
            seed=config.seed,
            steps=config.steps,
            time_limit=config.seconds,
            output=folder / "train",
        ),
    )
    summary = train(training)
    if summary.signal:
        console.print(summary.message)
        sys.exit(130)
    trained = str(summary.numbers["model"])

    console.print("[bold]3. The trained policy[/bold], on the same questions")
    after = {
        "greedy": evaluated("after-greedy", trained),
        "T = 1": evaluated("after-sampled", trained, temperature=1.0),
    }
    other = evaluated("after-other-world", trained, world=OTHER_WORLD)
    blank = evaluated("after-blanked", trained, blank=True)
    report = make_report(
        ReportConfig(
            (
                folder / "train",
                folder / "evaluations/before-greedy",
                folder / "evaluations/after-greedy",
            )
        )
    )

    rows = [
        *((("starter", how), numbers) for how, numbers in before.items()),
        *((("trained", how), numbers) for how, numbers in after.items()),
        (("trained, another world", "greedy"), other),
        (("trained, results blanked", "greedy"), blank),
    ]
    console.print(_table(config, rows))
    console.print(
        f"If it is forced to search, the starter's exact match is {able['em']:.3f}: it can read "
        "already. Training teaches it when to search, when to continue and when to stop."
    )
    console.print(report.curve, markup=False, highlight=False)
    seconds = summary.numbers.get("seconds of training", 0.0)
    console.print(f"{summary.numbers['steps']} steps in {float(seconds):.0f} s of training")
    paths = {
        "curve": str(report.picture),
        "trajectories": str(report.page),
        "tensorboard": str(summary.numbers["tensorboard"]),
        "model": trained,
    }
    for name, path in paths.items():
        console.print(f"{name:13}{path}", markup=False, highlight=False, soft_wrap=True)
    results = {
        "config": {k: str(v) for k, v in asdict(config).items()},
        "before": before,
        "after": after,
        "other_world": other,
        "blanked": blank,
        "starter_made_to_search": able,
        "seconds": seconds,
        "steps": summary.numbers["steps"],
        "paths": paths,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
