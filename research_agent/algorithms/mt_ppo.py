r"""Multi-turn PPO: PPO with a critic, and the reward of each turn at its last token.

Zeng et al. 2025, Reinforcing Multi-Turn Reasoning in LLM Agents (arXiv:2505.11821): PPO (Schulman
et al. 2017, arXiv:1707.06347) in which GAE credits the reward of a turn to the tokens up to its end
and to none after it:

.. math::

    J = \frac{1}{\sum_i |o_i|} \sum_{i=1}^{N} \sum_{t=1}^{|o_i|} \Big(
        \min\big(\rho_t \hat A_t,\ \mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon) \hat A_t\big)
        + \alpha\, H_t \Big)

    \hat A_t = \frac{A_t - \mathrm{mean}(A)}{\mathrm{std}(A)}, \qquad
    A_t = \sum_{l \ge 0} (\gamma\lambda)^l \delta_{t+l}, \qquad
    \delta_t = r_t + \gamma V_{t+1} - V_t

    r_t = [t \text{ ends turn } k]\, r_{i,k} - \beta \log\frac{\pi_{old}(o_t)}{\pi_{ref}(o_t)}

With ``over="turns"`` a turn is one step in time, as in Turn-PPO (Li et al. 2025, arXiv:2512.17008):
r is the sum over the turn, V is the value at the turn's first token, and all tokens of the turn
share A and the critic's target A + V. gamma and lambda then discount per turn. A turn without a
token is no step; its reward goes to the turn before it.

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
    gae,
    kl,
    numbered,
    rewards_at_turn_ends,
    token_mean,
)

if TYPE_CHECKING:
    from torch import Tensor

    from research_agent.batch import Batch


@dataclass(frozen=True, slots=True)
class MTPPO:
    """MT-PPO. It logs ``clip_fraction`` and, with a KL, ``kl`` (k1)."""

    over: Literal["tokens", "turns"] = "tokens"
    """What a step in time is: an action token, as in MT-PPO, or a turn."""
    clip: float = 0.2
    """Ratios are clipped to 1 - clip and 1 + clip (epsilon)."""
    kl_coef: float = 1e-3
    """Weight of the KL to the reference policy, in the reward (beta); 0: no reference runs."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus (alpha)."""
    gamma: float = 1.0
    """Discount per step."""
    lam: float = 1.0
    """Lambda of GAE: 0 trusts the critic, 1 the rewards."""
    value_clip: float = 0.5
    """How far an update may move a value before the critic's loss clips it."""
    critic_learning_rate: float = 1e-5
    """Learning rate of the critic's AdamW."""
    critic_warmup_steps: int = 0
    """Optimizer steps over which the critic's learning rate rises linearly from zero."""

    def __post_init__(self) -> None:
        coefficients = ("clip", "kl_coef", "entropy_coef", "gamma", "lam", "value_clip")
        require("mt_ppo", self, *coefficients, "critic_learning_rate", "critic_warmup_steps")
        require("mt_ppo", self, "gamma", "lam", at_most=1)
        require_one_of("mt_ppo", self, "over", ("tokens", "turns"))

    @property
    def needs_reference(self) -> bool:
        """True if ``kl_coef`` is above 0."""
        return self.kl_coef > 0

    def advantages(self, batch: Batch) -> Tensor:
        """``A^_t``: GAE, normalized over the action tokens."""
        return batch_normalized(self._estimate(batch)[0])

    def returns(self, batch: Batch) -> Tensor:
        """``A_t + V_old,t``, the targets of the critic."""
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
            raise ValueError("the batch has no values; MT-PPO needs a learner with a critic")
        values = batch.values.to(batch.rewards.dtype)
        rewards = rewards_at_turn_ends(batch.turn_rewards, batch.turn_ids, batch.turn_seq_ids)
        if batch.reference_logprobs is not None:
            rewards -= self.kl_coef * kl("k1", batch.old_logprobs, batch.reference_logprobs)
        if self.over == "tokens":
            return gae(rewards, values, batch.seq_ids, self.gamma, self.lam), values
        # Number the turns anew, to skip those without a token.
        steps = batch.turn_ids.new_tensor(numbered(batch.turn_ids.tolist()))
        lengths = steps.bincount()
        firsts = lengths.cumsum(0) - lengths  # index of each step's first token
        step_rewards = rewards.new_zeros(len(lengths)).index_add(0, steps, rewards)
        step_values = values[firsts]
        seq_ids = batch.seq_ids[firsts]
        advantages = gae(step_rewards, step_values, seq_ids, self.gamma, self.lam)
        return advantages[steps], step_values[steps]
