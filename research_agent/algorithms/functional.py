"""The pure functions that algorithms share.

Shapes: N trajectories, T turns, A action tokens. The action tokens of a trajectory stand one after
another, and observation tokens appear in no tensor. So whatever runs from token to token here
(returns, GAE, sequence ratios) goes from the last token of an action to the first of the next one.

Tensors are used by their methods only, so this module loads no torch.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from research_agent.algorithms.base import Tokens

KLEstimator = Literal["k1", "k2", "k3"]
KL_ESTIMATORS = ("k1", "k2", "k3")

# Log-ratios are clamped to +-20, as in verl. Beyond it exp() overflows in float32 and turns the
# gradient into NaN, even for tokens whose ratio is clipped.
MAX_LOG_RATIO = 20.0


# ---------------------------------------------------------------------------------------------
# Ratios, the clipped objective and the KL


def importance_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """``pi(o_t) / pi_old(o_t)``: Schulman et al. 2017 (arXiv:1707.06347), section 3.

    The log-ratio is clamped to +-20; the gradient is 0 beyond.

    Args:
        logprobs: log-probabilities under the current policy, [A], with gradient.
        old_logprobs: log-probabilities under the old policy, [A].

    Returns:
        The ratios, [A].
    """
    return (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def sequence_ratio(
    logprobs: Tensor, old_logprobs: Tensor, seq_ids: Tensor, *, mean: bool
) -> Tensor:
    """Importance ratio of whole trajectories, ``pi(o) / pi_old(o)``, or its geometric mean.

    The geometric mean over tokens, ``(pi(o) / pi_old(o)) ** (1 / |o|)``, is equation 7 of Zheng et
    al. 2025, GSPO (arXiv:2507.18071). The ratio itself is what TRL's RLOO uses. The log-ratio is
    clamped to +-20; the gradient is 0 beyond.

    Args:
        logprobs: log-probabilities under the current policy, [A], with gradient.
        old_logprobs: log-probabilities under the old policy, [A].
        seq_ids: index of each action token's trajectory, [A].
        mean: return the geometric mean.

    Returns:
        The ratios, [A]: the same for all tokens of a trajectory.
    """
    counts = seq_ids.bincount()
    sums = logprobs.new_zeros(len(counts)).index_add(0, seq_ids, logprobs - old_logprobs)
    log_ratio = sums / counts.clamp(min=1) if mean else sums
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()[seq_ids]


def truncated_importance(logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """``min(pi_learner(o_t) / pi_sampler(o_t), cap)``: truncated importance sampling.

    It corrects for engines whose log-probabilities differ from the learner's at the same weights,
    and for tokens that older weights sampled.

    Args:
        logprobs: log-probabilities that the learner recomputed before its update, [A].
        sampler_logprobs: log-probabilities as the engine reported them, [A].
        cap: the largest weight.

    Returns:
        The weights of the tokens, [A].

    References:
        Ionides 2008, "Truncated importance sampling". Yao et al. 2025, "Your efficient RL framework
        secretly brings you off-policy RL training". Fu et al. 2025, AReaL (decoupled objective).
    """
    return importance_ratio(logprobs, sampler_logprobs).clamp(max=cap)


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """``min(ratio A, clip(ratio, 1 - low, 1 + high) A)``: equation 7 of Schulman et al. 2017.

    Args:
        ratio: importance ratios, [A], with gradient.
        advantages: [A].
        low: how far below 1 the ratio may go.
        high: how far above 1 the ratio may go.

    Returns:
        The surrogates, [A]; and where clipping removed their gradient, [A] of booleans.
    """
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - low, 1 + high) * advantages
    return unclipped.minimum(clipped), clipped < unclipped


def clipped_objective(
    tokens: Tokens,
    *,
    clip: float | tuple[float, float],
    entropy_coef: float,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k1",
    ratio: Tensor | None = None,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """``min(ratio A, clip(ratio) A) - kl_coef KL + entropy_coef H``, per token: PPO's and GRPO's.

    Args:
        tokens: the action tokens of a micro-batch.
        clip: how far the ratio may go from 1; as a pair, how far below and how far above.
        entropy_coef: weight of the entropy bonus.
        kl_coef: weight of the KL to the reference policy; with 0 the KL is only logged.
        kl_estimator: which estimator of ``kl``.
        ratio: importance ratios, [A], with gradient; None: the ratios of the tokens.

    Returns:
        The objective, [A]; and what to log, [A] each: ``clip_fraction``, and ``kl`` where there is
        a reference policy.
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


