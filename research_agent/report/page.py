"""The page: the same tasks before and after training, side by side, every text by who wrote it."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Of policies that think aloud; the tag is the one that reasoning models use.
_THOUGHT = re.compile(r"(<think>.*?(?:</think>|\Z))", re.DOTALL)
_CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_SHOWN_INFO = 400  # characters of one of the environment's words about an episode


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of text and who wrote it: prompt, thought, action or observation."""

    author: str
    text: str


@dataclass(frozen=True, slots=True)
class Shown:
    """An episode as the page shows it."""

    reward: float
    stop_reason: str
    metrics: Mapping[str, float]
    words: Mapping[str, str]  # what else the environment said
    spans: Sequence[Span]


@dataclass(frozen=True, slots=True)
class Pair:
    """A task, before and after."""

    episode: int
    before: Shown | None
    after: Shown | None

    @property
    def change(self) -> float:
        """By how much the reward rose."""
        return self.after.reward - self.before.reward if self.before and self.after else 0.0


def spans(segments: Sequence[Mapping[str, Any]]) -> Iterator[Span]:
    """Texts of an episode in order; the thoughts in an action stand apart.

    Args:
        segments: records with ``provenance`` and ``text``.
    """
    for segment in segments:
        author, text = str(segment["provenance"]), str(segment["text"])
        if author != "action":
            yield Span(author, text)
            continue
        for piece in filter(None, _THOUGHT.split(text)):
            yield Span("thought" if piece.startswith("<think>") else "action", piece)


def readable(text: str) -> str:
    """Text that a page can hold: control characters as pictures, lone surrogates escaped."""
    return text.translate(_CONTROL).encode("utf-8", "backslashreplace").decode("utf-8")


def pairs(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], limit: int
) -> list[Pair]:
    """Match episodes by their number, those with the greatest change first.

    Args:
        before: records of a predictions.jsonl.
        after: the same of the trained policy; may be empty.
        limit: number of pairs.
    """
    first = {int(r["episode"]): _shown(r) for r in reversed(before)}
    second = {int(r["episode"]): _shown(r) for r in reversed(after)}
    numbers = sorted(first.keys() & second.keys() or first.keys() | second.keys())
    matched = [Pair(number, first.get(number), second.get(number)) for number in numbers]
    return sorted(matched, key=lambda pair: -pair.change)[:limit]


def _shown(record: Mapping[str, Any]) -> Shown:
    info = record.get("info") or {}
    words = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in info.items()
        if value not in (None, "", [], {})
    }
    return Shown(
        reward=float(record["reward"]),
        stop_reason=str(record.get("stop_reason", "")),
        metrics=record.get("metrics") or {},
        words={key: text[:_SHOWN_INFO] for key, text in words.items()},
        spans=list(spans(record["segments"])),
    )


def render(
    *,
    title: str,
    shown: Sequence[Pair],
    before: Mapping[str, float],
    after: Mapping[str, float],
    config: Mapping[str, Any],
    picture: Path | None = None,
) -> str:
    """Make the page, with everything that it needs inside.

    Args:
        title: of the page.
        shown: episodes before and after.
        before: averages of the evaluation before training.
        after: and after.
        config: of the run, flat.
        picture: a PNG to show on top.

    Returns:
        HTML that loads nothing from elsewhere and runs no script.
    """
    import jinja2  # noqa: PLC0415  (only the report needs it)

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: readable(value) if isinstance(value, str) else value,
    )
    encoded = base64.b64encode(picture.read_bytes()).decode() if picture else ""
    return environment.get_template("page.html.j2").render(
        title=title,
        pairs=shown,
        names=sorted(before.keys() | after.keys()),
        before=before,
        after=after,
        config=config,
        picture=encoded,
    )
