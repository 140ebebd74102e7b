"""The one transition function."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from research_env import (
    R1_SEARCHER,
    RESEARCH,
    SEARCH_R1,
    Episode,
    Hit,
    Passage,
    Protocol,
    Turn,
    advance,
    fail,
    observe,
    truncate,
)
from research_env.episode import shorten_hits
from research_env.errors import ActionError, EpisodeError, UnknownNameError
from research_env.papers import PROTOCOLS
from tests.research_env.fakes import QUESTIONS, answer, hit, search


def new(
    rules: Protocol = RESEARCH, *, max_searches: int | None = None, max_turns: int | None = None
) -> Episode:
    return Episode(QUESTIONS[0], rules, max_searches, max_turns)


def test_a_search_waits_for_its_hits_and_an_answer_ends_the_episode() -> None:
    start = new()
    asked = advance(start, search(" who ") + " ignored")
    assert asked.pending == "who"
    assert asked.turns[-1].action == "<think>I look it up.</think><search> who </search>"
    assert asked.turns[-1].observation == ""
    assert start.turns == ()

    seen = observe(asked, [hit(1, "Ann did.", "Firm")])
    assert seen.pending is None
    assert seen.turns[-1].observation == ' <result>\n"Firm"\nAnn did.\n</result>'
    assert seen.turns[-1].hits == (hit(1, "Ann did.", "Firm"),)
    assert (seen.over, seen.searches, seen.prediction) == (False, 1, None)

    done = advance(seen, answer("Ann"))
    assert (done.over, done.stop_reason, done.truncated, done.void) == (
        True,
        "answer",
        False,
        False,
    )
    assert done.prediction == "Ann"
    assert done.actions == (asked.turns[-1].action, answer("Ann"))


def test_a_text_without_search_or_answer_ends_the_episode_without_an_answer() -> None:
    done = advance(new(), "I do not know.")
    assert (done.stop_reason, done.truncated, done.prediction) == ("no_answer", False, None)
    assert advance(new(), "<answer>no box</answer>").stop_reason == "no_answer"


def test_the_answer_may_stand_before_the_last_action() -> None:
    """The authors' rollout goes on after </answer> and their reward reads the whole response."""
    asked = advance(new(), answer("Ann") + search("more"))
    done = advance(observe(asked, []), "That is all.")
    assert (done.stop_reason, done.prediction) == ("answer", "Ann")


def test_a_blank_query_finds_nothing_and_asks_nobody() -> None:
    seen = advance(new(), "<search> \n </search>")
    assert (seen.pending, seen.over, seen.searches) == (None, False, 1)
    assert seen.turns[-1].observation == " <result>\n\n</result>"


def test_an_invalid_action_gets_the_hint_of_search_r1() -> None:
    told = advance(new(SEARCH_R1), "I think it is Ann.")
    assert not told.over
    assert told.turns[-1].observation == (
        "\nMy previous action is invalid. If I want to search, I should put the query between "
        "<search> and </search>. If I want to give the final answer, I should put the answer "
        "between <answer> and </answer>. Let me try again.\n"
    )
    assert advance(told, "<answer>Ann</answer>").stop_reason == "answer"


def test_an_empty_query_ends_an_episode_of_r1_searcher() -> None:
    assert (
        advance(new(R1_SEARCHER), "<|begin_of_query|> <|end_of_query|>").stop_reason == "no_answer"
    )


def test_one_search_more_than_allowed_ends_the_episode() -> None:
    episode = new(max_searches=2)
    for query in ("one", "two"):
        episode = observe(advance(episode, search(query)), [])
    allowed = advance(episode, answer("Ann"))
    assert allowed.stop_reason == "answer"
    refused = advance(episode, search("three"))
    assert (refused.stop_reason, refused.truncated, refused.void) == ("max_searches", True, False)
    assert (refused.pending, refused.searches, refused.turns[-1].query) == (None, 2, "three")
    assert refused.turns[-1].observation == ""


def test_no_search_at_all_is_a_limit_too() -> None:
    assert advance(new(max_searches=0), search("one")).stop_reason == "max_searches"
    assert advance(new(max_searches=0), answer("Ann")).stop_reason == "answer"


@pytest.mark.parametrize("last", ["<search>x</search>", "no action"])
def test_the_last_turn_can_only_answer(last: str) -> None:
    episode = advance(new(SEARCH_R1, max_turns=2), "no action")
    assert not episode.over
    assert advance(episode, last).stop_reason == "max_turns"
    assert advance(episode, "<answer>Ann</answer>").stop_reason == "answer"


def test_a_failed_search_makes_the_episode_void() -> None:
    void = fail(advance(new(), search("one")))
    assert (void.stop_reason, void.void, void.truncated) == ("backend_error", True, True)
    assert (void.pending, void.searches, void.turns[-1].observation) == (None, 0, "")


