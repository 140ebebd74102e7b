r"""RLOO: REINFORCE with the mean of the others as the baseline.

Ahmadian et al. 2024, "Back to Basics" (arXiv:2402.14740), section 3, after Kool et al. 2019:

.. math::

    \nabla J = \frac{1}{N} \sum_{i=1}^{N} A_i\, \nabla \log \pi(o_i), \qquad
    A_i = R_i - \frac{1}{G-1} \sum_{j \ne i} R_j, \qquad
    R_i = r_i - \beta \log\frac{\pi_{old}(o_i)}{\pi_{ref}(o_i)}

A whole response is one action, so its log-probability is the sum over its tokens and the KL (k1) is
part of its reward. The baseline leaves the trajectory's own reward out, which keeps the gradient
unbiased.

For more than one update a rollout there is the ratio of whole trajectories, clipped as in TRL:

.. math::

    J = \frac{1}{N} \sum_i \min\big(s_i A_i,\ \mathrm{clip}(s_i, 1-\epsilon, 1+\epsilon) A_i\big),
    \qquad s_i = \frac{\pi(o_i)}{\pi_{old}(o_i)}

Where the policy is the one that sampled, s_i is 1 and the gradient that of the first equation.
Every token carries its trajectory's term, with the weight 1 / (N |o_i|), which is the same sum. A
group of one has advantage 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from research_agent.algorithms.base import Tokens
from research_agent.algorithms.functional import (
    clipped_objective,
    kl_k1,
    leave_one_out_mean,
    require,
    sequence_mean,
    sequence_ratio,
)

if TYPE_CHECKING:
    from torch import Tensor

    from research_agent.batch import Batch


@dataclass(frozen=True, slots=True)
class RLOO:
    """RLOO. It logs ``clip_fraction``, and ``kl`` (k1) if that is used."""

    clip: float = 0.2
    """Ratios of trajectories count only within 1 - clip and 1 + clip (epsilon)."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference policy, in the reward (beta); 0: no reference is run."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus, which the paper has not."""

    def __post_init__(self) -> None:
        require("rloo", self, "clip", "kl_coef", "entropy_coef")

    @property
    def needs_reference(self) -> bool:
        """True unless the KL counts for nothing."""
        return self.kl_coef > 0

    def advantages(self, batch: Batch) -> Tensor:
        """``R`` less the mean of the other samples; one value per trajectory."""
        rewards = batch.rewards
        if self.needs_reference and batch.reference_logprobs is not None:
            kl = kl_k1(batch.old_logprobs, batch.reference_logprobs).to(rewards.dtype)
            rewards = rewards.index_add(0, batch.seq_ids, kl, alpha=-self.kl_coef)
        return (rewards - leave_one_out_mean(rewards, batch.groups))[batch.seq_ids]

    def weights(self, batch: Batch) -> Tensor:
        """``1 / (N |o_i|)``."""
        return sequence_mean(batch.lengths, batch.seq_ids)

    def objective(self, tokens: Tokens) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The minimum in the second equation, for each token of the trajectory."""
        ratio = sequence_ratio(tokens.logprobs, tokens.old_logprobs, tokens.seq_ids, mean=False)
        return clipped_objective(
            tokens, clip=self.clip, entropy_coef=self.entropy_coef, ratio=ratio
        )
