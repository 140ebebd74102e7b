"""What sampling during the update gains: steps per second of ``--max-staleness`` 1 and 2 over 0.

    python -m benchmarks.overlap

The trainer is the real one: its loop, the child process that plays, the weights' way there, the
checkpoint at the end. Sampler and learner have equal cost because both sleep: the engine says a
script and sleeps at each of its steps, and the update sleeps as long as all steps of a collection
take. So two CPU cores show what two groups of GPUs would do. The ideal ratio is 2.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import tyro

from research_agent.engines.scripted import ScriptedEngine
from research_agent.presets import PRESETS
from research_agent.run_logger import METRICS, read_lines

if TYPE_CHECKING:
    from research_agent.engines.base import Completion, SamplingParams
    from research_agent.renderer import Renderer

ENGINE_STEPS = 100  # an episode takes so many, and so does a collection


@dataclass(frozen=True)
class Config:
    """Measure what sampling during the update gains."""

    seconds: float = 1.0
    """How long sampling a step's episodes takes, and how long its update takes."""
    steps: int = 10
    """Training steps of each run. The first is not counted: nothing was sampled before it."""
    staleness: tuple[int, ...] = (0, 1, 2)
    """Values of --max-staleness; ratios are to the first."""
    tiny: bool = False
    """Sleep for 50 ms and make 3 steps: to see that it runs."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A run.

    Attributes:
        rate: training steps per second.
        staleness: mean of the metric over the counted steps.
        staleness_max: its maximum.
    """

    rate: float
    staleness: float
    staleness_max: float


class SleepingEngine(ScriptedEngine):
    """A scripted engine whose steps take time."""

    def __init__(self, renderer: Renderer, max_context: int, seconds: float) -> None:
        super().__init__(
            lambda context, params: _say(renderer, params),
            renderer,
            max_context,
            delay=lambda: ENGINE_STEPS - 1,
            keeps_turns=True,
        )
        self._seconds = seconds

    def step(self) -> list[Completion]:
        """Sleep, unless there is nothing to sample."""
        if self.busy:
            time.sleep(self._seconds)
        return super().step()


def make_sleeping_engine(
    name: str, model: Any, renderer: Renderer, *, max_context: int, **_: Any
) -> SleepingEngine:
    """Replace ``engines.make_engine``; the engine's name ends with the seconds of its step."""
    return SleepingEngine(renderer, max_context, float(name.partition(":")[2]))


def measure(seconds: float, steps: int, staleness: int, output: Path) -> Measured:
    """Train for some steps.

    Args:
        seconds: how long a step samples, and how long an update takes.
        steps: training steps.
        staleness: value of ``--max-staleness``.
        output: folder of the run.
    """
    from research_agent import trainer  # noqa: PLC0415  (loads torch)
    from research_agent.learner import Learner  # noqa: PLC0415

    ends: list[float] = []

    def sleeping_update(self: Learner, groups: Sequence[Any]) -> dict[str, float]:
        time.sleep(seconds)
        ends.append(time.perf_counter())
        return {"trajectories": float(sum(len(group.trajectories) for group in groups))}

    base = PRESETS["miniworld"]
    sampling = replace(
        base.sampling,
        engine=f"sleeping:{seconds / ENGINE_STEPS}",
        overlap=True,
    )
    rollout = replace(base.rollout, prompts_per_step=4, group_size=4, max_staleness=staleness)
    run = replace(
        base.run, steps=steps, output=output, eval_every=None, save_every=steps, quiet=True
    )
    with (
        patch.object(trainer, "make_engine", make_sleeping_engine),
        patch.object(Learner, "update", sleeping_update),
    ):
        trainer.train(replace(base, sampling=sampling, rollout=rollout, run=run))
    records = read_lines(output / METRICS)[1:]
    return Measured(
        rate=(len(ends) - 1) / (ends[-1] - ends[0]),
        staleness=sum(record["staleness"] for record in records) / len(records),
        staleness_max=max(record["staleness_max"] for record in records),
    )


def main(config: Config) -> dict[int, Measured]:
    """Measure and print; returns the runs by their staleness."""
    seconds, steps = (0.05, 3) if config.tiny else (config.seconds, config.steps)
    found: dict[int, Measured] = {}
    print(f"sampling and update: {seconds:g} s each, {steps - 1} steps counted")
    print("max-staleness  steps/s  ratio  staleness  its maximum")
    for staleness in config.staleness:
        with TemporaryDirectory() as folder:
            run = found[staleness] = measure(seconds, steps, staleness, Path(folder) / "run")
        ratio = run.rate / found[config.staleness[0]].rate
        print(
            f"{staleness:13}  {run.rate:7.3f}  {ratio:5.2f}  {run.staleness:9.2f}  "
            f"{run.staleness_max:11.0f}"
        )
    return found


def _say(renderer: Renderer, params: SamplingParams) -> list[int]:
    """An answer at once, which depends on the sample, with the end token."""
    text = f"<answer>\\boxed{{{params.seed % 7}}}</answer>"
    return [*renderer.encode_text(text), min(renderer.end_ids)]


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m benchmarks.overlap", description=__doc__))
