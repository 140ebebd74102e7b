"""Read what a judge needs from a file of predictions (``predictions.jsonl``)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from research_env.errors import DataError

LONGEST_LINE = 256 << 20
"""Most bytes of a line; a longer one is refused before it is read whole."""

EpisodeKey = tuple[str | int, int]
"""An episode: its question's id, or the episode's number if it has none; and its sample."""


@dataclass(frozen=True, slots=True)
class JudgedEpisode:
    """What a judge needs of one line of a prediction file.

    Attributes:
        key: identifies the episode.
        void: whether the infrastructure failed; such an episode does not count.
        question: the question.
        answers: the gold answers.
        prediction: the policy's answer; blank if there is none.
    """

    key: EpisodeKey
    void: bool
    question: str
    answers: tuple[str, ...]
    prediction: str

    @property
    def needs_judge(self) -> bool:
        """Whether a judge is asked: the episode is not void, and there is a prediction."""
        return not self.void and bool(self.prediction.strip())


class _Info(msgspec.Struct):
    question_id: str | int | None = None
    question: str | None = None
    answers: list[str] | None = None
    prediction: str | None = None
    void: bool | None = None


class _Line(msgspec.Struct):
    info: _Info
    episode: int | None = None
    sample: int = 0
    void: bool | None = None


def read_predictions(path: Path) -> tuple[list[JudgedEpisode], list[str]]:
    """Read a prediction file.

    Returns:
        The episodes, and warnings: a last line that is cut is left out.

    Raises:
        DataError: no such file, a line that is not an episode, or an episode that comes twice.
            The message names file and line.
    """
    if not path.is_file():
        raise DataError(f"there is no prediction file {path}; an evaluation writes one")
    episodes: list[JudgedEpisode] = []
    warnings: list[str] = []
    lines: dict[EpisodeKey, int] = {}
    broken: tuple[int, str] | None = None
    for number, line in _bounded_lines(path):
        if not line.strip():
            continue
        if broken:
            raise DataError(f"{path}:{broken[0]}: no JSON ({broken[1]}); repair or remove the line")
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            broken = number, str(error)
            continue
        if isinstance(record, dict) and "header" in record:
            continue
        episode = _read_episode(record, f"{path}:{number}")
        first = lines.setdefault(episode.key, number)
        if first != number:
            raise DataError(
                f"{path}: lines {first} and {number} are both sample {episode.key[1]} of "
                f"{episode.key[0]!r}; remove one of them"
            )
        episodes.append(episode)
    if broken:
        warnings.append(f"{path}:{broken[0]}: the last line is cut, and is left out")
    if not episodes:
        raise DataError(f"{path} holds no episode")
    return episodes, warnings


def _bounded_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE):
            number += 1
            if len(line) == LONGEST_LINE:
                raise DataError(
                    f"{path}:{number}: a line of over {LONGEST_LINE >> 20} MB; is it a prediction "
                    "file?"
                )
            yield number, line


def _read_episode(record: Any, where: str) -> JudgedEpisode:
    try:
        line = msgspec.convert(record, _Line)
    except (msgspec.ValidationError, RecursionError) as error:
        raise DataError(f"{where}: no episode of a prediction file: {error}") from None
    info = line.info
    key = str(info.question_id) if info.question_id not in (None, "") else line.episode
    if key is None:
        raise DataError(f"{where}: an episode needs a question_id in 'info', or a number 'episode'")
    episode = JudgedEpisode(
        (key, line.sample),
        bool(line.void or info.void),
        info.question or "",
        tuple(info.answers or ()),
        info.prediction or "",
    )
    if not episode.needs_judge:
        return episode
    if not episode.question.strip():
        raise DataError(f"{where}: the question of {key!r} is missing; a judge needs it")
    if not episode.answers:
        raise DataError(
            f"{where}: the question {key!r} has no gold answers; a judge has nothing to compare "
            "with"
        )
    return episode
