"""A table of results for a terminal, for Markdown, LaTeX and programs, and as a bar chart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from benchmarks.baselines.published import Score
from research_agent.errors import ConfigError
from research_env.system.terminal import printable

DASH = "–"
BLUES = ("#0017c7", "#457aec", "#8fb0f5")  # colours of trained rows
GRAYS = ("#b8c0e0", "#dce1ee", "#dedede", "#bcbcbc", "#9a9a9a")


@dataclass(frozen=True, slots=True)
class Judged:
    """What an LLM judge said, in percent. Where verdicts are missing, ``score`` is None.

    ``range`` is then the score with all missing ones wrong, and with all of them right.
    """

    score: float | None
    range: tuple[float, float]
    model: str


def read_judge(folder: Path, episodes: int) -> Judged | None:
    """What ``research-env judge`` said of a cell; None where nobody judged.

    Args:
        folder: folder of the cell.
        episodes: how many it has that are not void.

    Raises:
        ConfigError: a judge.json that is no such file, or is of other episodes.
    """
    path = folder / "judge.json"
    if not path.exists():
        return None
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        score, span, judged = said["score"], said["range"], int(said["n"])
        if span is None:  # every episode is void
            return None
        found = Judged(
            None if score is None else 100 * float(score),
            (100 * float(span[0]), 100 * float(span[1])),
            str(said["model"]),
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(
            f"{path} is no summary of a judge ({type(error).__name__}: {error}); "
            "remove it, and run research-env judge again"
        ) from error
    if judged != episodes:
        raise ConfigError(
            f"{path} is of {judged} episodes, and the cell has {episodes} now; run "
            "research-env judge again, which asks for the others only"
        )
    return found


@dataclass(frozen=True, slots=True)
class Cell:
    """A method on a data set, in percent; ``published`` is the paper's."""

    em: float
    interval: tuple[float, float]  # 95 % interval of em
    searches: float  # a question
    episodes: int
    void: int
    judged: Judged | None
    published: Score | None
    folder: str


@dataclass(frozen=True, slots=True)
class Row:
    """A method with a model on every data set."""

    label: str
    model: str
    trained: bool
    cells: Mapping[str, Cell]  # by the printed name of the data set


@dataclass(frozen=True, slots=True)
class Results:
    """The whole table: rows in order, and the printed names of the data sets."""

    rows: Sequence[Row]
    datasets: Sequence[str]

    @property
    def has_published(self) -> bool:
        """Whether any number of a paper stands beside ours."""
        return any(cell.published for row in self.rows for cell in row.cells.values())


def exact_match(cell: Cell) -> str:
    """Ours, and the paper's in brackets."""
    return _beside(f"{cell.em:.2f}", cell.published and cell.published[0])


def judge(cell: Cell) -> str:
    """Ours, a range where verdicts are missing, a dash where nobody judged; and the paper's."""
    if cell.judged is None:
        ours = DASH
    elif cell.judged.score is None:
        ours = f"{cell.judged.range[0]:.2f} to {cell.judged.range[1]:.2f}"
    else:
        ours = f"{cell.judged.score:.2f}"
    return _beside(ours, cell.published and cell.published[1])


def _beside(ours: str, paper: float | None) -> str:
    return ours if paper is None else f"{ours} ({paper:.2f})"


def _legend(results: Results) -> str:
    legend = "EM: exact match, in percent. LJ: LLM as a judge."
    return legend + (" In brackets: the paper's." if results.has_published else "")


def terminal(results: Results) -> Table:
    """The table for a terminal."""
    table = Table(caption=_legend(results), box=SIMPLE)
    table.add_column("method", overflow="fold", min_width=10)
    for dataset in results.datasets:
        table.add_column(Text(f"{printable(dataset)}\nEM"), justify="right")
        table.add_column("\nLJ", justify="right")
    for row in results.rows:
        cells = [row.cells[dataset] for dataset in results.datasets]
        said = [each(cell) for cell in cells for each in (exact_match, judge)]
        table.add_row(Text(printable(row.label)), *said, style="bold" if row.trained else None)
    return table


