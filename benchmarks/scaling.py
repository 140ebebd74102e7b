"""How a step of learning scales with the number of ranks, and what the presets need.

``python -m benchmarks.scaling``: the share of the ranks' time in which they compute, for the
learner's part of a ReSearch step (256 tasks by 5 episodes, 1,300 tokens in the mean, one episode
at its limit of 8,704, at most 17,408 tokens per pass). The learner's own functions cut and deal the
passes, in one simulated process per rank; nothing is computed. A pass takes as long as it has
tokens, and all ranks wait for the slowest of each round, because FSDP gathers weights with all of
them. What is sent between GPUs is left out. "One rank's passes" deals the passes that a single
process would make.

``python -m benchmarks.scaling --plans [--write]``: the table of all presets of papers and machines
of ``research-agent train PRESET --plan``; ``--write`` puts it into docs/scale.md.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.synthetic import make_groups
from benchmarks.tables import markdown_table, print_table, replace_table
from research_agent.batch import Batch, make_batch, micro_batches
from research_agent.config import TrainConfig
from research_agent.distributed import shard_batches
from research_agent.plan import plan
from research_agent.plan.machines import parse_machines
from research_agent.plan.shapes import SHAPES, read_shape
from research_agent.plan.suggestions import apply, as_flags, suggest
from research_agent.presets import PRESETS

TASKS, SAMPLES, MEAN_TOKENS = 256, 5, 1_300  # per step of ReSearch, as in its preset
LONGEST = 512 + 8_192
MICRO_BATCH_TOKENS = 17_408
SPREAD = 0.5  # standard deviation of the logarithm of an episode's length
RANKS = (1, 8, 16, 32, 64, 128, 256, 512, 1_024)

GPUS, NODES = ("A100-80", "H100", "H200"), (1, 2, 8)
PAGE = Path(__file__).parents[1] / "docs" / "scale.md"


@dataclass(frozen=True, slots=True)
class Efficiency:
    """How well a number of ranks is used in a step.

    Attributes:
        ranks: number of processes.
        passes: forward passes of a rank.
        tokens: tokens of the largest pass.
        efficiency: tokens of the batch, by the tokens for which the ranks are occupied.
        before: the same with the passes that a single process would make.
    """

    ranks: int
    passes: int
    tokens: int
    efficiency: float
    before: float


def make_step() -> Batch:
    """Make the trajectories of a step; all lengths but one are drawn, from a log-normal."""
    rng = random.Random(0)
    lengths = [
        min(LONGEST, max(100, round(MEAN_TOKENS * rng.lognormvariate(-(SPREAD**2) / 2, SPREAD))))
        for _ in range(TASKS * SAMPLES - 1)
    ]
    lengths.append(LONGEST)
    return make_batch(make_groups(lengths, 1_000, samples=SAMPLES, seed=0))


def measure(batch: Batch, ranks: int) -> Efficiency:
    """Deal the passes of a batch to some ranks, and add up how long the ranks are occupied.

    Args:
        batch: batch of a step.
        ranks: number of processes.
    """
    new = _sizes(batch, ranks)
    before = new if ranks == 1 else _sizes(batch, 1)
    useful = sum(new)
    rounds = _rounds(new, ranks)
    return Efficiency(
        ranks,
        passes=len(rounds),
        tokens=max(new),
        efficiency=useful / (ranks * sum(rounds)),
        before=useful / (ranks * sum(_rounds(before, ranks))),
    )


def _sizes(batch: Batch, ranks: int) -> list[int]:
    passes = micro_batches(batch, MICRO_BATCH_TOKENS, packing="on", ranks=ranks)
    return [micro.tokens.numel() for micro in passes]


def _rounds(sizes: Sequence[int], ranks: int) -> list[int]:
    """The tokens of the largest pass of each round, as the ranks meet."""
    taken = []
    for rank in range(ranks):
        with _rank(rank, ranks):
            taken.append([size for size, _ in shard_batches(sizes)])
    return [max(sizes) for sizes in zip(*taken, strict=True)]


def _rank(rank: int, size: int) -> AbstractContextManager[Any]:
    """Let the learner's functions believe that they run on one of several ranks."""
    return mock.patch("research_agent.distributed.rank_and_size", return_value=(rank, size))


def paper_presets() -> dict[str, TrainConfig]:
    """The presets of papers: those whose models are known by name, without their miniatures."""
    return {
        name: config
        for name, config in PRESETS.items()
        if config.policy.model.removesuffix("-Instruct") in SHAPES
    }


def plans() -> str:
    """The plans of all presets of papers on all machines, in Markdown.

    Presets with the same plans share their rows.
    """
    names: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for name, config in paper_presets().items():
        rows = (
            _row(config, f"{nodes}x8x{gpu}" if nodes > 1 else f"8x{gpu}")
            for gpu in GPUS
            for nodes in NODES
        )
        names.setdefault(tuple(rows), []).append(name)
    needs = ("GPU, GB", "host, GB", "disk, GB", "s/step", "hours")
    return markdown_table(
        ("preset", "machines", "settings to add", *needs),
        [(", ".join(same), *row) for rows, same in names.items() for row in rows],
    )


def _row(config: TrainConfig, machines: str) -> tuple[str, ...]:
    """The plan of a configuration with the first settings that make it fit."""
    found, added = plan(config, machines), ""
    if not found.fits:
        where = parse_machines(machines)
        settings = suggest(config, read_shape(config.policy.model), where)
        if not settings:
            return (machines, "does not fit", "", "", "", "", "")
        found, added = plan(apply(config, settings[0]), machines), as_flags(settings[0])
    host, disk = (sum(each.values()) for each in (found.memory.host, found.memory.disk))
    return (
        machines,
        f"`{added}`" if added else "none",
        f"{found.memory.most / 1e9:.0f} of {found.machines.gpu.memory / 1e9:.0f}",
        f"{host / 1e9:.0f}",
        f"{disk / 1e9:.0f}",
        f"{found.times.step:.0f}",
        f"{found.hours:.1f}",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--plans", action="store_true", help="the table of presets and machines")
    parser.add_argument("--write", action="store_true", help="put that table into docs/scale.md")
    chosen = parser.parse_args(arguments)
    if chosen.plans:
        table = plans()
        print(table, end="")
        if chosen.write:
            replace_table(PAGE, table)
        return
    batch = make_step()
    rows = [
        (
            f"{row.ranks:,}",
            f"{row.passes}",
            f"{row.tokens:,}",
            f"{row.efficiency:.2f}",
            f"{row.before:.2f}",
        )
        for row in (measure(batch, ranks) for ranks in RANKS)
    ]
    headings = ("ranks", "passes per rank", "tokens of the largest pass", "efficiency",
                "one rank's passes")  # fmt: skip
    print_table("share of the ranks' time in which they compute", headings, rows)


if __name__ == "__main__":
    main()
