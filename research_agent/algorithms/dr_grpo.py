r"""Dr. GRPO ("GRPO done right"): GRPO without its biases by length and by difficulty.

Liu et al. 2025, "Understanding R1-Zero-Like Training" (arXiv:2503.20783), section 3.2:

.. math::

    J = \frac{1}{N L} \sum_{i=1}^{N} \sum_{t=1}^{|o_i|}
        \min\big(\rho_t A_i,\ \mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon) A_i\big), \qquad
    A_i = r_i - \mathrm{mean}(r_{group})

GRPO divides by the group's standard deviation, which gives more weight to tasks that are nearly
always or nearly never solved, and by |o_i|, which makes a wrong answer cheaper the longer it is.
Dr. GRPO does neither. The paper's equation has no L; the authors' code, like TRL, divides by the
constant token budget. L only scales the gradient: Adam does not see it, ``--max-grad-norm`` does.

Symbols that are not explained here are those of ``grpo.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from research_agent.algorithms.base import Tokens
from research_agent.algorithms.checks import require
from research_agent.algorithms.functional import (
    clipped_objective,
    group_mean,
)

if TYPE_CHECKING:
    from torch import Tensor

    from research_agent.batch import Batch


@dataclass(frozen=True, slots=True)
class DrGRPO:
    """Dr. GRPO; the defaults are the paper's. It logs ``clip_fraction`` and, with a KL, ``kl``."""

    clip: float = 0.2
    """Ratios are clipped to 1 - clip and 1 + clip (epsilon)."""
    max_length: int = 8192
    """Divisor of the sum over a trajectory's tokens (L); give it the value of --max-response."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference policy (k3), in the loss; 0: no reference runs."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus, which is not in the equation."""

    def __post_init__(self) -> None:
        require("dr_grpo", self, "clip", "kl_coef", "entropy_coef")
        require("dr_grpo", self, "max_length", above=0)

    @property
    def needs_reference(self) -> bool:
        """True if ``kl_coef`` is above 0."""
        return self.kl_coef > 0

    def advantages(self, batch: Batch) -> Tensor:
        """``A_i``: the reward less the group's mean, on every token of trajectory i."""
        return (batch.rewards - group_mean(batch.rewards, batch.groups))[batch.seq_ids]

    def weights(self, batch: Batch) -> Tensor:
        """``1 / (N L)``, the factor before the sums in J."""
        weight = 1 / (len(batch) * self.max_length)
        return batch.rewards.new_full((len(batch.seq_ids),), weight)

    def objective(self, tokens: Tokens) -> tuple[Tensor, Mapping[str, Tensor]]:
        """``min(rho_t A_i, clip(rho_t) A_i)``, the term in J; less KL, plus entropy."""
        return clipped_objective(
            tokens,
            clip=self.clip,
            entropy_coef=self.entropy_coef,
            kl_coef=self.kl_coef,
            kl_estimator="k3",
        )
