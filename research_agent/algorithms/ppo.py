r"""PPO with a critic, as Search-R1 uses it.

Schulman et al. 2017 (arXiv:1707.06347), equations 7 and 9, for language models as in Ouyang et al.
2022 (arXiv:2203.02155); Jin et al. 2025, Search-R1 (arXiv:2503.09516), equation 2:

.. math::

    J = \frac{1}{\sum_i |o_i|} \sum_{i=1}^{N} \sum_{t=1}^{|o_i|} \Big(
        \min\big(\rho_t \hat A_t,\ \mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon) \hat A_t\big)
        + \alpha\, H_t \Big)

    \hat A_t = \frac{A_t - \mathrm{mean}(A)}{\mathrm{std}(A)}, \qquad
    A_t = \sum_{l \ge 0} (\gamma\lambda)^l \delta_{t+l}, \qquad
    \delta_t = r_t + \gamma V_{t+1} - V_t

    r_t = [t = |o_i|]\, r_i - \beta \log\frac{\pi_{old}(o_t)}{\pi_{ref}(o_t)}, \qquad
    L_V = \frac{1}{2 \sum_i |o_i|} \sum_{i,t}
        \max\big((V - R_t)^2,\ (\mathrm{clip}(V, V_{old} \pm \epsilon_V) - R_t)^2\big), \quad
    R_t = A_t + V_{old,t}

V_t is the critic's value of the context before action token t; the critic and its loss L_V are in
``research_agent/models/critic.py``. t runs over action tokens only: the step after the last token
of an action is the first token of the next action. mean and std are over all action tokens of the
rollout. The authors' code also has observation tokens in GAE, mean, std and L_V (see verl issue
2337); with gamma = lambda = 1 they cancel in GAE, but not in the rest.

Symbols that are not explained here are those of ``grpo.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from research_agent.algorithms.base import Tokens
from research_agent.algorithms.checks import require
from research_agent.algorithms.functional import (
    batch_normalized,
    clipped_objective,
    gae,
    kl,
    rewards_at_end,
    token_mean,
)

if TYPE_CHECKING:
    from torch import Tensor

    from research_agent.batch import Batch


@dataclass(frozen=True, slots=True)
class PPO:
    """PPO; the defaults are Search-R1's. It logs ``clip_fraction`` and, with a KL, ``kl`` (k1)."""

    clip: float = 0.2
    """Ratios are clipped to 1 - clip and 1 + clip (epsilon)."""
    kl_coef: float = 1e-3
    """Weight of the KL to the reference policy, in the reward (beta); 0: no reference runs."""
    entropy_coef: float = 1e-3
    """Weight of the entropy bonus (alpha)."""
    gamma: float = 1.0
    """Discount per action token."""
    lam: float = 1.0
    """Lambda of GAE: 0 trusts the critic, 1 the rewards."""
    value_clip: float = 0.5
    """How far an update may move a value before the critic's loss clips it (epsilon_V)."""
    critic_learning_rate: float = 1e-5
    """Learning rate of the critic's AdamW."""
    critic_warmup_steps: int = 0
    """Optimizer steps over which the critic's learning rate rises linearly from zero."""

    def __post_init__(self) -> None:
        coefficients = ("clip", "kl_coef", "entropy_coef", "gamma", "lam", "value_clip")
        require("ppo", self, *coefficients, "critic_learning_rate", "critic_warmup_steps")
        require("ppo", self, "gamma", "lam", at_most=1)

    @property
    def needs_reference(self) -> bool:
        """True if ``kl_coef`` is above 0."""
        return self.kl_coef > 0

    def advantages(self, batch: Batch) -> Tensor:
        """``A^_t``: GAE, normalized over the action tokens."""
        return batch_normalized(self._estimate(batch)[0])

    def returns(self, batch: Batch) -> Tensor:
        """``R_t = A_t + V_old,t``, the targets of the critic."""
        advantages, values = self._estimate(batch)
        return advantages + values

    def weights(self, batch: Batch) -> Tensor:
        """``1 / sum_i |o_i|``, the factor before the sums in J."""
        return token_mean(batch.lengths, batch.seq_ids)

    def objective(self, tokens: Tokens) -> tuple[Tensor, Mapping[str, Tensor]]:
        """``min(rho_t A^_t, clip(rho_t) A^_t) + alpha H_t``: the bracket in J."""
        return clipped_objective(tokens, clip=self.clip, entropy_coef=self.entropy_coef)

    def _estimate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """``A_t`` and ``V_old,t`` of the action tokens, [A] each."""
        if batch.values is None:
            raise ValueError("the batch has no values; PPO needs a learner with a critic")
        values = batch.values.to(batch.rewards.dtype)
        rewards = rewards_at_end(batch.rewards, batch.lengths)
        if batch.reference_logprobs is not None:
            rewards -= self.kl_coef * kl("k1", batch.old_logprobs, batch.reference_logprobs)
        return gae(rewards, values, batch.seq_ids, self.gamma, self.lam), values
