"""The cost of a step: the table is complete, and every system does play its episodes."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

from benchmarks.env_overhead import PASSAGES, SEARCH, STEPS, System, measure, ours

PARTS = ("reset", "search", "answer", "step")


def test_our_episode_searches_and_answers_as_the_table_says() -> None:
    assert len(SEARCH) == 500
    system = ours()
    step: Any = system.search
    system.reset()
    for _ in range(STEPS - 1):
        seen, _, terminated, truncated, info = step()
        assert info["passage_ids"] == tuple(passage.id for passage in PASSAGES)
        assert all(passage.text in seen for passage in PASSAGES)
        assert not (terminated or truncated)
    end: Any = system.answer
    _, reward, terminated, _, _ = end()
    assert (reward, terminated) == (1.0, True)


def test_a_step_is_the_mean_over_an_episode_with_its_reset() -> None:
    calls: list[str] = []
    fake = System(
        "fake",
        lambda: calls.append("reset"),
        lambda: calls.append("search"),
        lambda: calls.append("answer"),
    )
    [row] = measure([fake], rounds=2, episodes=3)
    assert calls == ["reset", "search", "search", "search", "answer"] * 6
    assert row["system"] == "fake"
    parts = row["reset"] + 3 * row["search"] + row["answer"]
    assert row["step"] == pytest.approx(parts / STEPS)
    assert all(row[part] > 0 for part in PARTS)


def test_the_command_times_all_systems_that_are_installed() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "benchmarks.env_overhead", "--json", "--rounds", "1"],
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(told.stdout)
    peers = {"gem-llm": "gem", "skyrl-gym": "skyrl_gym"}
    installed = [name for name, module in peers.items() if find_spec(module)]
    assert result["missing"] == sorted(set(peers) - set(installed))
    first = ["research_env", *installed]
    second = [*first, "research_env, http", "research_env, http, 64"]
    expected = [("search stubbed", name) for name in first]
    expected += [("socket stubbed", name) for name in second]
    assert [(row["cut"], row["system"]) for row in result["rows"]] == expected
    for row in result["rows"]:
        assert all(row[part] > 0 for part in PARTS)
        if row["system"] == "research_env":
            assert row["search_ratio"] == row["step_ratio"] == 1.0
    assert isinstance(result["cheap_enough"], bool)
    assert len(result["times_ours"]) == 3 * len(installed)
    assert all(times > 0 for times in result["times_ours"].values())
