r"""Multi-turn GRPO: each turn gets its own credit.

Zeng et al. 2025, Reinforcing Multi-Turn Reasoning in LLM Agents (arXiv:2505.11821). The reward of
the last turn is the outcome. It is compared with the outcomes of the group; the reward of an
earlier turn k is compared with the group's other k-th turns. Earlier turns get both advantages, the
last turn gets the outcome's:

.. math::

    J = \frac{1}{N} \sum_{i=1}^{N} \frac{1}{|o_i|} \sum_{t=1}^{|o_i|} \Big(
        \min\big(\rho_t A_{i,k},\ \mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon) A_{i,k}\big)
        - \beta\, \mathrm{KL}_t \Big), \qquad k = k(t)

    A_{i,k} = \alpha\, \frac{r_{i,k} - \mathrm{mean}_j(r_{j,k})}{\mathrm{std}_j(r_{j,k}) + \delta}
        \,[k < K_i] + \frac{r_{i,K_i} - \mathrm{mean}_j(r_{j,K_j})}
        {\mathrm{std}_j(r_{j,K_j}) + \delta}

k(t) is the turn of token t and K_i the number of turns of sample i. In the first fraction j runs
over the samples of the group with k < K_j, in the second over all of them.

The paper's episodes have two turns, a tool call and an answer; for these the equation is the
paper's, with the authors' ``turn_advantage_coef`` as alpha. With more turns their code gives the
turn advantage to the tokens before the first observation only; here every turn has its own. Samples
at their k-th turn are in different states once they have acted differently, so this baseline is not
a state's (verl issue 7244); ``tree_grpo`` and ``gigpo`` compare turns in the same state.

Symbols that are not explained here are those of ``grpo.py``.
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
    group_normalized,
    positions_within,
    sequence_mean,
)

if TYPE_CHECKING:
    from torch import Tensor

    from research_agent.batch import Batch


@dataclass(frozen=True, slots=True)
class MTGRPO:
    """MT-GRPO. It logs ``clip_fraction`` and, with a KL, ``kl``."""

    turn_coef: float = 1.0
    """Weight of the turn advantages; the outcome advantages have weight 1 (alpha)."""
    clip: float = 0.2
    """Ratios are clipped to 1 - clip and 1 + clip (epsilon)."""
    kl_coef: float = 1e-3
    """Weight of the KL to the reference policy, in the loss (beta); 0: no reference runs."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus, which is not in the equation."""
    std_epsilon: float = 1e-6
    """Added to standard deviations of rewards (delta)."""
    kl_estimator: KLEstimator = "k3"
    """Estimator of the KL: k1, k2 or k3."""

    def __post_init__(self) -> None:
        require("mt_grpo", self, "clip", "kl_coef", "entropy_coef", "turn_coef")
        require("mt_grpo", self, "std_epsilon", above=0)
        require_one_of("mt_grpo", self, "kl_estimator", KL_ESTIMATORS)

    @property
    def needs_reference(self) -> bool:
        """True if ``kl_coef`` is above 0."""
        return self.kl_coef > 0

    def advantages(self, batch: Batch) -> Tensor:
        """``A_{i,k}``, on every token of turn k of trajectory i."""
        rewards, seq_ids = batch.turn_rewards, batch.turn_seq_ids
        groups, k = batch.groups[seq_ids], positions_within(seq_ids)
        last = k == seq_ids.bincount()[seq_ids] - 1
        same_turn = (groups * (len(k) + 1) + k)[~last]  # equal for the k-th turns of a group
        turns = rewards.new_zeros(len(rewards))
        turns[~last] = group_normalized(rewards[~last], same_turn, self.std_epsilon)
        outcomes = rewards.new_zeros(len(batch))
        outcomes[seq_ids[last]] = group_normalized(rewards[last], groups[last], self.std_epsilon)
        return (self.turn_coef * turns + outcomes[seq_ids])[batch.turn_ids]

    def weights(self, batch: Batch) -> Tensor:
        """``1 / (N |o_i|)``, the factors before the token's term in J."""
        return sequence_mean(batch.lengths, batch.seq_ids)

    def objective(self, tokens: Tokens) -> tuple[Tensor, Mapping[str, Tensor]]:
        """``min(rho_t A_{i,k}, clip(rho_t) A_{i,k}) - beta KL_t``: J's bracket; plus entropy."""
        return clipped_objective(
            tokens,
            clip=self.clip,
            kl_coef=self.kl_coef,
            entropy_coef=self.entropy_coef,
            kl_estimator=self.kl_estimator,
        )
