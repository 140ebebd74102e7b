"""A bar for long work, where somebody looks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(
    label: str, total: float | None, *, counted: bool = True
) -> Iterator[Callable[[float, str], None]]:
    """Show how far a work is, and how long it will take; nothing where there is no terminal.

    Args:
        label: in front of the bar.
        total: what is complete; None: not known.
        counted: say how many of how many, not the bar alone.

    Yields:
        A function that takes what is done of ``total``, and what else to tell.
    """
    if not sys.stderr.isatty():
        yield lambda done, told: None
        return
    from rich.console import Console  # noqa: PLC0415  (only where somebody looks)
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
