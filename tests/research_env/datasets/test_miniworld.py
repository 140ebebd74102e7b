"""MiniWorld: its promises, checked on its texts rather than on the tables that make them."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from research_env.datasets import Question, miniworld
from research_env.datasets.miniworld import RELATIONS, World
from research_env.env import SearchQAEnv
from research_env.errors import ConfigurationError, UnknownNameError
from tests.research_env.fakes import answer, search

WORLDS = (0, 1)
STATEMENTS = {r.name: r.statements for relations in RELATIONS.values() for r in relations}
COMPARES = re.compile(
    r"Which (?:has the (earlier|later)|came (first|last) by) (\w+), (\w+) or (\w+)\?"
)


def texts(world: World) -> dict[str, str]:
    return {passage.title: passage.text for passage in world}


def read(text: str, relation: str) -> str:
    """The value of a relation, as a reader of the passage finds it."""
    [value] = re.findall(rf", (?:{'|'.join(STATEMENTS[relation])}) (\w+)", text)
    return str(value)


def conclude(question: str, found: list[str]) -> str:
    """The answer to a question, from the values of its hops."""
    compared = COMPARES.fullmatch(question)
    if not compared:
        return found[-1]
    order, came, _, one, other = compared.groups()
    years = {int(found[0]): one, int(found[1]): other}
    return years[min(years) if order == "earlier" or came == "first" else max(years)]


def everything(seed: int) -> list[Question]:
    return [q for split in miniworld.SPLITS for q in miniworld.load(split, seed).questions]


# --- the world ------------------------------------------------------------------------------------


def digest() -> str:
    told = "\n".join(f"{q.id} {q.question} {q.answers[0]}" for q in everything(0))
    return hashlib.sha256(told.encode()).hexdigest() + miniworld.world(0).fingerprint()


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_the_world_of_a_seed_is_the_same_in_every_process(hash_seed: str) -> None:
    told = subprocess.run(
        [sys.executable, "-c", f"import {__name__} as own; print(own.digest())"],
        env={"PYTHONHASHSEED": hash_seed},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == digest()


def test_another_seed_is_another_world() -> None:
    worlds = [miniworld.world(seed) for seed in range(6)]
    assert len({world.fingerprint() for world in worlds}) == 6
    assert [world.name for world in worlds[:2]] == ["miniworld-0", "miniworld-1"]


OTHERS = (0, 1, 2, 5, 10**6 + 2, 2**31 - 1)


@pytest.mark.parametrize(("own", "other"), [(a, b) for a in WORLDS for b in OTHERS if a != b])
def test_no_other_world_holds_a_name_of_the_worlds_to_learn_and_test_in(
    own: int, other: int
) -> None:
    names = [set(texts(miniworld.world(seed))) for seed in (own, other)]
    assert len(names[0]) == len(names[1])
    assert not names[0] & names[1]
    words = set(re.findall(r"\w+", " ".join(texts(miniworld.world(other)).values())))
    assert not names[0] & words


@pytest.mark.parametrize("seed", WORLDS)
def test_a_world_has_a_thousand_passages_of_many_kinds(seed: int) -> None:
    world = miniworld.world(seed)
    passages = list(world)
    assert len(passages) >= 1_000
    assert len({p.id for p in passages}) == len({p.title for p in passages}) == len(passages)
    assert all(p.id == world.passage_id(p.title) for p in passages)
    nouns = Counter(text.split()[1] for text in texts(world).values())
    for kind in ("person", "film", "organisation", "city", "state", "gazette"):
        assert nouns[kind] >= 10
    assert [p.title for p in passages] != sorted(p.title for p in passages)


@pytest.mark.parametrize("seed", WORLDS)
def test_every_passage_states_its_facts_several_of_them_of_one_type(seed: int) -> None:
    world = miniworld.world(seed)
    told = texts(world)
    phrasings: dict[str, set[str]] = {}
    for name, entity in world.entities.items():
        relations = RELATIONS[entity.kind]
        assert len(relations) >= 5
        for relation in relations:
            value = read(told[name], relation.name)
            assert value == entity.facts[relation.name]
            if relation.value == "year":
                assert miniworld.FIRST_YEAR <= int(value) <= miniworld.LAST_YEAR
            else:
                assert value != name
                assert world.entities[value].kind == relation.value
            stated = next(s for s in relation.statements if f", {s} {value}" in told[name])
            phrasings.setdefault(relation.name, set()).add(stated)
        assert max(Counter(relation.value for relation in relations).values()) >= 2
    assert all(len(said) >= 2 for said in phrasings.values())  # relations are paraphrased
    assert len(phrasings) >= 20


def test_gazettes_mention_names_and_state_nothing() -> None:
    world = miniworld.world(0)
    gazettes = [text for text in texts(world).values() if text.startswith("The gazette")]
    assert len(gazettes) >= 100
    for text in gazettes:
        assert sum(word.strip(",.") in world.entities for word in text.split()) >= 3
        for statements in STATEMENTS.values():
            assert not any(f", {statement} " in text for statement in statements)


def test_spouses_are_married_to_each_other() -> None:
    people = {n: e for n, e in miniworld.world(0).entities.items() if e.kind == "person"}
    assert all(people[e.facts["spouse"]].facts["spouse"] == name for name, e in people.items())


@pytest.mark.parametrize("seed", [-1, 1.0, True, "0", None, [1]])
def test_a_seed_is_a_whole_number(seed: Any) -> None:
    miniworld.world(1)  # to a cache, True and 1.0 would be the same
    with pytest.raises(ConfigurationError, match=r"world_seed must be a whole number .* not "):
        miniworld.load("dev", seed)


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(UnknownNameError, match=r"split of miniworld 'test'; known: dev, train"):
        miniworld.load("test")


# --- the questions --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", WORLDS)
def test_questions_have_one_to_four_hops_and_some_compare(seed: int) -> None:
    for split, count in miniworld.SPLITS.items():
        questions = miniworld.load(split, seed).questions
        assert len(questions) == count
        assert all(q.split == split for q in questions)
        sorts = Counter((q.type, q.hops) for q in questions)
        assert set(sorts) == {*(("chain", hops) for hops in (1, 2, 3, 4)), ("comparison", 2)}
        assert min(sorts.values()) >= 0.05 * count
        asked = Counter(relation for q in questions for relation in relations_of(q))
        assert set(asked) == set(STATEMENTS)


def relations_of(question: Question) -> list[str]:
    return [hop.question.rsplit(" ", 1)[1] for hop in question.decomposition]


@pytest.mark.parametrize("seed", WORLDS)
def test_the_gold_decomposition_leads_to_the_answer(seed: int) -> None:
    data = miniworld.load("dev", seed)
    assert data.corpus is not None
    passages = {passage.id: passage for passage in data.corpus}
    for question in everything(seed):
        found: list[str] = []
        assert question.supporting == tuple(hop.support for hop in question.decomposition)
        assert question.hops == len(question.decomposition)
        for hop in question.decomposition:
            subject, relation = hop.question.rsplit(" ", 1)
            if subject.startswith("#"):
                subject = found[int(subject[1:]) - 1]
            else:
                assert subject in question.question  # the question names where to start
            assert hop.support is not None
            passage = passages[hop.support]
            assert passage.title == subject
            found.append(read(passage.text, relation))
            assert found[-1] == hop.answer
        assert question.answers == (conclude(question.question, found),)
        assert question.type == "comparison" or question.answers[0] not in question.question


@pytest.mark.parametrize("seed", WORLDS)
def test_no_task_is_asked_twice_in_any_wording(seed: int) -> None:
    tasks = Counter(
        (tuple(sorted(h.question for h in q.decomposition)), q.answers) for q in everything(seed)
    )
    assert max(tasks.values()) == 1
    assert len({q.id for q in everything(seed)}) == sum(miniworld.SPLITS.values())


@pytest.mark.parametrize("seed", WORLDS)
def test_an_oracle_that_reads_what_it_finds_answers_held_out_questions(
    seed: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache: Path = tmp_path_factory.getbasetemp() / "research-cache"
    monkeypatch.setenv("RESEARCH_CACHE", str(cache))
    data = miniworld.load("dev", seed)
    env = SearchQAEnv(split="dev", world_seed=seed, top_k=2, template="question")
    right = first = 0
    for question in data.questions:
        prompt, _ = env.reset(options={"question_id": question.id})
        found: list[str] = []
        for hop in question.decomposition:
            subject, relation = hop.question.rsplit(" ", 1)
            subject = found[int(subject[1:]) - 1] if subject.startswith("#") else subject
            seen, *_, info = env.step(search(f"{subject} {relation}"))
            first += info["passage_titles"][:1] == (subject,)
            stated = re.search(rf"The \w+ {subject}, .*", seen)
            found.append(read(stated[0], relation) if stated else "0")
        _, reward, terminated, _, info = env.step(answer(conclude(prompt.strip(), found)))
        assert terminated
        right += reward == info["metrics"]["em"] == info["metrics"]["support_recall"] == 1.0
    env.close()
    assert right >= 0.99 * len(data.questions)
    assert first >= 0.99 * sum(len(q.decomposition) for q in data.questions)
