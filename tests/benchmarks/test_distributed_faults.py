"""Faults in training on two ranks: one is caused here, and what is called right can be wrong."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import distributed_faults as faults
from benchmarks.faults import main


def test_every_step_is_expected_to_learn_from_its_own_tasks() -> None:
    assert list(faults.EXPECTED) == [1, 2, 3, 4]
    assert faults.EXPECTED[2][:5] == [(4, 0), (4, 1), (4, 2), (4, 3), (5, 0)]
    assert all(len(each) == 16 for each in faults.EXPECTED.values())


def test_what_was_learned_is_read_from_the_log(tmp_path: Path) -> None:
    records = [
        {"step": 1, "episode": 1, "sample": 0, "void": False},
        {"step": 1, "episode": 0, "sample": 1, "void": False},
        {"step": 2, "episode": 2, "sample": 0, "void": True},
    ]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "trajectories.jsonl").write_text(text)
    assert faults._learned(tmp_path) == ({1: [(0, 1), (1, 0)]}, 1)


def test_a_run_that_lost_something_is_not_right() -> None:
    good = faults.Row("fault", True, 1, faults.STEPS, 64, 0, True, 0, 1.0)
    assert good.is_right
    for wrong in ({"happened": False}, {"steps": 3}, {"void": 1}, {"same": False}):
        assert not replace(good, **wrong).is_right


@pytest.mark.slow
def test_a_server_killed_while_it_loads_weights_loses_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the tests' servers, which need no vLLM."""
    monkeypatch.setattr(faults, "PROGRAM", (sys.executable, "-m", "tests.research_agent.fake_vllm"))
    monkeypatch.setenv("FAKE_VLLM_RELOAD", "0.5")
    with pytest.raises(SystemExit) as ended:
        main(["--distributed", "--json", "--only", "loads weights"])
    row = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0, row
    assert row["happened"] and row["same"] and row["void"] == 0
    assert row["back"] and row["starts"] == 1
