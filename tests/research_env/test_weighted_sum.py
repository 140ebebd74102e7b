"""Rewards beyond the papers', and sums of rewards: hand-worked values, the grammar, and gym."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from hypothesis import given
from hypothesis import strategies as st

import research_env  # noqa: F401  (registers the ids)
from research_env.env import SearchQAEnv
from research_env.episode import Episode
from research_env.errors import ConfigurationError, UnknownNameError
from research_env.rewards import (
    REWARDS,
    SHAPING,
    WeightedSum,
    answer_length,
    parse_sum,
    query_diversity,
    resolve_reward,
    retrieved,
    searches,
    support_recall,
)
from research_env.tools import Call, ToolTurn
from research_env.turn_rewards import TURN_REWARDS
from tests.research_env.fakes import DATASET, Engine, answer, search
from tests.research_env.playing import play

KNOWN = (*REWARDS, *SHAPING)
END = "<think>b</think><answer>It is \\boxed{Paris}</answer>"


def ask(*queries: str, end: str = END, **more: object) -> Episode:
    actions = [*(f"<think>a</think><search>{query}</search>" for query in queries), end]
    return play("research", actions, **more)  # type: ignore[arg-type]


# --- the functions -------------------------------------------------------------------------------


def test_searches_counts_what_was_answered() -> None:
    assert searches(ask()) == 0.0
    assert searches(ask("x", "", "y")) == 3.0
    actions = ["<search>q</search>"] * 5  # four are allowed
    episode = play("search-r1", actions)
    assert (episode.stop_reason, searches(episode)) == ("max_searches", 4.0)


def test_support_recall_is_the_share_of_gold_passages_found() -> None:
    assert support_recall(ask("x", "x", supporting=("p1", "p9"))) == 0.5
    assert support_recall(ask("x", supporting=("p1", "p2"))) == 1.0
    assert support_recall(ask(supporting=("p1",))) == 0.0
    assert support_recall(ask("x")) == 0.0  # none is known


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        ((), 1.0),
        (("one",), 1.0),
        (("ada founded", "nordwind city"), 1.0),  # no word in common
        (("ada founded", "Founded, the Ada!"), 0.0),  # the same words
        (("ada founded what", "ada founded"), 1 - 2 / 3),
        (("a b c d", "c d e", "f"), (1 - 2 / 4 + 1 + 1) / 3),  # "a" is an article
        (("", " "), 0.0),  # both empty
        (("", "ada"), 1.0),
    ],
)
def test_query_diversity_is_the_mean_distance(queries: tuple[str, ...], expected: float) -> None:
    assert query_diversity(ask(*queries)) == pytest.approx(expected)


def test_a_refused_query_is_not_compared() -> None:
    actions = [f"<search>{query}</search>" for query in ("a1", "b1", "c1", "d1", "d1")]
    episode = play("search-r1", actions)
    assert episode.stop_reason == "max_searches"
    assert query_diversity(episode) == 1.0


def test_a_refused_query_is_not_compared_after_calls_of_other_tools() -> None:
    env = SearchQAEnv(protocol="tool-calls", tools="search,open", max_searches=3)
    env.reset(seed=0)
    once = Call(name="search", arguments={"query": "a1"})
    other = Call(name="open", arguments={"document": "x"})
    calls = [once, other, other, once]
    *_, info = [env.step(ToolTurn(calls=(call,)))[4] for call in calls]
    assert info["stop_reason"] == "max_searches"
    assert env.episode is not None
    assert query_diversity(env.episode) == 1.0


def test_retrieved_is_whether_a_search_found_a_passage() -> None:
    assert retrieved(ask("one")) == 1.0
    assert retrieved(ask()) == 0.0
    assert retrieved(ask("", " ")) == 0.0  # blank queries find none
    assert resolve_reward("0.5*retrieved+0.5*format")(ask("")) == 0.5  # the format alone


def test_answer_length_counts_words() -> None:
    assert answer_length(ask(end="<answer>\\boxed{ New  York, U.S. }</answer>")) == 3.0
    assert answer_length(ask(end="nothing")) == 0.0


# --- the grammar ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        (
            "research+0.1*support_recall-0.02*searches",
            [(1, "research"), (0.1, "support_recall"), (-0.02, "searches")],
        ),
        (" research - searches ", [(1, "research"), (-1, "searches")]),
        ("research-searches", [(1, "research"), (-1, "searches")]),
        ("research-strict", [(1, "research-strict")]),
        ("research-strict-1e-3*searches", [(1, "research-strict"), (-0.001, "searches")]),
        ("search-r1-format-f1", [(1, "search-r1-format"), (-1, "f1")]),
        ("-.5 * r1-searcher-stage2-em", [(-0.5, "r1-searcher-stage2-em")]),
        ("+2.*em + 0*cem", [(2, "em"), (0, "cem")]),
        ("em-my.module:thrifty+f1", [(1, "em"), (-1, "my.module:thrifty"), (1, "f1")]),
        ("3E+2*em:em", [(300, "em:em")]),
        ("em-my.module:Class.thrifty", [(1, "em"), (-1, "my.module:Class.thrifty")]),
    ],
)
def test_sums_are_read(text: str, terms: list[tuple[float, str]]) -> None:
    assert parse_sum(text, KNOWN) == terms


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "position 1 must be a name, not the end"),
        ("  ", "position 3 must be a name, not the end"),
        ("em+", "position 4 must be a name, not the end"),
        ("em++f1", r"position 4 must be a name, not '\+f1'"),
        ("em--f1", "position 4 must be a name"),
        ("em f1", r"position 4 must be a \+ or -, not 'f1'"),
        ("em*2", r"position 3 must be a \+ or -"),
        ("0.5", r"position 4 must be the \* between a weight and its name"),
        ("0.5 em", r"position 5 must be the \*"),
        ("2em", r"position 2 must be the \*"),
        ("0x10*em", r"position 2 must be the \*"),
        ("1e999*em", "position 1 must be a number that is not too large"),
        ("1_0*em", r"position 2 must be the \*"),
        ("\u0663*em", "position 1 must be a name"),  # a digit, but not one of ours
        ("em+(f1)", r"position 4 must be a name, not '\(f1\)'"),
        ("em+'f1'", "position 4 must be a name"),
        ("em+f1+em", "position 7 must be another name than 'em'"),
        ("em+[1]*f1", "position 4 must be a name"),
    ],
)
def test_an_invalid_sum_is_refused_with_the_position(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse_sum(text, KNOWN)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("research+0.1*suport_recall", r"'suport_recall'; known: .*Did you mean 'support_recall'\?"
         r" It is at position 14 of 'research\+"),
        ("research-strickt", "unknown reward 'research-strickt'.*Did you mean 'research-strict'"),
        ("em-foo", r"unknown reward 'foo'.* It is at position 4 of 'em-foo'"),
        ("em+__import__('os').system('true')", "unknown reward \"__import__"),
        ("inf*em", "unknown reward 'inf'"),
        ("nan*em", "unknown reward 'nan'"),
        ("em+eval", "unknown reward 'eval'"),
        ("em+lambda:0", "unknown reward 'lambda:0'"),
    ],
)  # fmt: skip
def test_unknown_names_are_refused_with_the_known_ones(text: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        resolve_reward(text)


@given(st.text(alphabet="em+-* .0123:f_()\n\"'", max_size=30) | st.text(max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    """Nothing else than our errors, and what is read says again what it was."""
    try:
        terms = parse_sum(text, KNOWN)
    except (ConfigurationError, UnknownNameError):
        return
    again = "".join(f"{weight:+}*{name}" for weight, name in terms)
    assert parse_sum(again, KNOWN) == terms


@pytest.mark.parametrize("piece", ["+", "em", "em+", "0", " ", "a:b+", "-", "_", "em-"])
def test_a_megabyte_is_refused_at_once(piece: str) -> None:
    with pytest.raises((ConfigurationError, UnknownNameError)) as refused:
        resolve_reward("+" + piece * (1_000_000 // len(piece)))
    assert len(str(refused.value)) < 1_000


def test_a_name_wins_over_a_difference() -> None:
    both = [pair for pair in product(KNOWN, KNOWN) if "-".join(pair) in KNOWN]
    stage2 = "r1-searcher-stage2"
    assert both == [(stage2, "em"), (stage2, "cem"), ("search-r1", "format")]
    for one, other in both:
        assert parse_sum(f"{one}-{other}", KNOWN) == [(1, f"{one}-{other}")]
        for difference in (f"{one} - {other}", f"{one} -{other}", f"{one}-1*{other}"):
            assert parse_sum(difference, KNOWN) == [(1, one), (-1, other)]


# --- the sums ------------------------------------------------------------------------------------


def two(episode: Episode) -> float:
    """A reward of one's own."""
    return 2.0


