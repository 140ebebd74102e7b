"""Demonstrations on real passages: a pretrained model sees how to search before it is trained.

They are made from training questions whose gold passages are known. An episode searches the gold
sub-questions (MuSiQue has them) or the titles of the gold passages, notes what it read, and answers
from its notes. A title is searched only if the question or an earlier passage names it, so each
step follows from what was read. The results come from a real search.

A small model finds it harder to read than to search. So a note says what was asked of a passage:
the fact behind a question of 2Wiki, if the passage states it ("The director of Get Low is ..."),
else the sentence that names the next passage or the answer. A question whose answer is in no note
is left out. No note is written twice: a policy that was shown how to repeat its notes before the
answer came to repeat them without end (benchmarks/RESULTS.md). The facts can also be demonstrated
as questions of their own: one search, and an answer that the passage contains.

As in MiniWorld the habit of searching is left weak on purpose: many episodes guess or stop early.
Reinforcement learning then has to find when to search, how often, and how to answer.

No development question is demonstrated. The index lacks the passages that only development
questions need.
"""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from research_env.datasets.base import Corpus, Dataset, Question
from research_env.datasets.load import load_dataset
from research_env.demonstrations import Demonstration, Habits, gold_queries
from research_env.episode import shorten_hits
from research_env.errors import ConfigurationError
from research_env.metrics import normalize
from research_env.papers.research import RESEARCH
from research_env.retrieval.base import Hit, Passage
from research_env.retrieval.bm25.retriever import EmbeddedRetriever, build_index

YES_NO = ("yes", "no")
MAX_WORDS_READ = 30  # longest quote of a passage
_SENTENCE_GAP = re.compile(r"(?<=[.!?])(?<!\b[A-Z]\.)\s+(?=[A-Z0-9\"'])")  # not after initials


@dataclass(frozen=True, slots=True)
class Step:
    """A search that follows from the question and the passages before it."""

    query: str
    passage: Passage  # the gold passage that it has to find
    note: str  # what is read in it: a fact, or a sentence


@dataclass(frozen=True, slots=True)
class WithoutPassages:
    """A corpus without some of its passages, itself a ``Corpus``."""

    corpus: Corpus
    left_out: frozenset[str]  # ids

    @property
    def name(self) -> str:
        """The name of the corpus, and the number of passages that are left out."""
        return f"{self.corpus.name}-without-{len(self.left_out)}"

    def __iter__(self) -> Iterator[Passage]:
        """Stream the passages that are left."""
        return (passage for passage in self.corpus if passage.id not in self.left_out)

    def fingerprint(self) -> str:
        """The corpus and the number of passages left out; no index is kept that needs more."""
        return f"{self.corpus.fingerprint()}-{len(self.left_out)}"


def demonstrations(
    count: int,
    dataset: str,
    top_k: int,
    seed: int = 0,
    *,
    split: str = "train-gold",
    max_passage_chars: int | None = None,
    facts: bool = False,
    search: float = 0.5,
    go_on: float = 0.7,
    box: float = 0.8,
) -> Iterator[Demonstration]:
    """Make demonstrations from the training questions of a data set with known gold passages.

    Args:
        count: number of demonstrations; each pass over the questions is in a new order.
        dataset: as for ``load_dataset``, such as "hotpotqa+2wiki".
        top_k: passages that a search returns.
        seed: seed of all random choices.
        split: split of the questions, such as "train-gold[:50%]". A policy that has seen a question
            several times answers it from memory, so reinforcement learning needs others.
        max_passage_chars: as in the environment; None: passages are whole.
        facts: whether to demonstrate the questions' facts as well (see :func:`fact_questions`).
        search: probability of searching at the start rather than guessing.
        go_on: probability of searching again, if something is missing, rather than answering.
        box: probability of writing the answer into a box.

    Yields:
        Lists of (provenance, text).

    Raises:
        ConfigurationError: no training question can be demonstrated.
    """
    rng = random.Random(f"wiki demonstrations {seed}")
    habits = Habits(search=search, go_on=go_on, box=box)
    train, held_out = (load_dataset(dataset, split=each) for each in (split, "dev"))
    left_out = held_out_passages(train, held_out)
    if facts:
        asked = [*train.questions, *fact_questions(train)]
        train = replace(train, questions=asked)
    questions = _searched(train, left_out, top_k, max_passage_chars)
    if not questions:
        raise ConfigurationError(
            f"no training question of {dataset!r} can be demonstrated: none has gold passages that "
            f"the question leads to and a search finds among {top_k}; give more passages (top_k)"
        )
    made = 0
    while made < count:
        for question, steps, results in rng.sample(questions, len(questions)):
            if made == count:
                return
            yield demonstrate(question, steps, results, rng, habits)
            made += 1


