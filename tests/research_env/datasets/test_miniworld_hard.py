"""MiniWorld's levels of difficulty: the texts answer the questions, and the golds are right."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from research_env.datasets import Question, load_dataset, miniworld, miniworld_hard
from research_env.datasets.miniworld import RELATIONS
from research_env.env import SearchQAEnv
from research_env.errors import ConfigurationError, UnknownNameError
from research_env.retrieval.base import Passage
from research_env.tools import write_call
from tests.research_env.fakes import answer, search

LEVELS = (1, 2, 3, 4, 5)
REFERENCES = {text: r for kind in RELATIONS.values() for r in kind for text in r.references}
STATEMENTS = {text: r for kind in RELATIONS.values() for r in kind for text in r.statements}
BY_KIND: dict[str, tuple[miniworld.Relation, ...]] = dict(RELATIONS.items())
NOUNS = {noun: kind for kind, nouns in miniworld.NOUNS.items() for noun in nouns}


class Reader:
    """Knows the passages and nothing else, and answers a question by its words."""

    def __init__(self, passages: list[Passage]) -> None:
        self.facts: list[tuple[str, str, dict[str, str]]] = []  # name, kind, relation to value
        for passage in passages:
            noun = passage.text.split()[1].strip(",")
            said = re.findall(r", ([a-z ]+) (\w+)", passage.text)
            if noun != "gazette" and said:  # a card states nothing
                stated = {STATEMENTS[text].name: value for text, value in said}
                self.facts.append((passage.title, NOUNS[noun], stated))

    def answers(self, question: str) -> set[str]:
        """All answers that the texts allow."""
        if found := re.fullmatch(
            r"Which came (first|last) by (\w+), (.*), (.*) or (.*)\?", question
        ):
            return self._compared(*found.groups())
        if found := re.fullmatch(
            r"How many of (.*), (.*) and (.*) have an? (\w+) before (\d+)\?", question
        ):
            *three, relation, year = found.groups()
            years = [self._year(phrase, relation) for phrase in three]
            return {str(sum(each < int(year) for each in years))}
        if found := re.fullmatch(r"Wh\w+ is the (\w+) (.*), (.*)\?", question):
            kind, *both = found.groups()
            facts = [met for fact in both if (met := self._constraint(fact))]
            own = {relation.name for relation in BY_KIND.get(kind, ())}
            if len(facts) == 2 and own.issuperset(relation for relation, _ in facts):
                return {
                    name
                    for name, of_kind, stated in self.facts
                    if of_kind == kind and all(stated[r] in values for r, values in facts)
                }
        return self._reached(re.sub(r"^(Who is|What is|Name) ", "", question)[:-1])

    def _constraint(self, text: str) -> tuple[str, set[str]] | None:
        for statement in sorted(STATEMENTS, key=len, reverse=True):
            if text.startswith(f"{statement} "):
                rest = text.removeprefix(f"{statement} ")
                return STATEMENTS[statement].name, self._reached(rest)
        return None

    def _reached(self, phrase: str) -> set[str]:
        """The names or years that "the mayor of the twin of X, paired with Y" can mean."""
        for reference in sorted(REFERENCES, key=len, reverse=True):
            if phrase.startswith(f"{reference} "):
                subject = phrase.removeprefix(f"{reference} ")
                name = REFERENCES[reference].name
                return {stated[name] for stated in self._entities(subject) if name in stated}
        return {phrase}

    def _entities(self, phrase: str) -> list[dict[str, str]]:
        named, _, fact = phrase.partition(", ")
        if named == phrase or named.startswith("the "):
            return [
                stated
                for name in self._reached(phrase)
                for known, _, stated in self.facts
                if known == name
            ]
        relation, values = self._constraint(fact) or ("", set())
        return [s for known, _, s in self.facts if known == named and s[relation] in values]

    def _year(self, phrase: str, relation: str) -> int:
        [year] = {
            stated[relation]
            for name in self._reached(phrase)
            for known, _, stated in self.facts
            if known == name
        }
        return int(year)

    def _compared(self, order: str, relation: str, *phrases: str) -> set[str]:
        years = {self._year(phrase, relation): phrase for phrase in phrases}
        assert len(years) == 3
        return self._reached(years[min(years) if order == "first" else max(years)])


@pytest.mark.parametrize("level", LEVELS)
def test_the_golds_are_what_a_reader_of_all_passages_finds_and_nothing_else(level: int) -> None:
    data = miniworld_hard.load("dev", 0, level)
    assert data.corpus is not None
    reader = Reader(list(data.corpus))
    read = 0
    for question in data.questions:
        # Commas separate the three that are compared, and a fact that tells namesakes apart. The
        # reader cannot split a question that has both; the test of each hop checks it.
        plain = {"comparison": 2, "count": 1}.get(question.type or "", 99)
        if question.question.count(",") > plain:
            continue
        read += 1
        assert reader.answers(question.question) == set(question.answers), question
    assert read >= 0.8 * len(data.questions)


@pytest.mark.parametrize("level", LEVELS)
def test_each_hop_is_stated_by_its_gold_passage(level: int) -> None:
    data = miniworld_hard.load("dev", 1, level)
    assert data.corpus is not None
    passages = {passage.id: passage for passage in data.corpus}
    assert len(passages) == len(list(data.corpus))
    for question in data.questions:
        found: list[str] = []
        assert question.hops == len(question.decomposition)
        assert set(question.supporting) == {hop.support for hop in question.decomposition}
        for hop in question.decomposition:
            asked = filled_in(hop.question, found)
            passage = passages[str(hop.support)]
            if ", " in asked:  # an intersection: both facts are stated, of what is sought
                statements = [STATEMENTS[part.rsplit(" ", 1)[0]] for part in asked.split(", ")]
                for relation, part in zip(statements, asked.split(", "), strict=True):
                    said = "|".join(relation.statements)
                    assert re.search(rf", (?:{said}) {part.rsplit(' ', 1)[1]}\b", passage.text)
                assert hop.answer == passage.title
            else:
                name, *apart, relation_name = asked.split()
                said = "|".join(t for t, r in STATEMENTS.items() if r.name == relation_name)
                assert name == passage.title
                assert re.search(rf", (?:{said}) {hop.answer}\b", passage.text)
                assert all(re.search(rf" {value}\b", passage.text) for value in apart)
            found.append(hop.answer)
        assert conclude(question, found) == question.answers[0]


def filled_in(query: str, found: list[str]) -> str:
    """A query with the answers of earlier hops in place of #1, #2, ..."""
    return re.sub(r"#(\d+)", lambda match: found[int(match[1]) - 1], query)


