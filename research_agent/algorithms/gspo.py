r"""GSPO: group sequence policy optimization, with importance ratios of whole trajectories.

Zheng et al. 2025 (arXiv:2507.18071), equations 5 to 7:

.. math::

    J = \frac{1}{N} \sum_{i=1}^{N}
        \min\big(s_i A_i,\ \mathrm{clip}(s_i, 1-\epsilon_{low}, 1+\epsilon_{high}) A_i\big)

    s_i = \Big(\frac{\pi(o_i)}{\pi_{old}(o_i)}\Big)^{1/|o_i|}
        = \exp\Big(\frac{1}{|o_i|} \sum_{t=1}^{|o_i|} \log\frac{\pi(o_t)}{\pi_{old}(o_t)}\Big),
    \qquad A_i = \frac{r_i - \mathrm{mean}(r_{group})}{\mathrm{std}(r_{group}) + \delta}

The reward belongs to a trajectory, so ratio and clipping do too. The geometric mean keeps the
ratios of long and short trajectories in the same narrow range: the epsilons are a thousandth of
GRPO's. In the code each of the |o_i| tokens carries its trajectory's term with weight
1 / (N |o_i|), which gives the same sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from research_agent.algorithms.base import Tokens
from research_agent.algorithms.checks import require
from research_agent.algorithms.functional import (
    clipped_objective,
    group_normalized,
    sequence_mean,
    sequence_ratio,
)

if TYPE_CHECKING:
    from torch import Tensor

    from research_agent.batch import Batch


@dataclass(frozen=True, slots=True)
class GSPO:
    """GSPO; the defaults are the paper's. It logs ``clip_fraction`` and, with a KL, ``kl``."""

    clip_low: float = 3e-4
    """Ratios are clipped from below at 1 - clip_low (epsilon_low)."""
    clip_high: float = 4e-4
    """Ratios are clipped from above at 1 + clip_high (epsilon_high)."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference policy (k3), in the loss; 0: no reference runs."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus, which is not in the equation."""
    std_epsilon: float = 1e-6
    """Added to the standard deviation of a group's rewards (delta)."""

    def __post_init__(self) -> None:
        require("gspo", self, "clip_low", "clip_high", "kl_coef", "entropy_coef")
        require("gspo", self, "std_epsilon", above=0)

    @property
    def needs_reference(self) -> bool:
        """True if ``kl_coef`` is above 0."""
        return self.kl_coef > 0

    def advantages(self, batch: Batch) -> Tensor:
        """``A_i``: the group-normalized reward, on every token of trajectory i."""
        return group_normalized(batch.rewards, batch.groups, self.std_epsilon)[batch.seq_ids]

    def weights(self, batch: Batch) -> Tensor:
        """``1 / (N |o_i|)``: J's 1 / N, divided among the tokens of the trajectory."""
        return sequence_mean(batch.lengths, batch.seq_ids)

    def objective(self, tokens: Tokens) -> tuple[Tensor, Mapping[str, Tensor]]:
        """``min(s_i A_i, clip(s_i) A_i)``, on every token; less KL, plus entropy."""
        ratio = sequence_ratio(tokens.logprobs, tokens.old_logprobs, tokens.seq_ids, mean=True)
        return clipped_objective(
            tokens,
            clip=(self.clip_low, self.clip_high),
            entropy_coef=self.entropy_coef,
            kl_coef=self.kl_coef,
            kl_estimator="k3",
            ratio=ratio,
        )
