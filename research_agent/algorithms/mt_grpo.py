r"""Multi-turn GRPO: credit of its own for each turn.

Zeng et al. 2025, Reinforcing Multi-Turn Reasoning in LLM Agents (arXiv:2505.11821). The rewards of
turns before the last one are compared with those of the same turn in the group's other samples, the
outcome with the other outcomes; an earlier turn gets both, the last turn gets the outcome's alone:

.. math::

    J = \frac{1}{N} \sum_{i=1}^{N} \frac{1}{|o_i|} \sum_{t=1}^{|o_i|} \Big(
        \min\big(\rho_t A_{i,k},\ \mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon) A_{i,k}\big)
        - \beta\, \mathrm{KL}_t \Big), \qquad k = k(t)

    A_{i,k} = \alpha\, \frac{r_{i,k} - \mathrm{mean}_j(r_{j,k})}{\mathrm{std}_j(r_{j,k}) + \delta}
        \,[k < K_i] + \frac{r_{i,K_i} - \mathrm{mean}_j(r_{j,K_j})}
        {\mathrm{std}_j(r_{j,K_j}) + \delta}

k(t) is the turn of token t, K_i the number of turns of sample i, and j runs over the samples of the
group that have a k-th turn before their last one. The outcome is the reward of the last turn.

The paper's episodes have two turns, a call of a tool and an answer; there this is its equation,
with the authors' ``turn_advantage_coef`` for alpha. With more turns their code still gives the
advantage of turns to the tokens before the first observation only; here every turn has its own.
Samples at their k-th turn stand in different states once they have done different things, so the
baseline is not that of a state (verl issue 7244); trees, or ``gigpo``, compare like with like.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from research_agent.algorithms.base import Tokens
from research_agent.algorithms.functional import (
    KL_ESTIMATORS,
    KLEstimator,
    clipped_objective,
    group_normalized,
    is_last_turn,
    positions_within,
    require,
    require_one_of,
    sequence_mean,
)

if TYPE_CHECKING:
    from torch import Tensor

    from research_agent.batch import Batch


@dataclass(frozen=True, slots=True)
class MTGRPO:
    """MT-GRPO. It logs ``clip_fraction``, and ``kl`` if that is used."""

    turn_coef: float = 1.0
    """Weight of the advantages of turns beside that of the outcome (alpha)."""
    clip: float = 0.2
    """Ratios count only within 1 - clip and 1 + clip (epsilon)."""
    kl_coef: float = 1e-3
    """Weight of the KL to the reference policy, in the loss (beta); 0: no reference is run."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    std_epsilon: float = 1e-6
    """Added to standard deviations (delta)."""
    kl_estimator: KLEstimator = "k3"
    """How the KL is estimated."""

    def __post_init__(self) -> None:
        require("mt_grpo", self, "clip", "kl_coef", "entropy_coef", "turn_coef")
        require("mt_grpo", self, "std_epsilon", above=0)
        require_one_of("mt_grpo", self, "kl_estimator", KL_ESTIMATORS)

    @property
    def needs_reference(self) -> bool:
        """True unless the KL counts for nothing."""
        return self.kl_coef > 0

    def advantages(self, batch: Batch) -> Tensor:
        """The outcome's and, before the last turn, the turn's; one value per turn."""
        last = is_last_turn(batch.turn_seq_ids)
        groups = batch.groups[batch.turn_seq_ids]
        place = positions_within(batch.turn_seq_ids)
        peers = (groups * (len(place) + 1) + place)[~last]  # the same turn of the same group
        of_turns = batch.turn_rewards.new_zeros(len(place))
        of_turns[~last] = group_normalized(batch.turn_rewards[~last], peers, self.std_epsilon)
        outcomes = group_normalized(batch.turn_rewards[last], groups[last], self.std_epsilon)
        has_turns = batch.turn_seq_ids[last]
        of_trajectories = batch.rewards.new_zeros(len(batch)).index_put((has_turns,), outcomes)
        advantages = self.turn_coef * of_turns + of_trajectories[batch.turn_seq_ids]
        return advantages[batch.turn_ids]

    def weights(self, batch: Batch) -> Tensor:
        """``1 / (N |o_i|)``."""
        return sequence_mean(batch.lengths, batch.seq_ids)

    def objective(self, tokens: Tokens) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The bracket of the equation, for each token."""
        return clipped_objective(
            tokens,
            clip=self.clip,
            kl_coef=self.kl_coef,
            entropy_coef=self.entropy_coef,
            kl_estimator=self.kl_estimator,
        )
