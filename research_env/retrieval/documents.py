"""Documents: passages of a corpus that belong together, read page by page.

Chunks of one passage (``ID#0``, ``ID#1``, ... of :mod:`research_env.datasets.chunks`) belong
together, and so do passages of the same title. A passage without a title is a document of its own.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise, takewhile
from typing import Protocol, runtime_checkable

import msgspec

from research_env.errors import ConfigurationError, RetrievalError
from research_env.retrieval.base import Passage, Retriever

PAGE_CHARACTERS = 3_000
"""Most characters of a page."""
MAX_PASSAGES = 500
"""Most passages of a document before and after the one that was asked for."""

_CHUNK = re.compile(r"(.*)#(\d+)", re.DOTALL)
# Scripts that put no blanks between words count by character.
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(f"[{_UNSPACED}]|[^\\s{_UNSPACED}]+")
"""A word, as chunks are counted in."""
_MAX_OVERLAP = 4_000  # characters that two chunks share at most


class Document(msgspec.Struct, frozen=True, gc=False):
    """Passages that belong together, in their order.

    Attributes:
        passages: at least one.
        asked: the position in ``passages`` of the one whose id was asked for; None if a title was.
    """

    passages: tuple[Passage, ...]
    asked: int | None = None


class Page(msgspec.Struct, frozen=True, gc=False):
    """A part of a document.

    Attributes:
        title: the title of the document.
        text: at most ``PAGE_CHARACTERS`` characters.
        number: the number of this page, from 1 on.
        count: how many pages the document has.
        passages: the passages from which the text is.
    """

    title: str
    text: str
    number: int
    count: int
    passages: tuple[Passage, ...]


@runtime_checkable
class DocumentReader(Protocol):
    """A retriever that can also read whole documents."""

    def prepare_reading(self) -> None:
        """Get ready to read.

        Raises:
            ConfigurationError: this index cannot be read; the message says why.
        """
        ...

    def read(self, names: Sequence[str]) -> list[Document | RetrievalError | None]:
        """Read whole documents.

        Args:
            names: each is the id of a passage or else a title, in upper or lower case.

        Returns:
            One entry per name, in order; None where there is no such document.
        """
        ...


def require_reader(retriever: Retriever) -> None:
    """Check that a retriever can read documents.

    Raises:
        ConfigurationError: it cannot; the message says what to use.
    """
    if not isinstance(retriever, DocumentReader):
        raise ConfigurationError(
            f"the tool 'open' reads whole documents, which {type(retriever).__name__} cannot do; "
            "use an embedded index or Elasticsearch, or leave the tool out: tools=search"
        )
    retriever.prepare_reading()


def chunk_of(passage_id: str) -> tuple[str, int] | None:
    """Split ``ID#NUMBER``, the id of a chunk, into both; None for the id of a whole passage."""
    found = _CHUNK.fullmatch(passage_id)
    return (found[1], int(found[2])) if found else None


def chunks_around(row: int, last: int, passage_at: Callable[[int], Passage]) -> Document:
    """Collect the chunks of the passage to which a chunk belongs.

    They are neighbors in the corpus, and have the passage's title. Ids alone would not do: those of
    a corpus whose whole passages are numbered ``wiki#1``, ``wiki#2`` look the same.

    Args:
        row: the row of the chunk that was asked for.
        last: the last row of the corpus.
        passage_at: returns the passage in a row.
    """
    asked = passage_at(row)
    asked_chunk = chunk_of(asked.id)

    def is_sibling(passage: Passage) -> bool:
        chunk = chunk_of(passage.id)
        if chunk is None or asked_chunk is None:
            return False
        return (chunk[0], passage.title) == (asked_chunk[0], asked.title)

    rows_before = range(row - 1, max(-1, row - MAX_PASSAGES - 1), -1)
    rows_after = range(row + 1, min(last, row + MAX_PASSAGES) + 1)
    before = [*takewhile(is_sibling, map(passage_at, rows_before))][::-1]
    after = takewhile(is_sibling, map(passage_at, rows_after))
    return Document((*before, asked, *after), len(before))


def window(rows: Sequence[int], asked: int | None) -> tuple[Sequence[int], int | None]:
    """Choose which rows of a long document are read.

    Args:
        rows: all rows of the document, ascending.
        asked: the row that was asked for; None if the title was.

    Returns:
        The rows to read, and the position of ``asked`` among them.
    """
    if asked is None:
        return rows[: MAX_PASSAGES + 1], None
    center = bisect_left(rows, asked)
    first = max(0, center - MAX_PASSAGES)
    return rows[first : center + MAX_PASSAGES + 1], center - first


def read_page(document: Document, number: int | None = None) -> Page | None:
    """Read a page of a document.

    Args:
        document: the document.
        number: from 1 on; None: the page on which the passage that was asked for begins.

    Returns:
        The page; None if there is no such page.
    """
    text, starts = _join(document.passages)
    pages = _cut(text)
    if number is None:
        begin = starts[document.asked or 0]
        number = next(n for n, (_, end) in enumerate(pages, 1) if begin < end or n == len(pages))
    if not 1 <= number <= len(pages):
        return None
    start, end = pages[number - 1]
    ends = [*starts[1:], len(text) + 1]
    shown = [
        passage
        for passage, first, last in zip(document.passages, starts, ends, strict=True)
        if first < end and last > start
    ]
    title = document.passages[0].title
    return Page(title, text[start:end].strip(), number, len(pages), tuple(shown))


def count_pages(document: Document) -> int:
    """Return how many pages a document has."""
    return len(_cut(_join(document.passages)[0]))


def _join(passages: Sequence[Passage]) -> tuple[str, list[int]]:
    """The text of passages, and where in it each one begins."""
    text, starts = passages[0].text, [0]
    for before, passage in pairwise(passages):
        shared = _overlap(before.text, passage.text) if _follows(before, passage) else 0
        starts.append(max(0, len(text) - shared) if shared else len(text) + 1)
        text += passage.text[shared:] if shared else f"\n{passage.text}"
    return text, starts


def _follows(before: Passage, passage: Passage) -> bool:
    """Whether two passages are consecutive chunks, which overlap."""
    one, other = chunk_of(before.id), chunk_of(passage.id)
    return bool(one and other and one[0] == other[0] and one[1] + 1 == other[1])


def _overlap(before: str, after: str) -> int:
    """How many characters at the end of a chunk the next one repeats: whole words."""
    for size in range(min(len(before), len(after), _MAX_OVERLAP), 0, -1):
        if before.endswith(after[:size]) and not (
            _splits_word(before, len(before) - size) or _splits_word(after, size)
        ):
            return size
    return 0


def _splits_word(text: str, at: int) -> bool:
    """Whether the place before the character ``at`` is within a word."""
    return 0 < at < len(text) and WORD.fullmatch(text[at - 1 : at + 1]) is not None


def _cut(text: str) -> list[tuple[int, int]]:
    """Where the pages of a text begin and end; they end at white space where there is any."""
    pages, start = [], 0
    while len(text) - start > PAGE_CHARACTERS:
        end = start + PAGE_CHARACTERS
        space = max(text.rfind(mark, start + PAGE_CHARACTERS // 2, end) for mark in " \n")
        end = space + 1 if space >= 0 else end
        pages.append((start, end))
        start = end
    return [*pages, (start, len(text))]
