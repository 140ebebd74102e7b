"""The learner's passes keep many ranks occupied, by the learner's own functions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks import scaling
from research_agent.batch import Batch


@pytest.fixture(scope="module")
def step() -> Batch:
    return scaling.make_step()


def test_the_step_is_that_of_research(step: Batch) -> None:
    lengths = [len(tokens) for tokens in step.tokens]
    assert len(lengths) == 256 * 5 and max(lengths) == 8_704
    assert sum(lengths) / len(lengths) == pytest.approx(1_300, rel=0.03)


@pytest.mark.parametrize(("ranks", "goal"), [(8, 0.95), (64, 0.9), (256, 0.75)])
def test_ranks_are_occupied(step: Batch, ranks: int, goal: float) -> None:
    had_group = dist.is_initialized()  # an engine of earlier tests may hold one
    row = scaling.measure(step, ranks)
    assert row.efficiency >= goal
    assert row.efficiency > row.before
    assert row.tokens <= scaling.MICRO_BATCH_TOKENS
    assert dist.is_initialized() == had_group


def test_efficiency_by_hand() -> None:
    # Three ranks, passes of 5, 4, 4 and 2 tokens: rounds of 5 and 2, the last pass is repeated.
    assert scaling._rounds([5, 4, 4, 2], 3) == [5, 2]


def test_the_table_of_plans_is_that_of_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    """After a change: python -m benchmarks.scaling --plans --write."""
    scaling.main(["--plans"])
    table = capsys.readouterr().out
    assert f"<!-- table -->\n{table}<!-- end -->" in scaling.PAGE.read_text(encoding="utf-8")
    assert "does not fit" not in table
    names = {name for line in table.splitlines() for name in line.split("|")[1].split(", ")}
    assert {name.strip() for name in names} >= set(scaling.paper_presets())
    assert len(scaling.paper_presets()) == 9


def test_writing_replaces_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table -->\nold\n<!-- end -->\nafter\n", encoding="utf-8")
    monkeypatch.setattr(scaling, "PAGE", page)
    monkeypatch.setattr(scaling, "plans", lambda: "new\n")
    scaling.main(["--plans", "--write"])
    expected = "before\n<!-- table -->\nnew\n<!-- end -->\nafter\n"
    assert page.read_text(encoding="utf-8") == expected
