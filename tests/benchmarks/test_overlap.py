from __future__ import annotations

import pytest

from benchmarks.overlap import Config, main


@pytest.mark.usefixtures("forks")
def test_a_tiny_run_measures_both(capsys: pytest.CaptureFixture[str]) -> None:
    found = main(Config(staleness=(0, 1), tiny=True))
    assert found[0].staleness_max == 0
    assert found[1].staleness_max <= 1
    assert all(run.rate > 0 for run in found.values())
    header, *rows = capsys.readouterr().out.splitlines()[1:]
    assert header.split()[:3] == ["max-staleness", "steps/s", "ratio"]
    assert [row.split()[0] for row in rows] == ["0", "1"]
    assert rows[0].split()[2] == "1.00"
