"""The replay benchmark: what it notices, and its numbers on the recorded trajectories."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.recorded import RecordedTrajectory, read_trajectories
from benchmarks.replay import distribution, lengths, main, make_env, recorded_f1
from benchmarks.replay import replay as play
from research_env import Dataset, Question
from research_env.env import SearchQAEnv
from research_env.errors import RetrievalError
from research_env.retrieval.base import Hit, Passage
from tests.research_env.playing import play as play_episode
from tests.research_env.test_rewards import oracle_r1_searcher

RECORDED = RecordedTrajectory(
    id="t1",
    dataset="HotpotQA",
    question="Which city?",
    answers=("Paris",),
    prediction=" Paris, France ",
    is_correct=True,
    actions=(
        'I look. <|begin_of_query|> "capital"  France<|end_of_query|>',
        "So.</think>\n\n<answer> Paris, France </answer>",
    ),
    observations=("\n\n<|begin_of_documents|>\n(1)x\n<|end_of_documents|>\n\n",),
)


class Five:
    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit] | RetrievalError]:
        return [[Hit(Passage(f"p{i}", "t", "x"), 1.0) for i in range(top_k)] for _ in queries]

    def close(self) -> None: ...


def environment() -> SearchQAEnv:
    questions = [Question("t1", "Which city?", ("Paris",))]
    return SearchQAEnv(
        dataset=Dataset("test", questions, None),
        retriever=Five(),
        protocol="r1-searcher",
        top_k=5,
    )


def test_a_trajectory_that_plays_as_recorded() -> None:
    result = play(environment(), RECORDED)
    assert result.wrong == ()
    assert result.found == (5,)
    assert result.exact
    assert result.f1 == result.reward == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"prediction": "Rome"}, "F1 0.66"),
        ({"prediction": "France Paris Texas"}, "answer 'Paris, France', recorded 'France Paris"),
        ({"actions": ("nothing", "</think><answer>Paris</answer>")}, "no search at turn 1"),
        ({"actions": RECORDED.actions[:1]}, "no answer at the end"),
        ({"actions": (RECORDED.actions[0], "gave up")}, "no answer at the end: no_answer"),
    ],
)
def test_what_is_not_as_recorded_is_noticed(change: dict[str, object], what: str) -> None:
    result = play(environment(), replace(RECORDED, **change))  # type: ignore[arg-type]
    assert any(what in each for each in result.wrong), result.wrong


def test_the_same_words_in_another_order_are_the_same_answer() -> None:
    result = play(environment(), replace(RECORDED, prediction="France: Paris"))
    assert (result.wrong, result.exact) == ((), False)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Paris", ["the paris!"], 1.0),
        ("Barack Obama", ["Obama"], 2 / 3),
        ("Barack Obama", ["Rome", "Hussein Obama"], 1 / 2),
        ("yes it is", ["yes"], 0.0),
        ("yes", ["Yes."], 1.0),
        ("", ["Paris"], 0.0),
        ("the", ["a"], 0.0),
        ("b b", ["b"], 2 / 3),
    ],
)
def test_the_recorded_f1_is_worked_out_by_hand(
    prediction: str, answers: list[str], expected: float
) -> None:
    assert recorded_f1(prediction, answers) == pytest.approx(expected)


def test_lengths_and_their_distribution() -> None:
    found = lengths([RECORDED, replace(RECORDED, actions=("abc",), observations=())])
    one, two = (len(action) for action in RECORDED.actions)
    shown = len(RECORDED.observations[0])
    assert found == {
        "searches": [1, 0],
        "action": [one, two, 3],
        "observation": [shown],
        "actions": [one + two, 3],
        "episode": [one + two + shown, 3],
    }
    shape = distribution(list(range(101)))
    assert shape == {
        "mean": 50, "min": 0, "5 %": 5, "25 %": 25, "50 %": 50, "75 %": 75, "95 %": 95, "max": 100
    }  # fmt: skip


def test_all_recorded_trajectories_play_as_recorded(
    research_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path))
    assert main(data=str(research_data), json=True) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["trajectories"], result["as recorded"], result["wrong"]) == (625, 625, [])
    assert result["searches"] == 1303
    assert result["same words, other order"] == 1  # "27 July 1953" for "July 27, 1953"
    assert result["lengths"]["searches"]["max"] == 4
    assert main(data=str(research_data)) == 0
    assert "as recorded: 625" in capsys.readouterr().out


def test_rewards_are_the_authors_but_for_the_word_assistant_in_documents(
    research_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On real trajectories, with the text as it was recorded, documents and all."""
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path))
    trajectories = read_trajectories(research_data)
    corpus = research_data / "r1searcher_trajectories" / "corpus.jsonl.gz"
    env = make_env(trajectories, corpus)
    differing = 0
    for trajectory in trajectories:
        ours = play(env, trajectory).reward
        episode = play_episode("r1-searcher", trajectory.actions, trajectory.answers)
        shown = (*trajectory.observations, "")
        turns = tuple(
            replace(turn, observation=text) for turn, text in zip(episode.turns, shown, strict=True)
        )
        theirs = oracle_r1_searcher(replace(episode, turns=turns), "f1")
        if theirs != pytest.approx(ours, abs=1e-6):
            assert theirs == pytest.approx(ours - 2.0)
            assert any("ssistant" in text for text in shown)
            differing += 1
    assert differing == 23
