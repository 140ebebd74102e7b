"""Learning curves, as a PNG and as text for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from research_agent.system.terminal import printable

Point = tuple[float, float]  # (step, value)


def series(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Curves of the training reward (``reward``) and of evaluations (``eval/...``).

    Args:
        records: records of ``metrics.jsonl``.

    Returns:
        The points (step, value) of each curve, by metric; values that are not finite are left out.
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
    """Draw the curves of runs as a PNG, one panel per metric.

    A single run has a panel for each of its curves. Several runs share two: training reward, and em
    on held-out tasks (or the held-out reward, if no run has em).

    Args:
        runs: records of ``metrics.jsonl``, by the name of the run.
        path: file to write.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  (slow to import)

    curves = {run: series(log) for run, log in runs.items()}
    named = (name for found in curves.values() for name in found)
    names = list(dict.fromkeys(["reward", *named]))
    if len(runs) > 1:
        main = "eval/em" if "eval/em" in names else "eval/reward"
        names = ["reward", *([main] if main in names else [])]
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(1 + 4 * columns, 0.6 + 2.6 * rows), layout="constrained")
    figure.suptitle(f"{_plain(', '.join(runs))}: reward and held-out metrics by training step")
    for number, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, number + 1)
        held_out = name != "reward"
        axes.set_title(_plain("held-out " + name.removeprefix("eval/") if held_out else name))
        ends = []
        for i, (run, found) in enumerate(curves.items()):
            if points := found.get(name):
                steps, values = zip(*points, strict=True)
                color, last = f"C{i % 10}", values[-1]
                axes.plot(steps, values, color=color, marker="o" if held_out else None, ms=3)
                ends.append((last, run if len(runs) > 1 else f"{last:.3g}", color))
        shown = [value for found in curves.values() for _, value in found.get(name, ())]
        if all(-1e-9 <= value <= 1 + 1e-9 for value in shown):
            axes.set_ylim(-0.02, 1.02)  # fractions get the whole scale
        label_ends(axes, ends)
    figure.savefig(path, dpi=130)


def _plain(name: str) -> str:
    """A name as matplotlib shows it unchanged: a dollar sign would begin a formula."""
    return printable(name).replace("$", r"\$")


def label_ends(axes: Any, ends: Sequence[tuple[float, str, str]], gap: float = 0.08) -> None:
    """Remove a panel's upper and right frame, and write each curve's name at its right end.

    Args:
        axes: the panel, with its curves drawn and its limits set.
        ends: last value, name and color of each curve.
        gap: least distance between names, as a fraction of the panel's height.
    """
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    low, high = axes.get_ylim()
    place = math.inf
    for value, name, color in sorted(ends, reverse=True):
        place = min(value, place - gap * (high - low))
        axes.annotate(
            _plain(name),
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            color=color,
            fontsize="small",
            va="center",
        )


def text_curve(
    points: Sequence[Point], *, name: str = "", width: int = 60, height: int = 12
) -> str:
    """Draw a curve as text.

    Args:
        points: (step, value), steps ascending.
        name: title above the curve.
        width: columns of the drawing, without its scale.
        height: lines of the drawing, without axis and title.

    Returns:
        Lines joined by newlines. A column with several steps shows the mean of their values.
    """
    if not points:
        return f"{name}: nothing to draw yet"
    values = [value for _, value in points]
    low, high = min(values), max(values)
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0  # fractions get the whole scale
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
