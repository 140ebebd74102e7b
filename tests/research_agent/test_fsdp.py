"""Two processes learn what one learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from research_agent import distributed
from tests.research_agent.fsdp_worker import learn
from tests.research_agent.torchrun import in_two_processes


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"packing": "on"}, {"packing": "off", "gradient_checkpointing": True, "minibatches": 2}],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_two_processes_come_to_the_weights_of_one(tmp_path: Path, settings: dict[str, Any]) -> None:
    learn(str(tmp_path / "one.pt"), **settings)
    two_file = str(tmp_path / "two.pt")
    in_two_processes("tests.research_agent.fsdp_worker", two_file, json.dumps(settings))
    one, two = (torch.load(tmp_path / name) for name in ("one.pt", "two.pt"))
    for which in ("weights", "after"):
        assert one[which].keys() == two[which].keys()
        for name, weight in one[which].items():
            assert torch.allclose(two[which][name], weight, rtol=1e-6, atol=1e-9), (which, name)
    for ours, theirs in zip(one["metrics"], two["metrics"], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-6, abs=1e-9)
    # A number that is not finite stops all processes, and none waits for the others.
    assert "not finite" in one["cause"] or "is nan" in one["cause"]
    assert "not finite" in two["cause"] or "is nan" in two["cause"]


@pytest.mark.parametrize(("count", "size"), [(0, 2), (1, 2), (4, 2), (5, 2), (2, 3)])
def test_passes_are_dealt_out_evenly_and_each_counts_once(
    count: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dealt = []
    for rank in range(size):
        monkeypatch.setattr(distributed, "rank_and_size", lambda rank=rank: (rank, size))
        dealt.append(list(distributed.shard_batches(range(count))))
    assert len({len(passes) for passes in dealt}) == 1
    assert sorted(i for passes in dealt for i, counts in passes if counts) == list(range(count))
