from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from research_env.retrieval.retry import Deadline, Retry, retry_after

SECONDS = st.floats(0, 1e6)


def test_pauses_double_up_to_the_longest_and_keep_half_as_a_floor() -> None:
    retry = Retry(deadline=100, first=1.0, longest=5.0)
    least = [retry.pause(n, 100, draw=lambda: 0.0) for n in range(5)]
    middle = [retry.pause(n, 100, draw=lambda: 0.5) for n in range(5)]
    assert least == [0.5, 1.0, 2.0, 2.5, 2.5]
    assert middle == [0.75, 1.5, 3.0, 3.75, 3.75]


def test_the_server_may_ask_for_more() -> None:
    retry = Retry(first=1.0, longest=5.0)
    assert retry.pause(0, 100, asked=7.0, draw=lambda: 0.0) == 7.0
    assert retry.pause(0, 100, asked=7.0, draw=lambda: 0.5) == 7.25
    assert retry.pause(0, 100, asked=0.0, draw=lambda: 0.0) == 0.0


def test_a_pause_that_would_end_after_the_deadline_is_not_made() -> None:
    retry = Retry(first=1.0, longest=5.0)
    assert retry.pause(0, 0.5, draw=lambda: 0.0) is None
    assert retry.pause(0, 0.51, draw=lambda: 0.0) == 0.5
    assert retry.pause(0, 100, asked=100.0, draw=lambda: 0.0) is None


@given(
    st.integers(0, 10_000),
    SECONDS,
    st.none() | SECONDS,
    st.floats(0, 1, exclude_max=True),
)
def test_a_pause_fits_into_the_time_left_and_honors_the_server(
    attempt: int, left: float, asked: float | None, drawn: float
) -> None:
    pause = Retry().pause(attempt, left, asked, draw=lambda: drawn)
    if pause is not None:
        assert 0 <= pause < left
        assert pause >= (asked or 0)
    else:
        assert left <= (asked or 0) + Retry().longest


def test_many_clients_do_not_come_back_together() -> None:
    assert len({Retry().pause(3, 100) for _ in range(50)}) > 40
    assert len({Retry().pause(3, 100, asked=1.0) for _ in range(50)}) > 40


NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("", None),
        ("0", 0.0),
        (" 120 ", 120.0),
        ("1.5", 1.5),
        ("-1", None),
        ("soon", None),
        ("nan", None),
        ("inf", None),
        ("9" * 400, None),
        ("Sun, 01 Mar 2026 12:00:30 GMT", 30.0),
        ("Sun, 01 Mar 2026 13:00:30 +0100", 30.0),
        ("Sun, 01 Mar 2026 12:00:30 -0000", 30.0),
        ("Sun, 01 Mar 2026 11:00:00 GMT", 0.0),
        ("Sun, 99 Mar 2026 11:00:00 GMT", None),
    ],
)
def test_retry_after_in_both_forms(header: str | None, seconds: float | None) -> None:
    assert retry_after(header, NOW) == seconds


@given(st.text(max_size=40))
def test_any_header_is_read_or_ignored(header: str) -> None:
    read = retry_after(header)
    assert read is None or read >= 0


def test_a_deadline_runs_out() -> None:
    assert 0 < Deadline.after(50).left() <= 50
    assert Deadline.after(-1).left() == 0.0
