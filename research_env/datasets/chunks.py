"""Split the passages of a corpus into chunks, for corpora of long documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from statistics import fmean

from research_env.datasets.base import Corpus
from research_env.errors import ConfigurationError
from research_env.retrieval.base import Passage
from research_env.retrieval.documents import WORD

LONG_PASSAGE = 200
"""A corpus whose passages have more words than this on average is worth chunking."""


@dataclass(frozen=True, slots=True)
class ChunkedCorpus:
    """The chunks of a corpus's passages, each with its passage's title.

    A passage of at most ``words`` words stays as it is. The chunks of a longer one have the ids
    ``ID#0``, ``ID#1``, ... and follow one another with an overlap of a fifth of their words.

    Attributes:
        corpus: The whole passages.
        words: Most words of a chunk.
    """

    corpus: Corpus
    words: int

    def __post_init__(self) -> None:
        if self.words < 1:
            raise ConfigurationError(f"a chunk needs 1 word or more, not {self.words}")

    @property
    def name(self) -> str:
        """Name of the corpus."""
        return self.corpus.name

    def __iter__(self) -> Iterator[Passage]:
        """Stream the chunks in the order of the corpus."""
        for passage in self.corpus:
            chunks = chunk_text(passage.text, self.words, self.words // 5)
            if len(chunks) == 1:
                yield passage
                continue
            for number, text in enumerate(chunks):
                yield Passage(f"{passage.id}#{number}", passage.title, text)

    def fingerprint(self) -> str:
        """Fingerprint of the corpus and of the size of the chunks."""
        return sha256(f"{self.corpus.fingerprint()} chunks of {self.words}".encode()).hexdigest()


def chunk_text(text: str, words: int, overlap: int) -> list[str]:
    """Split a text after a number of words.

    Words are separated by whitespace; in scripts without it (Chinese, Japanese, Thai) each
    character counts. Whitespace within a chunk stays as it is.

    Args:
        text: The text.
        words: Most words of a chunk.
        overlap: How many words a chunk repeats from the end of the one before it; below ``words``.

    Returns:
        The chunks; the text itself if it has at most ``words`` words.
    """
    found = list(WORD.finditer(text))
    if len(found) <= words:
        return [text]
    starts = range(0, len(found) - overlap, words - overlap)
    return [
        text[found[start].start() : found[min(start + words, len(found)) - 1].end()]
        for start in starts
    ]


def mean_words(corpus: Corpus) -> float:
    """Mean number of words of a corpus's first 1,000 passages; 0 for an empty corpus."""
    counts = [len(WORD.findall(passage.text)) for passage in islice(corpus, 1_000)]
    return fmean(counts) if counts else 0.0
