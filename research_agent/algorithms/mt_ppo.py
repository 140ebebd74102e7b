r"""Multi-turn PPO: a critic, and rewards where the turns end.

Zeng et al. 2025, Reinforcing Multi-Turn Reasoning in LLM Agents (arXiv:2505.11821): PPO (Schulman
et al. 2017, arXiv:1707.06347) with the reward of each turn at its last token, so that GAE gives it
to what came before it and to nothing that came after:

.. math::

    J = \frac{1}{\sum_i |o_i|} \sum_{i=1}^{N} \sum_{t=1}^{|o_i|} \Big(
        \min\big(\rho_t \hat A_t,\ \mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon) \hat A_t\big)
        + \alpha\, H_t \Big)

    \hat A_t = \frac{A_t - \mathrm{mean}(A)}{\mathrm{std}(A)}, \qquad
    A_t = \sum_{l \ge 0} (\gamma\lambda)^l \delta_{t+l}, \qquad
    \delta_t = r_t + \gamma V_{t+1} - V_t

    r_t = [t \text{ ends turn } k]\, r_{i,k} - \beta \log\frac{\pi_{old}(o_t)}{\pi_{ref}(o_t)}

With ``over="turns"`` a turn is one step in time, as in Turn-PPO (Li et al. 2025, arXiv:2512.17008):
r is the sum over the turn, V is that of the turn's first token, and all its tokens have its A and
the critic's target A + V. gamma and lambda then discount per turn, however long a turn is. A turn
without a token is no step; its reward goes to the turn before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from research_agent.algorithms.base import Tokens
from research_agent.algorithms.functional import (
    batch_normalized,
    clipped_objective,
    gae,
    kl_k1,
    numbered,
    require,
    require_one_of,
    rewards_at_turn_ends,
    token_mean,
)

if TYPE_CHECKING:
    from torch import Tensor

    from research_agent.batch import Batch


@dataclass(frozen=True, slots=True)
class MTPPO:
    """MT-PPO. It logs ``clip_fraction``, and ``kl`` (k1) if used."""

    over: Literal["tokens", "turns"] = "tokens"
    """What a step in time is: an action token, as in MT-PPO, or a turn."""
    clip: float = 0.2
    """Ratios count only within 1 - clip and 1 + clip (epsilon)."""
    kl_coef: float = 1e-3
    """Weight of the KL to the reference policy, in the reward (beta); 0: no reference is run."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus (alpha)."""
    gamma: float = 1.0
    """Discount of a step."""
    lam: float = 1.0
    """Lambda of GAE: 0 trusts the critic, 1 the rewards."""
    value_clip: float = 0.5
    """How far an update may move a value, as far as the critic's loss goes."""
    critic_learning_rate: float = 1e-5
    """Learning rate of the critic's AdamW."""
    critic_warmup_steps: int = 0
    """Optimizer steps over which the critic's learning rate rises linearly from zero."""

    def __post_init__(self) -> None:
        coefficients = ("clip", "kl_coef", "entropy_coef", "gamma", "lam", "value_clip")
        require("mt_ppo", self, *coefficients, "critic_learning_rate", "critic_warmup_steps")
        require_one_of("mt_ppo", self, "over", ("tokens", "turns"))

    @property
    def needs_reference(self) -> bool:
        """True unless the KL counts for nothing."""
        return self.kl_coef > 0

    def advantages(self, batch: Batch) -> Tensor:
        """GAE, normalized over the action tokens."""
        return batch_normalized(self._estimate(batch)[0])

    def returns(self, batch: Batch) -> Tensor:
        """``A + V_old``, before the advantages are normalized."""
        advantages, values = self._estimate(batch)
        return advantages + values

    def weights(self, batch: Batch) -> Tensor:
        """``1 / sum |o_i|``."""
        return token_mean(batch.lengths, batch.seq_ids)

    def objective(self, tokens: Tokens) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The bracket of the first equation, for each token; the KL is in the rewards."""
        return clipped_objective(tokens, clip=self.clip, entropy_coef=self.entropy_coef)

    def _estimate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Advantages and old values of the action tokens, [A] each."""
        if batch.values is None:
            raise ValueError("the batch has no values; MT-PPO needs a learner with a critic")
        values = batch.values.to(batch.rewards.dtype)
        rewards = rewards_at_turn_ends(batch.turn_rewards, batch.turn_ids, batch.turn_seq_ids)
        if batch.reference_logprobs is not None:
            rewards -= self.kl_coef * kl_k1(batch.old_logprobs, batch.reference_logprobs)
        if self.over == "tokens":
            return gae(rewards, values, batch.seq_ids, self.gamma, self.lam), values
        steps = batch.turn_ids.new_tensor(numbered(batch.turn_ids.tolist()))  # none is empty
        lengths = steps.bincount()
        firsts = lengths.cumsum(0) - lengths
        sums = rewards.new_zeros(len(lengths)).index_add(0, steps, rewards)
        values = values[firsts]
        each = gae(sums, values, batch.seq_ids[firsts], self.gamma, self.lam)
        return each[steps], values[steps]
