"""The formats of the files that this package reads back, each with its one schema.

A file may come from a stranger, from another version, or from a damaged disk. Text that does not
fit raises a typed error that names the file, the line, the place in it, and what to do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec

from research_agent.errors import ResearchAgentError

LONGEST_LINE = 64 << 20
"""The most bytes of a line that are read."""
_LARGEST_FILE = 1 << 30
_DEEPEST = 64  # levels of nested objects and lists

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Size = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
Number = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]


class SegmentFormat(TypedDict):
    """A segment of an episode: who wrote it, and what it says."""

    provenance: str
    text: str
    tokens: Count
    info: NotRequired[dict[str, Any]]
    reward: NotRequired[float]
    pieces: NotRequired[list[str]]
    logprobs: NotRequired[list[float | None]]
    messages: NotRequired[list[dict[str, Any]]]
    tools: NotRequired[list[dict[str, Any]]]
    chat_markup: NotRequired[list[str]]
    end: NotRequired[str]


class ContentFormat(TypedDict):
    """A part of a demonstration that is more than its text or messages."""

    text: NotRequired[str]
    messages: NotRequired[list[dict[str, Any]]]
    tools: NotRequired[list[dict[str, Any]]]
    chat_markup: NotRequired[list[str]]
    end: NotRequired[str]


class InfoFormat(TypedDict):
    """The last info of the environment. Other entries may hold anything."""

    strata: NotRequired[dict[str, Any] | None]


class EpisodeFormat(TypedDict):
    """A line of ``predictions.jsonl`` after its header."""

    episode: Count
    sample: Count
    reward: float
    void: bool
    truncated: NotRequired[bool]
    metrics: dict[str, float | None]  # None: not finite
    segments: list[SegmentFormat]
    info: InfoFormat


class HeaderFormat(TypedDict):
    """What an evaluation was made with."""

    environment: NotRequired[dict[str, Any]]
    settings: NotRequired[dict[str, Any]]


class HeaderLineFormat(TypedDict):
    """The first line of ``predictions.jsonl``."""

    header: HeaderFormat


class StepFormat(TypedDict):
    """A line of a log of a run: ``trajectories.jsonl``, ``changes.jsonl``."""

    step: Count


class CheckpointFormat(TypedDict):
    """``state.json`` of a checkpoint; its tensors are in ``state/``."""

    version: int
    step: Count
    config: dict[str, Any]
    state: Any


class PolicyFormat(TypedDict):
    """The part of a saved configuration that is used, and not only compared."""

    chat_template_date: NotRequired[str | None]


class RunFormat(TypedDict):
    """A saved configuration."""

    policy: PolicyFormat


class StateFormat(TypedDict):
    """The state of a training run in a checkpoint, its tensors in their places."""

    seconds: float
    origin: str
    learner: Any
    random: Any
    environment: dict[str, str]
    rewards: NotRequired[list[Any]]
    stage: NotRequired[dict[str, Any]]
    in_flight: list[dict[str, Any]]


class DecoderFormat(TypedDict):
    """The sizes in a model's ``config.json``."""

    num_hidden_layers: Size
    hidden_size: Size
    num_attention_heads: Size
    num_key_value_heads: NotRequired[Size | None]
    head_dim: NotRequired[Size | None]
    intermediate_size: Size
    vocab_size: Size
    max_position_embeddings: NotRequired[Size | None]


NumbersFormat = dict[str, Number | None]
"""A line of ``metrics.jsonl`` or ``timings.jsonl``."""
ObjectFormat = dict[str, Any]
"""``config.json``, and any other JSON object."""


def parse(text: bytes, schema: Any, where: str, error: type[ResearchAgentError], cure: str) -> Any:
    """Read a JSON value, and check that it fits a schema.

    Args:
        text: JSON in UTF-8.
        schema: one of this module's formats.
        where: file and line, for the message.
        error: class of the error to raise.
        cure: what to do about text that does not fit, for the message.

    Returns:
        The value as ``json.loads`` gives it.

    Raises:
        ResearchAgentError: an error of the class ``error``: the text is no JSON or does not fit.
    """
    try:
        value = json.loads(text, parse_int=_integer)
        if isinstance(value, dict | list):
            _require_shallow(value)
        require(value, schema)
    except (ValueError, RecursionError) as problem:
        reason = "it is nested too deeply" if isinstance(problem, RecursionError) else problem
        raise error(f"{where}: {reason}; {cure}") from problem
    return value


def require(value: Any, schema: Any) -> None:
    """Check that plain values fit a schema.

    Raises:
        ValueError: they do not; the message names the place.
    """
    try:
        msgspec.convert(value, schema)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error


def read_object(
    path: Path, error: type[ResearchAgentError], cure: str, schema: Any = ObjectFormat
) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: a regular file.
        error: class of the error to raise.
        cure: what to do about a broken file, for the message.
        schema: one of this module's formats.

    Raises:
        ResearchAgentError: an error of the class ``error``: no such file, or a broken one.
    """
    try:
        if path.exists() and not path.is_file():
            raise error(f"{path} is no regular file; {cure}")
        with path.open("rb") as file:
            text = file.read(_LARGEST_FILE + 1)
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem}; {cure}") from problem
    if len(text) > _LARGEST_FILE:
        raise error(f"{path} has more than {_LARGEST_FILE >> 20} MiB; {cure}")
    found: dict[str, Any] = parse(text, schema, str(path), error, cure)
    return found


def finite(value: Any) -> Any:
    """Replace numbers that are not finite by None, because JSON has none."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {key: finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [finite(inner) for inner in value]
        case _:
            return value


def _integer(text: str) -> int:
    """Read a whole number; one larger than any float would overflow when they are compared."""
    if len(text) > 300:
        raise ValueError(f"the number {text[:20]}... is too large")
    return int(text)


def _require_shallow(value: Any) -> None:
    """Refuse nesting that is too deep for later code, which is recursive."""
    level = [value]
    for _ in range(_DEEPEST):
        insides = [list(each.values()) if isinstance(each, dict) else each for each in level]
        level = [inner for each in insides for inner in each if isinstance(inner, dict | list)]
        if not level:
            return
    raise ValueError(f"it is nested more than {_DEEPEST} deep")
