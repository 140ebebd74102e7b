"""What came of an ablation: a table, verdicts on the paper's findings, and a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablations.numbers import (
    EQUAL_BUDGETS,
    NUMBERS,
    TOKENS,
    FinishedRun,
    at_equal_budget,
    read_run,
    rows_of,
)
from benchmarks.ablations.registry import Ablation, Claim
from benchmarks.ablations.runs import AblationsConfig
from benchmarks.drawing import Curve, small_multiples
from benchmarks.tables import markdown_table, print_table, spread
from research_agent.system.files import write_atomic

AGREES, DISAGREES, UNDECIDED = "as in the paper", "the other way", "cannot be told apart"
DIGITS_OVER_TIME = {"tokens": 1, "searches": 2, "turns": 2}  # after the point; others have 3
QUANTITIES = {
    "reward": "Reward in training",
    "eval/em": "Exact match, held out, T = 1",
    "env/searches": "Searches in training",
    "env/support_recall": "Support recall in training",
    "env/format": "Right format in training",
    "action_tokens": "Tokens of actions in training",
    "eval/met useless": "Met a useless result",
    "eval/searched again": "Then searched again",
    "eval/recovered": "Then found a gold passage",
}
"""What a picture calls the logged numbers."""


def verdict(claim: Claim, more: Sequence[float], less: Sequence[float]) -> str:
    """Compare the values of two arms; the package's docstring has the rule.

    Args:
        claim: says that ``more`` is larger than ``less``.
        more: one value per seed.
        less: one value per seed.
    """
    if len(more) < 2 or len(less) < 2:
        return "too few seeds to tell"
    if min(more) > max(less):
        return f"higher with {claim.more}" if claim.open else AGREES
    if max(more) < min(less):
        return f"higher with {claim.less}" if claim.open else DISAGREES
    return UNDECIDED


def verdicts(
    ablation: Ablation,
    rows: Mapping[str, Mapping[str, Sequence[float]]],
    runs: Mapping[str, Sequence[FinishedRun]],
) -> list[str]:
    """One line per claim: what is compared, our figures, and the verdict."""
    lines = []
    for claim in ablation.claims:
        more: Sequence[float]
        less: Sequence[float]
        if claim.number in EQUAL_BUDGETS:
            cost = EQUAL_BUDGETS[claim.number]
            more, less = at_equal_budget(runs.get(claim.more, ()), runs.get(claim.less, ()), cost)
        else:
            more, less = rows[claim.more][claim.number], rows[claim.less][claim.number]
        digits = _digits(ablation, claim.number)
        figures = f"{_shown(more, digits) or '?'} against {_shown(less, digits) or '?'}"
        sign = "and" if claim.open else ">"
        source = f" [{claim.source}]" if claim.source else ""
        what = f"{claim.number}: {claim.more} {sign} {claim.less}{source}"
        lines.append(f"{what}: {figures}: {verdict(claim, more, less)}")
    return lines


def _digits(ablation: Ablation, number: str) -> int:
    if ablation.over_time:
        return DIGITS_OVER_TIME.get(number, 3)
    return 3 if number in EQUAL_BUDGETS else NUMBERS[number][0]


def _shown(values: Sequence[float], digits: int) -> str:
    """Mean, lowest and highest value; "never" stands for a level that was not reached."""
    return spread(values, digits).replace("inf", "never")


def report(config: AblationsConfig, ablation: Ablation) -> Path:
    """Print an ablation's table and verdicts; write table.md, results.json and curves.png.

    Returns:
        The folder that they are in.
    """
    runs: dict[str, list[FinishedRun]] = {}
    for arm in ablation.arms:
        if finished := [run for seed in config.seeds if (run := read_run(config, arm, seed))]:
            runs[arm.name] = finished
    rows = rows_of(ablation, runs)
    headings = ["policy" if ablation.over_time else "run", "seeds", *ablation.numbers]
    cells = []
    for name, values in rows.items():
        of_row = runs.get(ablation.arms[0].name if ablation.over_time else name, ())
        shown = [_shown(values[number], _digits(ablation, number)) for number in ablation.numbers]
        cells.append([name, str(len(of_row)), *shown])
    said = verdicts(ablation, rows, runs)
    episodes = config.steps * config.prompts_per_step * config.group_size
    title = f"{ablation.name}: {config.steps} steps, {episodes} episodes; mean (lowest to highest)"
    print_table(title, headings, cells)
    words = [f"The finding of {ablation.paper}: {ablation.finding}."]
    words += [ablation.note] if ablation.note else []
    print("\n".join([*words, *said]))
    folder = config.output / ablation.name
    folder.mkdir(parents=True, exist_ok=True)
    text = [f"## {title}", "", *words, "", markdown_table(headings, cells)]
    text += [f"- {line}" for line in said]
    write_atomic(folder / "table.md", "\n".join(text) + "\n")
    out = {
        "ablation": ablation.name,
        "steps": config.steps,
        "seeds": list(config.seeds),
        "rows": {
            name: {
                number: [v if v < math.inf else "never" for v in values]
                for number, values in row.items()
            }
            for name, row in rows.items()
        },
    }
    write_atomic(folder / "results.json", json.dumps(out, indent=1) + "\n")
    if runs:
        draw(ablation, runs).savefig(folder / "curves.png", dpi=100)
    print(folder)
    return folder


def draw(ablation: Ablation, runs: Mapping[str, Sequence[FinishedRun]]) -> Any:
    """Draw the ablation's curves, over episodes played or tokens sampled.

    Args:
        ablation: says which curves.
        runs: finished runs by the name of their arm, one per seed. The first arm is the baseline.

    Returns:
        A matplotlib ``Figure``.
    """
    cost = {"episodes": "played", "sampled tokens": TOKENS}[ablation.over]  # what the log calls it
    spent = [line[cost] for seeds in runs.values() for run in seeds for line in run.log]

    def curve(name: str, seeds: Sequence[FinishedRun]) -> Curve | None:
        logs = [[line for line in run.log if line.get(name) is not None] for run in seeds]
        if all(logs):
            xs, ys = ([[float(x[key]) for x in log] for log in logs] for key in (cost, name))
            return Curve(xs, ys, window=1 if name.startswith("eval/") else 5)
        if name != "eval/em" or any(run.log for run in seeds):
            return None
        # SFT has no log of training. A level line shows the evaluation at the end.
        levels = [[run.final["in"]["em"]] * 2 for run in seeds]
        return Curve([[0.0, max(spent, default=1.0)]] * len(seeds), levels, note="greedy")

    curves = {
        arm: {QUANTITIES[name]: curve(name, seeds) for name in ablation.curves}
        for arm, seeds in runs.items()
    }
    first, *others = runs
    against = f"each run against {first}" if others else first
    title = f"Ablation {ablation.name!r}: {against}, by {ablation.over}"
    return small_multiples(curves, title, ablation.over)
