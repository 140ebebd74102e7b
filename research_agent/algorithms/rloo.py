r"""RLOO (REINFORCE leave-one-out): the mean of the group's other samples is the baseline.

Ahmadian et al. 2024, "Back to Basics" (arXiv:2402.14740), section 3, after Kool et al. 2019:

.. math::

    \nabla J = \frac{1}{N} \sum_{i=1}^{N} A_i\, \nabla \log \pi(o_i), \qquad
    A_i = R_i - \frac{1}{G-1} \sum_{j \ne i} R_j, \qquad
    R_i = r_i - \beta \log\frac{\pi_{old}(o_i)}{\pi_{ref}(o_i)}

A whole response is one action: its log-probability is the sum over its tokens, and the KL (k1) is
part of its reward. The baseline leaves out the trajectory's own reward, which keeps the gradient
unbiased. A group of one has advantage 0.

For several updates per rollout the objective has the ratio of whole trajectories, clipped as in
TRL:

.. math::

    J = \frac{1}{N} \sum_i \min\big(s_i A_i,\ \mathrm{clip}(s_i, 1-\epsilon, 1+\epsilon) A_i\big),
    \qquad s_i = \frac{\pi(o_i)}{\pi_{old}(o_i)}

For the policy that sampled, s_i is 1 and its gradient is the first equation's. In the code each of
the |o_i| tokens carries its trajectory's term with weight 1 / (N |o_i|), which gives the same sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from research_agent.algorithms.base import Tokens
from research_agent.algorithms.checks import require
from research_agent.algorithms.functional import (
    clipped_objective,
    kl,
    leave_one_out_mean,
    sequence_mean,
    sequence_ratio,
)

if TYPE_CHECKING:
    from torch import Tensor

    from research_agent.batch import Batch


@dataclass(frozen=True, slots=True)
class RLOO:
    """RLOO. It logs ``clip_fraction`` and, with a KL, ``kl`` (k1)."""

    clip: float = 0.2
    """Ratios of trajectories are clipped to 1 - clip and 1 + clip (epsilon)."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference policy, in the reward (beta); 0: no reference runs."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus, which is not in the equation."""

    def __post_init__(self) -> None:
        require("rloo", self, "clip", "kl_coef", "entropy_coef")

    @property
    def needs_reference(self) -> bool:
        """True if ``kl_coef`` is above 0."""
        return self.kl_coef > 0

    def advantages(self, batch: Batch) -> Tensor:
        """``A_i``: R_i less the mean R of the others, on every token of trajectory i."""
        rewards = batch.rewards
        if self.needs_reference and batch.reference_logprobs is not None:
            per_token = kl("k1", batch.old_logprobs, batch.reference_logprobs).to(rewards.dtype)
            rewards = rewards.index_add(0, batch.seq_ids, per_token, alpha=-self.kl_coef)
        return (rewards - leave_one_out_mean(rewards, batch.groups))[batch.seq_ids]

    def weights(self, batch: Batch) -> Tensor:
        """``1 / (N |o_i|)``: J's 1 / N, divided among the tokens of the trajectory."""
        return sequence_mean(batch.lengths, batch.seq_ids)

    def objective(self, tokens: Tokens) -> tuple[Tensor, Mapping[str, Tensor]]:
        """``min(s_i A_i, clip(s_i) A_i)``, on every token; plus entropy."""
        ratio = sequence_ratio(tokens.logprobs, tokens.old_logprobs, tokens.seq_ids, mean=False)
        return clipped_objective(
            tokens, clip=self.clip, entropy_coef=self.entropy_coef, ratio=ratio
        )