def conclude(question: Question, found: list[str]) -> str:
    """The answer to a question, from the answers of its hops."""
    if question.type in ("chain", "intersection"):
        return found[-1]
    reached = len(found) == 6
    years = [int(year) for year in (found[1::2] if reached else found)]
    if question.type == "count":
        before = int(str(re.search(r"before (\d+)", question.question)[1]))  # type: ignore[index]
        return str(sum(year < before for year in years))
    listed = re.search(r"by \w+, (.*), (.*) or (.*)\?", question.question)
    assert listed
    names = found[::2] if reached else list(listed.groups())
    return names[years.index(min(years) if " first " in question.question else max(years))]


def test_kinds_and_hops_of_the_levels() -> None:
    kinds = {}
    for level in LEVELS:
        questions = miniworld_hard.load("train", 0, level).questions
        assert len(questions) == miniworld.SPLITS["train"]
        kinds[level] = {q.type for q in questions}
        hops = Counter(q.hops for q in questions if q.type == "chain")
        assert set(hops) == ({5, 6} if level == 4 else {3, 4, 5, 6})
        assert min(hops.values()) > 0.05 * len(questions)
    assert kinds[1] == {"chain", "comparison"}
    assert kinds[2] == kinds[3] == kinds[5] == {"chain", "comparison", "intersection", "count"}
    assert kinds[4] == {"chain", "comparison", "count"}


