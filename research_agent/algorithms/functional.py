"""The pieces that algorithms share: pure functions of tensors.

Shapes: N trajectories, T turns, A action tokens, those of a trajectory one after another. Tensors
are used by their methods, so no torch is loaded. Observation tokens have no place in any of them:
what runs from token to token here (returns, GAE, ratios of sequences) runs from an action's last
token to the first of the next action.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from research_agent.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from research_agent.algorithms.base import Tokens

KLEstimator = Literal["k1", "k2", "k3"]
KL_ESTIMATORS = ("k1", "k2", "k3")

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


def sequence_ratio(
    logprobs: Tensor, old_logprobs: Tensor, seq_ids: Tensor, *, mean: bool
) -> Tensor:
    """Probability of a whole trajectory's actions under the policy that learns over that of old.

    With ``mean``, its geometric mean over the tokens, ``(pi(o) / pi_old(o)) ** (1 / |o|)``:
    equation 7 of Zheng et al. 2025, GSPO (arXiv:2507.18071). Without, the ratio itself, as TRL's
    RLOO takes it. The logarithm is cut at +-20 (no gradient beyond).

    Args:
        logprobs: [A], with gradient.
        old_logprobs: [A].
        seq_ids: number of the trajectory of each action token, [A].
        mean: take the mean of the logarithms, or their sum.

    Returns:
        The ratios, [A]: the same for all tokens of a trajectory.
    """
    counts = seq_ids.bincount()
    sums = logprobs.new_zeros(len(counts)).index_add(0, seq_ids, logprobs - old_logprobs)
    log_ratio = sums / counts.clamp(min=1) if mean else sums
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()[seq_ids]


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """``min(ratio A, clip(ratio, 1 - low, 1 + high) A)``: equation 7 of Schulman et al. 2017.

    Args:
        ratio: [A], with gradient.
        advantages: [A].
        low: how far below 1 the ratio counts.
        high: how far above 1 the ratio counts.

    Returns:
        The surrogates, [A]; and where clipping took their gradient, [A] of booleans.
    """
    free = ratio * advantages
    clipped = ratio.clamp(1 - low, 1 + high) * advantages
    return free.minimum(clipped), clipped < free


def clipped_objective(
    tokens: Tokens,
    *,
    clip: float | tuple[float, float],
    entropy_coef: float,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k1",
    ratio: Tensor | None = None,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """``min(ratio A, clip(ratio) A) - kl_coef KL + entropy_coef H``: PPO's objective, and GRPO's.

    Args:
        tokens: the action tokens of a micro-batch.
        clip: ratios count only within 1 - clip and 1 + clip; as a pair, how far below and above 1.
        entropy_coef: weight of the entropy.
        kl_coef: weight of the KL to the reference policy; 0: it is logged only.
        kl_estimator: how the KL is estimated.
        ratio: the ratios, [A], with gradient; None: those of the tokens.

    Returns:
        The objective, [A]; and ``clip_fraction``, and ``kl`` if there is a reference, [A] each.
    """
    if ratio is None:
        ratio = importance_ratio(tokens.logprobs, tokens.old_logprobs)
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    surrogate, clipped = clipped_surrogate(ratio, tokens.advantages, low, high)
    objective = surrogate + entropy_coef * tokens.entropy
    metrics = {"clip_fraction": clipped}
    if tokens.reference_logprobs is not None:
        metrics["kl"] = kl(kl_estimator, tokens.logprobs, tokens.reference_logprobs)
        if kl_coef:
            objective = objective - kl_coef * metrics["kl"]
    return objective, metrics


def truncated_importance(logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """Weigh tokens by how much likelier the learner finds them than the sampler did, up to a cap.

    ``min(pi_learner(o_t) / pi_sampler(o_t), cap)``: truncated importance sampling (Ionides 2008)
    for engines whose numbers differ from the learner's though the weights are the same (Yao et al.
    2025, "Your efficient RL framework secretly brings you off-policy RL training"), and for tokens
    that older weights sampled (Fu et al. 2025, "AReaL", the decoupled objective).

    Args:
        logprobs: recomputed by the learner, before it changed, [A].
        sampler_logprobs: as the engine reported them, [A].
        cap: the largest weight.

    Returns:
        The weights, [A].
    """
    return importance_ratio(logprobs, sampler_logprobs).clamp(max=cap)


def kl(estimator: KLEstimator, logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Estimate KL(pi || pi_ref) from samples of pi, by name: ``kl_k1``, ``kl_k2`` or ``kl_k3``."""
    return {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}[estimator](logprobs, reference_logprobs)


