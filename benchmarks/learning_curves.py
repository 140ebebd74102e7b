"""Learning curves of every algorithm on MiniWorld: ``python -m benchmarks.learning_curves``.

All begin with the shipped starter, have the same learning rate and the same budget of episodes, and
no KL and no entropy bonus; what else differs is the algorithm's own. The ablations change one thing
of GRPO: tokens of observations in the loss (their old log-probabilities are recomputed, for no
sampler reported any), a KL of 1e-3, and samples a group with as many episodes a step. Runs are
folders: one that is finished is not run again, one that was stopped goes on.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import tyro
from rich.console import Console
from rich.table import Table

from research_agent.config import AlgorithmConfig, TrainConfig
from research_agent.presets import MINIWORLD
from research_agent.tracking import read_lines

OFF = {"kl_coef": 0.0, "entropy_coef": 0.0}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": OFF,
    "dr_grpo": OFF | {"max_length": MINIWORLD.sampling.max_response},
    "dapo": {},
    "gspo": {},
    "cispo": {},
    "rloo": {},
    "reinforce_pp": {},
    "ppo": OFF | {"critic_learning_rate": MINIWORLD.learner.learning_rate},
}
GROUP_SIZES = (2, 4, 8, 16)
CHUNK = 10  # steps
SHARE = 0.1  # of the budget: what the table calls its beginning and its end
Ablation = Literal["mask", "kl", "group"]
ABLATIONS: tuple[Ablation, ...] = ("mask", "kl", "group")


@dataclass(frozen=True)
class CurvesConfig:
    """Train MiniWorld's starter by every algorithm, several seeds each; draw what came of it."""

    output: Path = Path("runs/learning-curves")
    """Folder of the runs, of curves.png, table.md and results.json."""
    algorithms: tuple[str, ...] = tuple(ALGORITHMS)
    """Names of algorithms."""
    ablations: tuple[Ablation, ...] = ABLATIONS
    """Which of the ablations; give no name for none."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the runs."""
    steps: int = MINIWORLD.run.steps
    """Training steps; the budget is as many times --prompts times --samples episodes."""
    prompts: int = MINIWORLD.sampling.prompts
    """Tasks a step."""
    samples: int = MINIWORLD.sampling.samples
    """Episodes of each task."""
    eval_limit: int = 200
    """Held-out questions of an evaluation (greedy)."""
    workers: int = 2
    """Runs at the same time, each with one thread."""
    device: str = "cpu"
    """Where the models live."""


@dataclass(frozen=True)
class Run:
    """One training run of the comparison."""

    name: str  # what the table calls it; runs of the same name differ in their seed alone
    seed: int
    algorithm: str = "grpo"
    args: Mapping[str, Any] = field(default_factory=dict)
    samples: int | None = None  # None: those of the configuration
    masked: bool = True  # tokens of observations are left out of the loss


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not finished, then write picture and table."""
    config = tyro.cli(CurvesConfig, args=argv, prog="python -m benchmarks.learning_curves")
    unknown = sorted(set(config.algorithms) - set(ALGORITHMS))
    if unknown:
        known = ", ".join(ALGORITHMS)
        sys.exit(f"benchmarks.learning_curves: unknown algorithm {unknown[0]!r}; known: {known}")
    failed = run_all(config)
    results = [result for run in plan(config) if (result := read(config, run))]
    report(config, results)
    if failed:
        sys.exit(f"benchmarks.learning_curves: {len(failed)} runs failed: {', '.join(failed)}")


def plan(config: CurvesConfig) -> list[Run]:
    """All runs, the seeds of one name next to one another; GRPO's are in ablations as well."""
    wanted: list[Run] = []
    wanted += [Run(name, 0, name, ALGORITHMS[name]) for name in config.algorithms]
    if "mask" in config.ablations:
        wanted += [Run("grpo", 0, args=OFF), Run("grpo, unmasked", 0, args=OFF, masked=False)]
    if "kl" in config.ablations:
        wanted += [Run("grpo", 0, args=OFF), Run("grpo, KL 1e-3", 0, args=OFF | {"kl_coef": 1e-3})]
    if "group" in config.ablations:
        for size in GROUP_SIZES:
            name = "grpo" if size == config.samples else f"grpo, G = {size}"
            wanted.append(Run(name, 0, args=OFF, samples=size))
    unique = {run.name: run for run in wanted}
    return [replace(run, seed=seed) for run in unique.values() for seed in config.seeds]


def folder_of(config: CurvesConfig, run: Run) -> Path:
    """Where a run is kept."""
    name = run.name.replace(", ", "-").replace(" = ", "").replace(" ", "")
    return config.output / "runs" / name / f"seed-{run.seed}"


