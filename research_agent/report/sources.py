"""Read what a report shows: logs of training runs, and files of predictions."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from research_agent.errors import ConfigError
from research_agent.evaluation.predictions import PREDICTIONS, read_predictions
from research_agent.formats import read_object
from research_agent.run_logger import METRICS, read_lines

CONFIG, SUMMARY = "config.json", "summary.json"
_MUTE = ("/", "evaluations", "predictions")  # parts of a path that a name leaves out


@dataclass(frozen=True, slots=True)
class Training:
    """The log of a training run."""

    path: Path  # its folder
    log: Sequence[Mapping[str, Any]]  # records of metrics.jsonl
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Predictions:
    """An evaluation, finished or not."""

    path: Path
    header: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Sources:
    """Everything that was read, in the order of the command line."""

    trainings: list[Training] = field(default_factory=list)
    predictions: list[Predictions] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # warnings about the input


def read(paths: Sequence[Path]) -> Sources:
    """Read training runs, folders of evaluations, and files of predictions.

    A training run comes with its first and its last finished evaluation. A path that is given twice
    is read once.

    Raises:
        ConfigError: a path is none of these.
        PredictionsError: a file of predictions cannot be read.
    """
    sources = Sources()
    seen: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise ConfigError(f"there is no {path}; give a run, an evaluation or a {PREDICTIONS}")
        if path.is_file():
            found = [path]
        else:
            log = read_lines(path / METRICS)
            if log and path.resolve() not in seen:
                sources.trainings.append(Training(path, log, _json(path / CONFIG)))
            seen.add(path.resolve())
            own = path / PREDICTIONS
            found = [own] if own.is_file() else _first_and_last(path)
            if not log and not found:
                raise ConfigError(
                    f"{path} holds no run and no evaluation: there is no {METRICS} with a record "
                    f"in it, and no {PREDICTIONS}"
                )
        for file in found:
            if file.resolve() not in seen:
                sources.predictions.append(_predictions(file, sources.notes))
            seen.add(file.resolve())
    return sources


def names(paths: Sequence[Path]) -> list[str]:
    """Short names for files and folders: the shortest ends of their paths that differ.

    >>> names([Path("a/evaluations/step-1/predictions.jsonl"), Path("b/step-1/predictions.jsonl")])
    ['a/step-1', 'b/step-1']
    """
    parts = [
        [p for p in Path(str(path.resolve()).removesuffix(".jsonl")).parts if p not in _MUTE]
        for path in paths
    ]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        ends = ["/".join(inner[-depth:]) for inner in parts]
        if len(set(ends)) == len(ends):
            return ends
    return [str(path) for path in paths]


def _first_and_last(run: Path) -> list[Path]:
    ends = sorted((run / "evaluations").glob(f"step-*/{SUMMARY}"))  # written when one is finished
    files = [file for end in ends if (file := end.with_name(PREDICTIONS)).is_file()]
    return files[:1] + files[1:][-1:]


def _predictions(file: Path, notes: list[str]) -> Predictions:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        header, records = read_predictions(file)
    notes += [str(warning.message) for warning in caught]
    if not records:
        raise ConfigError(f"{file} holds no prediction; is it a {PREDICTIONS}, and begun?")
    return Predictions(file, header, records)


def _json(path: Path) -> dict[str, Any]:
    return read_object(path, ConfigError, "remove it or mend it") if path.exists() else {}
