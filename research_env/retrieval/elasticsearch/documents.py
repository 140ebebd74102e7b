"""Read whole documents of an index: each by its name first, then the passages around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from research_env.errors import ConfigurationError, RetrievalError
from research_env.retrieval.base import Hit, Passage, SearchResult
from research_env.retrieval.documents import MAX_PASSAGES, Document, chunk_of
from research_env.retrieval.elasticsearch.client import Body
from research_env.retrieval.elasticsearch.fields import find_field

Search = Callable[[Sequence[Body]], Sequence[SearchResult]]
"""Answers searches. In an index that research-env made, the score of a hit is its row."""

_EXACT = "exact"  # the multi-field of the title that holds whole titles, in lower case


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """How documents of an index are found.

    Attributes:
        own: whether research-env made the index, so that ids are in the field ``id``; otherwise
            they are the server's own, ``_id``.
        title: the field of whole titles; None: documents are found by id alone.
    """

    own: bool
    title: str | None

    def by_id(self, name: str) -> Body:
        """Query for the passage with an id."""
        return {"term": {"id": name}} if self.own else {"ids": {"values": [name]}}

    def by_title(self, title: str) -> Body:
        """Query for the passages with a title; upper case matters if the index is the user's."""
        if self.title is None or not title.strip():
            return {"match_none": {}}
        return {"terms": {self.title: [title, title.strip()]}}

    def around(self, asked: Hit) -> tuple[Body, Body]:
        """Searches for the passages of a document before a hit, backwards, and from it on.

        In an index that the user made there is no order, and the second search finds all.
        """
        chunk = chunk_of(asked.passage.id) if self.own else None
        query = {"prefix": {"id": f"{chunk[0]}#"}} if chunk else self.by_title(asked.passage.title)
        if not self.own:
            return _search({"match_none": {}}), _search(query, 2 * MAX_PASSAGES + 1)
        rows_before = {"range": {"row": {"lt": asked.score}}}
        rows_after = {"range": {"row": {"gte": asked.score}}}
        before = _search({"bool": {"filter": [query, rows_before]}}, MAX_PASSAGES)
        before["sort"] = [{"row": "desc"}]
        return before, _search({"bool": {"filter": [query, rows_after]}})


def _search(query: Body, size: int = MAX_PASSAGES + 1) -> Body:
    return {"query": {"constant_score": {"filter": query}}, "size": size}


def plan_reading(
    mappings: Sequence[Body], title: str | None, address: object, *, own: bool
) -> ReadPlan:
    """Decide how documents are found.

    Args:
        mappings: the mapping of each index behind the name.
        title: the user's field of titles; None if there is none, or for an index of research-env.
        address: the index, for messages.
        own: whether research-env made the index.

    Raises:
        ConfigurationError: an older version of research-env made the index.
    """
    if own:
        fields = mappings[0].get("properties", {})
        ids_are_indexed = fields.get("id", {}).get("index", True) is not False
        if not ids_are_indexed or _EXACT not in fields.get("title", {}).get("fields", {}):
            raise ConfigurationError(
                f"the index {address} cannot be read by ids and titles, as an earlier version made "
                "it; index the corpus again (the command makes a new index and moves the name to "
                "it), or leave the tool out: tools=search"
            )
        return ReadPlan(True, f"title.{_EXACT}")
    for path in (title, f"{title}.keyword") if title else ():
        found = [find_field(mapping, path) for mapping in mappings]
        if all(each and each.type == "keyword" and each.nested is None for each in found):
            return ReadPlan(False, path)
    return ReadPlan(False, None)


def read_documents(
    names: Sequence[str], plan: ReadPlan, search: Search
) -> list[Document | RetrievalError | None]:
    """Find the document of each name, which is a passage's id or else a title.

    Returns:
        One entry per name, in order; None if there is no such document.
    """
    queries = [*map(plan.by_id, names), *map(plan.by_title, names)]
    found = search([_search(query) for query in queries])
    by_id, by_title = found[: len(names)], found[len(names) :]
    asked = {
        i: hits[0] for i, hits in enumerate(by_id) if hits and not isinstance(hits, RetrievalError)
    }
    halves = search([half for hit in asked.values() for half in plan.around(hit)])
    rest = dict(zip(asked, zip(halves[::2], halves[1::2], strict=True), strict=True))
    documents: list[Document | RetrievalError | None] = []
    for i, (passage, titled) in enumerate(zip(by_id, by_title, strict=True)):
        if i in asked:
            documents.append(_document_around(asked[i].passage, *rest[i]))
        elif isinstance(passage, RetrievalError):
            documents.append(passage)
        elif isinstance(titled, RetrievalError):
            documents.append(titled)
        else:
            documents.append(Document(tuple(hit.passage for hit in titled)) if titled else None)
    return documents


def _document_around(
    asked: Passage, before: SearchResult, after: SearchResult
) -> Document | RetrievalError:
    """Make a document of the passages that ``around`` finds."""
    if isinstance(before, RetrievalError):
        return before
    if isinstance(after, RetrievalError):
        return after
    passages = [hit.passage for hit in (*reversed(before), *after)]
    chunk = chunk_of(asked.id)
    if chunk:  # the prefix "a#" also finds chunks of a passage "a#b"
        chunks = [(chunk_of(each.id), each) for each in passages if each.title == asked.title]
        passages = [each for other, each in chunks if other and other[0] == chunk[0]]
    if asked not in passages:
        passages = [asked]
    return Document(tuple(passages), passages.index(asked))


def readable_fields() -> Mapping[str, Body]:
    """Return the fields that only reading documents needs: indexed ids and whole titles."""
    exact = {"type": "keyword", "doc_values": False, "ignore_above": 8191}
    return {"id": exact, "title": {"fields": {_EXACT: exact | {"normalizer": "lowercase"}}}}
