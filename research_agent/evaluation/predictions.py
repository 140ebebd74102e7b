"""The file of an evaluation, ``predictions.jsonl``: a header line, then a line per episode.

An episode's record is written the moment it ends, so a killed evaluation can be continued.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from codecs import BOM_UTF8
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from research_agent.config import flatten
from research_agent.errors import PredictionsError
from research_agent.formats import LONGEST_LINE, EpisodeFormat, HeaderLineFormat, finite, parse
from research_agent.system.files import folder_lock
from research_agent.trajectory import Segment, Trajectory

PREDICTIONS = "predictions.jsonl"

_LONGEST_HEADER = 1 << 20  # bytes

Header = dict[str, Any]
Record = dict[str, Any]
Key = tuple[str, int]  # question id (or else episode number), sample
Pieces = Callable[[Sequence[int]], list[str]]  # returns the text of each token on its own
ChatTokens = Callable[[Sequence[int]], Record]  # returns fields of a turn's record
_CURE = "remove it, and evaluate that episode again"
_OTHER_FILE = f"the file is no {PREDICTIONS}: give the folder of the run or evaluation"
_TASK_SETTINGS = frozenset({"env", "env_args", "split"})  # settings that choose the tasks


def as_record(
    trajectory: Trajectory, pieces: Pieces | None = None, chat_tokens: ChatTokens | None = None
) -> Record:
    """A finished trajectory as plain JSON values.

    Args:
        trajectory: the trajectory.
        pieces: returns the text of each token; with it action segments have ``pieces`` and
            ``logprobs`` (the sampler's, to 4 digits; None if unknown), one per token.
        chat_tokens: returns the fields ``end`` and ``chat_markup`` of an action segment; see
            ``evaluate``.

    Returns:
        The trajectory's fields. The last ``info`` is without ``metrics``, which are a field of the
        record; their numbers are None where they are not finite. Of the segments only observations
        have ``info``, without empty values and values that came with the prompt already (such as
        the question). The prompt has its chat ``messages``, unless they are its text as one user
        message, and the ``tools``, if any.
    """
    first = _plain(trajectory.segments[0].info) if trajectory.segments else {}
    return {
        "episode": trajectory.episode,
        "sample": trajectory.sample,
        "reward": trajectory.reward,
        "terminated": trajectory.terminated,
        "truncated": trajectory.truncated,
        "stop_reason": trajectory.stop_reason,
        "void": trajectory.void,
        "metrics": finite(trajectory.metrics),
        "segments": [
            _segment(segment, first, pieces, chat_tokens) for segment in trajectory.segments
        ],
        "info": {k: _plain(v) for k, v in trajectory.info.items() if k != "metrics"},
    }


def record_key(record: Mapping[str, Any]) -> Key:
    """The question and sample number of a record; no two records have the same."""
    question = record["info"].get("question_id")
    named = question not in (None, "")
    return str(question if named else record["episode"]), int(record["sample"])


def read_predictions(path: str | Path) -> tuple[Header, list[Record]]:
    """Read the header and records of an evaluation.

    Args:
        path: a ``predictions.jsonl``, or the folder that holds one.

    Returns:
        The header (empty if the file has none) and the records, in the order of the file. An
        incomplete last line is left out, with a warning.

    Raises:
        PredictionsError: there is no such file, a line is no record, or two records are of the
            same sample.
    """
    path = Path(path)
    path = path / PREDICTIONS if path.is_dir() else path
    header: Header = {}
    records: list[Record] = []
    for number, _, value in _lines(path):
        if value is None:
            warnings.warn(f"{path}:{number}: the last line is cut short; left out", stacklevel=2)
        elif "header" in value:
            header = header or dict(value["header"])
        else:
            records.append(value)
    return header, records


def read_header(folder: Path) -> Header:
    """The header of the predictions in a folder; empty if there is none."""
    try:
        with (folder / PREDICTIONS).open("rb") as file:
            first = file.readline(_LONGEST_HEADER)
        return dict(_value(first, PREDICTIONS).get("header", {}))
    except (OSError, PredictionsError):
        return {}


@contextmanager
def open_predictions(
    folder: Path, header: Header, wanted: Collection[tuple[int, int]], *, resume: bool
) -> Iterator[tuple[list[Record], Callable[[Record], None]]]:
    """Open a folder's predictions for appending, and keep other processes out.

    Args:
        folder: folder to write to; created if it is missing.
        header: what the episodes depend on; see ``fingerprint.header``.
        wanted: (episode, sample) of every episode of this evaluation.
        resume: continue a file with the same header: its records stay, except void ones and an
            incomplete last line, whose episodes must be played again. If only ``versions``,
            ``shows``, names or places differ, a second header is written between the old records
            and the new ones. False: begin a new file.

    Yields:
        The records that are kept, and a function that writes a record at once.

    Raises:
        FolderInUseError: another process writes to the folder.
        PredictionsError: the file belongs to another evaluation, or is broken. The function raises
            it for a second record of the same question and sample, and for one that could not be
            read again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PREDICTIONS
    with folder_lock(folder):
        kept = _resume(path, header, wanted) if resume else []
        with path.open("a" if resume else "w", encoding="utf-8") as file:
            if header and not resume:
                file.write(json.dumps({"header": header}) + "\n")

            written = {record_key(record) for record in kept}

            def append(record: Record) -> None:
                if (key := record_key(record)) in written:
                    raise PredictionsError(
                        f"episode {record['episode']} has the question_id {key[0]!r} of an earlier "
                        "one, and nothing could tell their records apart; let the environment give "
                        "each task its own id, or give a --limit (an --eval-limit, in training) at "
                        "which no task comes again"
                    )
                line = _record_line(record)
                written.add(key)
                file.write(line + "\n")
                file.flush()

            yield kept, append


def _record_line(record: Record) -> str:
    """Write a record as JSON, and check that it can be read again.

    Raises:
        PredictionsError: it cannot; the message names the episode.
    """
    where = f"episode {record['episode']}, sample {record['sample']}, cannot be recorded"
    cure = "mend what the environment returns"
    rewards = [record["reward"], *(each.get("reward", 0.0) for each in record["segments"])]
    if wrong := [reward for reward in rewards if not math.isfinite(reward)]:
        if not record["void"]:
            raise PredictionsError(f"{where}: its reward is {wrong[0]}; {cure}")
        segments = [
            each | {"reward": 0.0} if "reward" in each else each for each in record["segments"]
        ]
        record = {**record, "reward": 0.0, "segments": segments}  # nothing is concluded from them
    try:
        line = json.dumps(record, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise PredictionsError(f"{where}: {error}; {cure}") from error
    parse(line.encode(), EpisodeFormat, where, PredictionsError, cure)
    return line


def _resume(path: Path, header: Header, wanted: Collection[tuple[int, int]]) -> list[Record]:
    """Rewrite a file atomically, without what must be played again; returns the kept records."""
    kept: list[Record] = []
    last: Header | None = None
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            for number, line, value in _lines(path) if path.exists() else ():
                if value is None or value.get("void"):
                    continue
                if "header" in value:
                    last = value["header"]
                    _require_same(last, header, path)
                elif last is None:
                    raise PredictionsError(
                        f"{path} does not say what it was made with; give another --output"
                    )
                elif (value["episode"], value["sample"]) not in wanted:
                    raise PredictionsError(
                        f"{path}:{number} is sample {value['sample']} of episode "
                        f"{value['episode']}, which this evaluation would not play; give the "
                        "--limit and --samples-per-task of before, or more, or another --output"
                    )
                else:
                    kept.append(value)
                file.write(line.rstrip(b"\n") + b"\n")
            if last != header:
                file.write(json.dumps({"header": header}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return kept


def _require_same(before: Header, now: Header, path: Path) -> None:
    """Refuse predictions of another evaluation, and name every setting that differs.

    If both headers have the environment's fingerprints, these decide whether the tasks are the
    same, and not its settings: the same data may lie at another path.
    """
    old, new = _compared(before), _compared(now)
    if old.get("environment") and old["environment"] == new.get("environment"):
        for each in (old, new):
            each["settings"] = {
                key: value
                for key, value in each.get("settings", {}).items()
                if key not in _TASK_SETTINGS
            }
    flat_old, flat_new = dict(flatten(old)), dict(flatten(new))
    differing = [
        f"  {key}: {flat_old.get(key, '(unset)')!r} in the file, "
        f"{flat_new.get(key, '(unset)')!r} now"
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key) != flat_new.get(key)
    ]
    if differing:
        raise PredictionsError(
            f"{path} holds another evaluation:\n"
            + "\n".join(differing)
            + "\nGive another --output, or the same settings and model to continue that one."
        )


def _compared(header: Header) -> Header:
    """The parts of a header that decide whether two evaluations are the same."""
    environment = dict(header.get("environment", {}))
    kept = {key: value for key, value in header.items() if key not in ("versions", "shows")}
    kept["environment"] = {k: v for k, v in environment.items() if not k.startswith("place:")}
    if isinstance(model := header.get("model"), dict):
        kept["model"] = {key: value for key, value in model.items() if key != "name"}
    return kept


def _lines(path: Path) -> Iterator[tuple[int, bytes, Record | None]]:
    """Yield line number, line and value (None: an incomplete last line) of each line."""
    seen: dict[Key, int] = {}
    if path.exists() and not path.is_file():
        raise PredictionsError(f"{path} is no regular file; give a {PREDICTIONS}, or its folder")
    try:
        with path.open("rb") as file:
            lines = iter(lambda: file.readline(LONGEST_LINE), b"")
            for number, line in enumerate(lines, start=1):
                is_other_file = number == 1 and path.name != PREDICTIONS  # such as metrics.jsonl
                try:
                    value = _value(
                        line, f"{path}:{number}", _OTHER_FILE if is_other_file else _CURE
                    )
                except PredictionsError:
                    if line.endswith(b"\n"):  # written last, so the line is complete
                        raise
                    value = None
                if value is not None and "header" not in value:
                    key = record_key(value)
                    if (first := seen.setdefault(key, number)) != number:
                        raise PredictionsError(
                            f"{path}:{number}: sample {key[1]} of question {key[0]} stands on line "
                            f"{first} already; remove one of the lines"
                        )
                yield number, line, value
    except (FileNotFoundError, NotADirectoryError) as error:
        raise PredictionsError(
            f"there is no file {path}; give a {PREDICTIONS} of an evaluation, or its folder"
        ) from error


def _value(line: bytes, where: str, cure: str = _CURE) -> Record:
    """Parse and check a line: a header, or a record."""
    is_header = line.removeprefix(BOM_UTF8).lstrip().startswith(b'{"header"')
    schema = HeaderLineFormat if is_header else EpisodeFormat
    problem = f"{where}: this line is no record of an episode"
    return dict(parse(line, schema, problem, PredictionsError, cure))


def _segment(
    segment: Segment,
    first: Mapping[str, Any],
    pieces: Pieces | None,
    chat_tokens: ChatTokens | None,
) -> Record:
    record: Record = {
        "provenance": segment.provenance,
        "text": segment.text,
        "tokens": len(segment.tokens),
    }
    if segment.provenance == "prompt":  # a chat template renders messages and tools, not the text
        messages, tools = _plain(segment.info.get("messages")), _plain(segment.info.get("tools"))
        if messages and messages != [{"role": "user", "content": segment.text}]:
            record["messages"] = messages
        if tools:
            record["tools"] = tools
    if segment.provenance == "observation":
        info = {k: _plain(v) for k, v in segment.info.items()}
        record["info"] = {
            k: v
            for k, v in info.items()
            if not _is_empty(v) and (k == "chat_markup" or first.get(k) != v)
        }
    if segment.provenance == "action":
        record["reward"] = segment.reward
        record |= chat_tokens(segment.tokens) if chat_tokens else {}
    if segment.provenance == "action" and pieces is not None:
        record["pieces"] = pieces(segment.tokens)
        record["logprobs"] = [  # NaN means unknown, and JSON has no NaN
            round(float(value), 4) if math.isfinite(value) else None
            for value in segment.logprobs or ()
        ]
    return record


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _plain(value: Any) -> Any:
    """Convert a value of an info to JSON types."""
    match value:
        case None | bool() | int() | float() | str():
            return finite(value)
        case np.floating():  # tolist() of a long double is a long double again
            return finite(float(value))
        case np.generic() | np.ndarray() if not isinstance(value, np.complexfloating):
            return _plain(value.tolist())
        case Mapping():
            return {str(k): _plain(v) for k, v in value.items()}
        case list() | tuple():
            return [_plain(v) for v in value]
        case _:
            return str(value)