def held_out_passages(train: Dataset, held_out: Dataset) -> frozenset[str]:
    """The passages that held-out questions need and no training question does."""
    needed = {passage for question in train.questions for passage in question.supporting}
    asked = {passage for question in held_out.questions for passage in question.supporting}
    return frozenset(asked - needed)


def fact_questions(train: Dataset) -> list[Question]:
    """The facts behind the questions, each as a question of its own.

    They are 2Wiki's ``evidences``, triples of subject, relation and object: "What is the director
    of Get Low?". A fact of several questions is asked once.

    Args:
        train: questions with their corpus.

    Returns:
        Questions whose only gold passage is the subject's. A fact is left out if no gold passage
        has the subject as its title.
    """
    names = {passage.id: _name(passage).casefold() for passage in train.corpus or ()}
    found: dict[tuple[str, str], Question] = {}
    for question in train.questions:
        named = {names[id_]: id_ for id_ in question.supporting if id_ in names}
        for subject, relation, answer in _evidences(question):
            support = named.get(subject.casefold())
            if support is not None:
                text = f"What is the {relation} of {subject}?"
                own = {"evidences": [[subject, relation, answer]]}
                id_ = f"{support} {relation}"
                fact = Question(id_, text, (answer,), (support,), hops=1, extra=own)
                found.setdefault((support, relation), fact)
    return list(found.values())


def gold_steps(question: Question, passages: dict[str, Passage]) -> list[Step]:
    """Find the searches that lead to all gold passages of a question, in an order to read them.

    Args:
        question: a question with gold passages.
        passages: the gold passages of all questions by id.

    Returns:
        The steps in order. There are none if a passage is missing, if neither the question nor an
        earlier passage names it, or if the notes do not contain the answer.
    """
    if any(id_ not in passages for id_ in question.supporting):
        return []
    answers = () if question.answers[0].casefold() in YES_NO else question.answers
    steps: list[Step] = []
    if question.decomposition:
        for query, hop in zip(gold_queries(question), question.decomposition, strict=True):
            if hop.support:
                found = passages[hop.support]
                steps.append(Step(query, found, _note(question, found, (hop.answer,))))
    else:
        order = _reading_order(question, [passages[id_] for id_ in question.supporting])
        names = [_name(passage) for passage in order]
        for i, passage in enumerate(order):
            wanted = (*names[i + 1 : i + 2], *answers)
            steps.append(Step(names[i], passage, _note(question, passage, wanted)))
    noted = normalize(" ".join(step.note for step in steps))
    said = [answer for answer in map(normalize, answers) if answer and answer in noted]
    return steps if said or not answers else []


def demonstrate(
    question: Question,
    steps: Sequence[Step],
    results: Sequence[str],
    rng: random.Random,
    habits: Habits,
) -> Demonstration:
    """Play a question step by step.

    Args:
        question: the question.
        steps: its searches, from ``gold_steps``.
        results: the observation of each search.
        rng: random generator of the decisions.
        habits: the probabilities of skilled decisions.

    Raises:
        ValueError: there are no steps.
    """
    parts: Demonstration = [("prompt", RESEARCH.prompt("question", question.question))]

    def finish(thought: str, answer: str) -> Demonstration:
        said = f"\\boxed{{{answer}}}" if rng.random() < habits.box else answer
        end = f"<think> {thought} </think> <answer> {said} </answer>"
        return [*parts, ("action", end)]

    if rng.random() >= habits.search:
        return finish("I guess without searching.", steps[0].query)
    thought = f"I need to find {steps[0].query}."
    for i, (step, result) in enumerate(zip(steps, results, strict=True)):
        action = f"<think> {thought} </think> <search> {step.query} </search>"
        parts += [("action", action), ("observation", result)]
        if i == len(steps) - 1:
            return finish(step.note, question.answers[0])
        if rng.random() >= habits.go_on:
            return finish(step.note, _name(step.passage))
        thought = f"{step.note} Now I need to find {steps[i + 1].query}."
    raise ValueError(f"question {question.id!r} has no steps")


