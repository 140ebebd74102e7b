"""Demonstrations: what they teach is true, and is said in the words of the vocabulary."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from research_env import RESEARCH, Dataset
from research_env import demonstrations as module
from research_env.datasets import Question, miniworld
from research_env.demonstrations import (
    Demonstration,
    Habits,
    demonstrations,
    gold_queries,
    tool_demonstrations,
    tool_vocabulary,
    vocabulary,
)
from research_env.env import SearchQAEnv
from research_env.episode import Episode, advance, observe
from research_env.papers.recall import RECALL, recall_format
from research_env.retrieval.base import Hit, Passage


@pytest.fixture(autouse=True)
def small_worlds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A few demonstrations of each world, so that a few hundred are of several worlds."""
    monkeypatch.setattr(module, "PER_WORLD", 40)
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))


def words(demonstration: Iterable[tuple[str, str]]) -> str:
    return "".join(text for _, text in demonstration)


def is_reading(demonstration: Demonstration) -> bool:
    return "<result>" in demonstration[0][1]


def is_comparing(demonstration: Demonstration) -> bool:
    return [provenance for provenance, _ in demonstration] == ["prompt", "observation", "action"]


def is_drill(demonstration: Demonstration) -> bool:
    return is_reading(demonstration) or is_comparing(demonstration)


def is_guess(demonstration: Demonstration) -> bool:
    return "guess:" in words(demonstration)


def test_count_order_and_provenance() -> None:
    always_guessing = Habits(search=0.0)
    made = list(demonstrations(200, top_k=2, habit_share=0.15, habits=always_guessing))
    assert len(made) == 200
    assert [is_guess(d) for d in made] == [False] * 170 + [True] * 30
    assert 0.2 * 170 < sum(map(is_reading, made)) < 0.4 * 170
    assert 0.07 * 170 < sum(map(is_comparing, made)) < 0.23 * 170
    for demonstration in made:
        provenances = [provenance for provenance, _ in demonstration]
        assert provenances[0] == "prompt"
        assert provenances[-1] == ("observation" if is_reading(demonstration) else "action")
        assert "prompt" not in provenances[1:]
        assert set(provenances) <= {"prompt", "action", "observation"}
        assert all(text for _, text in demonstration)


@pytest.mark.parametrize("count", [0, 1, 39, 41])
def test_as_many_as_asked_for(count: int) -> None:
    assert len(list(demonstrations(count, top_k=2))) == count


def test_the_same_seed_says_the_same() -> None:
    told = [list(demonstrations(90, top_k=2, seed=seed)) for seed in (3, 3, 4)]
    assert told[0] == told[1]
    assert told[0] != told[2]
    assert len({words(d) for d in told[0]}) > 85


def test_one_passage_a_search_comes_before_several() -> None:
    made = list(demonstrations(200, top_k=3, habit_share=0.0))
    shown = [max(text.count('"\n') for _, text in d) for d in made]
    assert {n for n, d in zip(shown[:60], made, strict=False) if not is_comparing(d)} == {1}
    assert {n for n, d in zip(shown[60:], made[60:], strict=True) if is_reading(d)} == {3}
    assert shown[60:].count(3) > 90  # a search may find fewer


def test_habits_are_kept_as_often_as_said() -> None:
    habits = Habits(search=0.4, go_on=0.5, box=0.7)
    made = list(demonstrations(800, top_k=2, habit_share=1.0, habits=habits))
    assert not any(map(is_drill, made))
    searching = [d for d in made if not is_guess(d)]
    assert 0.33 < len(searching) / 800 < 0.47
    assert 0.65 < sum("\\boxed{" in words(d) for d in made) / 800 < 0.75
    given_up = [d for d in searching if len(plan(d)) > 1 and len(d) == 4]
    of_several = [d for d in searching if len(plan(d)) > 1]
    assert 0.35 < len(given_up) / len(of_several) < 0.65


def plan(demonstration: Demonstration) -> list[str]:
    """The relations that the first thought names; a comparison needs its one twice."""
    found = re.search("plan:( compare)?(.*?) </think>", demonstration[1][1])
    assert found
    return found[2].split() * (2 if found[1] else 1)


