"""The pieces that algorithms share: pure functions of tensors.

Shapes: N trajectories, A action tokens. Tensors are used by their methods, so no torch is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# The largest difference of log-probabilities that is told apart, as in verl. Beyond it, exp()
# overflows in float32 and turns the gradient into NaN, even of tokens whose ratio is clipped.
MAX_LOG_RATIO = 20.0


def importance_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Probability under the policy that learns over that under the policy that sampled.

    ``pi(o_t) / pi_old(o_t)``, Schulman et al. 2017 (arXiv:1707.06347), section 3. The difference of
    the logarithms is cut at +-20 (no gradient beyond).

    Args:
        logprobs: [A], with gradient.
        old_logprobs: [A].

    Returns:
        The ratios, [A].
    """
    return (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def kl_k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Estimate KL(pi || pi_ref) from samples of pi: unbiased, and never negative.

    ``r - log r - 1`` with ``r = pi_ref(o_t) / pi(o_t)``: k3 of Schulman 2020
    (http://joschu.net/blog/kl-approx.html), equation 4 of Shao et al. 2024 (arXiv:2402.03300).
    ``log r`` is cut at +-20 (no gradient beyond); verl, which does this too, also cuts the result
    at 10.

    Args:
        logprobs: [A], with gradient.
        reference_logprobs: [A].

    Returns:
        The estimates, [A], in nats.
    """
    log_ratio = (reference_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.exp() - log_ratio - 1


def group_mean(values: Tensor, groups: Tensor) -> Tensor:
    """Mean of each trajectory's group; exactly the value where the values of a group are equal.

    Args:
        values: one a trajectory, [N].
        groups: number of each trajectory's group, [N], counted from 0.

    Returns:
        The means, [N].
    """
    # Rounding must not make a group of equal rewards unequal: add up what exceeds the smallest.
    counts = groups.bincount()
    least = values.new_zeros(len(counts)).scatter_reduce(
        0, groups, values, "amin", include_self=False
    )
    excess = values.new_zeros(len(counts)).index_add(0, groups, values - least[groups])
    return (least + excess / counts.clamp(min=1))[groups]


def group_std(values: Tensor, groups: Tensor) -> Tensor:
    """Sample standard deviation (n - 1) of each trajectory's group; 0 in a group of one.

    Args:
        values: one a trajectory, [N].
        groups: number of each trajectory's group, [N], counted from 0.

    Returns:
        The standard deviations, [N].
    """
    counts = groups.bincount()
    squares = (values - group_mean(values, groups)) ** 2
    sums = values.new_zeros(len(counts)).index_add(0, groups, squares)
    return (sums / (counts - 1).clamp(min=1)).sqrt()[groups]


def sequence_mean(lengths: Tensor, sequence: Tensor) -> Tensor:
    """Weights of the mean over trajectories of the mean over their action tokens: 1 / (N |o_i|).

    Args:
        lengths: number of action tokens of each trajectory, [N].
        sequence: number of the trajectory of each action token, [A].

    Returns:
        The weights, [A], in float64. They sum to 1 if every trajectory has an action token.
    """
    return 1 / (len(lengths) * lengths[sequence].double())
