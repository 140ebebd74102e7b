"""Learning curves of every algorithm on MiniWorld: ``python -m benchmarks.learning_curves``.

All start from the shipped starter with the same learning rate and budget of episodes, without KL
and without an entropy bonus; all other settings are the algorithm's defaults. Each ablation changes
one thing about GRPO: tokens of observations are in the loss (their old log-probabilities are
recomputed, because no sampler reports any), the KL coefficient is 1e-3, or groups have another size
(with the same number of episodes per step). Runs are folders: one that is finished is not run
again, and one that was stopped continues.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks.drawing import Curve, small_multiples
from benchmarks.runs import is_finished as finished
from benchmarks.runs import read_log, training_process
from benchmarks.runs import run_all as do_all
from benchmarks.tables import markdown_table, print_table, spread
from research_agent.config import AlgorithmConfig, TrainConfig
from research_agent.presets import PRESETS

MINIWORLD = PRESETS["miniworld"]

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
    "mt_grpo": OFF,
    "mt_ppo": OFF | {"critic_learning_rate": MINIWORLD.learner.learning_rate},
    "gigpo": OFF,
    "tree_grpo": OFF,
    "arpo": OFF,
}
GROUP_SIZES = (2, 4, 8, 16)
CHUNK = 10  # steps of DAPO, after which its episodes are counted
SHARE = 0.1  # the table's first and last rewards are means over this part of the budget
Ablation = Literal["mask", "kl", "group"]
ABLATIONS: tuple[Ablation, ...] = ("mask", "kl", "group")


@dataclass(frozen=True)
class CurvesConfig:
    """Train MiniWorld's starter with every algorithm, several seeds each, and draw the rewards."""

    output: Path = Path("runs/learning-curves")
    """Folder of the runs, of curves.png, table.md and results.json."""
    algorithms: tuple[str, ...] = tuple(ALGORITHMS)
    """Names of algorithms."""
    ablations: tuple[Ablation, ...] = ABLATIONS
    """Names of ablations; the flag without a name does none."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""
    steps: int = MINIWORLD.run.steps
    """Training steps. The budget is steps x --prompts-per-step x --group-size episodes."""
    prompts_per_step: int = MINIWORLD.rollout.prompts_per_step
    """Tasks per step."""
    group_size: int = MINIWORLD.rollout.group_size
    """Episodes of each task."""
    eval_limit: int = 200
    """Held-out questions per evaluation (greedy)."""
    workers: int = 2
    """Runs at the same time, each with one thread."""


@dataclass(frozen=True)
class Run:
    """One training run of the comparison."""

    name: str  # runs of the same name differ only in their seed
    seed: int
    algorithm: str = "grpo"
    args: Mapping[str, Any] = field(default_factory=dict)
    group_size: int | None = None  # None: as configured
    masked: bool = True  # tokens of observations are left out of the loss


def main(argv: Sequence[str] | None = None) -> None:
    """Do the runs that are not finished, then write picture and table."""
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
    """All runs, with the seeds of one name next to one another; ablations need GRPO's as well."""
    wanted = [Run(name, 0, name, ALGORITHMS[name]) for name in config.algorithms]
    if config.ablations:
        wanted.append(Run("grpo", 0, args=OFF))
    if "mask" in config.ablations:
        wanted.append(Run("grpo, unmasked", 0, args=OFF, masked=False))
    if "kl" in config.ablations:
        wanted.append(Run("grpo, KL 1e-3", 0, args=OFF | {"kl_coef": 1e-3}))
    if "group" in config.ablations:
        sizes = [size for size in GROUP_SIZES if size != config.group_size]
        wanted += [Run(f"grpo, G = {size}", 0, args=OFF, group_size=size) for size in sizes]
    unique = {run.name: run for run in wanted}
    return [replace(run, seed=seed) for run in unique.values() for seed in config.seeds]


def folder_of(config: CurvesConfig, run: Run) -> Path:
    """Folder of a run."""
    name = run.name.replace(", ", "-").replace(" = ", "").replace(" ", "")
    return config.output / "runs" / name / f"seed-{run.seed}"