def kl_k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Estimate KL(pi || pi_ref) from samples of pi: unbiased, of either sign.

    ``-log r`` with ``r = pi_ref(o_t) / pi(o_t)``: k1 of Schulman 2020
    (http://joschu.net/blog/kl-approx.html). It belongs into a reward: in a loss its gradient is
    ``grad log pi``, which is 0 in the mean and knows nothing of the reference.

    Args:
        logprobs: [A], with gradient.
        reference_logprobs: [A].

    Returns:
        The estimates, [A], in nats.
    """
    return logprobs - reference_logprobs


def kl_k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Estimate KL(pi || pi_ref) from samples of pi: biased, never negative.

    ``(log r)^2 / 2`` with ``r = pi_ref(o_t) / pi(o_t)``: k2 of Schulman 2020
    (http://joschu.net/blog/kl-approx.html). In a loss its gradient is, in the mean, that of the KL.

    Args:
        logprobs: [A], with gradient.
        reference_logprobs: [A].

    Returns:
        The estimates, [A], in nats.
    """
    return (logprobs - reference_logprobs) ** 2 / 2


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
        values: one per trajectory, [N].
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
        values: one per trajectory, [N].
        groups: number of each trajectory's group, [N], counted from 0.

    Returns:
        The standard deviations, [N].
    """
    counts = groups.bincount()
    squares = (values - group_mean(values, groups)) ** 2
    sums = values.new_zeros(len(counts)).index_add(0, groups, squares)
    return (sums / (counts - 1).clamp(min=1)).sqrt()[groups]


def leave_one_out_mean(values: Tensor, groups: Tensor) -> Tensor:
    """Mean of the others of each trajectory's group; its own value in a group of one.

    Args:
        values: one per trajectory, [N].
        groups: number of each trajectory's group, [N], counted from 0.

    Returns:
        The means, [N].
    """
    counts = groups.bincount()[groups]
    mean = group_mean(values, groups)
    return mean + (mean - values) / (counts - 1).clamp(min=1)


def group_normalized(values: Tensor, groups: Tensor, epsilon: float) -> Tensor:
    """``(value - mean) / (std + epsilon)`` of each trajectory's group; 0 in a group of one.

    Args:
        values: one per trajectory, [N].
        groups: number of each trajectory's group, [N], counted from 0.
        epsilon: added to the (n - 1) standard deviation.

    Returns:
        The normalized values, [N].
    """
    return (values - group_mean(values, groups)) / (group_std(values, groups) + epsilon)


def batch_normalized(values: Tensor) -> Tensor:
    """``(value - mean) / std`` of all action tokens; values that are all equal become 0.

    Over n, with the variance held above 1e-8, as in OpenRLHF; verl divides by n - 1 and adds 1e-8.
    There the sums run over the response mask, which must leave observations out.

    Args:
        values: [A].

    Returns:
        The normalized values, [A].
    """
    centered = values - values.mean()
    return centered / (centered**2).mean().clamp(min=1e-8).sqrt()


def rewards_at_end(rewards: Tensor, lengths: Tensor) -> Tensor:
    """Put each trajectory's reward on its last action token; the others have 0.

    Args:
        rewards: one per trajectory, [N].
        lengths: number of action tokens of each trajectory, [N]. Without any, the reward is lost.

    Returns:
        The rewards of the tokens, [A].
    """
    ends = lengths.cumsum(0) - 1
    some = lengths > 0
    return rewards.new_zeros(int(lengths.sum())).index_put((ends[some],), rewards[some])


def rewards_at_turn_ends(turn_rewards: Tensor, turn_ids: Tensor, turn_seq_ids: Tensor) -> Tensor:
    """Put each turn's reward on its last action token; the other tokens have 0.

    The reward of a turn without a token goes to the last token before it. Without any, no token of
    the trajectory can have earned it, and it is left out.

    Args:
        turn_rewards: [T].
        turn_ids: number of the turn of each action token, [A], ascending.
        turn_seq_ids: number of the trajectory of each turn, [T], ascending.

    Returns:
        The rewards of the tokens, [A].
    """
    ends = turn_ids.bincount(minlength=len(turn_rewards)).cumsum(0) - 1
    earned = ends >= 0
    earned &= turn_seq_ids[turn_ids[ends.clamp(min=0)]] == turn_seq_ids
    return turn_rewards.new_zeros(len(turn_ids)).index_add(0, ends[earned], turn_rewards[earned])


def numbered(keys: Sequence[Hashable]) -> list[int]:
    """Number keys in the order in which they first occur: equal keys, equal numbers."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def is_last_turn(turn_seq_ids: Tensor) -> Tensor:
    """Say of each turn whether it is the last of its trajectory.

    Args:
        turn_seq_ids: number of the trajectory of each turn, [T], ascending.

    Returns:
        Booleans, [T].
    """
    counts = turn_seq_ids.bincount()
    return positions_within(turn_seq_ids) == counts[turn_seq_ids] - 1


def positions_within(seq_ids: Tensor) -> Tensor:
    """Place of each action token, or turn, among those of its trajectory, counted from 0.

    Args:
        seq_ids: number of the trajectory of each, [A] or [T], ascending.

    Returns:
        The places, of the same shape.
    """
    lengths = seq_ids.bincount()
    starts = lengths.cumsum(0) - lengths
    return seq_ids.new_ones(len(seq_ids)).cumsum(0) - 1 - starts[seq_ids]


def discounted_sum(values: Tensor, seq_ids: Tensor, factor: float) -> Tensor:
    """``y_t = x_t + factor * y_(t+1)`` along the action tokens, or turns, of each trajectory.

    With rewards and ``gamma`` these are the returns of REINFORCE.

    Args:
        values: x, [A] or [T].
        seq_ids: number of the trajectory of each action token or turn, ascending.
        factor: from 0 to 1.

    Returns:
        The sums y, of the same shape.
    """
    if not len(values):
        return values
    lengths = seq_ids.bincount()
    column = lengths.cumsum(0)[seq_ids] - 1 - positions_within(seq_ids)  # tokens that still follow
    rows = values.new_zeros((int(column.max()) + 1, len(lengths)))
    rows = rows.index_put((column, seq_ids), values)
    for place in range(1, len(rows)):
        rows[place] += factor * rows[place - 1]
    return rows[column, seq_ids]


def gae(rewards: Tensor, values: Tensor, seq_ids: Tensor, gamma: float, lam: float) -> Tensor:
    r"""Generalized advantage estimation along the action tokens of each trajectory.

    :math:`A_t = \sum_l (\gamma\lambda)^l \delta_{t+l}` with :math:`\delta_t = r_t + \gamma V_{t+1}
    - V_t`: equation 16 of Schulman et al. 2015 (arXiv:1506.02438). The token after an action's last
    one is the first of the next action; after the last of all the value is 0, in truncated episodes
    too.

    Args:
        rewards: [A].
        values: values of the state in which each token was sampled, [A].
        seq_ids: number of the trajectory of each action token, [A], ascending.
        gamma: discount of a token.
        lam: 0 trusts the values, 1 the rewards.

    Returns:
        The advantages, [A].
    """
    following = values.roll(-1).where(seq_ids == seq_ids.roll(-1), 0)
    following[-1:] = 0  # also where there is but one trajectory
    return discounted_sum(rewards + gamma * following - values, seq_ids, gamma * lam)


def overlong_penalty(lengths: Tensor, limit: int, cache: int) -> Tensor:
    """Penalty of long responses: 0, then falling linearly to -1 over the last ``cache`` tokens.

    Equation 13 of Yu et al. 2025, DAPO (arXiv:2503.14476), "soft overlong punishment".

    Args:
        lengths: number of action tokens of each trajectory, [N].
        limit: length from which the penalty is -1 (L_max).
        cache: tokens before it over which the penalty falls (L_cache), at least 1.

    Returns:
        The penalties, [N], in float64.
    """
    return ((limit - cache - lengths.double()) / cache).clamp(-1, 0)


def sequence_mean(lengths: Tensor, seq_ids: Tensor) -> Tensor:
    """Weights of the mean over trajectories of the mean over their action tokens: 1 / (N |o_i|).

    Args:
        lengths: number of action tokens of each trajectory, [N].
        seq_ids: number of the trajectory of each action token, [A].

    Returns:
        The weights, [A], in float64. They sum to 1 if every trajectory has an action token.
    """
    return 1 / (len(lengths) * lengths[seq_ids].double())


def token_mean(lengths: Tensor, seq_ids: Tensor) -> Tensor:
    """Weights of the mean over the action tokens of all trajectories: 1 / sum |o_i|.

    Args:
        lengths: number of action tokens of each trajectory, [N].
        seq_ids: number of the trajectory of each action token, [A].

    Returns:
        The weights, [A], in float64. They sum to 1.
    """
    return lengths.new_ones(len(seq_ids)).double() / lengths.sum().clamp(min=1)


def constant_mean(lengths: Tensor, seq_ids: Tensor, length: int) -> Tensor:
    """Weights of the sum over tokens, divided by trajectories and a length: 1 / (N length).

    Args:
        lengths: number of action tokens of each trajectory, [N].
        seq_ids: number of the trajectory of each action token, [A].
        length: the same for every trajectory, whatever its own.

    Returns:
        The weights, [A], in float64.
    """
    return lengths.new_ones(len(seq_ids)).double() / (len(lengths) * length)


def require(name: str, algorithm: object, *fields: str, above: float | None = None) -> None:
    """Refuse settings of an algorithm that are not finite, or too small.

    Args:
        name: name of the algorithm, for the message.
        algorithm: has the settings as attributes.
        fields: names of the settings.
        above: they must be larger; None: 0 or larger.

    Raises:
        ConfigError: naming algorithm, setting and value.
    """
    wanted = "0 or more" if above is None else f"above {above:g}"
    for field in fields:
        value = getattr(algorithm, field)
        small = value < 0 if above is None else value <= above
        if small or not math.isfinite(value):
            raise ConfigError(f"{name}: {field} is {value}; give a finite number, {wanted}")


def require_one_of(name: str, algorithm: object, field: str, known: Collection[object]) -> None:
    """Refuse a setting of an algorithm whose value is none of those that are known.

    Raises:
        ConfigError: naming algorithm, setting, value and what is known.
    """
    value = getattr(algorithm, field)
    if value not in known:
        words = ", ".join(map(repr, known))
        raise ConfigError(f"{name}: {field} is {value!r}; known: {words}")
