r"""Group-in-Group Policy Optimization: compare turns that were taken in the same state.

Feng et al. 2025 (arXiv:2505.10978), equations 3 and 6 to 9. The advantage of a turn adds two
comparisons: the episode's reward within its group, and the turn's return among all turns of the
group that were taken in the same state (the anchor state):

.. math::

    J = \frac{1}{T} \sum_{i,k} \frac{1}{|o_{i,k}|} \sum_{t \in o_{i,k}} \Big(
        \min\big(\rho_t A_{i,k},\ \mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon) A_{i,k}\big)
        - \beta\, \mathrm{KL}_t \Big)

    A_{i,k} = A^E_i + \omega\, A^S_{i,k}, \qquad
    A^E_i = \frac{r_i - \mathrm{mean}_j(r_j)}{F_j(r_j)}, \qquad
    A^S_{i,k} = \frac{R_{i,k} - \mathrm{mean}(R_s)}{F(R_s)}

    R_{i,k} = \sum_{l \ge k} \gamma^{l-k} r_{i,l}, \qquad
    R_s = \{ R_{j,l} : s_{j,l} = s_{i,k} \}

F is the standard deviation plus delta, or 1 with ``normalize=False``; T is the number of turns in
the batch. s is the environment's ``info["state_key"]``. A turn has A^S = 0 if its state has no key,
or if no other turn of the group was taken in that state, as in the authors' code. The paper's ratio
is per action; the authors' code, and this, take it per token.

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
    discounted_sum,
    group_mean,
    group_normalized,
    numbered,
    sequence_mean,
)

if TYPE_CHECKING:
    from torch import Tensor

    from research_agent.batch import Batch


@dataclass(frozen=True, slots=True)
class GiGPO:
    """GiGPO; omega and gamma are the paper's. It logs ``clip_fraction`` and, with a KL, ``kl``."""

    step_coef: float = 1.0
    """Weight of the advantages within states, A^S (omega)."""
    gamma: float = 0.95
    """Discount per turn."""
    normalize: bool = True
    """Divide by standard deviations (F); otherwise subtract means only."""
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
        require("gigpo", self, "clip", "kl_coef", "entropy_coef", "step_coef", "gamma")
        require("gigpo", self, "std_epsilon", above=0)
        require("gigpo", self, "gamma", at_most=1)
        require_one_of("gigpo", self, "kl_estimator", KL_ESTIMATORS)

    @property
    def needs_reference(self) -> bool:
        """True if ``kl_coef`` is above 0."""
        return self.kl_coef > 0

    def advantages(self, batch: Batch) -> Tensor:
        """``A_{i,k}``, on every token of turn k of trajectory i."""
        returns = discounted_sum(batch.turn_rewards, batch.turn_seq_ids, self.gamma)
        groups = batch.groups[batch.turn_seq_ids].tolist()
        # A turn without a state key is alone in its state: its own index stands for it.
        states = [
            (group, key) if key else turn
            for turn, (group, key) in enumerate(zip(groups, batch.state_keys, strict=True))
        ]
        anchors = batch.turn_seq_ids.new_tensor(numbered(states))
        episode = self._relative(batch.rewards, batch.groups)[batch.turn_seq_ids]
        return (episode + self.step_coef * self._relative(returns, anchors))[batch.turn_ids]

    def weights(self, batch: Batch) -> Tensor:
        """``1 / (T |o_{i,k}|)``, the factors before the token's term in J."""
        lengths = batch.turn_ids.bincount(minlength=len(batch.turn_rewards))
        return sequence_mean(lengths, batch.turn_ids)

    def objective(self, tokens: Tokens) -> tuple[Tensor, Mapping[str, Tensor]]:
        """``min(rho_t A_{i,k}, clip(rho_t) A_{i,k}) - beta KL_t``: J's bracket; plus entropy."""
        return clipped_objective(
            tokens,
            clip=self.clip,
            kl_coef=self.kl_coef,
            entropy_coef=self.entropy_coef,
            kl_estimator=self.kl_estimator,
        )

    def _relative(self, values: Tensor, groups: Tensor) -> Tensor:
        """``(value - mean) / F`` of each group."""
        if self.normalize:
            return group_normalized(values, groups, self.std_epsilon)
        return values - group_mean(values, groups)