def training_of(config: CurvesConfig, run: Run) -> TrainConfig:
    """The configuration of a run; a step has as many episodes, however large its groups are."""
    samples = run.group_size or config.group_size
    episodes = config.prompts_per_step * config.group_size
    return replace(
        MINIWORLD,
        rollout=replace(
            MINIWORLD.rollout, prompts_per_step=max(1, episodes // samples), group_size=samples
        ),
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
    """Do the runs that are not finished, several at a time; returns the names of failed ones."""
    runs = plan(config)
    waiting = [run for run in runs if not is_finished(config, run)]
    jobs = {f"{run.name}, seed {run.seed}": (config, run) for run in waiting}
    return do_all(do, jobs, config.workers, finished=len(runs) - len(waiting))


def do(config: CurvesConfig, run: Run) -> str:
    """Train in a process of its own; says how the reward changed."""
    from research_agent.trainer import train  # noqa: PLC0415 - loads torch

    training = training_of(config, run)
    # Steps of DAPO play more episodes than others, so its budget is checked after every CHUNK.
    stops = range(CHUNK, config.steps, CHUNK) if run.algorithm == "dapo" else ()
    with training_process(masked=run.masked):
        for steps in (*stops, config.steps):
            summary = train(replace(training, run=replace(training.run, steps=steps)))
            if summary.signal:
                raise RuntimeError(summary.message)
            if is_finished(config, run):
                break
    numbers = summary.numbers
    return f"reward {float(numbers['reward first']):.2f} -> {float(numbers['reward last']):.2f}"


def is_finished(config: CurvesConfig, run: Run) -> bool:
    """Whether a run has all its steps, or has played all episodes of the budget."""
    return finished(folder_of(config, run), config.steps, budget_of(config))


def budget_of(config: CurvesConfig) -> int:
    """Episodes of a run."""
    return config.steps * config.prompts_per_step * config.group_size


@dataclass(frozen=True)
class Result:
    """What a run logged, up to the budget of episodes."""

    run: Run
    episodes: list[int]  # played up to and with each step
    seconds: list[float]  # seconds of training up to and with each step
    rewards: list[float]  # mean of the step, at T = 1
    evaluations: list[tuple[int, float]]  # episodes so far, exact match on held-out questions

    def at_ends(self, budget: int) -> tuple[float, float]:
        """Mean reward over the first and the last tenth of the budget of episodes."""
        first = [r for e, r in zip(self.episodes, self.rewards, strict=True) if e <= SHARE * budget]
        last = [
            r for e, r in zip(self.episodes, self.rewards, strict=True) if e > (1 - SHARE) * budget
        ]
        return (
            statistics.fmean(first or self.rewards[:1]),
            statistics.fmean(last or self.rewards[-1:]),
        )


def read(config: CurvesConfig, run: Run) -> Result | None:
    """Read what a run has logged so far; None if it has no step."""
    result = Result(run, [], [], [], [])
    for line in read_log(folder_of(config, run), budget_of(config)):
        if "eval/em" in line:
            result.evaluations.append((line["played"], line["eval/em"]))
        if "reward" in line:
            result.episodes.append(line["played"])
            result.seconds.append(line["seconds"])
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
    print_table(f"MiniWorld, {budget} episodes; mean (lowest to highest seed)", headings, rows)
    config.output.mkdir(parents=True, exist_ok=True)
    (config.output / "table.md").write_text(markdown_table(headings, rows), encoding="utf-8")
    written = [{**vars(result), "run": vars(result.run)} for result in results]
    out = {"budget": budget, "workers": config.workers, "runs": written}
    (config.output / "results.json").write_text(json.dumps(out) + "\n", encoding="utf-8")
    draw(by_name).savefig(config.output / "curves.png", dpi=100)
    print(config.output / "curves.png")


def _row(name: str, results: Sequence[Result], budget: int) -> tuple[str, ...]:
    ends = [result.at_ends(budget) for result in results]
    return (
        name,
        str(len(results)),
        spread([first for first, _ in ends]),
        spread([last for _, last in ends]),
        spread([result.evaluations[-1][1] for result in results if result.evaluations]),
        spread([result.seconds[-1] for result in results], 0),
        spread([float(len(result.rewards)) for result in results], 0),
    )


def draw(by_name: Mapping[str, Sequence[Result]]) -> Any:
    """Draw the reward of each run by episodes, with GRPO's (else the first run's) behind it.

    Args:
        by_name: results by the name of the run, one per seed.

    Returns:
        A matplotlib ``Figure``.
    """
    curves = {
        name: {"reward": Curve([r.episodes for r in seeds], [r.rewards for r in seeds], window=5)}
        for name, seeds in by_name.items()
    }
    runs = {**({"grpo": curves["grpo"]} if "grpo" in curves else {}), **curves}
    title = "Reward on MiniWorld while training, at T = 1 (mean of five steps)"
    return small_multiples(runs, title, "episodes")


if __name__ == "__main__":
    main()
