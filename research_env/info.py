"""The info that ``reset`` and ``step`` return beside an observation."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

from research_env.datasets.base import Question
from research_env.episode import Episode

SHOWS = {
    "request": "query",
    "requests": "searches",
    "ids": "passage_ids",
    "titles": "passage_titles",
    "scores": "passage_scores",
    "marked": "supporting_ids",
    "item": "passage",
    "mark": "gold",
}
"""``metadata["shows"]`` of the environments: which keys of the info describe an observation, and
what its parts are called, so that a trainer's report shows passages without knowing of any."""


def make_info(episode: Episode, messages: list[dict[str, str]]) -> dict[str, Any]:
    """The info of an episode that goes on; the keys that the end fills in are empty.

    Keys and types never vary, so that the infos of many environments batch into arrays.

    Args:
        episode: after ``reset`` or a turn.
        messages: what the observation is as chat messages.
    """
    turn = episode.turns[-1] if episode.turns else None
    hits = turn.hits if turn else ()
    tool_format = episode.protocol.tool_format
    return {
        "question_id": episode.question.id,
        "question": episode.question.question,
        "messages": messages,
        "tools": [],
        "chat_markup": tool_format.markup if turn and turn.observation and tool_format else (),
        "query": (turn.query or "") if turn else "",
        "passage_ids": tuple([hit.passage.id for hit in hits]),
        "passage_titles": tuple([hit.passage.title for hit in hits]),
        "passage_scores": tuple([hit.score for hit in hits]),
        "state_key": _state_key(episode),
        "prediction": "",
        "answers": (),
        "supporting_ids": (),
        "strata": strata(episode.question),
        "metrics": {},
        "stop_reason": "",
        "void": False,
    }


def strata(question: Question) -> dict[str, str]:
    """The groups by which evaluations report means; "" where a value is not known."""
    return {"hops": str(question.hops or ""), "type": question.type or ""}


def _state_key(episode: Episode) -> str:
    """Equal where two samples of a question have found the same passages; "" at the end."""
    if episode.over:
        return ""
    found = frozenset([hit.passage.id for turn in episode.turns for hit in turn.hits])
    return _key_of_found(episode.question.id, found)


@lru_cache(maxsize=4096)  # the samples of a group often find the same passages
def _key_of_found(question_id: str, passage_ids: frozenset[str]) -> str:
    text = "\0".join([question_id, *sorted(passage_ids)])
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