def _searched(
    train: Dataset, left_out: frozenset[str], top_k: int, max_passage_chars: int | None
) -> list[tuple[Question, list[Step], list[str]]]:
    """The questions whose searches all find their passages, with their steps and observations."""
    if train.corpus is None:
        raise ConfigurationError(f"the data set {train.name!r} has no corpus; take one that has")
    corpus = WithoutPassages(train.corpus, left_out)
    needed = {id_ for question in train.questions for id_ in question.supporting}
    gold = tuple(Hit(passage, 0.0) for passage in corpus if passage.id in needed)
    passages = {hit.passage.id: hit.passage for hit in shorten_hits(gold, max_passage_chars)}
    planned = [(question, gold_steps(question, passages)) for question in train.questions]
    planned = [(question, steps) for question, steps in planned if steps]
    with tempfile.TemporaryDirectory() as folder:
        build_index(corpus, Path(folder) / "index")
        retriever = EmbeddedRetriever(Path(folder) / "index")
        try:
            queries = [step.query for _, steps in planned for step in steps]
            answers = iter(retriever.search(queries, top_k))
        finally:
            retriever.close()
    found: list[tuple[Question, list[Step], list[str]]] = []
    for question, steps in planned:
        complete, shown = True, []
        for step in steps:
            hits = next(answers)
            if isinstance(hits, Exception):
                raise hits
            complete &= any(hit.passage.id == step.passage.id for hit in hits)
            shown.append(RESEARCH.render(shorten_hits(tuple(hits), max_passage_chars)))
        if complete:
            found.append((question, steps, shown))
    return found


def _name(passage: Passage) -> str:
    """A title without the addition that distinguishes it from equal ones, such as "(film)"."""
    return re.sub(r"\s*\([^()]*\)$", "", passage.title) or passage.title


def _evidences(question: Question) -> list[tuple[str, str, str]]:
    """2Wiki's triples of subject, relation and object; anything of another form is left out."""
    given = question.extra.get("evidences")
    found = []
    for triple in given if isinstance(given, list) else ():
        match triple:
            case [str(subject), str(relation), str(value)]:
                found.append((subject, relation, value))
    return found


def _reading_order(question: Question, gold: Sequence[Passage]) -> list[Passage]:
    """The gold passages, each named by the question or by one before it; empty if one is not."""
    left, order, seen = list(gold), [], question.question
    while left:
        found = next((p for p in left if _name(p).casefold() in seen.casefold()), None)
        if found is None:
            return []
        left.remove(found)
        order.append(found)
        seen = f"{seen} {found.text}"
    return order


def _note(question: Question, passage: Passage, wanted: Sequence[str]) -> str:
    """The question's fact that a passage states, else a sentence of the passage.

    The sentence is the first that contains one of ``wanted``, tried in order, else the first of
    all. It is shortened if it is long.
    """
    for subject, relation, value in _evidences(question):
        if subject.casefold() == _name(passage).casefold() and _find(value, passage.text):
            return f"The {relation} of {subject} is {value}."
    sentences = _SENTENCE_GAP.split(passage.text)
    for text in wanted:
        for sentence in sentences:
            if found := _find(text, sentence):
                return _shortened(sentence, found.end())
    return _shortened(sentences[0], 0)


def _find(wanted: str, text: str) -> re.Match[str] | None:
    """The first place of a text where ``wanted`` stands as whole words."""
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text, re.IGNORECASE)


def _shortened(sentence: str, end: int) -> str:
    """At most ``MAX_WORDS_READ`` words of a sentence, with those before the character ``end``."""
    words = sentence.split()
    start = max(0, len(sentence[:end].split()) - MAX_WORDS_READ)
    rest = words[start : start + MAX_WORDS_READ]
    before, after = "... " if start else "", " ..." if start + len(rest) < len(words) else ""
    return f"{before}{' '.join(rest)}{after}"
