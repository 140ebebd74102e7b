from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from research_env.datasets.base import Hop, Question
from research_env.demonstrations import SKILLED
from research_env.errors import ResearchEnvError
from research_env.retrieval.base import Passage
from research_env.wiki_demonstrations import demonstrate, demonstrations, gold_steps

FILM = Passage("p1", "Get Low (song)", "Get Low is a song by Dillon Francis. It was a hit.")
SINGER = Passage("p2", "Dillon Francis", "He lives in Los Angeles. He was born on October 5, 1987.")
HIDDEN = Passage("p3", "Secret Street", "Only a development question needs October 5, 1987.")
PASSAGES = {p.id: p for p in (FILM, SINGER, HIDDEN)}
QUESTION = Question(
    "q",
    "When was the performer of Get Low born?",
    ("October 5, 1987",),
    ("p2", "p1"),
    split="train",
)


def test_each_search_is_named_by_what_was_read_before() -> None:
    """The gold passages are listed the other way round; only the song is in the question."""
    steps = gold_steps(QUESTION, PASSAGES)
    assert [(step.query, step.passage.id) for step in steps] == [
        ("Get Low", "p1"),
        ("Dillon Francis", "p2"),
    ]


def test_a_gold_decomposition_is_asked_as_it_stands() -> None:
    hops = (
        Hop("Who performed Get Low?", "Dillon Francis", "p1"),
        Hop("When was #1 born?", "October 5, 1987", "p2"),
    )
    question = Question("q", "?", ("October 5, 1987",), ("p1", "p2"), decomposition=hops)
    queries = [step.query for step in gold_steps(question, PASSAGES)]
    assert queries == ["Who performed Get Low?", "When was Dillon Francis born?"]


@pytest.mark.parametrize(
    "question",
    [
        Question("q", "Who is it?", ("October 5, 1987",), ("p1",)),  # nothing names the passage
        Question("q", "Who sang Get Low?", ("Somebody else",), ("p1",)),  # no passage says it
        Question("q", "Who sang Get Low?", ("Dillon Francis",), ("p1", "gone")),
    ],
)
def test_what_cannot_be_concluded_is_not_demonstrated(question: Question) -> None:
    assert gold_steps(question, PASSAGES) == []


