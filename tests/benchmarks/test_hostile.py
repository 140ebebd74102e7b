from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import hostile, hostile_trials
from benchmarks.hostile_trials import Case, Row, run_section
from research_env.errors import DataError


def cases(folder: Path) -> Iterator[Case]:
    """One input of each outcome, and one after each that ends the process."""
    assert folder.is_dir()
    yield Case("refused in the answer", lambda place: True)
    yield Case("harmless", lambda place: False)
    yield Case("typed", typed)
    yield Case("raw", lambda place: bool(1 // 0))
    yield Case("a signal", killed)
    yield Case("after it", lambda place: not place.is_dir())
    yield Case("large", lambda place: not b"x" * (100 << 20))


def typed(place: Path) -> bool:
    raise DataError(f"{place}: not in order")


def killed(place: Path) -> bool:
    os.kill(os.getpid(), signal.SIGKILL)
    return place.is_dir()


def asleep(place: Path) -> bool:
    time.sleep(600)
    return place.is_dir()


def hanging(folder: Path) -> Iterator[Case]:
    yield Case("hangs", asleep)
    yield Case("after it", lambda place: False)


def test_every_outcome_is_counted() -> None:
    row = run_section("all", cases)
    assert (row.tried, row.refused, row.typed, row.harmless, row.killed) == (7, 3, 2, 3, 1)
    raw, ended = row.wrong
    assert raw.startswith("raw: raw ZeroDivisionError: ") and ended == "a signal: killed"
    assert row.peak_mb > 95


def test_an_input_that_never_ends_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostile_trials, "TIMEOUT", 3.0)
    row = run_section("all", hanging)
    assert (row.tried, row.killed, row.wrong) == (2, 1, ("hangs: killed",))


def test_a_wrong_input_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Row("good", 2, 1, 1, 1, 0, 3.0), Row("bad", 1, 1, 0, 0, 0, 0.0, ("x: raw KeyError",))]
    monkeypatch.setattr(hostile, "SECTIONS", {"some": lambda: rows})
    with pytest.raises(SystemExit) as stopped:
        hostile.main([])
    assert stopped.value.code == 1
    shown = capsys.readouterr().out
    assert (
        "| good                     |     2 |       1 |            1 |        1 |      0 |" in shown
    )
    assert "wrong: x: raw KeyError" in shown
    with pytest.raises(SystemExit):
        hostile.main(["--json"])
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["section"] for each in told] == ["good", "bad"]
    with pytest.raises(SystemExit) as stopped:
        hostile.main(["--only", "none of them"])
    assert stopped.value.code == 0


@pytest.mark.slow
def test_hostile_files_are_refused_by_our_errors_or_read_as_data() -> None:
    for row in hostile.hostile_files():
        assert row.wrong == ()
        assert row.tried >= 190
        assert row.typed == row.refused >= row.tried // 2
        assert row.peak_mb < 400


@pytest.mark.slow
def test_hostile_weight_files_are_refused_by_our_errors_or_read() -> None:
    (row,) = hostile.hostile_models()
    assert row.wrong == ()
    assert row.tried >= 250
    assert row.typed == row.refused >= 220
    assert row.peak_mb < 500


@pytest.mark.slow
def test_hostile_requests_are_refused_in_bounded_memory() -> None:
    (row,) = hostile.hostile_requests()
    assert row.wrong == ()
    assert row.tried >= 150
    assert row.typed == row.refused >= 140
    assert row.peak_mb < 700  # 60 requests of 16 MB took 5.2 GB
