"""Read whole documents of an index: which queries find them, and how their passages go together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from research_env.errors import ConfigurationError, RetrievalError
from research_env.retrieval.base import Passage
from research_env.retrieval.documents import MAX_PASSAGES, Document, chunk_of
from research_env.retrieval.elasticsearch.fields import find_field
from research_env.retrieval.elasticsearch.responses import Answer

Body = dict[str, Any]
Search = Callable[[Sequence[Body]], Sequence[Answer]]
"""Answers queries in the words of Elasticsearch, with the passages in the order of the corpus."""

EXACT = "exact"
"""Name of the field below the title that holds whole titles, in lower case."""

MAX_READ = 2 * MAX_PASSAGES + 1
"""Most passages of a document."""


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """How documents of an index are found.

    Attributes:
        own: whether research-env made the index, so that ids are in the field ``id``; else they are
            the server's own, ``_id``.
        title: the field of whole titles; None: documents are found by id alone.
    """

    own: bool
    title: str | None

    def by_id(self, name: str) -> Body:
        """Finds a passage by its id."""
        return {"term": {"id": name}} if self.own else {"ids": {"values": [name]}}

    def by_title(self, title: str) -> Body:
        """Finds passages by their whole title, in lower case where research-env made the index."""
        if self.title is None or not title.strip():
            return {"match_none": {}}
        return {"term": {self.title: title.strip()}}

    def chunks(self, passage_id: str) -> Body:
        """Finds the chunks of a passage."""
        return {"prefix": {"id": f"{passage_id}#"}}


def plan_reading(
    mappings: Sequence[Body], title: str | None, address: object, *, own: bool
) -> ReadPlan:
    """Decide how documents are found.

    Args:
        mappings: mappings of each index behind the name.
        title: the user's field of titles; None if there is none, or for an index of research-env.
        address: the index, for messages.
        own: whether research-env made it.

    Raises:
        ConfigurationError: an older version of research-env made it.
    """
    if own:
        fields = mappings[0].get("properties", {})
        if fields.get("id", {}).get("index", True) is False or EXACT not in fields.get(
            "title", {}
        ).get("fields", {}):
            raise ConfigurationError(
                f"the index {address} cannot be read by ids and titles, as an earlier version made "
                "it; index the corpus again (the command makes a new index and moves the name to "
                "it), or leave the tool out: tools=search"
            )
        return ReadPlan(True, f"title.{EXACT}")
    for path in filter(None, (title, title and f"{title}.keyword")):
        found = [find_field(mapping, path) for mapping in mappings]
        if all(each and each.type == "keyword" and each.nested is None for each in found):
            return ReadPlan(False, path)
    return ReadPlan(False, None)


def read_documents(
    names: Sequence[str], plan: ReadPlan, search: Search
) -> list[Document | RetrievalError | None]:
    """Find the document of each name: by a passage's id, or else by its title."""
    first = search([*map(plan.by_id, names), *map(plan.by_title, names)])
    by_id, by_title = first[: len(names)], first[len(names) :]
    asked = [
        None if isinstance(each, RetrievalError) or not each else each[0].passage for each in by_id
    ]
    rest = dict(_rest(asked, plan))
    more = dict(zip(rest, search(list(rest.values())), strict=True)) if rest else {}
    return [_document(by_id[i], by_title[i], asked[i], more.get(i)) for i in range(len(names))]


def _rest(asked: Sequence[Passage | None], plan: ReadPlan) -> Iterator[tuple[int, Body]]:
    """The query for the other passages of each document that was found by an id."""
    for i, passage in enumerate(asked):
        if passage is None:
            continue
        chunk = chunk_of(passage.id) if plan.own else None
        yield i, plan.chunks(chunk[0]) if chunk else plan.by_title(passage.title)


def _document(
    by_id: Answer, by_title: Answer, asked: Passage | None, rest: Answer | None
) -> Document | RetrievalError | None:
    for each in (by_id, rest, by_title if asked is None else []):
        if isinstance(each, RetrievalError):
            return each
    if asked is None:
        passages = tuple(hit.passage for hit in by_title)  # type: ignore[union-attr]
        return Document(passages) if passages else None
    chunk = chunk_of(asked.id)
    found = [hit.passage for hit in rest or ()]  # type: ignore[union-attr]
    if chunk:
        of_chunks = [(chunk_of(each.id), each) for each in found]
        found = [each for other, each in of_chunks if other and other[0] == chunk[0]]
    if asked not in found:
        found = [asked]
    return Document(tuple(found), found.index(asked))


def readable_fields() -> Mapping[str, Body]:
    """What an index of research-env needs beside what searches need: ids, and whole titles."""
    exact = {"type": "keyword", "doc_values": False, "ignore_above": 8191}
    return {"id": exact, "title": {"fields": {EXACT: exact | {"normalizer": "lowercase"}}}}
