"""The info that ``reset`` and ``step`` return, of one environment and of many."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

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


def batch_infos(infos: Mapping[int, Mapping[str, Any]], num_envs: int) -> dict[str, Any]:
    """Merge the infos of sub-environments into one, in Gymnasium's format.

    The result is that of ``VectorEnv._add_info`` for one info after the other, in a quarter of its
    time.

    Args:
        infos: by the number of the sub-environment, from 0.
        num_envs: how many sub-environments there are.

    Returns:
        For each key an array of num_envs values, zero or None where a sub-environment lacks the
        key, and under ``_key`` num_envs booleans: which ones have it. Dictionaries are merged in
        the same way.
    """
    columns: defaultdict[str, dict[int, Any]] = defaultdict(dict)
    for i, info in infos.items():
        for key, value in info.items():
            columns[key][i] = value
    batched: dict[str, Any] = {}
    for key, column in columns.items():
        mask = np.zeros(num_envs, dtype=np.bool_)
        mask[list(column)] = True
        batched[key], batched[f"_{key}"] = _array(column, num_envs), mask
    return batched


def _array(column: Mapping[int, Any], num_envs: int) -> Any:
    """The values of a key as an array with the type of the first."""
    first = next(iter(column.values()))
    if isinstance(first, dict):
        return batch_infos(column, num_envs)
    array: npt.NDArray[Any]
    if type(first) in (int, float, bool) or isinstance(first, np.number):
        array = np.zeros(num_envs, dtype=type(first))
    elif isinstance(first, np.ndarray):
        array = np.zeros((num_envs, *first.shape), dtype=first.dtype)
    else:
        array = np.full(num_envs, None, dtype=object)
    for i, value in column.items():
        array[i] = value
    return array
