"""The learner's benchmark: what it counts is right, and its gates can fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import learner as bench
from research_agent.trajectory import Group, Segment, Trajectory


def test_the_flops_are_those_that_torch_counts() -> None:
    """Forward and backward of the whole model, with the head everywhere and attention whole."""
    from torch.utils.flop_counter import FlopCounterMode

    sizes = {**bench.TINY, "vocab_size": 300}
    model = bench.make_model(sizes, "cpu")
    model.set_attn_implementation("eager")
    tokens = 32
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(tokens)[None], use_cache=False).logits.sum().backward()
    segments = (Segment("prompt", (0,)), Segment("action", tuple(range(1, tokens)), (-1.0,) * 31))
    groups = [Group(0, [Trajectory(0, 0, segments, 0.0, True, False)])]
    strict, loose = bench.needed_flops(sizes, groups)
    assert loose == pytest.approx(counter.get_total_flops(), rel=1e-3)
    head, pairs = 6 * 300 * 64, 2 * 64 * tokens**2
    assert loose - strict == pytest.approx(head + 6 * pairs)  # one token and half of attention


def test_trajectories_have_the_lengths_asked_for_and_end_in_an_action() -> None:
    groups = bench.make_groups([8192, 900, 64, 3000, 20], 100)
    made = [t for group in groups for t in group.trajectories]
    assert [len(t.tokens) for t in made] == [8192, 900, 64, 3000, 20]
    assert all(t.segments[-1].provenance == "action" for t in made)
    assert 0.1 < made[0].num_action_tokens / 8192 < 0.3


def test_agreement_sees_a_difference() -> None:
    one = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    same = bench.agreement(one, one)
    assert same == pytest.approx({"cosine": 1, "norm": 1, "difference": 0})
    other = bench.agreement({"a": torch.tensor([0.0, 3.0]), "b": torch.tensor([4.0])}, one)
    assert other == pytest.approx({"cosine": 16 / 25, "norm": 1, "difference": 18**0.5 / 5})


@pytest.mark.slow
def test_our_update_is_trls(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    names = ("ours, best", "TRL, float32, no checkpointing, batch 4")
    rows = [bench.race_alone(name, 8, 0.05, 2, tmp_path) for name in names]
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-5)
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], abs=1e-6)
    start = bench.make_model(bench.RACE_SIZES, "cpu").state_dict()
    ours, theirs = (
        {n: w - start[n] for n, w in torch.load(tmp_path / f"{name}.pt").items()} for name in names
    )
    assert bench.agreement(ours, theirs)["difference"] < 1e-2
    assert 0 <= rows[0]["outside"] < 1