def kl(estimator: KLEstimator, logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Estimate KL(pi || pi_ref) per token, from tokens that pi sampled.

    With ``r = pi_ref(o_t) / pi(o_t)``:

    - k1, ``-log r``: unbiased, of either sign. It belongs in a reward. In a loss its expected
      gradient is 0, whatever the reference is.
    - k2, ``(log r)^2 / 2``: biased, never negative. In a loss its expected gradient is the KL's.
    - k3, ``r - log r - 1``: unbiased, never negative; equation 4 of Shao et al. 2024
      (arXiv:2402.03300). ``log r`` is clamped to +-20; verl also clamps the result to +-10.

    Args:
        estimator: k1, k2 or k3.
        logprobs: log-probabilities under pi, [A], with gradient.
        reference_logprobs: log-probabilities under the reference policy, [A].

    Returns:
        The estimates, [A], in nats.

    References:
        Schulman 2020, http://joschu.net/blog/kl-approx.html.
    """
    if estimator == "k1":
        return logprobs - reference_logprobs
    if estimator == "k2":
        return (logprobs - reference_logprobs) ** 2 / 2
    log_r = (reference_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_r.exp() - log_r - 1


# ---------------------------------------------------------------------------------------------
# Baselines and normalization


def group_mean(values: Tensor, groups: Tensor) -> Tensor:
    """Mean over each trajectory's group; exactly the value where a group's values are all equal.

    Args:
        values: one per trajectory, [N].
        groups: index of each trajectory's group, [N].

    Returns:
        The means, [N].
    """
    # Summing what exceeds the smallest value keeps a group of equal rewards free of rounding.
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
        groups: index of each trajectory's group, [N].

    Returns:
        The standard deviations, [N].
    """
    counts = groups.bincount()
    squares = (values - group_mean(values, groups)) ** 2
    sums = values.new_zeros(len(counts)).index_add(0, groups, squares)
    return (sums / (counts - 1).clamp(min=1)).sqrt()[groups]


def leave_one_out_mean(values: Tensor, groups: Tensor) -> Tensor:
    """Mean over the other trajectories of the group; the trajectory's own value in a group of one.

    Args:
        values: one per trajectory, [N].
        groups: index of each trajectory's group, [N].

    Returns:
        The means, [N].
    """
    counts = groups.bincount()[groups]
    mean = group_mean(values, groups)
    return mean + (mean - values) / (counts - 1).clamp(min=1)


def group_normalized(values: Tensor, groups: Tensor, epsilon: float) -> Tensor:
    """``(value - mean) / (std + epsilon)`` within each trajectory's group; 0 in a group of one.

    Args:
        values: one per trajectory, [N].
        groups: index of each trajectory's group, [N].
        epsilon: added to the (n - 1) standard deviation.

    Returns:
        The normalized values, [N].
    """
    return (values - group_mean(values, groups)) / (group_std(values, groups) + epsilon)


def batch_normalized(values: Tensor) -> Tensor:
    """``(value - mean) / std`` over all action tokens; values that are all equal become 0.

    The variance is over n and at least 1e-8, as in OpenRLHF; verl divides by n - 1 and adds 1e-8.

    Args:
        values: one per action token, [A].

    Returns:
        The normalized values, [A].
    """
    centered = values - values.mean()
    return centered / (centered**2).mean().clamp(min=1e-8).sqrt()


# ---------------------------------------------------------------------------------------------
# Rewards, returns and advantages along a trajectory


def rewards_at_end(rewards: Tensor, lengths: Tensor) -> Tensor:
    """Put each trajectory's reward on its last action token; all other tokens get 0.

    Args:
        rewards: one per trajectory, [N].
        lengths: action tokens per trajectory, [N]. The reward of a trajectory with none is dropped.

    Returns:
        The rewards of the tokens, [A].
    """
    last_tokens = lengths.cumsum(0) - 1
    has_tokens = lengths > 0
    per_token = rewards.new_zeros(int(lengths.sum()))
    return per_token.index_put((last_tokens[has_tokens],), rewards[has_tokens])


def rewards_at_turn_ends(turn_rewards: Tensor, turn_ids: Tensor, turn_seq_ids: Tensor) -> Tensor:
    """Put each turn's reward on its last action token; all other tokens get 0.

    The reward of a turn without a token goes to the token before it in the trajectory. If there is
    none, no token can have earned the reward, and it is dropped.

    Args:
        turn_rewards: one per turn, [T].
        turn_ids: index of each action token's turn, [A], ascending.
        turn_seq_ids: index of each turn's trajectory, [T], ascending.

    Returns:
        The rewards of the tokens, [A].
    """
    ends = turn_ids.bincount(minlength=len(turn_rewards)).cumsum(0) - 1
    earned = ends >= 0
    earned &= turn_seq_ids[turn_ids[ends.clamp(min=0)]] == turn_seq_ids
    return turn_rewards.new_zeros(len(turn_ids)).index_add(0, ends[earned], turn_rewards[earned])


def numbered(keys: Sequence[Hashable]) -> list[int]:
    """Number keys in the order in which they first occur; equal keys get the same number."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def positions_within(seq_ids: Tensor) -> Tensor:
    """Position of each action token, or turn, within its trajectory, counted from 0.

    Args:
        seq_ids: index of the trajectory of each token or turn, [A] or [T], ascending.

    Returns:
        The positions, of the same shape.
    """
    lengths = seq_ids.bincount()
    starts = lengths.cumsum(0) - lengths
    return seq_ids.new_ones(len(seq_ids)).cumsum(0) - 1 - starts[seq_ids]


def discounted_sum(values: Tensor, seq_ids: Tensor, factor: float) -> Tensor:
    """``y_t = x_t + factor * y_(t+1)`` along the action tokens, or turns, of each trajectory.

    With rewards as values and gamma as factor, y are the returns of REINFORCE.

    Args:
        values: x, [A] or [T].
        seq_ids: index of the trajectory of each token or turn, of the same shape, ascending.
        factor: from 0 to 1.

    Returns:
        The sums y, of the same shape.
    """
    if not len(values):
        return values
    lengths = seq_ids.bincount()
    to_go = lengths.cumsum(0)[seq_ids] - 1 - positions_within(seq_ids)  # later ones in trajectory
    rows = values.new_zeros((int(to_go.max()) + 1, len(lengths)))  # row k: k more follow
    rows = rows.index_put((to_go, seq_ids), values)
    for k in range(1, len(rows)):
        rows[k] += factor * rows[k - 1]
    return rows[to_go, seq_ids]


def gae(rewards: Tensor, values: Tensor, seq_ids: Tensor, gamma: float, lam: float) -> Tensor:
    r"""Generalized advantage estimation along the action tokens of each trajectory.

    :math:`A_t = \sum_l (\gamma\lambda)^l \delta_{t+l}` with :math:`\delta_t = r_t + \gamma V_{t+1}
    - V_t`: equation 16 of Schulman et al. 2015 (arXiv:1506.02438). Token t + 1 is the next action
    token, across observations. After the last action token the value is 0, also in truncated
    episodes.

    Args:
        rewards: one per action token, [A].
        values: value of the state in which each token was sampled, [A].
        seq_ids: index of each action token's trajectory, [A], ascending.
        gamma: discount per token.
        lam: lambda; 0 trusts the values, 1 the rewards.

    Returns:
        The advantages, [A].
    """
    next_values = values.roll(-1).where(seq_ids == seq_ids.roll(-1), 0)
    next_values[-1:] = 0  # with a single trajectory the roll wraps around
    return discounted_sum(rewards + gamma * next_values - values, seq_ids, gamma * lam)


# ---------------------------------------------------------------------------------------------
# Token weights


def sequence_mean(lengths: Tensor, seq_ids: Tensor) -> Tensor:
    """``1 / (N |o_i|)``: the mean over trajectories of the mean over their action tokens.

    Args:
        lengths: action tokens per trajectory, [N].
        seq_ids: index of each action token's trajectory, [A].

    Returns:
        The weights, [A], in float64. They sum to 1 if every trajectory has an action token.
    """
    return 1 / (len(lengths) * lengths[seq_ids].double())


def token_mean(lengths: Tensor, seq_ids: Tensor) -> Tensor:
    """``1 / sum |o_i|``: the mean over the action tokens of all trajectories.

    Args:
        lengths: action tokens per trajectory, [N].
        seq_ids: index of each action token's trajectory, [A].

    Returns:
        The weights, [A], in float64. They sum to 1.
    """
    return lengths.new_ones(len(seq_ids)).double() / lengths.sum().clamp(min=1)
