"""The command line of the ablations: ``python -m benchmarks.ablations NAME``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import tyro

from benchmarks.ablations import prepare, runs
from benchmarks.ablations.registry import ABLATIONS, BY_NAME, Ablation
from benchmarks.ablations.report import report
from benchmarks.runs import run_all
from research_agent.errors import ResearchAgentError


def main(argv: Sequence[str] | None = None) -> None:
    """Do the runs of an ablation that are missing, then print and write the results."""
    config = tyro.cli(runs.AblationsConfig, args=argv, prog="python -m benchmarks.ablations")
    if config.tiny:
        config = replace(config, steps=2, seeds=(0,), prompts_per_step=4, questions=4)
    if config.ablation == "list":
        for ablation in ABLATIONS:
            print(f"{ablation.name:16} {ablation.finding}\n{'':16} {ablation.paper}")
        return
    if config.ablation not in (*BY_NAME, "all"):
        known = ", ".join((*BY_NAME, "all", "list"))
        sys.exit(f"benchmarks.ablations: unknown ablation {config.ablation!r}; known: {known}")
    try:
        failed = run(config, ABLATIONS if config.ablation == "all" else (BY_NAME[config.ablation],))
    except ResearchAgentError as error:
        print(f"benchmarks.ablations: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        sys.exit(130)
    if failed:
        sys.exit(f"benchmarks.ablations: {len(failed)} runs failed: {', '.join(failed)}")


def run(config: runs.AblationsConfig, ablations: Sequence[Ablation]) -> list[str]:
    """Do the runs that are not finished, and report every ablation.

    Returns:
        The names of the runs that failed.

    Raises:
        ConfigError: the output folder holds runs of another size.
        CheckpointError: a run in it has another configuration.
    """
    prepare.claim_folder(config)
    arms = {arm.name: arm for ablation in ablations for arm in ablation.arms}.values()
    waiting = [
        (arm, seed)
        for seed in config.seeds  # all arms have their first seed before any has its second
        for arm in arms
        if not runs.is_finished(config, arm, seed)
    ]
    prepare.write_worlds(config, dict.fromkeys(w for arm in arms for w in runs.worlds_of(arm)))
    missing = prepare.missing(config, [arm for arm, _ in waiting])
    needed = {name: (config, name) for name in missing}
    if needed and (failed := run_all(prepare.prepare, needed, config.workers)):
        return failed
    jobs = {f"{arm.name}, seed {seed}": (config, arm, seed) for arm, seed in waiting}
    done = len(arms) * len(config.seeds) - len(jobs)
    failed = run_all(runs.do, jobs, config.workers, finished=done)
    for ablation in ablations:
        report(config, ablation)
    return failed


if __name__ == "__main__":
    main()