def training_of(config: CurvesConfig, run: Run) -> TrainConfig:
    """The whole configuration of a run."""
    samples = run.samples or config.samples
    episodes = config.prompts * config.samples  # a step has as many, however large a group is
    return replace(
        MINIWORLD,
        policy=replace(MINIWORLD.policy, device=config.device),
        sampling=replace(MINIWORLD.sampling, prompts=max(1, episodes // samples), samples=samples),
        algorithm=AlgorithmConfig(algorithm=run.algorithm, algorithm_args=dict(run.args)),
        learner=replace(MINIWORLD.learner, old_logprobs="sampler" if run.masked else "recomputed"),
        run=replace(
            MINIWORLD.run,
            seed=run.seed,
            steps=config.steps,
            output=folder_of(config, run),
            save_every=10,
            eval_every=max(1, min(20, config.steps // 2)),
            eval_limit=config.eval_limit,
            log_episodes=1,
            quiet=True,
        ),
    )


def run_all(config: CurvesConfig) -> list[str]:
    """Do the runs that are not finished, several at a time; returns those that failed."""
    waiting = [run for run in plan(config) if not is_finished(config, run)]
    console = Console(stderr=True)
    console.print(
        f"{len(plan(config))} runs, {len(waiting)} of them to do; {config.workers} at once"
    )
    if not waiting:
        return []
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = "1"  # for the processes to be started
    failed = []
    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config.workers, mp_context=context) as pool:
        futures = {pool.submit(do, config, run): run for run in waiting}
        for count, future in enumerate(as_completed(futures), 1):
            run, minutes = futures[future], (time.perf_counter() - start) / 60
            label = f"{run.name}, seed {run.seed}"
            error = future.exception()
            said = f"failed: {error!r}" if error else future.result()
            failed += [label] if error else []
            console.print(f"{minutes:5.1f} min  {count}/{len(waiting)}  {label}: {said}")
    return failed


def do(config: CurvesConfig, run: Run) -> str:
    """Train, in a process of its own."""
    import torch  # noqa: PLC0415 - the process that starts others needs none
    from transformers.utils import logging  # noqa: PLC0415

    from research_agent import trainer  # noqa: PLC0415
    from research_agent.learner import Learner  # noqa: PLC0415

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    training = training_of(config, run)
    # Steps of DAPO play more episodes than those of others: look at times whether it had enough.
    stops = range(CHUNK, config.steps, CHUNK) if run.algorithm == "dapo" else ()
    with patch.object(trainer, "Learner", Learner if run.masked else unmasked(Learner)):
        for steps in (*stops, config.steps):
            summary = trainer.train(replace(training, run=replace(training.run, steps=steps)))
            if summary.signal:
                raise RuntimeError(summary.message)
            if is_finished(config, run):
                break
    numbers = summary.numbers
    return f"reward {float(numbers['reward first']):.2f} -> {float(numbers['reward last']):.2f}"


def unmasked(learner: type[Any]) -> type[Any]:
    """A learner that takes tokens of observations for the policy's own, which ours never does.

    Their log-probabilities, which no sampler reported, are those recomputed before the update.
    """

    class Unmasked(learner):  # type: ignore[misc]
        def update(self, groups: Sequence[Any]) -> Any:
            def as_action(segment: Any) -> Any:
                if segment.provenance != "observation":
                    return segment
                given = tuple(0.0 for _ in segment.tokens)
                return replace(segment, provenance="action", logprobs=given)

            def as_actions(trajectory: Any) -> Any:
                return replace(trajectory, segments=tuple(map(as_action, trajectory.segments)))

            return super().update(
                [replace(g, trajectories=[as_actions(t) for t in g.trajectories]) for g in groups]
            )

    return Unmasked


def is_finished(config: CurvesConfig, run: Run) -> bool:
    """Whether a run has all its steps, or has played all episodes of the budget."""
    lines = read_lines(folder_of(config, run) / "metrics.jsonl")
    if not lines:
        return False
    step, played = lines[-1]["step"], sum(line.get("episodes", 0) for line in lines)
    saved = folder_of(config, run) / "checkpoints" / f"step-{step:06d}"
    return saved.is_dir() and (step >= config.steps or played >= budget_of(config))


def budget_of(config: CurvesConfig) -> int:
    """Episodes of a run."""
    return config.steps * config.prompts * config.samples


@dataclass(frozen=True)
class Result:
    """What a run logged, up to the budget of episodes."""

    run: Run
    episodes: list[int]  # played up to and with each step
    seconds: list[float]  # of training, likewise
    rewards: list[float]  # mean of the step, at T = 1
    evaluations: list[tuple[int, float]]  # episodes so far, exact match on held-out questions

    def at_ends(self, budget: int) -> tuple[float, float]:
        """Mean reward over the first and the last tenth of the budget."""
        first = [r for e, r in zip(self.episodes, self.rewards, strict=True) if e <= SHARE * budget]
        last = [
            r for e, r in zip(self.episodes, self.rewards, strict=True) if e > (1 - SHARE) * budget
        ]
        return (
            statistics.fmean(first or self.rewards[:1]),
            statistics.fmean(last or self.rewards[-1:]),
        )


def read(config: CurvesConfig, run: Run) -> Result | None:
    """What a run has logged so far; None if nothing."""
    folder = folder_of(config, run)
    seconds = {t["step"]: t["seconds"] for t in read_lines(folder / "timings.jsonl")}
    result = Result(run, [], [], [], [])
    budget = budget_of(config)
    played = 0
    for line in read_lines(folder / "metrics.jsonl"):
        played += int(line.get("episodes", 0))
        if played > budget:
            break
        if "eval/em" in line:
            result.evaluations.append((played, line["eval/em"]))
        if "reward" in line:
            result.episodes.append(played)
            result.seconds.append(seconds[line["step"]])
            result.rewards.append(line["reward"])
    return result if result.rewards else None


def report(config: CurvesConfig, results: Sequence[Result]) -> None:
    """Print the table; write curves.png, table.md and results.json."""
    if not results:
        return
    budget = budget_of(config)
    by_name: dict[str, list[Result]] = {}
    for result in results:
        by_name.setdefault(result.run.name, []).append(result)
    headings = (
        "run",
        "seeds",
        "reward, first tenth",
        "reward, last tenth",
        "exact match, held out",
        "seconds of training",
        "steps",
    )
    rows = [_row(name, of_name, budget) for name, of_name in by_name.items()]
    table = Table(title=f"MiniWorld, {budget} episodes; mean (lowest to highest seed)")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    config.output.mkdir(parents=True, exist_ok=True)
    lines = [headings, tuple("---" for _ in headings), *rows]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    (config.output / "table.md").write_text(text, encoding="utf-8")
    written = [
        {
            "name": r.run.name,
            "seed": r.run.seed,
            "episodes": r.episodes,
            "seconds": r.seconds,
            "rewards": r.rewards,
            "evaluations": r.evaluations,
        }
        for r in results
    ]
    out = {"budget": budget, "workers": config.workers, "runs": written}
    (config.output / "results.json").write_text(json.dumps(out) + "\n", encoding="utf-8")
    draw(config, by_name)
    print(config.output / "curves.png")


def _row(name: str, results: Sequence[Result], budget: int) -> tuple[str, ...]:
    def show(values: Sequence[float], digits: int = 3) -> str:
        if not values:
            return ""
        mean, low, high = statistics.fmean(values), min(values), max(values)
        if len(values) == 1:
            return f"{mean:.{digits}f}"
        return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    ends = [result.at_ends(budget) for result in results]
    return (
        name,
        str(len(results)),
        show([first for first, _ in ends]),
        show([last for _, last in ends]),
        show([result.evaluations[-1][1] for result in results if result.evaluations]),
        show([result.seconds[-1] for result in results], 0),
        show([float(len(result.rewards)) for result in results], 0),
    )


def draw(config: CurvesConfig, by_name: Mapping[str, Sequence[Result]]) -> None:
    """One picture: algorithms by episodes and by time, and the ablations by episodes."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    algorithms = [name for name in config.algorithms if name in by_name]
    groups = [name for name in by_name if ", G = " in name]
    panels: dict[str, tuple[str, list[str]]] = {}
    if algorithms:
        panels["algorithms, by episodes"] = ("episodes", algorithms)
        panels["algorithms, by time"] = ("seconds", algorithms)
    for title, others in (
        ("retrieved tokens masked, or not", ["grpo, unmasked"]),
        ("KL 0, or 1e-3", ["grpo, KL 1e-3"]),
        (f"samples a group (grpo: {config.samples})", groups),
    ):
        if shown := [name for name in others if name in by_name]:
            panels[title] = ("episodes", [*(["grpo"] if "grpo" in by_name else []), *shown])
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False, sharey=True
    )
    for axis, (title, (unit, names)) in zip(axes[0], panels.items(), strict=True):
        for name in names:
            _draw_curve(axis, by_name[name], unit, name)
        axis.set_title(title)
        axis.set_xlabel("episodes" if unit == "episodes" else "seconds of training, one thread")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("reward at T = 1: mean, lowest and highest seed")
    figure.tight_layout()
    figure.savefig(config.output / "curves.png", dpi=120)
    plt.close(figure)


def _draw_curve(axis: Any, results: Sequence[Result], unit: str, label: str) -> None:
    import numpy as np  # noqa: PLC0415

    def smooth(values: Sequence[float]) -> list[float]:
        """Mean of each step and up to four before it."""
        return [statistics.fmean(values[max(0, i - 4) : i + 1]) for i in range(len(values))]

    xs = [r.episodes if unit == "episodes" else r.seconds for r in results]
    grid = np.linspace(max(x[0] for x in xs), min(x[-1] for x in xs), 200)
    curves = [np.interp(grid, x, smooth(r.rewards)) for x, r in zip(xs, results, strict=True)]
    (line,) = axis.plot(grid, np.mean(curves, axis=0), label=label)
    axis.fill_between(
        grid, np.min(curves, axis=0), np.max(curves, axis=0), color=line.get_color(), alpha=0.15
    )


if __name__ == "__main__":
    main()
