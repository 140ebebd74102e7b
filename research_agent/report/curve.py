"""Learning curves: one PNG, and the same in plain text for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Point = tuple[float, float]  # (step, value)


def series(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Curves of the reward and of what evaluations measured, by name.

    Args:
        records: records of ``metrics.jsonl``.

    Returns:
        ``reward`` (of training) and ``eval/...``, each a list of (step, value), finite ones only.
    """
    curves: dict[str, list[Point]] = {}
    for record in records:
        for name, value in record.items():
            if name != "reward" and not name.startswith("eval/"):
                continue
            if isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(name, []).append((float(record["step"]), float(value)))
    return curves


def draw(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw the curves of runs as a PNG: shares from 0 to 1 above, other quantities below.

    Of a single run all curves are drawn; of several the reward and the first of em and reward on
    held-out tasks that there is, a color a run.

    Args:
        runs: records of ``metrics.jsonl``, by the name of the run.
        path: path of the picture.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  (slow to import)

    alone = len(runs) == 1
    curves = {
        (run, name): points for run, log in runs.items() for name, points in series(log).items()
    }
    if not alone:
        main = "eval/em" if any(name == "eval/em" for _, name in curves) else "eval/reward"
        curves = {key: points for key, points in curves.items() if key[1] in ("reward", main)}
    colors = {run: f"C{i % 10}" for i, run in enumerate(runs)}
    metrics = {name for _, name in curves}
    shares = {
        name
        for name in metrics
        if all(-1e-9 <= v <= 1 + 1e-9 for key, c in curves.items() if key[1] == name for _, v in c)
    }
    panels = [panel for panel in (shares, metrics - shares) if panel] or [metrics]
    figure = Figure(figsize=(8, 1 + 3 * len(panels)), layout="constrained")
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, number + 1)
        for (run, name), points in curves.items():
            if name not in panel:
                continue
            steps, values = zip(*points, strict=True)
            held_out = "held-out " + name.removeprefix("eval/")
            label = "reward while training" if name == "reward" else held_out
            style: dict[str, Any] = {"label": label if alone else f"{run}: {label}"}
            if name == "reward":
                style |= {"linewidth": 1, "color": "0.6"}
            else:
                style |= {"marker": "o", "markersize": 4}
            if not alone:
                style["color"] = colors[run]
            axes.plot(steps, values, **style)
        if panel is shares:
            axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.3)
        if panel:
            axes.legend(fontsize="small", loc="best")
    axes.set_xlabel("training step")
    if alone:
        figure.suptitle(next(iter(runs)))
    figure.savefig(path, dpi=130)


def text_curve(
    points: Sequence[Point], *, name: str = "", width: int = 60, height: int = 12
) -> str:
    """Draw a curve as text.

    Args:
        points: (step, value), at least one, steps ascending.
        name: written above.
        width: width of the drawing in characters, its scale left out.
        height: height of the drawing in lines, axes left out.

    Returns:
        Lines joined by newlines. Where several steps fall into a column, it shows their mean.
    """
    if not points:
        return f"{name}: nothing to draw yet"
    values = [value for _, value in points]
    low, high = min(values), max(values)
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0  # a share is read against the whole scale
    elif low == high:
        low, high = low - 0.5, high + 0.5
    first, last = points[0][0], points[-1][0]
    columns: dict[int, list[float]] = {}
    for step, value in points:
        place = 0.0 if last == first else (step - first) / (last - first)
        columns.setdefault(round(place * (width - 1)), []).append(value)
    grid = [[" "] * width for _ in range(height)]
    for column, inside in columns.items():
        mean = sum(inside) / len(inside)
        grid[height - 1 - round((mean - low) / (high - low) * (height - 1))][column] = "●"
    lines = [name] if name else []
    for row, cells in enumerate(grid):
        level = high - (high - low) * row / (height - 1)
        label = f"{level:8.2f}" if row % 3 == 0 or row == height - 1 else " " * 8
        lines.append(f"{label} ┤{''.join(cells).rstrip()}")
    lines.append(" " * 9 + "└" + "─" * width)
    end = f"step {last:g}"
    lines.append(" " * 10 + f"{first:g}".ljust(width - len(end)) + end)
    return "\n".join(lines)