def test_namesakes_are_told_apart_by_each_of_their_facts() -> None:
    world = miniworld_hard.world(0, 3)
    works = [name for name, e in world.entities.items() if e.kind == "work" and name == e.name]
    assert len(works) == miniworld.POPULATION["work"]
    titles = Counter(passage.title for passage in world)
    for name in works:
        one, other = world.entities[name], world.entities[miniworld_hard.namesake(name)]
        assert titles[name] == 2 and one.facts.keys() == other.facts.keys()
        assert all(one.facts[relation] != other.facts[relation] for relation in one.facts)
    assert world.name != miniworld.world(0).name
    assert world.fingerprint() != miniworld.world(0).fingerprint()


def test_at_level_5_a_search_finds_a_card_and_the_facts_must_be_opened(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache: Path = tmp_path_factory.getbasetemp() / "research-cache"
    monkeypatch.setenv("RESEARCH_CACHE", str(cache))
    settings: dict[str, Any] = {"protocol": "tool-calls", "tools": "search,open", "top_k": 1}
    env = SearchQAEnv(split="dev", difficulty=5, template="instruct", **settings)
    chains = [q for q in miniworld_hard.load("dev", 0, 5).questions if q.type == "chain"][:20]
    for question in chains:
        env.reset(options={"question_id": question.id})
        for place, hop in enumerate(question.decomposition):
            known = [h.answer for h in question.decomposition[:place]]
            query = filled_in(hop.question, known)
            shown, *_, info = env.step(write_call("search", {"query": query}))
            (card,) = info["passage_ids"]
            assert card == f"{hop.support}-card" and hop.answer not in shown
            shown, *_ = env.step(write_call("open", {"document": card}))
            assert hop.answer in shown
        *_, info = env.step(f"It is \\boxed{{{question.answers[0]}}}.")
        assert info["metrics"]["em"] == info["metrics"]["support_recall"] == 1.0
    env.close()


@pytest.mark.parametrize("level", LEVELS)
def test_no_task_stands_in_both_splits(level: int) -> None:
    tasks: list[str] = []
    for split in miniworld.SPLITS:
        tasks += [
            str((sorted(h.question for h in q.decomposition), q.answers))
            for q in miniworld_hard.load(split, 0, level).questions
        ]
    assert len(set(tasks)) == len(tasks)


def test_difficulty_0_is_miniworld() -> None:
    data = load_dataset("miniworld", split="dev", difficulty=0)
    assert tuple(data.questions) == tuple(miniworld.load("dev").questions)
    assert miniworld_hard.world(3, 0) is miniworld.world(3)


def test_unknown_levels_and_splits_are_refused() -> None:
    for level in (6, -1, True, "2", 2.0):
        with pytest.raises(ConfigurationError, match="difficulty of miniworld is one of 0, 1, 2"):
            load_dataset("miniworld", split="dev", difficulty=level)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="split of miniworld"):
        miniworld_hard.load("test", 0, 1)


@pytest.mark.parametrize("level", [2, 3])
def test_an_oracle_that_searches_answers_most_questions(
    level: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gold queries find the gold passages where a search returns two."""
    cache: Path = tmp_path_factory.getbasetemp() / "research-cache"
    monkeypatch.setenv("RESEARCH_CACHE", str(cache))
    env = SearchQAEnv(split="dev", difficulty=level, top_k=2, template="question")
    right = 0
    questions = miniworld_hard.load("dev", 0, level).questions[:150]
    for question in questions:
        env.reset(options={"question_id": question.id})
        for place, hop in enumerate(question.decomposition):
            known = [h.answer for h in question.decomposition[:place]]
            env.step(search(filled_in(hop.question, known)))
        *_, info = env.step(answer(question.answers[0]))
        assert info["metrics"]["em"] == 1.0
        right += info["metrics"]["support_recall"] == 1.0
    env.close()
    assert right >= 0.95 * len(questions)
