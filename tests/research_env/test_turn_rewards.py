"""Rewards of turns: hand-worked values, telescoping potentials, nothing paid twice, through gym."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research_env.datasets.base import Hop, Question
from research_env.env import SearchQAEnv
from research_env.episode import Episode, advance, fail, observe, truncate
from research_env.errors import ConfigurationError, RewardError, UnknownNameError
from research_env.papers import PROTOCOLS
from research_env.retrieval.base import Hit, Passage
from research_env.tools import write_call
from research_env.turn_rewards import TURN_REWARDS, TurnRewards, resolve_turn_rewards
from research_env.vector_env import SearchQAVectorEnv
from tests.research_env.fakes import DATASET, Engine, answer, hit, search

HOPS = (Hop("Who?", "Ann Lee", "p1"), Hop("Where?", "Bergen", "p2"))
QUESTION = Question("q", "Where is she?", ("Bergen",), ("p1", "p2"), decomposition=HOPS)
EVERYTHING = "+".join(TURN_REWARDS)


def states(
    actions: Sequence[str], protocol: str = "research", question: Question = QUESTION
) -> list[Episode]:
    """The episode before the first action, and after each; a query names the passages it finds."""
    rules = PROTOCOLS[protocol]
    episode = Episode(question, rules, rules.max_searches, rules.max_turns)
    made = [episode]
    for action in actions:
        if episode.over:
            break
        episode = advance(episode, action)
        while isinstance(episode.pending, str):
            numbers = [int(w) for w in episode.pending.split() if w.isdecimal()]
            episode = observe(episode, [hit(n) for n in numbers])
        made.append(episode)
    return made


def earned(name: str, actions: Sequence[str], **more: object) -> list[float]:
    """What each turn earns."""
    rule = resolve_turn_rewards(name)
    return [rule.earned(state) for state in states(actions, **more)[1:]]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("new_support", [1, 0, 1, 0]),
        ("information_gain", [0.5, 0, 0.5, 0]),
        ("redundancy", [0, 0.5, 1 / 3, 0]),
        ("first_search", [1, 0, 0, 0]),
        ("searches", [1, 1, 1, 0]),
        ("repeated_query", [0, 0, 0, 0]),
        ("invalid_action", [0, 0, 0, 0]),
        ("evidence_found", [0, 0, 0, 1]),
        ("support_progress", [0.5, 0, 0.5, -1]),
        ("0.2*new_support-0.02*searches", [0.18, -0.02, 0.18, 0]),
    ],
)
def test_literals(name: str, expected: list[float]) -> None:
    """Gold are p1 and p2: found by the first search and the third."""
    actions = [search("1 7"), search("1 8"), search("2 8 9"), answer("Bergen")]
    assert earned(name, actions) == pytest.approx(expected)


def test_pivots_are_gold_passages_and_answers_in_the_policys_own_words() -> None:
    """Four pivots. A passage that says "Ann Lee" is not the policy saying it (law 3)."""
    actions = [search("5"), search("1 of ann lee"), search("bergen 2"), answer("Bergen")]
    assert earned("pivot_progress", actions) == [0, 0.5, 0.5, -1]
    told = [Hit(Passage("p9", "Ann Lee", "Ann Lee lives in Bergen."), 1.0)]
    episode = observe(advance(states([])[0], search("5")), told)
    assert resolve_turn_rewards("pivot_progress").earned(episode) == 0.0


def test_repeated_queries_and_invalid_actions() -> None:
    again = [search("The 1"), search("  the   1!"), search("2"), answer("x")]
    assert earned("repeated_query", again) == [0, 1, 0, 0]
    calls = write_call("search", {"query": "1"}) * 2
    assert earned("repeated_query", [calls], protocol="tool-calls") == [1]
    assert earned("searches", [calls], protocol="tool-calls") == [2]
    lost = ["no tags at all", search("1"), "<search>again"]
    assert earned("invalid_action", lost, protocol="search-r1")[:2] == [1, 0]


def test_evidence_counts_for_answers_alone_and_only_if_it_is_whole() -> None:
    assert earned("evidence_found", [search("1"), answer("Bergen")]) == [0, 0]
    assert earned("evidence_found", [search("1 2"), "<answer>no box</answer>"]) == [0, 0]
    bare = Question("q", "Where?", ("x",))
    for name in ("evidence_found", "information_gain", "support_progress", "pivot_progress"):
        assert earned(name, [search("1"), answer("x")], question=bare) == [0, 0]


ACTIONS = st.lists(
    st.one_of(
        st.lists(st.sampled_from(["1", "2", "3", "ann", "lee"]), max_size=3).map(
            lambda words: search(" ".join(words))
        ),
        st.sampled_from(["nonsense", answer("Ann Lee"), answer("Bergen")]),
    ),
    max_size=7,
)


@settings(deadline=None, max_examples=150)
@given(actions=ACTIONS, protocol=st.sampled_from(sorted(PROTOCOLS)), cut=st.booleans())
def test_potentials_telescope(actions: list[str], protocol: str, cut: bool) -> None:
    """Phi is 0 at both ends, so what turns were lent, the last one pays back: the sum is 0."""
    made = states(actions, protocol)
    if cut and not made[-1].over:
        made.append(truncate(made[-1]))
    for name in ("support_progress", "pivot_progress"):
        f, rule = TURN_REWARDS[name], resolve_turn_rewards(name)
        total = sum(f(before, after) for before, after in pairwise(made))
        assert sum(map(rule.earned, made[1:])) == pytest.approx(total, abs=1e-12)
        if made[-1].over:
            assert total == pytest.approx(0.0, abs=1e-12)
            assert rule.totals(made[-1])[f"turn_reward/{name}"] == pytest.approx(0.0, abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(actions=ACTIONS, again=st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_nothing_is_paid_twice(actions: list[str], again: list[int]) -> None:
    """Any search of the episode, repeated at any time, earns nothing more and costs as much."""
    made = states(actions)
    searched = [s.actions[-1] for s in made[1:] if s.turns[-1].kind == "search"]
    repeats = [] if made[-1].over else [searched[n % len(searched)] for n in again if searched]
    repeated = states([*actions, *repeats])[len(made) :]
    assert len(repeated) == len(repeats)
    costs = {"redundancy", "searches", "repeated_query", "invalid_action"}
    for name in TURN_REWARDS.keys() - costs:
        assert [resolve_turn_rewards(name).earned(state) for state in repeated] == [0.0] * len(
            repeats
        )
    paid = resolve_turn_rewards("-0.02*searches-0.1*repeated_query")
    assert [paid.earned(state) for state in repeated] == pytest.approx([-0.12] * len(repeats))
    gained = resolve_turn_rewards("information_gain")
    total = sum(gained.earned(state) for state in states(actions)[1:])
    assert total <= 1.0 + 1e-12


def test_a_budget_that_is_spent_pays_no_turn_again() -> None:
    """The last turn had its reward when it was answered; only what was lent is paid back."""
    *_, last = states([search("1 2"), search("1")])
    cut = truncate(last)
    for name in TURN_REWARDS:
        owed = -1.0 if name == "support_progress" else -0.5 if name == "pivot_progress" else 0.0
        assert resolve_turn_rewards(name).earned(cut) == owed
    sums = resolve_turn_rewards(EVERYTHING).totals(cut)
    assert sums["turn_reward/searches"] == 2.0
    assert sums["turn_reward/new_support"] == 2.0


def test_a_search_that_was_cut_before_its_answer_costs_nothing() -> None:
    waiting = advance(states([search("1")])[-1], search("2"))
    assert resolve_turn_rewards("searches").earned(truncate(waiting)) == 0.0
    assert resolve_turn_rewards("new_support").earned(truncate(waiting)) == 0.0


def test_a_failed_engine_pays_nothing() -> None:
    void = fail(advance(states([search("1")])[-1], search("2")))
    assert resolve_turn_rewards(EVERYTHING).earned(void) == 0.0


def longest(before: Episode, after: Episode) -> float:
    return float(len(after.turns) - len(before.turns))


def test_own_functions_and_invalid_sums() -> None:
    rule = resolve_turn_rewards(f"searches-0.5*{__name__}:longest")
    assert [rule.earned(s) for s in states([search("1"), answer("x")])[1:]] == [0.5, -0.5]
    assert rule.__name__ == f"1*searches-0.5*{__name__}:longest"
    assert isinstance(resolve_turn_rewards(longest), TurnRewards)
    with pytest.raises(UnknownNameError, match="new_suport"):
        resolve_turn_rewards("0.2*new_suport")
    with pytest.raises(UnknownNameError, match="support_recall"):
        resolve_turn_rewards("support_recall")  # a reward of whole episodes
    with pytest.raises(ConfigurationError, match="position 14"):
        resolve_turn_rewards("0.2*searches 3")


def nothing(before: Episode, after: Episode) -> Any:
    return None


def not_a_number(before: Episode, after: Episode) -> float:
    return float("nan")


def fails(before: Episode, after: Episode) -> float:
    return 1 / 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "returned None for question 'q1'; a reward is one finite number"),
        ("not_a_number", "returned nan for question 'q1'"),
        ("fails", "failed for question 'q1': ZeroDivisionError: division by zero"),
    ],
)
def test_an_invalid_value_is_an_error_that_names_the_reward(name: str, message: str) -> None:
    own = f"{__name__}:{name}"
    env = SearchQAEnv(dataset=DATASET, retriever=Engine(), turn_reward=f"searches-0.5*{own}")
    env.reset(options={"question_id": "q1"})
    with pytest.raises(RewardError, match=f"the reward {own} {message}"):
        env.step(search("1"))
    *_, last = states([answer("Bergen")])
    with pytest.raises(RewardError, match=f"the reward {own} {message.replace('q1', 'q')}"):
        resolve_turn_rewards(own).totals(last)


def test_the_text_of_a_sum_keeps_all_digits() -> None:
    assert resolve_turn_rewards("0.12345678*searches-redundancy").__name__ == (
        "0.12345678*searches-1*redundancy"
    )


# --- through the environments --------------------------------------------------------------------

SUM = "0.2*new_support+0.1*first_search-0.02*searches+support_progress"


def test_gymnasium_users_see_them_as_step_rewards() -> None:
    env = SearchQAEnv(dataset=DATASET, retriever=Engine(), reward="em", turn_reward=SUM)
    _, info = env.reset(options={"question_id": "q3"})
    keys = [info["state_key"]]
    rewards = []
    for action in (search("7"), search("3"), search("3 7"), answer("Founder 3")):
        _, reward, terminated, _, info = env.step(action)
        rewards.append(reward)
        keys.append(info["state_key"])
    assert terminated
    assert rewards == pytest.approx([0.08, 0.18 + 1, -0.02, 1 - 1])
    assert info["metrics"]["turn_reward/new_support"] == 1.0
    assert info["metrics"]["turn_reward/searches"] == 3.0
    assert info["metrics"]["turn_reward/first_search"] == 1.0
    assert info["metrics"]["turn_reward/support_progress"] == 0.0
    assert len(set(keys)) == 4  # nothing found, 7, 7 and 3, the end
    assert keys[2] == keys[3] and keys[-1] == ""


def test_the_vector_environment_has_the_same_rewards() -> None:
    vector = SearchQAVectorEnv(
        num_envs=2, dataset=DATASET, retriever=Engine(), reward="em", turn_reward=SUM
    )
    _, infos = vector.reset(options={"episodes": [0, 0]})
    assert infos["state_key"][0] == infos["state_key"][1] != ""
    found = [int(infos["question"][0].split()[-1].rstrip("?"))]
    _, rewards, *_ = vector.step([search(str(found[0])), search("99")])
    assert np.allclose(rewards, [1.28, 0.08])
    vector.close()


def test_without_turn_rewards_nothing_changes() -> None:
    env = SearchQAEnv(dataset=DATASET, retriever=Engine(), reward="em")
    env.reset(options={"question_id": "q3"})
    assert env.step(search("3"))[1] == 0.0
    assert not any("turn" in name for name in env.step(answer("x"))[4]["metrics"])
