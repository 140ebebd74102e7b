from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from research_agent.evaluation import statistics
from research_agent.evaluation.statistics import (
    bootstrap,
    interval,
    mcnemar,
    pass_at_k,
    two_sided_p,
)


def test_one_question_leaves_nothing_to_draw() -> None:
    means = bootstrap([[2.0, 6.0]], [4], resamples=50)
    assert means.shape == (50, 2)
    assert (means == [0.5, 1.5]).all()
    assert interval(means) == [(0.5, 0.5), (1.5, 1.5)]


def test_questions_are_drawn_and_with_them_all_their_episodes() -> None:
    # Question A: one episode, right. Question B: three, none right. The pairs AA, AB, BA, BB have
    # 2 of 2, 1 of 4, 1 of 4 and 0 of 6 right.
    means = bootstrap([[1.0], [0.0]], [1, 3])
    values, counts = np.unique(means, return_counts=True)
    assert values.tolist() == [0.0, 0.25, 1.0]
    assert counts / len(means) == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    assert interval(means) == [(0.0, 1.0)]


@pytest.mark.parametrize("at_once", [1, 40])
def test_the_means_are_those_of_a_plain_loop(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_AT_ONCE", at_once)
    sums = np.random.default_rng(1).random((7, 2))
    counts = [1, 2, 3, 1, 1, 5, 2]
    generator = np.random.default_rng(5)
    expected = []
    for _ in range(30):
        drawn = [int(generator.integers(7)) for _ in range(7)]
        episodes = sum(counts[i] for i in drawn)
        expected.append([sum(sums[i][m] for i in drawn) / episodes for m in range(2)])
    # A loop that draws one at a time takes the same numbers from the generator.
    assert bootstrap(sums, counts, resamples=30, seed=5) == pytest.approx(np.array(expected))


def test_percentiles_of_a_list_worked_by_hand() -> None:
    means = np.arange(41, dtype=np.float64)[:, None]  # 2.5 % and 97.5 % of the way from 0 to 40
    [spread] = interval(means)
    assert spread == pytest.approx((1.0, 39.0))


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([0.1] * 9, 0.2),  # none of 9 is on the other side: 2 (0 + 1) / 10
        ([-0.1] * 9, 0.2),
        ([-1.0, 1.0, 1.0, 1.0], 0.8),  # one of 4: 2 (1 + 1) / 5
        ([-1.0, 1.0], 1.0),
        ([0.0] * 9, 1.0),  # on both sides
        ([1e-17] * 9, 1.0),  # rounding
    ],
)
def test_two_sided_p_by_hand(differences: list[float], p: float) -> None:
    assert two_sided_p(np.array(differences)[:, None]) == pytest.approx([p])


def test_no_p_without_finite_numbers() -> None:
    nan, inf = np.nan, np.inf
    columns = np.array([[nan] * 4, [nan, 1.0, 1.0, 1.0], [inf, -inf, 1.0, 1.0], [1.0] * 4]).T
    assert two_sided_p(columns) == pytest.approx([nan, nan, nan, 0.4], nan_ok=True)


def test_what_cannot_be_resampled_is_refused() -> None:
    with pytest.raises(ValueError, match="give each question one"):
        bootstrap(np.empty((0, 1)), [])
    with pytest.raises(ValueError, match="give each question one"):
        bootstrap([[1.0], [0.0]], [1, 0])
    with pytest.raises(ValueError, match="give each question one"):
        bootstrap([[1.0]], [1, 1])


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 1, 2) == 0.5  # 3 of the 6 pairs hold the right one
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6)
    assert pass_at_k(4, 0, 4) == 0.0
    assert pass_at_k(4, 1, 4) == 1.0


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(samples: int) -> None:
    for right in range(samples + 1):
        marks = [i < right for i in range(samples)]
        for k in range(1, samples + 1):
            subsets = list(combinations(marks, k))
            share = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(samples, right, k) == pytest.approx(share)


@pytest.mark.parametrize(("samples", "right", "k"), [(3, 1, 4), (3, 1, 0), (3, 4, 1), (3, -1, 1)])
def test_pass_at_k_of_what_was_not_sampled_is_refused(samples: int, right: int, k: int) -> None:
    with pytest.raises(ValueError, match="is not defined"):
        pass_at_k(samples, right, k)


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (3, 0, 0.25),  # 2 / 8
        (1, 9, 22 / 1024),  # 2 (1 + 10) / 1024
        (5, 5, 1.0),
        (2, 6, 74 / 256),  # 2 (1 + 8 + 28) / 256
    ],
)
def test_mcnemar_by_hand(only_a: int, only_b: int, p: float) -> None:
    assert mcnemar(only_a, only_b) == p
    assert mcnemar(only_b, only_a) == p


def test_mcnemar_is_the_binomial_test_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for only_a, only_b in [(1, 2), (4, 13), (0, 40), (120, 95), (3000, 3200)]:
        expected = stats.binomtest(only_a, only_a + only_b, 0.5).pvalue
        assert mcnemar(only_a, only_b) == pytest.approx(expected, rel=1e-9)