def test_no_name_of_the_worlds_to_learn_and_test_in_occurs() -> None:
    unseen = {passage.title for seed in (0, 1) for passage in miniworld.world(seed)}
    for demonstration in demonstrations(300, top_k=2, habit_share=0.5):
        assert not unseen & set(re.findall(r"\w+", words(demonstration)))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Question, miniworld.World]]:
    """The questions that demonstrations are made of, in order, with their worlds."""
    seen: list[tuple[Question, miniworld.World]] = []
    original = miniworld.questions

    def listen(of: miniworld.World, rng: random.Random, count: int) -> Iterator[Question]:
        for question in original(of, rng, count):
            seen.append((question, of))
            yield question

    monkeypatch.setattr(miniworld, "questions", listen)
    return seen


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_a_skilled_episode_is_one_of_the_environment_with_full_reward(
    asked: list[tuple[Question, miniworld.World]], top_k: int
) -> None:
    made = list(demonstrations(120, top_k=top_k, habit_share=0.0))
    assert len(asked) == len(made)
    posed = {f"{question.question}\n": (question, world) for question, world in asked}
    replayed = 0
    for i, demonstration in enumerate(made):
        if is_drill(demonstration):
            continue
        question, world = posed[demonstration[0][1]]
        data = Dataset("one", [replace(question, id="q")], world)
        shown = 1 if i < 36 else top_k
        env = SearchQAEnv(dataset=data, template="question", top_k=shown, max_searches=5)
        seen, _ = env.reset()
        assert demonstration[0] == ("prompt", seen)
        reward, over = 0.0, False
        for provenance, text in demonstration[1:]:
            if provenance == "observation":
                assert text == seen
                continue
            assert not over
            seen, reward, over, truncated, info = env.step(text)
            assert not truncated
        assert over
        assert (reward, seen) == (1.0, "")
        assert info["metrics"]["em"] == info["metrics"]["format"] == 1.0
        assert info["metrics"]["searches"] == len(question.decomposition)
        env.close()
        replayed += 1
    assert replayed > 45


def test_a_drill_asks_for_facts_that_its_passages_state() -> None:
    world = miniworld.world(2)
    for seed in range(20):
        [(kind, shown), *rest, last] = module.reading_drill(world, 2, random.Random(seed))
        assert (kind, last) == ("prompt", ("observation", "\n"))
        facts = sum(len(world.entities[s].facts) for s in re.findall('"(\\w+)"\n', shown))
        assert len(rest) == 2 * facts
        for (_, query), (_, thought) in zip(rest[::2], rest[1::2], strict=True):
            asked = re.fullmatch(r" <search> (\w+) (\w+) </search>", query)
            assert asked
            value = world.entities[asked[1]].facts[asked[2]]
            assert thought == f" <think> next: {asked[2]} {value} </think>"
            assert re.search(rf"The \w+ {asked[1]},.* {value}[,.]", shown)


def test_a_comparison_is_drilled_with_true_years_and_ends_right() -> None:
    world = miniworld.world(2)
    endings = set()
    for seed in range(40):
        parts = module.comparing_drill(world, random.Random(seed))
        (_, question), (_, known), (_, asked) = parts
        one, other = re.findall(r"(\w+) or (\w+)\?", question)[0]
        relation = re.search(r"compare (\w+)", known)[1]  # type: ignore[index]
        years = [int(world.entities[name].facts[relation]) for name in (one, other)]
        assert known.endswith(f"<think> done: {relation} {years[1]}")
        order = "after" if years[1] > years[0] else "before"
        earlier = "earlier" in question or "came first" in question
        right = one if (years[0] < years[1]) == earlier else other
        assert asked == f" {order} {years[0]} </think> <answer> \\boxed{{ {right}}} </answer>"
        endings.add((order, right == one))
    assert len(endings) == 4


