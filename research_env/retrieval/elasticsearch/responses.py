"""What Elasticsearch answers to ``_msearch``: each response judged alone, its hits read.

The answer is decoded straight into passages, without the dictionaries that it would be as JSON:
half the time for an answer of 64 searches. One that is not as expected is read again as any JSON,
so that a broken response costs no other one its hits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import msgspec

from research_env.errors import RetrievalError
from research_env.retrieval.base import Hit, Passage
from research_env.retrieval.elasticsearch.client import Again, Place, kind_of, refusal
from research_env.retrieval.reading import read_json
from research_env.retrieval.retry import AGAIN
from research_env.retrieval.url import words_only

Answer = list[Hit] | RetrievalError
Document = TypeVar("Document")

_NO_RESULT = (msgspec.DecodeError, ValueError, RecursionError)


class _Sort(msgspec.Struct, array_like=True, gc=False):
    """By what hits are sorted; behind the score comes the row, which is not read."""

    score: float


class _Ours(msgspec.Struct, gc=False):
    """A document of an index that research-env made."""

    passage: Passage = msgspec.field(name="_source")
    sort: _Sort


class _Theirs(msgspec.Struct, gc=False):
    """A document of an index of the user's own."""

    id: str = msgspec.field(name="_id")
    score: float = msgspec.field(name="_score")
    source: Any = msgspec.field(name="_source", default_factory=dict)


class _Shards(msgspec.Struct, gc=False):
    failed: int


class _Hits(msgspec.Struct, Generic[Document], gc=False):
    hits: list[Document]


class _Response(msgspec.Struct, Generic[Document], gc=False):
    """The answer to one search; ``error`` in place of the rest where the status is not 200."""

    status: int
    timed_out: bool | None = None
    shards: _Shards | None = msgspec.field(name="_shards", default=None)
    hits: _Hits[Document] | None = None
    error: Any = None


class _Whole(msgspec.Struct, Generic[Document], gc=False):
    responses: list[_Response[Document]]


@dataclass(frozen=True, slots=True)
class Fields:
    """Where in the documents of an index of the user's own the texts and titles stand.

    Attributes:
        named: what the user calls the field of the texts.
        text: where they stand, in objects by dots.
        title: where titles stand, None where there are none.
    """

    named: str
    text: str
    title: str | None


_OURS = msgspec.json.Decoder(_Whole[_Ours])
_THEIRS = msgspec.json.Decoder(_Whole[_Theirs])


def read_answers(body: bytes, place: Place, fields: Fields | None) -> list[Answer | Again]:
    """What became of each search of a request.

    Args:
        body: of the answer.
        place: that was asked.
        fields: None for an index that research-env made.

    Returns:
        One entry a response: its hits, an error, or that it may be asked again.

    Raises:
        ValueError: the body is not an answer to several searches.
    """
    if fields is None:
        return _read(body, place, _OURS, _our_hits)
    return _read(body, place, _THEIRS, partial(_their_hits, place, fields))


def _read(
    body: bytes,
    place: Place,
    decoder: msgspec.json.Decoder[_Whole[Document]],
    hits: Callable[[list[Document]], list[Hit]],
) -> list[Answer | Again]:
    try:
        return [_judge(response, place, hits) for response in decoder.decode(body).responses]
    except _NO_RESULT:
        answer = read_json(body)
    responses = answer.get("responses") if isinstance(answer, dict) else None
    if not isinstance(responses, list):
        raise ValueError("an answer without responses")
    judged: list[Answer | Again] = []
    for each in responses:
        try:
            alone = words_only(json.dumps({"responses": [each]}, ensure_ascii=False))
            [response] = decoder.decode(alone).responses
            judged.append(_judge(response, place, hits))
        except _NO_RESULT:
            judged.append(Again("an answer that is not a search result"))
    return judged


def _judge(
    response: _Response[Document], place: Place, hits: Callable[[list[Document]], list[Hit]]
) -> Answer | Again:
    """What became of a search.

    Raises:
        ValueError: its response is no search result.
    """
    if response.status != 200:
        kind = kind_of(response.error)
        if response.status in AGAIN:
            return Again(f"status {response.status} {kind} for this search")
        return RetrievalError(refusal(place, response.status, kind))
    if response.timed_out is None or response.shards is None or response.hits is None:
        raise ValueError("a response without hits")
    if response.timed_out or response.shards.failed:
        return Again("an answer of some shards only")
    try:
        return hits(response.hits.hits)
    except RetrievalError as error:
        return error


def _our_hits(documents: list[_Ours]) -> list[Hit]:
    return [Hit(document.passage, document.sort.score) for document in documents]


def _their_hits(place: Place, fields: Fields, documents: list[_Theirs]) -> list[Hit]:
    return [_their_hit(place, fields, document) for document in documents]


def _their_hit(place: Place, fields: Fields, document: _Theirs) -> Hit:
    id_ = words_only(document.id)
    title = _at(document.source, fields.title) if fields.title else ""
    text = _at(document.source, fields.text)
    if text is None:  # an empty passage would look like evidence of nothing
        raise RetrievalError(
            f"the document {id_!r:.100} of {place} has no field {fields.named!r} in its _source, "
            "from which texts are read"
        )
    return Hit(Passage(id_, title or "", text), document.score)


def _at(source: Any, field: str) -> str | None:
    """A field of a document, in objects by dots; texts of a list are joined; None: it lacks it."""
    if isinstance(source, list):
        found = [_at(each, field) for each in source]
        return "\n".join(filter(None, found)) if any(each is not None for each in found) else None
    if not isinstance(source, dict):
        return None
    for _, rest, value in below(source, field):
        text = _at(value, rest) if rest else _text(value)
        if text is not None:
            return text
    return None


def below(names: dict[str, Any], field: str) -> Iterator[tuple[str, str, Any]]:
    """What a field's name may begin with: that name, the rest of the field's, what it names."""
    for name, value in names.items():
        if name == field or field.startswith(f"{name}."):
            yield name, field[len(name) + 1 :], value


def _text(value: Any) -> str:
    """A value as text; Elasticsearch takes null and a list as no text, and as many."""
    if isinstance(value, list):
        return "\n".join(filter(None, map(_text, value)))
    return "" if value is None else words_only(str(value))
