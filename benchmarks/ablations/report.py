"""What came of the runs: numbers, verdicts on the papers' findings, a table and a picture."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ablations.registry import AFTER, BEFORE, LEVELS, MIDDLE, Ablation, Arm, Claim
from benchmarks.ablations.runs import Settings, folder_of, read_result
from benchmarks.runs import draw_band, read_log
from benchmarks.tables import markdown_table, print_table, spread
from research_agent.evaluation.predictions import read_predictions
from research_agent.report.curve import label_ends
from research_agent.system.files import write_atomic

Values = dict[str, float]
AGREES, DISAGREES, UNDECIDED = "as in the paper", "the other way", "cannot be told apart"
TOKENS, SEARCHES = "all tokens", "all searches"
LONG = "em, 5+ hops"
MEETING, AGAIN, RECOVERED = "met useless", "searched again", "recovered"


# --- numbers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """A run as it is on disk."""

    log: Sequence[Mapping[str, Any]]  # a line per training step; empty for SFT
    final: Mapping[str, Mapping[str, float]]  # world to means of the last evaluation, greedy
    seconds: float


def look(settings: Settings, arm: Arm, seed: int) -> Seen | None:
    """Read a finished run; None for one that is not."""
    folder = folder_of(settings, arm, seed)
    result = read_result(folder)
    if not result:
        return None
    log = [{**line, **_corrections(folder, line)} for line in read_log(folder)]
    final = {
        name: {**means, **_long(folder / "final" / name)} for name, means in result["final"].items()
    }
    return Seen(with_totals(log), final, result["seconds"])


def _long(place: Path) -> Values:
    """Exact match of an evaluation's chains of five facts and more, which MiniWorld has none of."""
    if not (place / "predictions.jsonl").exists():
        return {}
    asked = [(record["info"].get("strata", {}), record) for record in read_predictions(place)[1]]
    long = [r["metrics"]["em"] for strata, r in asked if int(strata.get("hops", 0)) > 4]
    return {LONG: statistics.fmean(long)} if long else {}


