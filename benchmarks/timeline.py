"""What overlap is for: the timeline of a training step whose searches take half a second.

    python -m benchmarks.timeline --output docs/pictures/trace.png

MiniWorld is trained for a few steps, its passages behind a server that is slow on purpose: in
lockstep, with ``--overlap``, and with ``--max-staleness 1`` too, where sampling continues during
the update. The picture shows one late step of each at the same scale.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import tyro

from research_agent.presets import PRESETS
from research_env.datasets import load_dataset
from research_env.retrieval import Hit, Retriever, open_retriever
from research_env.retrieval.serve import RetrievalServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from research_env.errors import RetrievalError

COLORS = {
    "generate": "#2f6db3",
    "environment": "#f2c069",
    "wait": "#c94f4f",
    "update": "#3b8f5a",
    "sync": "#4a4a4a",
}
MINIWORLD = PRESETS["miniworld"]
RUNS = {"lockstep": (False, 0), "--overlap": (True, 0), "--overlap --max-staleness 1": (True, 1)}


@dataclass(frozen=True)
class Config:
    """Draw the timeline of a training step with slow searches."""

    output: Path = Path("timeline.png")
    """The picture."""
    seconds: float = 0.5
    """Seconds per search."""
    max_in_flight: int = 48
    """Episodes played at the same time."""
    steps: int = 4
    """Training steps; the last but one is drawn."""


@dataclass(frozen=True, slots=True)
class Span:
    """Something that went on from one time to another, in seconds."""

    name: str
    row: int
    begin: float
    end: float


class Slow:
    """A retriever that keeps its askers waiting."""

    def __init__(self, retriever: Retriever, seconds: float) -> None:
        self._retriever = retriever
        self._seconds = seconds

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit] | RetrievalError]:
        """Answer every query of a batch, after a while."""
        time.sleep(self._seconds)
        return self._retriever.search(queries, top_k)

    def close(self) -> None:
        """Release what the retriever holds."""
        self._retriever.close()


def main(config: Config) -> None:
    """Run all, draw the picture, and print what it shows."""
    with TemporaryDirectory() as scratch, slow_server(config.seconds) as url:
        steps = {}
        for number, (name, (overlap, staleness)) in enumerate(RUNS.items()):
            output = Path(scratch) / f"run-{number}"
            trace = _train(config, url, output, overlap=overlap, staleness=staleness)
            steps[name] = one_step(read(trace))
    draw(steps, config)
    for name, spans in steps.items():
        collection = next(span.end for span in spans if span.name == "collect")
        step = max(span.end for span in spans)
        played = MINIWORLD.rollout.prompts_per_step * MINIWORLD.rollout.group_size / step
        print(
            f"{name}: {step:.2f} s per step, {collection:.2f} of them waiting for episodes; "
            f"{played:.1f} episodes/s"
        )


@contextmanager
def slow_server(seconds: float) -> Iterator[str]:
    """MiniWorld's passages behind a retrieval server that takes so long; yields its address."""
    retriever = Slow(open_retriever(None, load_dataset("miniworld", split="train").corpus), seconds)
    server = RetrievalServer(retriever)
    try:
        yield server.url
    finally:
        server.stop()
        retriever.close()


def read(path: Path) -> list[Span]:
    """The spans of a trace, whether it was closed or cut."""
    text = path.read_text(encoding="utf-8").rstrip().rstrip(",")
    events: list[dict[str, Any]] = json.loads(text + "]")
    return [
        Span(e["name"], e["tid"], e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6)
        for e in events
        if e["ph"] == "X"
    ]


def one_step(spans: Sequence[Span]) -> list[Span]:
    """What went on from the last collection but one to the last; its beginning is time 0."""
    start, stop = sorted(span.begin for span in spans if span.name == "collect")[-2:]
    return [
        replace(span, begin=max(span.begin - start, 0), end=min(span.end, stop) - start)
        for span in spans
        if span.end > start and span.begin < stop
    ]


def draw(steps: dict[str, list[Span]], config: Config) -> None:
    """Rows of slots over time, a panel each, at the same scale."""
    import matplotlib as mpl  # noqa: PLC0415  (slow to import)

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure, panels = plt.subplots(len(steps), sharex=True, figsize=(9, 8), layout="constrained")
    for panel, (name, spans) in zip(panels, steps.items(), strict=True):
        for kind, color in COLORS.items():
            chosen = [span for span in spans if span.name == kind]
            panel.barh(
                [config.max_in_flight + 3 if span.row == 0 else span.row for span in chosen],
                [span.end - span.begin for span in chosen],
                left=[span.begin for span in chosen],
                height=[4 if span.row == 0 else 1 for span in chosen],
                color=color,
                label=kind,
            )
        panel.set_ylim(config.max_in_flight + 6, 0)
        panel.set_ylabel("slot")
        panel.set_title(name, loc="left", fontsize="medium")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)
    panels[-1].set_xlabel(f"seconds since the step began; a search takes {config.seconds:g} s")
    config.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.output, dpi=120)
    plt.close(figure)


def _train(config: Config, url: str, output: Path, *, overlap: bool, staleness: int) -> Path:
    """Train, and return the file of the trace."""
    from research_agent.trainer import train  # noqa: PLC0415  (loads torch)

    env_args = {**MINIWORLD.environment.env_args, "retriever": url}
    trace = output.with_suffix(".json")
    train(
        replace(
            MINIWORLD,
            environment=replace(MINIWORLD.environment, env_args=env_args),
            sampling=replace(
                MINIWORLD.sampling, max_in_flight=config.max_in_flight, overlap=overlap
            ),
            rollout=replace(MINIWORLD.rollout, max_staleness=staleness),
            run=replace(
                MINIWORLD.run,
                steps=config.steps,
                output=output,
                trace=trace,
                eval_every=None,
                save_every=config.steps,
                quiet=True,
            ),
        )
    )
    return trace


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m benchmarks.timeline", description=__doc__))
