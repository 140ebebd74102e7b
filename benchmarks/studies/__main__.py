"""The command line of the studies: ``python -m benchmarks.studies NAME``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.runs import run_all
from benchmarks.studies import work
from benchmarks.studies.catalogue import BY_NAME, STUDIES, Study
from benchmarks.studies.report import report
from research_agent.errors import ResearchAgentError
from research_agent.presets import PRESETS

MINIWORLD = PRESETS["miniworld"]


@dataclass(frozen=True)
class StudiesConfig:
    """The papers' studies in miniature: runs of several seeds, a table, a picture, verdicts.

    The same command again goes on where it was stopped, and studies share the runs of the same
    name. The first argument is the name of a study; list prints all with the papers' findings.
    """

    study: tyro.conf.Positional[str]
    """Name of a study; all does every one, list prints them."""
    output: Path = Path("runs/studies")
    """Folder of the runs, and of a folder for each study with table.md, curves.png and
    results.json."""
    steps: int = 30
    """Training steps of a run."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the runs. Verdicts need two at least."""
    prompts_per_step: int = MINIWORLD.sampling.prompts_per_step
    """Tasks a step."""
    group_size: int = MINIWORLD.sampling.group_size
    """Episodes of each task."""
    questions: int = 200
    """Held-out questions of an evaluation."""
    workers: int = 2
    """Runs at the same time, each with one thread."""
    device: str = "cpu"
    """Where the models live."""


def main(argv: Sequence[str] | None = None) -> None:
    """Do what is not done of a study, then print and write what came of it."""
    config = tyro.cli(StudiesConfig, args=argv, prog="python -m benchmarks.studies")
    if config.study == "list":
        for study in STUDIES:
            print(f"{study.name:16} {study.finding}\n{'':16} {study.paper}")
        return
    if config.study not in (*BY_NAME, "all"):
        known = ", ".join((*BY_NAME, "all", "list"))
        sys.exit(f"benchmarks.studies: unknown study {config.study!r}; known: {known}")
    try:
        failed = run(config, STUDIES if config.study == "all" else (BY_NAME[config.study],))
    except ResearchAgentError as error:
        print(f"benchmarks.studies: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    if failed:
        sys.exit(f"benchmarks.studies: {len(failed)} runs failed: {', '.join(failed)}")


def run(config: StudiesConfig, studies: Sequence[Study]) -> list[str]:
    """Do the runs that are not finished, and report every study; returns the runs that failed.

    Raises:
        ConfigError, CheckpointError: the output folder holds runs of other settings.
    """
    settings = work.Settings(
        output=config.output,
        steps=config.steps,
        prompts_per_step=config.prompts_per_step,
        group_size=config.group_size,
        questions=config.questions,
        device=config.device,
    )
    work.claim_folder(settings)
    arms = {arm.name: arm for study in studies for arm in study.arms}.values()
    waiting = [
        (arm, seed)
        for seed in config.seeds  # all arms have their first seed before any has its second
        for arm in arms
        if not work.is_finished(settings, arm, seed)
    ]
    work.write_worlds(settings)
    needed = work.missing(settings, [arm for arm, _ in waiting])
    if needed:
        failed = run_all(work.prepare, {name: (settings, name) for name in needed}, config.workers)
        if failed:
            return failed
    jobs = {f"{arm.name}, seed {seed}": (settings, arm, seed) for arm, seed in waiting}
    done = len(arms) * len(config.seeds) - len(jobs)
    failed = run_all(work.do, jobs, config.workers, finished=done)
    for study in studies:
        report(settings, study, config.seeds)
    return failed


if __name__ == "__main__":
    main()
