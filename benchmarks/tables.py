"""Tables in Markdown: for the terminal, for files, and in pages of the documentation."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, with a line break at its end."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose columns are aligned, all but the first to the right."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    aligned = [
        [f"{cell:{'>' if place else '<'}{widths[place]}}" for place, cell in enumerate(line)]
        for line in (headings, *rows)
    ]
    print(f"\n{title}\n\n{markdown_table(aligned[0], aligned[1:])}", flush=True)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean, lowest and highest of several seeds; empty without any."""
    if not values:
        return ""
    mean, low, high = statistics.fmean(values), min(values), max(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def replace_table(page: Path, table: str) -> None:
    """Put a table into a page, in the place of what stands between its two marks."""
    before, begin, rest = page.read_text(encoding="utf-8").partition("<!-- table -->\n")
    _, end, after = rest.partition("<!-- end -->")
    page.write_text(before + begin + table + end + after, encoding="utf-8")
