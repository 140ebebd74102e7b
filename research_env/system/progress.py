"""A progress bar for long work in a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(
    label: str, total: float | None, *, counted: bool = True
) -> Iterator[Callable[[float, str], None]]:
    """Show how much is done and how long the rest will take; nothing if there is no terminal.

    Args:
        label: the text in front of the bar.
        total: the amount of work, in any unit; None if it is not known.
        counted: whether to show done and total as numbers, too.

    Yields:
        A function that takes the amount that is done, and a text to show behind the bar.
    """
    if not sys.stderr.isatty():
        yield lambda done, told: None
        return
    from rich.console import Console  # noqa: PLC0415  (only in a terminal)
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *((MofNCompleteColumn(),) if counted else ()),
        TextColumn("{task.fields[told]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total, told="")
        yield lambda done, told: bar.update(task, completed=done, told=told)
