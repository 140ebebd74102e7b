"""The learner's benchmark: what it counts is right, and its gates can fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import learner as bench
from benchmarks.synthetic import make_groups, make_model


def test_trajectories_have_the_lengths_asked_for_and_end_in_an_action() -> None:
    groups = make_groups([8192, 900, 64, 3000, 20], 100)
    made = [t for group in groups for t in group.trajectories]
    assert [len(t.tokens) for t in made] == [8192, 900, 64, 3000, 20]
    assert all(t.segments[-1].provenance == "action" for t in made)
    assert 0.1 < made[0].num_action_tokens / 8192 < 0.3


def test_a_difference_is_seen() -> None:
    one = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    assert bench.difference(one, one) == 0
    other = {"a": torch.tensor([0.0, 3.0]), "b": torch.tensor([4.0])}
    assert bench.difference(other, one) == pytest.approx(18**0.5 / 5)


@pytest.mark.slow
def test_our_update_is_trls(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    names = ("ours, best", "TRL, float32, no checkpointing, batch 4")
    rows = [bench.race_alone(name, 8, 0.05, 2, tmp_path) for name in names]
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-5)
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], abs=1e-6)
    start = make_model(bench.RACE_SIZES, "cpu").state_dict()
    ours, theirs = (
        {n: w - start[n] for n, w in torch.load(tmp_path / f"{name}.pt").items()} for name in names
    )
    assert bench.difference(ours, theirs) < 1e-2
    assert 0 <= rows[0]["outside"] < 1
