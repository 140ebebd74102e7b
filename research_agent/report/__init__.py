"""What a run looked like: a page, a picture, and a curve in the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research_agent.config import ReportConfig, flatten
from research_agent.errors import CheckpointError, ConfigError
from research_agent.report.curve import draw, series, text_curve
from research_agent.report.page import pairs, render
from research_agent.tracking import METRICS, read_lines

__all__ = ["Report", "draw", "make_report", "pairs", "render", "series", "text_curve"]


@dataclass(frozen=True, slots=True)
class Report:
    """The files of a report, and its curve as text."""

    page: Path
    picture: Path
    curve: str


def make_report(config: ReportConfig) -> Report:
    """Write ``report.html`` and ``curve.png`` into the folder of a run.

    Args:
        config: which run, which evaluations, how many tasks.

    Raises:
        CheckpointError: the folder holds no run.
        ConfigError: the run has no metric of that name.
    """
    run = config.run
    records = read_lines(run / METRICS)
    if not records:
        raise CheckpointError(f"{run} holds no run: there is no {METRICS} with a record in it")
    curves = series(records)
    metric = config.metric or ("eval/reward" if "eval/reward" in curves else "reward")
    if metric not in curves and config.metric:
        raise ConfigError(f"the run has no metric {metric!r}; it has {', '.join(sorted(curves))}")
    evaluations = sorted(path for path in (run / "evaluations").glob("step-*") if path.is_dir())
    before = config.before or (evaluations[0] / "predictions.jsonl" if evaluations else None)
    after = config.after or (evaluations[-1] / "predictions.jsonl" if evaluations[1:] else None)
    picture, page = run / "curve.png", run / "report.html"
    draw(records, picture, title=run.name)
    html = render(
        title=f"Training run {run.name}",
        shown=pairs(_read(before), _read(after), config.limit),
        before=_summary(before),
        after=_summary(after),
        config=dict(flatten(_json(run / "config.json"))),
        picture=picture,
    )
    page.write_text(html, encoding="utf-8")
    return Report(page, picture, text_curve(curves.get(metric, []), name=metric))


def _read(path: Path | None) -> list[dict[str, Any]]:
    if path is None:
        return []
    if not path.exists():
        raise ConfigError(f"there is no file {path}; give a predictions.jsonl of an evaluation")
    return read_lines(path)


def _summary(predictions: Path | None) -> Mapping[str, float]:
    summary = _json(predictions.with_name("summary.json")) if predictions else {}
    return {k: float(v) for k, v in flatten(summary) if isinstance(v, int | float)}


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
