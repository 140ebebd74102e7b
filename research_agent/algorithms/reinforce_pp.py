r"""REINFORCE++: PPO's clipped objective without a critic, advantages normalized over the batch.

Hu et al. 2025 (arXiv:2501.03262), section 3:

.. math::

    J = \frac{1}{N} \sum_{i=1}^{N} \frac{1}{|o_i|} \sum_{t=1}^{|o_i|}
        \min\big(\rho_t \hat A_t,\ \mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon) \hat A_t\big)

    \hat A_t = \frac{A_t - \mathrm{mean}(A)}{\mathrm{std}(A)}, \qquad
    A_t = R_i - \beta \sum_{t'=t}^{|o_i|} \log\frac{\pi_{old}(o_{t'})}{\pi_{ref}(o_{t'})}

mean and std are over all action tokens of the rollout; the KL (k1) is part of the reward.

``baseline`` defines R_i. With ``none`` it is the reward r_i. With ``group`` it is r_i less the mean
of its group (REINFORCE++-baseline); the paper then has no KL in the reward, but k2 in the loss
(``kl_in=loss``): each term of J is reduced by :math:`\beta \frac{1}{2} \log^2(\pi / \pi_{ref})`.

R1-Searcher (Song et al. 2025, arXiv:2503.05592) masks documents out of loss, KL and normalization.
Here this holds for every algorithm, because only action tokens enter the sums. Its published script
uses the group baseline with KL 0 (presets ``r1-searcher-qwen`` and ``r1-searcher-llama``).

The sum over t' runs over the action tokens of a trajectory, across observations. verl once reset it
at each observation, so that only the last action saw the reward (issue 7278). There is no discount.

Symbols that are not explained here are those of ``grpo.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from research_agent.algorithms.base import Tokens
from research_agent.algorithms.checks import require, require_one_of
from research_agent.algorithms.functional import (
    batch_normalized,
    clipped_objective,
    discounted_sum,
    group_mean,
    kl,
    rewards_at_end,
    sequence_mean,
)

if TYPE_CHECKING:
    from torch import Tensor

    from research_agent.batch import Batch


@dataclass(frozen=True, slots=True)
class ReinforcePP:
    """REINFORCE++. It logs ``clip_fraction`` and, with a KL, ``kl``."""

    clip: float = 0.2
    """Ratios are clipped to 1 - clip and 1 + clip (epsilon)."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference policy (beta); 0: no reference runs."""
    baseline: Literal["none", "group"] = "none"
    """What is subtracted from the reward: nothing, or the mean of the group."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL is: in the reward (k1), or in the loss (k2)."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus, which is not in the equation."""

    def __post_init__(self) -> None:
        require("reinforce_pp", self, "clip", "kl_coef", "entropy_coef")
        require_one_of("reinforce_pp", self, "baseline", ("none", "group"))
        require_one_of("reinforce_pp", self, "kl_in", ("reward", "loss"))

    @property
    def needs_reference(self) -> bool:
        """True if ``kl_coef`` is above 0."""
        return self.kl_coef > 0

    def advantages(self, batch: Batch) -> Tensor:
        """``A^_t``: reward to come less KL to come, normalized over the action tokens."""
        rewards = batch.rewards
        if self.baseline == "group":
            rewards = rewards - group_mean(rewards, batch.groups)
        per_token = rewards_at_end(rewards, batch.lengths)
        if self.kl_in == "reward" and batch.reference_logprobs is not None:
            per_token -= self.kl_coef * kl("k1", batch.old_logprobs, batch.reference_logprobs)
        return batch_normalized(discounted_sum(per_token, batch.seq_ids, 1.0))

    def weights(self, batch: Batch) -> Tensor:
        """``1 / (N |o_i|)``, the factors before the token's term in J."""
        return sequence_mean(batch.lengths, batch.seq_ids)

    def objective(self, tokens: Tokens) -> tuple[Tensor, Mapping[str, Tensor]]:
        """``min(rho_t A^_t, clip(rho_t) A^_t)``, the term in J; less KL if it is in the loss."""
        in_loss = self.kl_in == "loss"
        return clipped_objective(
            tokens,
            clip=self.clip,
            entropy_coef=self.entropy_coef,
            kl_coef=self.kl_coef if in_loss else 0.0,
            kl_estimator="k2" if in_loss else "k1",
        )
