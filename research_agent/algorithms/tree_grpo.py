r"""Tree-GRPO: advantages within a tree, and across the trees of a task.

Ji et al. 2025, Tree Search for LLM Agent Reinforcement Learning (arXiv:2509.21240). A group is M
trees whose nodes are turns; every path from a root to a leaf is a trajectory. Its reward is
compared within its own tree, whose trajectories differ in their last turns only, and within all
trees of the group, which is a steadier baseline:

.. math::

    J = \frac{1}{N} \sum_{i=1}^{N} \frac{1}{|o_i|} \sum_{t=1}^{|o_i|} \Big(
        \min\big(\rho_t A_i,\ \mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon) A_i\big)
        - \beta\, \mathrm{KL}_t \Big)

    A_i = A^{intra}_i + A^{inter}_i, \qquad
    A^{intra}_i = \frac{r_i - \mathrm{mean}(r_{tree})}{\mathrm{std}(r_{tree}) + \delta}, \qquad
    A^{inter}_i = \frac{r_i - \mathrm{mean}(r_{group})}{\mathrm{std}(r_{group}) + \delta}

A turn that several trajectories share is in each of their sums, so it learns from the mean of their
advantages. A tree of one trajectory has A^intra = 0: without branches this is GRPO. The paper shows
that A^intra alone gives the objective of step-level preference learning.

The rollout samples the trees (``--tree-branches``).

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
    sequence_mean,
)

if TYPE_CHECKING:
    from torch import Tensor

    from research_agent.batch import Batch


@dataclass(frozen=True, slots=True)
class TreeGRPO:
    """Tree-GRPO. It logs ``clip_fraction`` and, with a KL, ``kl``."""

    intra_coef: float = 1.0
    """Weight of A^intra; 1 in the equation."""
    inter_coef: float = 1.0
    """Weight of A^inter; 1 in the equation."""
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
        require("tree_grpo", self, "clip", "kl_coef", "entropy_coef", "intra_coef", "inter_coef")
        require("tree_grpo", self, "std_epsilon", above=0)
        require_one_of("tree_grpo", self, "kl_estimator", KL_ESTIMATORS)

    @property
    def needs_reference(self) -> bool:
        """True if ``kl_coef`` is above 0."""
        return self.kl_coef > 0

    def advantages(self, batch: Batch) -> Tensor:
        """``A_i = A^intra_i + A^inter_i``, on every token of trajectory i."""
        intra = group_normalized(batch.rewards, batch.trees, self.std_epsilon)
        inter = group_normalized(batch.rewards, batch.groups, self.std_epsilon)
        return (self.intra_coef * intra + self.inter_coef * inter)[batch.seq_ids]

    def weights(self, batch: Batch) -> Tensor:
        """``1 / (N |o_i|)``, the factors before the token's term in J."""
        return sequence_mean(batch.lengths, batch.seq_ids)

    def objective(self, tokens: Tokens) -> tuple[Tensor, Mapping[str, Tensor]]:
        """``min(rho_t A_i, clip(rho_t) A_i) - beta KL_t``: J's bracket; plus entropy."""
        return clipped_objective(
            tokens,
            clip=self.clip,
            kl_coef=self.kl_coef,
            entropy_coef=self.entropy_coef,
            kl_estimator=self.kl_estimator,
        )