def test_a_skilled_episode_searches_reads_and_answers() -> None:
    steps = gold_steps(QUESTION, PASSAGES)
    assert demonstrate(QUESTION, steps, ["[one]", "[two]"], random.Random(0), SKILLED) == [
        ("prompt", "When was the performer of Get Low born?\n"),
        ("action", "<think> I need to find Get Low. </think> <search> Get Low </search>"),
        ("observation", "[one]"),
        (
            "action",
            "<think> Get Low is a song by Dillon Francis. Now I need to find Dillon Francis. "
            "</think> <search> Dillon Francis </search>",
        ),
        ("observation", "[two]"),
        (
            "action",
            "<think> He was born on October 5, 1987. </think> "
            "<answer> \\boxed{October 5, 1987} </answer>",
        ),
    ]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hotpotqa"
    folder.mkdir()
    asked = [
        {"id": "q", "question": QUESTION.question, "answers": list(QUESTION.answers),
         "supporting": ["p1", "p2"], "split": "train",
         "evidences": [["Get low", "performer", "Dillon Francis"],
                       ["Dillon Francis", "date of birth", "October 5, 1987"],
                       ["Dillon Francis", "date of birth", "October 5, 1987"],
                       ["Dillon Francis", "spouse", "Nobody Here"],
                       ["Los Angeles", "country", "USA"], ["no triple"]]},
        {"id": "d", "question": "What is on Secret Street?", "answers": ["October 5, 1987"],
         "supporting": ["p3", "p2"], "split": "dev"},
    ]  # fmt: skip
    stored = [{"id": p.id, "title": p.title, "text": p.text} for p in PASSAGES.values()]
    for name, rows in (("questions", asked), ("corpus", stored)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    monkeypatch.setenv("RESEARCH_DATA", str(tmp_path))
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    return folder


def test_nothing_that_only_held_out_questions_need_is_shown(data: Path) -> None:
    """With three passages a search would show all of the corpus."""
    made = list(demonstrations(20, "hotpotqa", 3, search=1.0, go_on=1.0, box=1.0))
    assert len(made) == 20
    told = "\n".join(text for each in made for _, text in each)
    assert "Get Low is a song" in told and "born on October 5" in told
    assert "Secret Street" not in told and "development question" not in told


def test_facts_are_questions_of_their_own(data: Path) -> None:
    """Not those that no passage says, or whose subject has no gold passage; each only once."""
    made = list(demonstrations(60, "hotpotqa", 2, facts=True, search=1.0, go_on=1.0, box=1.0))
    prompts = Counter(each[0][1] for each in made)
    assert prompts == {
        f"{QUESTION.question}\n": 20,
        "What is the performer of Get low?\n": 20,
        "What is the date of birth of Dillon Francis?\n": 20,
    }
    fact = next(each for each in made if "performer of Get low?" in each[0][1])
    assert [kind for kind, _ in fact] == ["prompt", "action", "observation", "action"]
    assert fact[-1][1] == (
        "<think> The performer of Get low is Dillon Francis. </think> "
        "<answer> \\boxed{Dillon Francis} </answer>"
    )


def test_habits_are_as_weak_as_said(data: Path) -> None:
    made = list(demonstrations(400, "hotpotqa", 2, seed=3, search=0.5, go_on=0.5, box=0.75))
    assert made == list(demonstrations(400, "hotpotqa", 2, seed=3, search=0.5, go_on=0.5, box=0.75))
    assert made != list(demonstrations(400, "hotpotqa", 2, seed=4, search=0.5, go_on=0.5, box=0.75))
    searches = [sum(kind == "observation" for kind, _ in each) for each in made]
    assert 160 < searches.count(0) < 240  # half of 400
    assert 70 < searches.count(1) < 130 and 70 < searches.count(2) < 130
    boxed = sum("\\boxed{" in each[-1][1] for each in made)
    assert 270 < boxed < 330


def test_data_without_a_question_to_demonstrate_are_refused(data: Path) -> None:
    (data / "corpus.jsonl").write_text('{"id": "p1", "title": "X", "text": "y"}\n')
    with pytest.raises(ResearchEnvError, match="question"):
        list(demonstrations(1, "hotpotqa", 1))


NOTED = [
    Passage(
        "f1", "Here", "Here is an economic western. It was directed by B. Reeves Eason in 1927."
    ),
    Passage("f2", "There", "There is a film of 1930. No scene of Here is in it."),
]


def notes(asked: str, answer: str, *evidences: list[str], gold: list[Passage] = NOTED) -> list[str]:
    question = Question(
        "q", asked, (answer,), tuple(p.id for p in gold), extra={"evidences": list(evidences)}
    )
    return [step.note for step in gold_steps(question, {p.id: p for p in gold})]


def test_a_note_is_the_fact_that_a_passage_states() -> None:
    """A part of a word is no fact of it; then a sentence is quoted, here one with the answer."""
    asked = "Which film is older, Here or There?"
    director, year = ["Here", "director", "B. Reeves Eason"], ["There", "year", "1930"]
    assert notes(asked, "Here", director, year) == [
        "The director of Here is B. Reeves Eason.",
        "The year of There is 1930.",
    ]
    assert notes(
        asked, "Here", ["Here", "director", "Somebody Else"], ["There", "year", "193"]
    ) == [
        "Here is an economic western.",
        "No scene of Here is in it.",
    ]


def test_a_note_quotes_the_sentence_that_is_needed() -> None:
    """Initials end no sentence. Yes and no are not looked for, and no word is found in another."""
    assert notes("Who directed Here?", "B. Reeves Eason", gold=NOTED[:1]) == [
        "It was directed by B. Reeves Eason in 1927."
    ]
    assert notes("Is There older than Here?", "no") == [
        "Here is an economic western.",
        "There is a film of 1930.",
    ]
    long = Passage("f3", "Long", " ".join(f"w{i}" for i in range(1, 41)) + ".")
    first, last = (notes("Where is Long?", word, gold=[long]) for word in ("w3", "w35"))
    assert first == [" ".join(f"w{i}" for i in range(1, 31)) + " ..."]
    assert last == ["... " + " ".join(f"w{i}" for i in range(6, 36)) + " ..."]
    assert notes("Where is Long?", "w40", gold=[long])[0].endswith(" w40.")


def test_a_question_whose_answer_is_in_no_note_is_left_out() -> None:
    """The director is in the passage, but the note names the year."""
    evidence = ["Here", "year", "1927"]
    assert notes("Who directed Here?", "B. Reeves Eason", evidence, gold=NOTED[:1]) == []
    assert notes("When was Here made?", "1927", evidence, gold=NOTED[:1]) == [
        "The year of Here is 1927."
    ]


def test_a_hop_without_a_passage_does_not_shift_the_notes() -> None:
    hops = (
        Hop("What is it?", "a film", None),
        Hop("Who directed Here?", "B. Reeves Eason", "f1"),
    )
    question = Question("q", "?", ("B. Reeves Eason",), ("f1",), decomposition=hops)
    (step,) = gold_steps(question, {"f1": NOTED[0]})
    assert step.note == "It was directed by B. Reeves Eason in 1927."
