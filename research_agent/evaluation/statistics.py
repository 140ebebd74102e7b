"""The statistics of evaluations: bootstrap over questions, pass@k, McNemar's test.

Samples of one question are not independent, so questions are resampled, each with all its samples,
and never single episodes.
"""

from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

RESAMPLES = 10_000
_AT_ONCE = 4_000_000  # drawn questions in memory at a time
_SAME = 1e-12  # differences below this are rounding


def bootstrap(
    sums: ArrayLike, counts: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0
) -> Floats:
    """Bootstrap the means of metrics over questions (Efron and Tibshirani 1993).

    Each resample draws as many questions as there are, with replacement, and takes the mean over
    all their episodes.

    Args:
        sums: sum of each metric over the episodes of each question, [questions, metrics].
        counts: episodes per question, at least 1, [questions].
        resamples: number of resamples.
        seed: seed of the draws; the same questions in the same order give the same means.

    Returns:
        The means, [resamples, metrics]. A resample has the same questions for all metrics.

    Raises:
        ValueError: there is no question, or one has no episode.
    """
    values, weights = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    questions = len(weights)
    if not questions or values.shape[:1] != weights.shape or not (weights >= 1).all():
        raise ValueError(f"{values.shape} sums and counts {weights!r:.60}; give each question one")
    generator = np.random.default_rng(seed)
    means = np.empty((resamples, values.shape[1]))
    rows = max(1, _AT_ONCE // questions)
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        drawn = generator.integers(questions, size=(size, questions))
        drawn += questions * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * questions).reshape(size, questions)
        means[start : start + size] = (times @ values) / (times @ weights)[:, None]
    return means


def interval(means: Floats) -> list[tuple[float, float]]:
    """95 % percentile intervals of bootstrapped means, one per metric (column)."""
    low, high = np.quantile(means, (0.025, 0.975), axis=0)
    return [(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def two_sided_p(differences: Floats) -> list[float]:
    """Two-sided p-values that a mean difference is zero, one per metric (column).

    p is twice the share of bootstrapped differences on the rarer side of zero, at most 1: the
    smallest level whose percentile interval excludes zero. Both counts get 1 added, because no
    finite number of resamples shows that p is 0 (Davison and Hinkley 1997, 4.2).

    Args:
        differences: bootstrapped means of paired differences, [resamples, metrics].

    Returns:
        The p-values; NaN for a metric with a difference that is not finite.
    """
    below = (differences <= _SAME).sum(axis=0)
    above = (differences >= -_SAME).sum(axis=0)
    shares = (np.minimum(below, above) + 1) / (len(differences) + 1)
    known = np.isfinite(differences).all(axis=0)
    return [float(p) for p in np.where(known, np.minimum(1.0, 2 * shares), np.nan)]


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k samples is correct.

    ``1 - C(n - c, k) / C(n, k)`` for c correct among n samples (Chen et al. 2021, "Evaluating Large
    Language Models Trained on Code", equation 1).

    Raises:
        ValueError: k or ``correct`` is not possible with so many samples.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{k} of {correct} correct ones in {samples} samples is not defined")
    return 1 - comb(samples - correct, k) / comb(samples, k)


def mcnemar(only_a: int, only_b: int) -> float:
    """McNemar's exact test: two-sided p that A and B are correct equally often.

    Under the null hypothesis, a question that only one of them answers correctly is A's or B's with
    probability 1/2 (McNemar 1947; exact binomial form). Without such a question p is 1.

    Args:
        only_a: questions that A answers correctly and B does not.
        only_b: questions that B answers correctly and A does not.
    """
    differing = only_a + only_b
    tail: int = sum(comb(differing, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, float(Fraction(2 * tail, 2**differing)))
