"""Reports of runs and evaluations: a page, a picture, and curves as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from research_agent.config import ReportConfig
from research_agent.errors import ConfigError
from research_agent.report.curve import draw, series, text_curve
from research_agent.report.index import make_index
from research_agent.report.page import render
from research_agent.report.sources import Training, names, read
from research_agent.system.files import write_atomic

__all__ = ["Report", "draw", "make_report", "render", "series", "text_curve"]


@dataclass(frozen=True, slots=True)
class Report:
    """The files of a report, and its curves as text."""

    page: Path
    picture: Path | None  # None without a training run
    curve: str  # "" without a training run
    notes: Sequence[str]  # warnings about the input


def make_report(config: ReportConfig) -> Report:
    """Write the page and, if there is a training run, ``curve.png`` beside it.

    Args:
        config: runs and predictions to show, most episodes to show, and the output file.

    Raises:
        ConfigError: a path holds nothing to report, or no run has the metric.
        PredictionsError: a file of predictions cannot be read.
    """
    if config.limit is not None and config.limit < 1:
        raise ConfigError(f"--limit is {config.limit}; it must be at least 1")
    if not config.paths:
        raise ConfigError("nothing to report: name a run, an evaluation, or a predictions.jsonl")
    sources = read(config.paths)
    first = config.paths[0]
    page = config.output or (first if first.is_dir() else first.parent) / "report.html"
    runs = dict(zip(names([t.path for t in sources.trainings]), sources.trainings, strict=True))
    curve = _curve(runs, config.metric)
    index, details = make_index(sources, config.limit)
    shown = names([path.resolve() for path in config.paths])
    html = render(f"Report: {', '.join(shown)}", index, details)
    page.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(page, html)
    picture = page.with_name("curve.png") if runs else None
    if picture:
        draw({name: run.log for name, run in runs.items()}, picture)
    return Report(page, picture, curve, index["notes"])


def _curve(runs: dict[str, Training], metric: str | None) -> str:
    """One metric's curve of each run as text, one below the other."""
    runs_curves = {name: series(run.log) for name, run in runs.items()}
    known = sorted({each for curves in runs_curves.values() for each in curves})
    if metric and metric not in known:
        raise ConfigError(f"no run has a metric {metric!r}; they have {', '.join(known)}")
    chosen = metric or ("eval/reward" if "eval/reward" in known else "reward")
    return "\n\n".join(
        text_curve(curves.get(chosen, []), name=chosen if len(runs) == 1 else f"{name}: {chosen}")
        for name, curves in runs_curves.items()
    )