OWN = f"{__name__}:two"
weights = st.floats(-100, 100) | st.sampled_from([1.0, -1.0, 0.02, 1e-7, 1e22])
signs = st.sampled_from(["+", " + ", "\n+ ", "+  "])


@given(
    parts=st.lists(
        st.tuples(weights, st.sampled_from([*KNOWN, OWN])), min_size=1, unique_by=lambda p: p[1]
    ),
    data=st.data(),
)
def test_a_sum_is_the_sum_of_its_terms(parts: list[tuple[float, str]], data: st.DataObject) -> None:
    text = ""
    for number, (weight, name) in enumerate(parts):
        plain = weight in (1, -1) and data.draw(st.booleans())
        sign = "-" if weight < 0 else "+" if number else ""
        text += sign.join(data.draw(st.sampled_from([("", ""), (" ", " ")])))
        text += (
            name if plain else f"{abs(weight)!r}{data.draw(st.sampled_from(['*', ' * ']))}{name}"
        )
    episode = ask("paris", "paris france", supporting=("p1", "p9"))
    expected = sum(weight * resolve_reward(name)(episode) for weight, name in parts)
    assert resolve_reward(f" {text}")(episode) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_a_sum_worked_by_hand() -> None:
    text = f"research+0.5*support_recall-0.02*searches-0.01*answer_length+{OWN}"
    episode = ask("x y", "y z", supporting=("p1", "p9"))
    assert resolve_reward(text)(episode) == pytest.approx(1 + 0.5 * 0.5 - 0.02 * 2 - 0.01 * 1 + 2)
    read = resolve_reward(text)
    assert isinstance(read, WeightedSum)
    assert read.components(episode) == {
        "research": 1.0, "support_recall": 0.5, "searches": 2.0, "answer_length": 1.0, OWN: 2.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("0.1*em+f1", "0.1*em+1*f1"),
        ("-2*em-0.02*searches", "-2*em-0.02*searches"),
        ("0.12345678*em+1e22*f1", "0.12345678*em+1e+22*f1"),
        ("12345678*em", "12345678*em"),
    ],
)
def test_the_text_of_a_sum_keeps_all_digits(text: str, name: str) -> None:
    assert getattr(resolve_reward(text), "__name__", "") == name