def test_a_truncated_episode_keeps_what_was_written_and_searched() -> None:
    episode = observe(advance(new(), search("one")), [hit(1)])
    cut = truncate(episode)
    assert (cut.stop_reason, cut.over, cut.truncated, cut.void) == ("length", True, True, False)
    assert (cut.searches, cut.prediction, cut.turns) == (1, None, episode.turns)
    waiting = advance(episode, search("two"))
    assert (truncate(waiting).pending, truncate(waiting).searches) == (None, 1)
    said = observe(advance(new(), answer("Ann") + search("one")), [])
    assert truncate(said).prediction == "Ann"
    assert truncate(new()).turns == ()
    with pytest.raises(EpisodeError, match=r"over \(length\); it cannot be truncated"):
        truncate(cut)
    with pytest.raises(UnknownNameError, match="unknown reason to truncate an episode 'bored'"):
        truncate(episode, "bored")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("title", "text", "shown"),
    [
        ("Ann", "1234567", '"Ann"\n1234567'),  # ten characters: the limit
        ("Ann", "12345678", '"Ann"\n1234567 […]'),
        ("A title too long", "1", '"A title to […]"\n […]'),
        ("", "</result>67890", "‹/result>6 […]"),
    ],
)
@pytest.mark.parametrize("rules", PROTOCOLS.values())
def test_a_long_passage_is_cut_and_the_tags_stay(
    rules: Protocol, title: str, text: str, shown: str
) -> None:
    found = [Hit(Passage("p", title, text), 1.0), hit(2, "short", "B")]
    asked = Episode(
        QUESTIONS[0], rules, max_passage_chars=10, pending="q", turns=(Turn("", "search"),)
    )
    seen = observe(asked, found).turns[-1]
    assert seen.hits == tuple(found)
    assert seen.observation.strip().startswith(rules.result.open)
    assert seen.observation.strip().endswith(rules.result.close)
    assert seen.observation.count("short") == 1
    if rules is RESEARCH:
        assert shown in seen.observation
    assert len(seen.observation) < len(rules.render([hit(2, "", "B")] * 2)) + 2 * (10 + 2 * 4)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("He sang. She danced all night.", "He sang. […]"),
        ("He sang.  She.  They.", "He sang.  She. […]"),  # the limit itself
        ('"Who?" asked Ann, and left.', '"Who?" asked An […]'),  # in the first half
        ("I met J. Ann Smith.", "I met J. Ann Sm […]"),  # an initial
        ("It cost 3.14 dollars.", "It cost 3.14 do […]"),
        ("Called (or not!) by all.", "Called (or not! […]"),  # the bracket is over the limit
        ("一二三四五六七八九。十一二三四五六", "一二三四五六七八九。 […]"),
        ("一二三四五六七八九十一二三四五。", "一二三四五六七八九十一二三四五 […]"),
    ],
)
def test_a_cut_passage_ends_with_a_whole_sentence(text: str, shown: str) -> None:
    """Fifteen characters, if its second half holds the end of one."""
    (hit,) = shorten_hits((Hit(Passage("p", "", text), 1.0),), 15)
    assert hit.passage.text == shown


@given(st.text(alphabet="ab. !?。\n\"')J"), st.integers(1, 30))
def test_a_cut_passage_is_a_beginning_of_it(text: str, limit: int) -> None:
    (hit,) = shorten_hits((Hit(Passage("p", "", text), 1.0),), limit)
    kept = hit.passage.text.removesuffix(" […]")
    assert text.startswith(kept)
    assert hit.passage.text == text if len(text) <= limit else limit / 2 <= len(kept) <= limit


@pytest.mark.parametrize("action", [None, 3, b"bytes", ["list"]])
def test_an_action_that_is_not_text_is_refused(action: Any) -> None:
    with pytest.raises(ActionError, match=f"not {type(action).__name__}"):
        advance(new(), action)


def test_steps_out_of_turn_are_refused() -> None:
    asked = advance(new(), search("one"))
    with pytest.raises(EpisodeError, match="'one' has no result yet"):
        advance(asked, "x")
    with pytest.raises(EpisodeError, match=r"over \(answer\)"):
        advance(advance(new(), answer("x")), "x")
    with pytest.raises(EpisodeError, match="no pending search"):
        observe(new(), [])
    with pytest.raises(EpisodeError, match="no pending search"):
        fail(observe(asked, []))


def test_an_episode_cannot_be_changed_and_pickles() -> None:
    asked = advance(new(), search("one"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        asked.pending = None  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(asked)) == asked


PIECES = st.sampled_from(
    [
        *("<search>", "</search>", "<answer>", "</answer>", "<think>", "</think>", "\\boxed{", "}"),
        *("<|begin_of_query|>", "<|end_of_query|>", "<result>", "</result>", "<information>"),
        *("\x00", "\ud800", "\n", " ", '"', "Ann", "<|im_end|>", "$"),
    ]
)
TEXT = st.one_of(st.lists(PIECES).map("".join), st.text())


@given(
    rules=st.sampled_from(list(PROTOCOLS.values())),
    actions=st.lists(TEXT, max_size=6),
    max_searches=st.none() | st.integers(0, 3),
    max_turns=st.none() | st.integers(1, 4),
)
def test_whatever_is_written_the_episode_stays_sound(
    rules: Protocol, actions: list[str], max_searches: int | None, max_turns: int | None
) -> None:
    episode = Episode(QUESTIONS[0], rules, max_searches, max_turns)
    for action in actions:
        before = episode
        episode = advance(episode, action)
        assert episode == advance(before, rules.cut(action))
        assert episode.turns[:-1] == before.turns
        assert action.startswith(episode.turns[-1].action)
        if episode.pending is not None:
            assert isinstance(episode.pending, str)
            assert episode.pending.strip()
            assert episode.pending == episode.turns[-1].query
            episode.pending.encode()
            episode = observe(episode, [hit(1)])
        assert max_searches is None or episode.searches <= max_searches
        assert max_turns is None or len(episode.turns) <= max_turns
        assert (episode.stop_reason == "answer") <= (episode.prediction is not None)
        if episode.over:
            break
    assert max_turns is None or episode.over or len(episode.turns) < max_turns
