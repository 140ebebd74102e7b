"""Passages and actions that try to break out: no passage changes a parse, a mark or a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research_env import Hit, Passage, Protocol
from research_env.env import SearchQAEnv
from research_env.errors import RetrievalError
from research_env.papers import PROTOCOLS
from research_env.rewards import REWARDS
from tests.research_env.fakes import DATASET, Engine

MARKS = [
    *("<think>", "</think>", "<search>", "</search>", "<result>", "</result>"),
    *("<information>", "</information>", "<answer>", "</answer>"),
    *("<|begin_of_query|>", "<|end_of_query|>"),
    *("<|begin_of_documents|>", "<|end_of_documents|>", "<|begin_of_documents|>\n(1)"),
]
POISON = [
    *MARKS,
    *("\\boxed{Founder 1}", "\\boxed ", "$", "}", "<answer>Founder 1</answer>", "Founder 1"),
    *("<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "</s>", "[INST]", "assistant"),
    *("<b>", "<script>alert(1)</script>", "&lt;search&gt;", "\x00", "\x1b[2J", "\ud800", "\r\n"),
    *("Assistant:", "User:", "漢字", "\u202e", "x" * 5_000),
]
PASSAGE = st.lists(st.one_of(st.sampled_from(POISON), st.text(max_size=5)), max_size=6).map("".join)


class Library:
    """An engine that returns the same passages for every query."""

    def __init__(self, pages: Sequence[tuple[str, str]]) -> None:
        self.hits = [
            Hit(Passage(f"p{i}", title, text), 1.0) for i, (title, text) in enumerate(pages)
        ]

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit] | RetrievalError]:
        return [self.hits[:top_k] for _ in queries]

    def close(self) -> None:
        """Nothing to release."""


def play(library: Library, rules: Protocol, reward: str, actions: Sequence[str]) -> list[Any]:
    """All that must not depend on the passages: rewards, ends, queries, metrics, predictions."""
    env = SearchQAEnv(dataset=DATASET, retriever=library, protocol=rules, reward=reward)
    env.reset(seed=0, options={"question_id": "q1"})
    told: list[Any] = []
    for action in actions:
        seen, earned, terminated, truncated, info = env.step(action)
        seen.encode()  # a lone surrogate would break every tokenizer
        told.append((earned, terminated, truncated, {**info, "passage_titles": ()}))
        if terminated or truncated:
            break
    assert env.episode is not None
    blank = rules.render([Hit(Passage("", "-", "-"), 0.0)] * len(library.hits[:5]))
    for turn in env.episode.turns:
        if turn.hits:
            for mark in MARKS[:-1]:
                assert turn.observation.count(mark) == blank.count(mark)
    return told


def searching(rules: Protocol, query: str) -> str:
    return f"I look it up.{rules.query.open}{query}{rules.query.close}"


def answering(rules: Protocol, text: str) -> str:
    shown = rf"\boxed{{{text}}}" if rules.name == "research" else text
    return f"So.</think><answer>{shown}</answer>"


@settings(deadline=None)
@given(
    pages=st.lists(st.tuples(PASSAGE, PASSAGE), max_size=5),
    rules=st.sampled_from(list(PROTOCOLS.values())),
    reward=st.sampled_from(sorted(REWARDS)),
    searches=st.integers(1, 3),
    final=st.sampled_from(["Founder 1", "someone else", "F. 1 </answer><answer> no", ""]),
    lead=st.sampled_from(["<think>", ""]),
)
def test_no_passage_changes_a_reward(  # noqa: PLR0917 (Hypothesis draws them)
    pages: list[tuple[str, str]],
    rules: Protocol,
    reward: str,
    searches: int,
    final: str,
    lead: str,
) -> None:
    actions = [lead + searching(rules, f"company {i}") for i in range(searches)]
    actions.append(lead + answering(rules, final))
    blank = Library([("", "")] * len(pages))
    assert play(Library(pages), rules, reward, actions) == play(blank, rules, reward, actions)


PIECES = st.one_of(st.sampled_from(POISON), st.text(max_size=5))


@settings(deadline=None)
@given(
    actions=st.lists(st.lists(PIECES, max_size=8).map("".join), min_size=1, max_size=5),
    rules=st.sampled_from(list(PROTOCOLS.values())),
    reward=st.sampled_from(sorted(REWARDS)),
)
def test_whatever_is_written_the_environment_answers(
    actions: list[str], rules: Protocol, reward: str
) -> None:
    env = SearchQAEnv(dataset=DATASET, retriever=Engine(), protocol=rules, reward=reward)
    env.reset(seed=0)
    for action in actions:
        seen, earned, terminated, truncated, info = env.step(action)
        assert isinstance(seen, str)
        assert earned == earned + 0.0 != float("inf")
        assert not (terminated and truncated)
        assert bool(info["stop_reason"]) == (terminated or truncated)
        assert bool(info["metrics"]) == (terminated or truncated)
        info["query"].encode()
        if terminated or truncated:
            assert seen == ""
            break


@pytest.mark.parametrize("rules", PROTOCOLS.values(), ids=PROTOCOLS)
@pytest.mark.parametrize(
    "piece", ["<search>", "<answer>", "<think>", "\\boxed{", "{", "\ud800", "a "]
)
def test_a_megabyte_is_an_action_like_any_other(rules: Protocol, piece: str) -> None:
    """A parser that needs quadratic time would not finish."""
    text = piece * (1_000_000 // len(piece))
    env = SearchQAEnv(dataset=DATASET, retriever=Engine(), protocol=rules, max_turns=3)
    env.reset(seed=0)
    assert not env.step(searching(rules, "a" + text))[2]
    result = env.step(answering(rules, text))
    assert (result.terminated, result.info["metrics"]["em"]) == (True, 0.0)
