"""What one rank fails at: every rank ends, and the cause is told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.research_agent.torchrun import in_two_processes


@pytest.fixture(scope="module")
def said() -> list[dict[str, Any]]:
    """What rank 0 and rank 1 say."""
    lines = in_two_processes("tests.research_agent.failing_ranks").splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return sorted(found, key=lambda each: "lost" in each)


@pytest.mark.slow
def test_an_error_of_one_rank_alone_is_told_by_that_rank(said: list[dict[str, Any]]) -> None:
    assert [each["fail_alone"] for each in said] == [None, "ConfigError: rank 1 alone"]
    first, second = (each["fail_alike"] for each in said)
    assert (first, second[:12]) == ("ConfigError: both", "StoppedError")


@pytest.mark.slow
def test_a_rank_that_cannot_write_weights_stops_the_others(said: list[dict[str, Any]]) -> None:
    first, second = (each["fill_the_disk"] for each in said)
    assert first.startswith("EngineError: the weights cannot be written to ")
    assert second.startswith("StoppedError")


@pytest.mark.slow
def test_all_ranks_pack_alike(said: list[dict[str, Any]]) -> None:
    first, second = (each["pack_on_one_rank"] for each in said)
    assert first == second != 0


@pytest.mark.slow
def test_the_end_of_rank_0_is_told_by_the_others(said: list[dict[str, Any]]) -> None:
    assert said[1]["lost"].startswith("RankError: another rank stopped or did not answer")
