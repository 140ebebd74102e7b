"""Strategies that know nothing, in a small world of their own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.cheap_strategies import PROTOCOLS, STRATEGIES, play, rewards_of
from research_env import Dataset, Hit, Passage, Question
from research_env.core import make_core
from research_env.rewards import REWARDS, SHAPING
from tests.research_env.fakes import Engine

QUESTION = Question("q", "Which city has Ann Bell seen?", ("Paris",))
HITS = [Hit(Passage("p", "Paris", "Paris is a city, and one of many words that are copied."), 1.0)]
COPIED, TITLE, GIVES_UP = "copies all passages", "copies the first title", "gives up"


@pytest.mark.parametrize(
    ("reward", "strategy", "earned"),
    [
        ("research", TITLE, 1.0),
        ("research", GIVES_UP, 0.0),
        ("research", "a wrong answer", 0.1),
        ("cem", COPIED, 1.0),
        ("guarded-cem", COPIED, 0.0),
        ("guarded-cem", TITLE, 1.0),
        ("r1-searcher-stage1", COPIED, 2.0),
        ("guarded-r1-searcher-stage1", COPIED, 0.0),
        ("guarded-r1-searcher-stage1", TITLE, 2.0),
        ("guarded-r1-searcher-stage1", GIVES_UP, -1.0),
        ("r1-searcher-stage2", COPIED, 2 / 13 - 2),  # P 1/12, R 1; more than ten words
        ("search-r1", TITLE, 1.0),
        ("search-r1-format", "searches, a wrong answer", 0.2),
    ],
)
def test_what_a_strategy_earns(reward: str, strategy: str, earned: float) -> None:
    (protocol,) = (name for name in PROTOCOLS if reward in rewards_of(name))
    data = Dataset("one", [QUESTION], None)
    core = make_core(dataset=data, retriever=Engine(), protocol=protocol)
    chosen = next(each for each in STRATEGIES if each.name == strategy)
    function = (REWARDS | SHAPING)[reward]
    assert function(play(core, QUESTION, chosen, HITS)) == pytest.approx(earned)


def test_the_page_has_the_cheapest_strategy_of_every_reward() -> None:
    page = Path(__file__).parents[2] / "docs" / "how-to" / "rewards.md"
    _, _, table = page.read_text(encoding="utf-8").partition("## What knowing nothing pays")
    rows = dict(re.findall(r"^\| ([\w-]+) \| ([^|]+) \|", table, flags=re.MULTILINE))
    assert rows.pop("reward") == "strategy"
    assert rows.keys() == {reward for each in PROTOCOLS for reward in rewards_of(each)}
    assert set(rows.values()) <= {strategy.name for strategy in STRATEGIES}