def markdown(results: Results) -> str:
    """The table in Markdown."""
    heads = ["method", *(f"{name} {what}" for name in results.datasets for what in ("EM", "LJ"))]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for row in results.rows:
        cells = [row.cells[dataset] for dataset in results.datasets]
        lines.append([row.label, *(each(c) for c in cells for each in (exact_match, judge))])
    shown = [[printable(" ".join(t.split())).replace("|", "\\|") for t in line] for line in lines]
    rows = (f"| {' | '.join(line)} |" for line in shown)
    return "\n".join([*rows, "", _legend(results), ""])


def latex(results: Results) -> str:
    """The table in LaTeX, for the package booktabs; the paper's numbers in gray (xcolor)."""
    columns = len(results.datasets)
    names = " & ".join(rf"\multicolumn{{2}}{{c}}{{{_escape(name)}}}" for name in results.datasets)
    rules = "".join(rf"\cmidrule(lr){{{2 * i + 2}-{2 * i + 3}}}" for i in range(columns))
    lines = [
        rf"\begin{{tabular}}{{l{'rr' * columns}}}",
        r"\toprule",
        rf" & {names} \\",
        rules,
        "Method" + " & EM & LJ" * columns + r" \\",
        r"\midrule",
    ]
    trained = [row.trained for row in results.rows]
    for i, row in enumerate(results.rows):
        if row.trained and i and not trained[i - 1]:
            lines.append(r"\midrule")
        said = []
        for dataset in results.datasets:
            for text in (exact_match(row.cells[dataset]), judge(row.cells[dataset])):
                ours, _, paper = text.partition(" (")
                gray = rf" \textcolor{{gray}}{{({paper}}}" if paper else ""
                said.append(_escape(ours).replace(DASH, "--") + gray)
        lines.append(f"{_escape(row.label)} & {' & '.join(said)} \\\\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _escape(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {char: "\\" + char for char in "&%$#_{}"}
    return "".join(special.get(char, char) for char in text)


def as_json(results: Results) -> str:
    """The table for programs: everything that a cell knows."""
    rows = [asdict(row) for row in results.rows]
    return json.dumps({"datasets": list(results.datasets), "rows": rows}, indent=1) + "\n"


def chart(results: Results, path: Path) -> str:
    """Draw bars, grouped by data set, as the paper's first figure does.

    They are the judge's scores where every cell has one, else exact match.

    Returns:
        What the bars are.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow to import

    cells = [cell for row in results.rows for cell in row.cells.values()]
    judged = all(cell.judged and cell.judged.score is not None for cell in cells)
    what = "LLM-as-a-Judge (%)" if judged else "Exact match (%)"

    def value(cell: Cell) -> float:
        score = cell.judged.score if judged and cell.judged else cell.em
        return score or 0.0

    # The trained models first, then the baselines from the best known to the plainest.
    ordered = [row for row in results.rows[::-1] if row.trained]
    ordered += [row for row in results.rows[::-1] if not row.trained]
    blues, grays = iter(BLUES * len(ordered)), iter(GRAYS * len(ordered))
    figure = Figure(figsize=(1.5 + 2.6 * len(results.datasets), 5.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(ordered))
    for i, row in enumerate(ordered):
        places = [at + (i - (len(ordered) - 1) / 2) * width for at in range(len(results.datasets))]
        heights = [value(row.cells[dataset]) for dataset in results.datasets]
        bars = axes.bar(
            places, heights, 0.9 * width, label=row.label,
            color=next(blues) if row.trained else next(grays),
        )  # fmt: skip
        weight = "bold" if row.trained else "normal"
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8, weight=weight)
    axes.set_xticks(range(len(results.datasets)), list(results.datasets), fontsize=12)
    axes.set_ylabel(what, fontsize=13)
    axes.margins(y=0.2)
    axes.grid(axis="y", color="#cccccc")
    axes.set_axisbelow(True)
    axes.legend(ncols=2, fontsize=9)
    figure.savefig(path, dpi=150)
    return what
