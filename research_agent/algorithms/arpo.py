r"""Agentic Reinforced Policy Optimization: GRPO on trajectories that branch where entropy is high.

Dong et al. 2025 (arXiv:2507.19849). Trajectories of a group share their beginnings. Each has GRPO's
advantage, and a token that several trajectories share learns from the advantages of all of them:

.. math::

    J = \frac{1}{N} \sum_{i=1}^{N} \frac{1}{|o_i|} \sum_{t=1}^{|o_i|} \Big(
        \min\big(\rho_t A_{i,t},\ \mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon) A_{i,t}\big)
        - \beta\, \mathrm{KL}_t \Big), \qquad
    A_i = \frac{r_i - \mathrm{mean}(r_{group})}{\mathrm{std}(r_{group}) + \delta}

    \text{soft: } A_{i,t} = A_i, \qquad
    \text{hard: } A_{i,t} = \frac{1}{|S_t|} \sum_{j \in S_t} A_j

S_t is the set of trajectories that share the turn of token t, i among them. The paper proposes both
attributions. A shared token has the same ratio in all its trajectories, so soft attribution gives
it the gradient of their mean advantage too. The two differ where clipping treats advantages of
different signs differently, and where trajectories differ in 1 / |o_i|.

The rollout branches where the entropy has risen most since the first turn (``--tree-choice
entropy``).

Symbols that are not explained here are those of ``grpo.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

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
class ARPO:
    """ARPO. It logs ``clip_fraction`` and, with a KL, ``kl``."""

    attribution: Literal["soft", "hard"] = "soft"
    """Advantage of a shared token: each trajectory's own (soft), or their mean (hard)."""
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
        require("arpo", self, "clip", "kl_coef", "entropy_coef")
        require("arpo", self, "std_epsilon", above=0)
        require_one_of("arpo", self, "kl_estimator", KL_ESTIMATORS)
        require_one_of("arpo", self, "attribution", ("soft", "hard"))

    @property
    def needs_reference(self) -> bool:
        """True if ``kl_coef`` is above 0."""
        return self.kl_coef > 0

    def advantages(self, batch: Batch) -> Tensor:
        """``A_{i,t}``: GRPO's advantage, or its mean over the trajectories that share a turn."""
        own = group_normalized(batch.rewards, batch.groups, self.std_epsilon)
        if self.attribution == "soft":
            return own[batch.seq_ids]
        sums = own.new_zeros(len(batch.turn_nodes))
        sums = sums.index_add(0, batch.turn_nodes, own[batch.turn_seq_ids])
        counts = batch.turn_nodes.bincount(minlength=len(sums)).clamp(min=1)
        return (sums / counts)[batch.turn_nodes][batch.turn_ids]

    def weights(self, batch: Batch) -> Tensor:
        """``1 / (N |o_i|)``, the factors before the token's term in J."""
        return sequence_mean(batch.lengths, batch.seq_ids)

    def objective(self, tokens: Tokens) -> tuple[Tensor, Mapping[str, Tensor]]:
        """``min(rho_t A_{i,t}, clip(rho_t) A_{i,t}) - beta KL_t``: J's bracket; plus entropy."""
        return clipped_objective(
            tokens,
            clip=self.clip,
            kl_coef=self.kl_coef,
            entropy_coef=self.entropy_coef,
            kl_estimator=self.kl_estimator,
        )