@given(weight=st.floats(allow_nan=False, allow_infinity=False))
def test_the_text_of_a_sum_is_read_back(weight: float) -> None:
    read = resolve_reward(f"{weight!r}*em+f1")
    assert isinstance(read, WeightedSum)
    again = resolve_reward(read.__name__)
    assert isinstance(again, WeightedSum)
    assert again.terms == read.terms


def test_the_table_of_rewards_names_all_there_is() -> None:
    table = (Path(__file__).parents[2] / "docs/how-to/rewards.md").read_text(encoding="utf-8")
    of_episodes, of_turns = table.split("## Rewards of turns")
    for part, known in ((of_episodes, KNOWN), (of_turns, TURN_REWARDS)):
        named = re.findall(r"^\| `([^`]+)` \|", part, flags=re.MULTILINE)
        assert sorted(named) == sorted(known)


def test_a_name_alone_is_the_function_itself() -> None:
    for name, function in SHAPING.items():
        assert resolve_reward(name) is function
        assert function.__doc__


# --- through gym ---------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {"dataset": DATASET, "template": "question"}
BASIC = {"em", "f1", "cem", "format", "searches", "support_recall"}


def test_components_are_among_the_metrics_at_the_end() -> None:
    text = f"research+0.1*support_recall-0.02*searches+{OWN}"
    env = gym.make("SearchQA-v0", retriever=Engine(), reward=text, **SETTINGS)
    env.reset(seed=0, options={"question_id": "q3"})
    _, reward_now, _, _, info = env.step(search("3 and 4"))
    assert (reward_now, info["metrics"]) == (0.0, {})
    _, earned, _, _, info = env.step(answer("Founder 3"))
    components = {"research": 1.0, "support_recall": 1.0, "searches": 1.0, OWN: 2.0}
    assert earned == pytest.approx(1 + 0.1 - 0.02 + 2)
    assert set(info["metrics"]) == BASIC | {f"reward/{name}" for name in components}
    assert {name: info["metrics"][f"reward/{name}"] for name in components} == components
    env.reset(options={"question_id": "q3"})
    _, earned, _, _, info = env.step(search("fail"))  # void: nothing is scored
    assert (earned, info["void"]) == (0.0, True)
    assert info["metrics"] == dict.fromkeys(
        (*BASIC, *(f"reward/{name}" for name in components)), 0.0
    )


def test_a_single_reward_adds_no_metric() -> None:
    for name in ("research", "support_recall", OWN):
        env = gym.make("SearchQA-v0", retriever=Engine(), reward=name, **SETTINGS)
        env.reset(seed=0)
        *_, info = env.step(answer("x"))
        assert set(info["metrics"]) == BASIC


def test_vector_environments_report_them_too() -> None:
    envs: Any = gym.make_vec(
        "ReSearch-MiniWorld-v0", num_envs=2, reward="f1-0.02*searches", autoreset_mode="Disabled"
    )
    envs.reset(seed=7)
    _, rewards, *_, infos = envs.step([answer("x"), search("city")])
    assert list(rewards) == [0.0, 0.0]
    envs.send([1], [answer("y")])
    [result] = envs.recv(min_results=1)
    assert result.reward == pytest.approx(-0.02)
    assert result.info["metrics"]["reward/searches"] == 1.0
    assert infos["metrics"]
    envs.close()


def test_the_text_goes_through_the_spec() -> None:
    text = "research+0.1*support_recall-0.02*searches"
    env = gym.make("ReSearch-MiniWorld-v0", reward=text, template="question")
    assert env.spec is not None
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    again.reset(seed=1)
    *_, info = again.step(answer("x"))
    assert info["metrics"]["reward/support_recall"] == 0.0
