"""The benchmark of the adapters: its server counts, and each system plays every episode."""

from __future__ import annotations

import json
import time

import httpx
import pytest

from benchmarks.adapter_systems import FRAMEWORKS
from benchmarks.adapters import SearchServer, main


def test_a_tiny_race(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--tiny", "--json", "--only", "skyrl-gym", "GEM", "TorchRL"])
    result = json.loads(capsys.readouterr().out)
    played = [(row["framework"], row["parallel"]) for row in result["rows"]]
    kinds = [kind for name, kind in played if name == "GEM"]
    assert kinds == [False, False, False, True, True, True]
    assert set(result["times_peer"]) == {
        f"{name}, {kind}"
        for name in ("skyrl-gym", "GEM")
        for kind in ("one at a time", "in parallel")
    }
    for row in result["rows"]:
        assert row["episodes_per_second"] > 0
        if row["system"] == "framework alone":
            assert (row["calls_per_search"], row["of_framework_alone"]) == (0.0, 1.0)
        elif row["system"].startswith(("adapter", "research_env")):
            assert 0 < row["calls_per_search"] <= 1
        else:
            assert row["calls_per_search"] == 1.0
    assert "TRL" not in result["missing"]
    assert set(result["missing"]) <= set(FRAMEWORKS)


def test_the_server_takes_its_time_for_a_request_and_counts() -> None:
    server = SearchServer(0.05, parallel=False)
    try:
        began = time.perf_counter()
        reply = httpx.post(server.url, json={"queries": ["a", "b", "c"], "topk": 3})
        assert time.perf_counter() - began >= 0.05
        assert len(reply.json()["result"]) == 3
        assert server.counts() == (1, 3)
    finally:
        server.stop()
