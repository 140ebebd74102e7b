"""The papers' recipes run in MiniWorld; whether they learn is for the benchmarks."""

from __future__ import annotations

from pathlib import Path

import pytest

from research_agent.cli import main
from research_agent.presets import PRESETS
from research_agent.run_logger import read_lines

SAME = ("research-7b-instruct", "research-32b", "research-32b-instruct")  # as research-7b
MINIS = [name for name in PRESETS if name.endswith("-mini") and not name.startswith(SAME)]


@pytest.mark.parametrize("name", MINIS)
def test_a_recipe_in_miniature_makes_steps(name: str, tmp_path: Path) -> None:
    words = f"train {name} --steps 2 --prompts-per-step 10 --group-size 2 --eval-every None --quiet"
    stages = PRESETS[name].rollout.stages
    if stages:  # as short as the test
        words += " --max-response 128"
    more = ["--stages", f"steps=1 {stages[0].split(maxsplit=2)[2]}", stages[1]] if stages else []
    main([*words.split(), *more, "--output", str(tmp_path)])
    records = read_lines(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2]
    assert [record.get("stage") for record in records] == ([1, 2] if stages else [None, None])
    components = {key for key in records[0] if key.startswith("env/reward/")}
    assert components == ({"env/reward/retrieved", "env/reward/format"} if stages else set())
    assert records[0]["learner/optimizer_steps"] == PRESETS[name].learner.minibatches
