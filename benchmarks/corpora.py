"""Corpora to measure with: a generated one of any size, and the published ones in one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice

import numpy as np

from benchmarks.recorded import QUERY, read_trajectories
from research_env import Passage
from research_env.datasets import load_dataset
from research_env.datasets.base import Corpus

VOCABULARY = 300_000  # distinct content words
OPENINGS = (
    "who founded the", "where was the", "when did the", "what is the name of the", "spouse of",
    "which company made the", "director of",
)  # fmt: skip
# Function words of English, most frequent first, and the words of OPENINGS, which are rarer.
COMMON = "the of and in to was is for as on by with at it that from he his her first also were had"
ASKED = "who which where when one two name company what founded made director spouse did"

_BLOCK = 10_000  # passages drawn at a time
_SYLLABLES = [c + v for c in "bcdfgklmnprstvz" for v in "aeiou"]


@dataclass(frozen=True)
class GeneratedCorpus:
    """Passages of about 100 words whose frequencies follow Zipf's law, each with a rare title.

    They are like Wikipedia's in what decides a search engine's speed: lengths, the share of common
    words, and how often the others occur. The corpus is a stream and takes no memory.
    """

    size: int
    seed: int = 0

    @property
    def name(self) -> str:
        """What it is called."""
        return f"generated-{self.size}"

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Passage]:
        """Draw the passages; the same ones at each iteration."""
        words = _Words()
        for start in range(0, self.size, _BLOCK):
            rng = np.random.default_rng([self.seed, start])
            count = min(_BLOCK, self.size - start)
            lengths = rng.lognormal(np.log(90), 0.4, count).clip(8, 400).astype(int)
            text = iter(words.draw(rng, int(lengths.sum())))
            titles = words.rare(rng, 2 * count)
            for i, length in enumerate(lengths.tolist()):
                title = f"{titles[2 * i]} {titles[2 * i + 1]}".title()
                body = " ".join(islice(text, length))
                yield Passage(f"g{start + i}", title, f"{title} {body}.")

    def fingerprint(self) -> str:
        """Return the size and the seed, which decide the corpus."""
        return sha256(f"generated {self.size} {self.seed}".encode()).hexdigest()

    def queries(self, count: int) -> list[str]:
        """Questions such as models ask: an opening, a name, and some words of a passage."""
        rng = np.random.default_rng([self.seed, 1])
        words = _Words()
        asked = []
        for passage in islice(self, 0, self.size, max(self.size // count, 1)):
            body = passage.text.split()
            own = [body[i] for i in rng.integers(2, len(body), 2)]
            name = passage.title.split()[: 1 + (rng.random() < 0.6)]
            others = words.content(rng, int(rng.integers(0, 3)))
            opening = OPENINGS[rng.integers(len(OPENINGS))]
            asked.append(" ".join([opening, *name, *own, *others]) + "?")
        return [asked[i] for i in rng.permutation(len(asked))[:count]]


class _Words:
    def __init__(self) -> None:
        self._spelled = np.array([_spell(rank) for rank in range(VOCABULARY)], object)
        self._content = _cumulated(1 / (np.arange(VOCABULARY) + 20))
        common, asked = COMMON.split(), ASKED.split()
        self._common = np.array(common + asked, object)
        ranks = np.arange(len(common)) + 1.5
        self._frequencies = _cumulated(np.concatenate([1 / ranks, np.full(len(asked), 0.012)]))

    def content(self, rng: np.random.Generator, count: int) -> list[str]:
        ranks = np.searchsorted(self._content, rng.random(count))
        return list(self._spelled[ranks])

    def rare(self, rng: np.random.Generator, count: int) -> list[str]:
        return list(self._spelled[rng.integers(2_000, VOCABULARY, count)])

    def draw(self, rng: np.random.Generator, count: int) -> list[str]:
        words = self._spelled[np.searchsorted(self._content, rng.random(count))]
        common = rng.random(count) < 0.42
        ranks = np.searchsorted(self._frequencies, rng.random(int(common.sum())))
        words[common] = self._common[ranks]
        return list(words)


def _spell(rank: int) -> str:
    """A word of its own for every rank, a short one for a frequent word."""
    syllables = []
    rank += len(_SYLLABLES)
    while rank:
        rank, last = divmod(rank, len(_SYLLABLES))
        syllables.append(_SYLLABLES[last])
    return "".join(syllables)


def _cumulated(
    weights: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    sums = np.cumsum(weights / weights.sum())
    sums[-1] = 1.0
    return sums


@dataclass(frozen=True)
class Together:
    """Several corpora as one."""

    parts: tuple[Corpus, ...]
    name: str = "together"

    def __iter__(self) -> Iterator[Passage]:
        """Stream one after the other."""
        for part in self.parts:
            yield from part

    def fingerprint(self) -> str:
        """Combine the fingerprints of the parts."""
        return sha256(" ".join(part.fingerprint() for part in self.parts).encode()).hexdigest()


def real_corpus() -> Together:
    """Return the passages of the published sets.

    Raises:
        DataNotFoundError: they are not here.
    """
    corpora = [load_dataset(name, split="dev").corpus for name in ("musique", "hotpotqa", "2wiki")]
    return Together(tuple(corpus for corpus in corpora if corpus is not None), "real")


def model_queries() -> list[str]:
    """What R1-Searcher-Qwen-7B asked in its recorded trajectories.

    Raises:
        DataNotFoundError: they are not here.
    """
    actions = (action for each in read_trajectories() for action in each.actions)
    found = (QUERY.search(action) for action in actions)
    return [match[1].strip() for match in found if match]
