r"""Dr. GRPO: "GRPO done right", without its biases towards length and towards easy or hard tasks.

Liu et al. 2025, "Understanding R1-Zero-Like Training" (arXiv:2503.20783), section 3.2:

.. math::

    J = \frac{1}{N L} \sum_{i=1}^{N} \sum_{t=1}^{|o_i|}
        \min\big(\rho_t A_i,\ \mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon) A_i\big), \qquad
    A_i = r_i - \mathrm{mean}(r_{group})

GRPO divides by the standard deviation of the group, so that tasks which are nearly always or nearly
never solved weigh more; and by |o_i|, so that a wrong answer costs less the longer it is. Neither
is here. The equation of the paper has no L; the authors' code divides by a constant, the budget of
tokens, and so does TRL. L only scales the gradient, which matters to ``--max-grad-norm`` and to
weight decay; Adam itself does not see it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from research_agent.algorithms.base import Tokens
from research_agent.algorithms.functional import (
    clipped_objective,
    constant_mean,
    group_mean,
    require,
)

if TYPE_CHECKING:
    from torch import Tensor

    from research_agent.batch import Batch


@dataclass(frozen=True, slots=True)
class DrGRPO:
    """Dr. GRPO; the defaults are the paper's. It logs ``clip_fraction``, and ``kl`` if used."""

    clip: float = 0.2
    """Ratios count only within 1 - clip and 1 + clip (epsilon)."""
    max_length: int = 8192
    """What the sum over the tokens of a trajectory is divided by (L): give it --max-response."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference policy (k3), in the loss; 0: no reference is run."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""

    def __post_init__(self) -> None:
        require("dr_grpo", self, "clip", "kl_coef", "entropy_coef")
        require("dr_grpo", self, "max_length", above=0)

    @property
    def needs_reference(self) -> bool:
        """True unless the KL counts for nothing."""
        return self.kl_coef > 0

    def advantages(self, batch: Batch) -> Tensor:
        """``r - mean`` of the group; one value per trajectory."""
        return (batch.rewards - group_mean(batch.rewards, batch.groups))[batch.seq_ids]

    def weights(self, batch: Batch) -> Tensor:
        """``1 / (N L)``."""
        return constant_mean(batch.lengths, batch.seq_ids, self.max_length)

    def objective(self, tokens: Tokens) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The minimum in the equation, for each token; less KL, plus entropy."""
        return clipped_objective(
            tokens,
            clip=self.clip,
            entropy_coef=self.entropy_coef,
            kl_coef=self.kl_coef,
            kl_estimator="k3",
        )
