r"""Agentic Reinforced Policy Optimization: GRPO on trajectories that branch where entropy is high.

Dong et al. 2025 (arXiv:2507.19849). Trajectories of a group share their beginnings. Every one has
the advantage of GRPO, and a token that several of them share learns from all of theirs:

.. math::

    J = \frac{1}{N} \sum_{i=1}^{N} \frac{1}{|o_i|} \sum_{t=1}^{|o_i|} \Big(
        \min\big(\rho_t A_{i,t},\ \mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon) A_{i,t}\big)
        - \beta\, \mathrm{KL}_t \Big), \qquad
    A_i = \frac{r_i - \mathrm{mean}(r_{group})}{\mathrm{std}(r_{group}) + \delta}

    \text{soft: } A_{i,t} = A_i, \qquad
    \text{hard: } A_{i,t} = \frac{1}{|S_t|} \sum_{j \in S_t} A_j

S_t are the trajectories of the group that share the turn of token t; if none does, i alone.
The paper proposes both. A shared token has the same ratio in all its trajectories, so with soft its
gradient is that of their mean advantage, too. The two differ where clipping treats advantages of
different signs differently, and where trajectories differ in 1 / |o_i|.

The rollout chooses where to branch, by the rise of the entropy over that of the first turn
(``--tree-choice entropy``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from research_agent.algorithms.base import Tokens
from research_agent.algorithms.functional import (
    KL_ESTIMATORS,
    KLEstimator,
    clipped_objective,
    group_normalized,
    require,
    require_one_of,
    sequence_mean,
)

if TYPE_CHECKING:
    from torch import Tensor

    from research_agent.batch import Batch


@dataclass(frozen=True, slots=True)
class ARPO:
    """ARPO. It logs ``clip_fraction``, and ``kl`` if that is used."""

    attribution: Literal["soft", "hard"] = "soft"
    """What shared tokens learn from: the advantage of each trajectory, or their mean."""
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
        require("arpo", self, "clip", "kl_coef", "entropy_coef")
        require("arpo", self, "std_epsilon", above=0)
        require_one_of("arpo", self, "kl_estimator", KL_ESTIMATORS)
        require_one_of("arpo", self, "attribution", ("soft", "hard"))

    @property
    def needs_reference(self) -> bool:
        """True unless the KL counts for nothing."""
        return self.kl_coef > 0

    def advantages(self, batch: Batch) -> Tensor:
        """GRPO's; with hard attribution their mean over the trajectories that share a turn."""
        each = group_normalized(batch.rewards, batch.groups, self.std_epsilon)
        if self.attribution == "soft":
            return each[batch.seq_ids]
        sums = each.new_zeros(len(batch.turn_nodes))
        sums = sums.index_add(0, batch.turn_nodes, each[batch.turn_seq_ids])
        counts = batch.turn_nodes.bincount(minlength=len(sums)).clamp(min=1)
        return (sums / counts)[batch.turn_nodes][batch.turn_ids]

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