def with_totals(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Add to each line what was spent until then: ``all tokens`` and ``all searches``.

    What a tree shares was sampled once. The last turn of an episode is an answer; all others are
    searches.
    """
    tokens = accumulate(line.get("sampled_tokens", 0.0) for line in log)
    searches = accumulate(
        line.get("sampled_turns", 0.0) - line.get("episodes", 0.0) for line in log
    )
    return [
        {**line, TOKENS: spent, SEARCHES: searched}
        for line, spent, searched in zip(log, tokens, searches, strict=True)
    ]


def _corrections(folder: Path, line: Mapping[str, Any]) -> Values:
    place = folder / "evaluations" / f"step-{line['step']:06d}"
    if "eval/em" not in line or not (place / "predictions.jsonl").exists():
        return {}
    _, records = read_predictions(place)
    return {f"eval/{name}": value for name, value in self_correction(records).items()}


def self_correction(records: Iterable[Mapping[str, Any]]) -> Values:
    """What policies do about useless results: those without a gold passage of the question.

    Args:
        records: records of an evaluation, see ``research_agent.evaluation.predictions``. Void ones,
            and those of questions whose gold passages are not known, are left out.

    Returns:
        ``met useless``: the share of episodes with a useless result. Of these ``searched again``:
        the share with a search after the first useless one, and ``recovered``: with a search after
        it that found a gold passage. Each is there if it is the share of something.
    """
    episodes = met = again = recovered = 0
    for record in records:
        golds = set(record["info"].get("supporting_ids") or ())
        if record["void"] or not golds:
            continue
        found = [
            not golds.isdisjoint(segment["info"].get("passage_ids", ()))
            for segment in record["segments"]
            if segment["provenance"] == "observation" and segment["info"].get("query")
        ]
        episodes += 1
        if False in found:
            later = found[found.index(False) + 1 :]
            met += 1
            again += bool(later)
            recovered += any(later)
    shares = {MEETING: (met, episodes), AGAIN: (again, met), RECOVERED: (recovered, met)}
    return {name: part / whole for name, (part, whole) in shares.items() if whole}


def largest_fall(rewards: Sequence[float], window: int = 5) -> float:
    """How far the mean reward of ``window`` steps fell below its highest before, at most."""
    means = [
        statistics.fmean(rewards[i : i + window])
        for i in range(max(1, len(rewards) - window + 1))
        if rewards
    ]
    best, fall = -float("inf"), 0.0
    for mean in means:
        best = max(best, mean)
        fall = max(fall, best - mean)
    return fall


def _trained(seen: Seen, name: str, first: float, last: float) -> float | None:
    """Mean of a logged number over a share of the steps of training, such as 0.9 to 1."""
    values = [float(line[name]) for line in seen.log if line.get(name) is not None]
    steps = values[int(first * len(values)) : max(1, round(last * len(values)))]
    return statistics.fmean(steps) if steps else None


def _final(world: str, name: str) -> Callable[[Seen], float | None]:
    return lambda seen: seen.final.get(world, {}).get(name)


def _evaluations(seen: Seen, cost: str) -> list[tuple[float, float]]:
    """What a run had spent at each evaluation, and its exact match there."""
    return [(float(line[cost]), float(line["eval/em"])) for line in seen.log if "eval/em" in line]


def _until(level: float, cost: str) -> Callable[[Seen], float | None]:
    """What a run has spent when it reaches a level; infinity where it never does.

    Args:
        level: exact match of the held-out questions, on a line between the evaluations.
        cost: name of a logged number that grows over the run.
    """

    def found(seen: Seen) -> float | None:
        points = _evaluations(seen, cost)
        if points and points[0][1] >= level:
            return points[0][0]
        for (spent, low), (more, high) in pairwise(points):
            if high >= level:
                return spent + (more - spent) * (level - low) / (high - low)
        return math.inf if points else None

    return found


def at_equal_budget(
    one: Sequence[Seen], other: Sequence[Seen], cost: str
) -> tuple[list[float], list[float]]:
    """Exact match of two arms when their runs have spent the same.

    Args:
        one: runs of an arm, one per seed.
        other: those of another arm.
        cost: ``all tokens`` or ``all searches``.

    Returns:
        The exact match of each run, on a line between its evaluations, when it had spent what the
        run that spent least spent in all.
    """
    evaluated = [[_evaluations(seen, cost) for seen in runs] for runs in (one, other)]
    budget = min((points[-1][0] for runs in evaluated for points in runs if points), default=0.0)

    def reached(points: Sequence[tuple[float, float]]) -> float:
        spent, right = zip(*points, strict=True)
        return float(np.interp(budget, spent, right))

    first, second = ([reached(points) for points in runs if points] for runs in evaluated)
    return first, second


def _last(name: str) -> Callable[[Seen], float | None]:
    return lambda seen: next((float(x[name]) for x in reversed(seen.log) if name in x), None)


_UNITS = {"episodes": "played", "tokens": TOKENS, "searches": SEARCHES}
EQUAL_BUDGETS = {"em at equal tokens": TOKENS, "em at equal searches": SEARCHES}
"""Numbers of two arms each, which claims may name, and what both have spent as much of."""
THIRD = 1 / 3
NUMBERS: dict[str, tuple[int, Callable[[Seen], float | None]]] = {
    "em in": (3, _final("in", "em")),
    "em out": (3, _final("out", "em")),
    "f1 in": (3, _final("in", "f1")),
    "cem in": (3, _final("in", "cem")),
    "tokens": (1, _final("in", "tokens")),
    "searches": (2, _final("in", "searches")),
    "answer words": (2, _final("in", "answer words")),
    "reward": (3, lambda seen: _trained(seen, "reward", 0.9, 1)),
    "fall": (3, lambda seen: largest_fall([x["reward"] for x in seen.log if "reward" in x])),
    "format early": (3, lambda seen: _trained(seen, "env/format", 0, THIRD)),
    "searches early": (2, lambda seen: _trained(seen, "env/searches", 0, THIRD)),
    "seconds": (0, lambda seen: seen.seconds),
    "em hard": (3, _final("hard", "em")),
    LONG: (3, _final("hard", LONG)),
    "em, T = 1": (3, _last("eval/em")),
    **{
        f"{unit} to {level}": (0, _until(float(level), name))
        for level in LEVELS
        for unit, name in _UNITS.items()
    },
    TOKENS: (0, _last(TOKENS)),
    SEARCHES: (0, _last(SEARCHES)),
}
"""Columns of ablations that compare arms: digits, and how the number is found."""
DIGITS_OVER_TIME = {"tokens": 1, "searches": 2, "turns": 2}


def rows_of(
    ablation: Ablation, runs: Mapping[str, Sequence[Seen]]
) -> dict[str, dict[str, Sequence[float]]]:
    """Row to number to its values of the seeds.

    Args:
        ablation: whose numbers are wanted.
        runs: finished runs by the name of their arm, one a seed.
    """
    if not ablation.over_time:
        return {
            arm.name: {
                number: _known(NUMBERS[number][1](seen) for seen in runs.get(arm.name, ()))
                for number in ablation.numbers
            }
            for arm in ablation.arms
        }
    evaluations = [
        [line for line in seen.log if "eval/em" in line]
        for seen in runs.get(ablation.arms[0].name, ())
    ]
    at = {BEFORE: 0.0, MIDDLE: 0.5, AFTER: 1.0}
    return {
        moment: {
            number: _known(
                _line_at(lines, share).get(f"eval/{number}") for lines in evaluations if lines
            )
            for number in ablation.numbers
        }
        for moment, share in at.items()
    }


def _line_at(lines: Sequence[Mapping[str, Any]], share: float) -> Mapping[str, Any]:
    """Return the line whose step is nearest to a share of the last step."""
    return min(lines, key=lambda line: abs(line["step"] - share * lines[-1]["step"]))


def _known(values: Iterable[float | None]) -> list[float]:
    return [float(value) for value in values if value is not None]


# --- verdicts -------------------------------------------------------------------------------------


def verdict(claim: Claim, more: Sequence[float], less: Sequence[float]) -> str:
    """Whether the seeds' values bear a claim out; see the package for the rule.

    Args:
        claim: the claim that ``more`` is larger than ``less``.
        more: one value a seed.
        less: likewise.
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
    runs: Mapping[str, Sequence[Seen]],
) -> list[str]:
    """A line a claim: what is compared, our figures, and the verdict."""
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
    """The values of the seeds, as in the tables; of a level that was not reached: never."""
    return spread(values, digits).replace("inf", "never")


