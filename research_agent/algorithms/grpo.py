r"""Group Relative Policy Optimization, as ReSearch uses it.

Shao et al. 2024, DeepSeekMath (arXiv:2402.03300), equations 3 and 4; Chen et al. 2025, ReSearch
(arXiv:2503.19470), equation 1, which leaves the environment's tokens out of the sums:

.. math::

    J = \frac{1}{N} \sum_{i=1}^{N} \frac{1}{|o_i|} \sum_{t=1}^{|o_i|} \Big(
        \min\big(\rho_t A_i,\ \mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon) A_i\big)
        - \beta\, \mathrm{KL}_t + \alpha\, H_t \Big)

    \rho_t = \frac{\pi(o_t)}{\pi_{old}(o_t)}, \qquad
    A_i = \frac{r_i - \mathrm{mean}(r_{group})}{\mathrm{std}(r_{group}) + \delta}, \qquad
    \mathrm{KL}_t = \frac{\pi_{ref}(o_t)}{\pi(o_t)} - \log\frac{\pi_{ref}(o_t)}{\pi(o_t)} - 1

N is the number of trajectories, |o_i| the number of tokens that the policy sampled in trajectory i,
and H_t the policy's entropy before token t. The method ``advantages`` computes A_i, ``weights``
computes 1 / (N |o_i|), and ``objective`` the bracket. The learner minimizes -J.

Libraries differ in these definitions. The standard deviation is the sample's, over n - 1, as in
verl and TRL; delta is 1e-6, as in verl (TRL: 1e-4). A group of one has advantage 0, as in prime-rl
(verl keeps the raw reward). The mean is over trajectories, as in the equation; the authors' code,
an early verl, took it over the tokens of a micro-batch. The entropy bonus comes from the authors'
settings; the papers' equations have none.

``turn_rewards`` is process supervision, section 4.1.3 of Shao et al.: the reward of each turn is
normalized by mean and std over all turns of the group, and a token's advantage sums these over its
own turn k(t) and all later turns, :math:`A_{i,t} = \sum_{k \ge k(t)} \tilde r_{i,k}`. Because the
mean is over turns, extra turns without a reward cost an episode something (see verl issue 7244).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from research_agent.algorithms.base import Tokens
from research_agent.algorithms.checks import require, require_one_of
from research_agent.algorithms.functional import (
    KL_ESTIMATORS,
    KLEstimator,
    clipped_objective,
    discounted_sum,
    group_normalized,
    sequence_mean,
)

if TYPE_CHECKING:
    from torch import Tensor

    from research_agent.batch import Batch


@dataclass(frozen=True, slots=True)
class GRPO:
    """GRPO; the defaults are ReSearch's. It logs ``clip_fraction`` and, with a KL, ``kl``."""

    clip: float = 0.2
    """Ratios are clipped to 1 - clip and 1 + clip (epsilon)."""
    kl_coef: float = 1e-3
    """Weight of the KL to the reference policy, in the loss (beta); 0: no reference runs."""
    entropy_coef: float = 1e-3
    """Weight of the entropy bonus (alpha)."""
    std_epsilon: float = 1e-6
    """Added to the standard deviation of a group's rewards (delta)."""
    kl_estimator: KLEstimator = "k3"
    """Estimator of the KL: k1, k2 or k3; k3 is the equation's."""
    turn_rewards: bool = False
    """Learn from the rewards of turns instead of their sum: process supervision."""

    def __post_init__(self) -> None:
        require("grpo", self, "clip", "kl_coef", "entropy_coef")
        require("grpo", self, "std_epsilon", above=0)
        require_one_of("grpo", self, "kl_estimator", KL_ESTIMATORS)

    @property
    def needs_reference(self) -> bool:
        """True if ``kl_coef`` is above 0."""
        return self.kl_coef > 0

    def advantages(self, batch: Batch) -> Tensor:
        """``A_i``, on every token of trajectory i; with ``turn_rewards`` ``A_{i,t}``."""
        if not self.turn_rewards:
            return group_normalized(batch.rewards, batch.groups, self.std_epsilon)[batch.seq_ids]
        groups = batch.groups[batch.turn_seq_ids]
        normalized = group_normalized(batch.turn_rewards, groups, self.std_epsilon)
        return discounted_sum(normalized, batch.turn_seq_ids, 1.0)[batch.turn_ids]

    def weights(self, batch: Batch) -> Tensor:
        """``1 / (N |o_i|)``, the factors before the token's term in J."""
        return sequence_mean(batch.lengths, batch.seq_ids)

    def objective(self, tokens: Tokens) -> tuple[Tensor, Mapping[str, Tensor]]:
        """``min(rho_t A_i, clip(rho_t) A_i) - beta KL_t + alpha H_t``: the bracket in J."""
        return clipped_objective(
            tokens,
            clip=self.clip,
            kl_coef=self.kl_coef,
            entropy_coef=self.entropy_coef,
            kl_estimator=self.kl_estimator,
        )
