"""Pictures of runs: small panels with few lines, labeled directly, in the style of the report."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from research_agent.report.curve import label_ends

RUN, BASELINE = "#2b62b8", "#929ba6"  # colors of the report's page: accent, and quiet text
COLUMNS = 5  # panels beside each other, if runs are compared by one quantity


@dataclass(frozen=True)
class Curve:
    """One quantity of a run, over what the run had spent."""

    xs: Sequence[Sequence[float]]  # one sequence per seed, ascending
    ys: Sequence[Sequence[float]]  # the values there
    window: int = 1  # what is drawn at a point is the mean of so many values up to it
    note: str = ""  # stands behind the last value


def small_multiples(
    runs: Mapping[str, Mapping[str, Curve | None]], title: str, x_label: str
) -> Any:
    """Draw each run in blue in panels of its own, with the first run in grey behind it.

    Several quantities make a table of panels: a row per run, a column per quantity. A single
    quantity makes a panel per run, as many as fit beside each other.

    Args:
        runs: run to quantity to curve (None: the run has none); each run names all quantities. The
            first run is the baseline, which has panels of its own only if it is the only run.
        title: what the picture shows. Colors, bands and numbers are explained below it.
        x_label: what the runs had spent.

    Returns:
        A matplotlib ``Figure``.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow to import
    from matplotlib.ticker import EngFormatter  # noqa: PLC0415

    first, *others = runs
    baseline = runs[first] if others else {}
    quantities = list(runs[first])
    cells = [(run, quantity) for run in others or [first] for quantity in quantities]
    table = len(quantities) > 1
    columns = len(quantities) if table else min(COLUMNS, len(cells))
    rows = math.ceil(len(cells) / columns)
    figure = Figure(figsize=(1 + 2.4 * columns, 1.1 + 1.4 * rows), layout="constrained")
    grid = figure.subplots(
        rows, columns, sharex=True, sharey="col" if table else True, squeeze=False
    )
    for axes in grid.flat[len(cells) :]:
        axes.set_visible(False)
    panels = grid.flat[: len(cells)]
    drawn = [
        _draw_curves(axes, {BASELINE: baseline.get(quantity), RUN: runs[run].get(quantity)})
        for (run, quantity), axes in zip(cells, panels, strict=True)
    ]
    for number, ((run, quantity), axes, ends) in enumerate(zip(cells, panels, drawn, strict=True)):
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        label_ends(axes, ends, gap=0.2)  # shared scales are final once all curves are drawn
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.tick_params(labelsize="small", labelbottom=number + columns >= len(cells))
        if not table:
            axes.set_title(run, fontsize="medium")
            continue
        if number < columns:
            axes.set_title(quantity, fontsize="medium")
        if number % columns == 0:
            name = "\n".join(textwrap.wrap(run, 16))
            axes.set_ylabel(name, rotation=0, ha="right", va="center", color=RUN)
    colors = f"Blue: the run. Grey: {first}. " if others else ""
    legend = f"{colors}Line: mean of the seeds. Band: lowest to highest. Number: the last mean."
    figure.suptitle(f"{title}\n{legend}", fontsize="medium")
    figure.supxlabel(x_label, fontsize="medium")
    return figure


def _draw_curves(axes: Any, curves: Mapping[str, Curve | None]) -> list[tuple[float, str, str]]:
    """Draw curves, by color, in one panel: the mean of the seeds, and the band that they span.

    Returns:
        Last mean, label and color of each curve, for ``label_ends``.
    """
    import numpy as np  # noqa: PLC0415

    ends = []
    for color, curve in curves.items():
        if curve is None:
            continue
        grid = np.linspace(max(x[0] for x in curve.xs), min(x[-1] for x in curve.xs), 200)
        seeds = [
            np.interp(grid, x, _smooth(y, curve.window))
            for x, y in zip(curve.xs, curve.ys, strict=True)
        ]
        mean = np.mean(seeds, axis=0)
        axes.plot(grid, mean, color=color)
        low, high = np.min(seeds, axis=0), np.max(seeds, axis=0)
        axes.fill_between(grid, low, high, color=color, alpha=0.2, linewidth=0)
        last = float(mean[-1])
        ends.append((last, f"{last:.{2 if last < 10 else 1}f} {curve.note}".strip(), color))
    return ends


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and those before it, ``window`` values at most."""
    return [statistics.fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]