# --- what is written ------------------------------------------------------------------------------


def report(settings: Settings, ablation: Ablation, seeds: Sequence[int]) -> Path:
    """Print an ablation's table and verdicts; write table.md, results.json and curves.png.

    Returns:
        The folder of the three.
    """
    runs: dict[str, list[Seen]] = {}
    for arm in ablation.arms:
        seen = [found for seed in seeds if (found := look(settings, arm, seed))]
        if seen:
            runs[arm.name] = seen
    rows = rows_of(ablation, runs)
    headings = ["policy" if ablation.over_time else "run", "seeds", *ablation.numbers]
    cells = []
    for name, values in rows.items():
        of_row = runs.get(ablation.arms[0].name if ablation.over_time else name, ())
        shown = [_shown(values[number], _digits(ablation, number)) for number in ablation.numbers]
        cells.append([name, str(len(of_row)), *shown])
    said = verdicts(ablation, rows, runs)
    episodes = settings.steps * settings.prompts_per_step * settings.group_size
    title = (
        f"{ablation.name}: {settings.steps} steps, {episodes} episodes; mean (lowest to highest)"
    )
    print_table(title, headings, cells)
    words = [
        f"The finding of {ablation.paper}: {ablation.finding}.",
        *([ablation.note] if ablation.note else ()),
    ]
    print("\n".join([*words, *said]))
    folder = settings.output / ablation.name
    folder.mkdir(parents=True, exist_ok=True)
    text = [f"## {title}", "", *words, "", markdown_table(headings, cells)]
    text += [f"- {line}" for line in said]
    write_atomic(folder / "table.md", "\n".join(text) + "\n")
    values_of = {
        name: {
            number: [v if v < math.inf else "never" for v in values]
            for number, values in row.items()
        }
        for name, row in rows.items()
    }
    out = {"ablation": ablation.name, "steps": settings.steps, "seeds": list(seeds)}
    out["rows"] = values_of
    write_atomic(folder / "results.json", json.dumps(out, indent=1) + "\n")
    if runs:
        draw(ablation, runs, folder / "curves.png")
    print(folder)
    return folder


def draw(ablation: Ablation, runs: Mapping[str, Sequence[Seen]], path: Path) -> None:
    """Draw a panel for each of the ablation's curves, over episodes played or tokens sampled."""
    from matplotlib import colormaps  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    cost = {"episodes": "played", "sampled tokens": TOKENS}[ablation.over]
    palette = colormaps["tab10" if len(runs) <= 10 else "tab20"]
    figure = Figure(figsize=(1 + 4 * len(ablation.curves), 3.4), layout="constrained")
    figure.suptitle(f"{ablation.name}: mean of the seeds, and lowest to highest")
    for number, name in enumerate(ablation.curves):
        axes = figure.add_subplot(1, len(ablation.curves), number + 1)
        axes.set_prop_cycle(color=palette(range(palette.N)))
        ends = []
        for arm, seeds in runs.items():
            lines = [[x for x in seen.log if x.get(name) is not None] for seen in seeds]
            if all(lines):
                xs = [[float(x[cost]) for x in of_seed] for of_seed in lines]
                ys = [[float(x[name]) for x in of_seed] for of_seed in lines]
                last, color = draw_band(axes, xs, ys, window=1 if name.startswith("eval/") else 5)
                ends.append((last, arm, color))
            elif name == "eval/em":  # no log of training: what came of it
                level = statistics.fmean(seen.final["in"]["em"] for seen in seeds)
                axes.axhline(level, linestyle="--", color="gray")
                ends.append((level, f"{arm}, greedy", "gray"))
        axes.set_title(name)
        axes.set_xlabel(ablation.over)
        label_ends(axes, ends)
    figure.savefig(path, dpi=120)