def test_neighbors_are_of_different_worlds() -> None:
    made = list(demonstrations(400, top_k=1, habit_share=0.0))
    names = [set(re.findall('"(\\w+)"\n', words(d))) for d in made]
    early, late = set().union(*names[:20]), set().union(*names[60:80])
    one_world = [set(miniworld.world(seed).entities) for seed in (0, 1, 2)]
    assert all(len(early & world) < len(early) / 2 for world in one_world)
    assert len(early & late) < len(early) / 2


def test_gold_queries_have_earlier_answers_filled_in() -> None:
    four = next(q for q in miniworld.load("dev").questions if q.hops == 4)
    queries, hops = gold_queries(four), four.decomposition
    assert queries[0] == hops[0].question
    for i in (1, 2, 3):
        assert queries[i] == f"{hops[i - 1].answer} {hops[i].question.split()[1]}"


def test_a_question_without_decomposition_is_refused() -> None:
    bare = Question("q7", "Who?", ("Ann",))
    with pytest.raises(ValueError, match="question 'q7' has no decomposition"):
        module.demonstrate(bare, [], random.Random(0), module.SKILLED)


def spelled(text: str, phrases: frozenset[str], longest: int) -> bool:
    """Whether a text is a chain of phrases."""
    reached = {0}
    for start in range(len(text)):
        if start in reached:
            ends = range(start + 1, min(start + longest, len(text)) + 1)
            reached |= {end for end in ends if text[start:end] in phrases}
    return len(text) in reached


def all_texts() -> Iterator[str]:
    for demonstration in demonstrations(240, top_k=2, habit_share=0.3):
        yield from (text for _, text in demonstration)
    for seed in (0, 1):
        world: Any = miniworld.world(seed)
        passages = list(world)
        for one, other in zip(passages[::2], passages[1::2], strict=True):
            yield RESEARCH.render([Hit(one, 2.0), Hit(other, 1.0)])
        yield from (f"{q.question}\n" for q in miniworld.load("dev", seed).questions)


def test_the_vocabulary_spells_every_text_without_letters() -> None:
    phrases = module.vocabulary()
    assert len(set(phrases)) == len(phrases)
    assert not [phrase for phrase in phrases if len(phrase) == 1 and phrase.isalpha()]
    known, longest = frozenset(phrases), max(map(len, phrases))
    unspelled = [text for text in all_texts() if not spelled(text, known, longest)]
    assert unspelled[:3] == []


# --- tool calls ----------------------------------------------------------------------------------


def test_tool_demonstrations_are_episodes_of_recall() -> None:
    made = list(tool_demonstrations(count=30, top_k=2, habit_share=0.0))
    assert len(made) == 30
    searched = 0
    for demonstration in made:
        (_, prompt), *rest = demonstration
        assert prompt.endswith("?\n<think>")
        episode = Episode(Question("q", prompt.removesuffix("\n<think>"), ("x",)), RECALL)
        for action, observation in itertools.zip_longest(rest[::2], rest[1::2]):
            episode = advance(episode, action[1])
            if observation is None:
                break
            searched += 1
            titles = re.findall(r'^"(.*)"$', observation[1], flags=re.M)
            texts = re.findall(r'^"[^"]*"\n(.*)$', observation[1], flags=re.M)
            hits = [
                Hit(Passage(title, title, text), 1.0)
                for title, text in zip(titles, texts, strict=True)
            ]
            episode = observe(episode, hits)
            assert episode.turns[-1].observation == observation[1]
        assert episode.stop_reason == "answer"
        assert recall_format(episode)
    assert searched > 30


def test_habits_of_tool_demonstrations_come_last() -> None:
    made = list(tool_demonstrations(count=40, top_k=1, habit_share=0.5))
    lengths = [sum(provenance == "action" for provenance, _ in each) for each in made]
    assert min(lengths[:20]) > 1
    assert min(lengths[20:]) == 1


def test_the_phrases_of_tool_calls_take_the_places_of_tags() -> None:
    known = vocabulary()
    renamed = [tool_vocabulary().get(phrase, phrase) for phrase in known]
    assert set(tool_vocabulary()) < set(known)
    assert len(set(renamed)) == len(known)
