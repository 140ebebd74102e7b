"""The GPU script runs as it will on a GPU, with a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.synthetic import TINY, make_model
from research_agent.trajectory import Group, Segment, Trajectory


def test_the_flops_are_those_that_torch_counts() -> None:
    """Forward and backward of the whole model, with the head everywhere and attention whole."""
    from torch.utils.flop_counter import FlopCounterMode

    sizes = {**TINY, "vocab_size": 300}
    model = make_model(sizes, "cpu")
    model.set_attn_implementation("eager")
    tokens = 32
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(tokens)[None], use_cache=False).logits.sum().backward()
    segments = (Segment("prompt", (0,)), Segment("action", tuple(range(1, tokens)), (-1.0,) * 31))
    groups = [Group(0, [Trajectory(0, 0, segments, 0.0, True, False)])]
    strict, loose = gpu.needed_flops(sizes, groups)
    assert loose == pytest.approx(counter.get_total_flops(), rel=1e-3)
    head, pairs = 6 * 300 * 64, 2 * 64 * tokens**2
    assert loose - strict == pytest.approx(head + 6 * pairs)  # one token and half of attention


def test_buckets_fill_a_room_and_none_is_cut() -> None:
    assert gpu._buckets([3, 3, 3, 9, 1], 7) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert gpu._buckets([1, 1, 1], 7) == [(0, 3)]


def test_every_part_measures(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--tiny", "--output", str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / gpu.FILE).read_text().splitlines()]
    assert ended.value.code == 0, lines
    assert not [line for line in lines if "error" in line]
    found = {line["what"]: line for line in lines}
    assert found.keys() == {"machine", *gpu.PARTS}
    assert 0 < found["learner"]["mfu"] < 1 and found["learner"]["tokens_per_second"] > 0
    # float32 weights and two moments of each are 12 bytes; names and tokenizer are little
    assert 12 <= found["checkpoint"]["bytes_per_weight"] < 13
    assert [line["bucket_mib"] for line in lines if line["what"] == "transfer"] == [256] * 2 + [
        1024
    ] * 2
    assert found["transfer"]["gb_per_second"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [gpu.FILE]


def test_a_part_that_fails_is_told_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(bench: gpu.Bench) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setitem(gpu.PARTS, "learner", fails)
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--tiny", "--output", str(tmp_path), "--parts", "learner", "checkpoint"])
    lines = [json.loads(line) for line in (tmp_path / gpu.FILE).read_text().splitlines()]
    assert ended.value.code == 1
    assert lines[1]["error"] == "RuntimeError: no memory"
    assert lines[-1]["what"] == "checkpoint" and "error" not in lines[-1]
