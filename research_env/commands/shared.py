"""Helpers of several commands of ``research-env``."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research_env.errors import ConfigurationError
from research_env.system.terminal import printable, show

if TYPE_CHECKING:
    from research_env.datasets import Corpus


_WORDS = {"none": None, "null": None, "true": True, "false": False}


def named_corpus(dataset: str | None, path: Path | None) -> Corpus:
    """The passages of a data set or of a file; exactly one must be given."""
    from research_env.datasets import FileCorpus, load_dataset  # noqa: PLC0415
    from research_env.datasets.catalog import PUBLISHED  # noqa: PLC0415

    if (dataset is None) == (path is None):
        raise ConfigurationError("give either --dataset NAME or --corpus FILE")
    if path is not None:
        return FileCorpus(path.name, path)
    known = PUBLISHED.get(dataset or "")
    split = next(iter(known.splits)) if known else "train"
    corpus = load_dataset(dataset or "", split=split).corpus
    if corpus is None:
        raise ConfigurationError(f"the data set {dataset!r} has no corpus; give --corpus FILE")
    return corpus


def parse_env_args(pairs: Sequence[str]) -> dict[str, Any]:
    """Read KEY=VALUE pairs as ``research-agent`` does.

    A value that is JSON (3, true, [2, 3]) is parsed, none is None, and others are text.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigurationError(f"--env-args takes KEY=VALUE, not {pair!r}")
        if value.lower() in _WORDS:
            settings[key] = _WORDS[value.lower()]
            continue
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    return settings


class _FirstRecord(logging.Handler):
    """Prints the first record to standard error."""

    shown = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self.shown:
            show(f"research-env: {record.getMessage()}", file=sys.stderr)
        self.shown = True


@contextmanager
def first_retry_shown() -> Iterator[None]:
    """Say on standard error, once, that the command waits for a server."""
    log, handler = logging.getLogger("research_env.retrieval.retry"), _FirstRecord()
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; what looks like markup in its cells is shown as text."""
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(title=Text(printable(title)), title_justify="left")
    for column in columns:
        table.add_column(Text(printable(column)), overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console().print(table)
