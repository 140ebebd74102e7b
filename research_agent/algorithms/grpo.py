r"""Group Relative Policy Optimization, as ReSearch uses it.

Shao et al. 2024, DeepSeekMath (arXiv:2402.03300), equations 3 and 4; Chen et al. 2025, ReSearch
(arXiv:2503.19470), equation 1, where tokens that the search engine wrote are left out of the sums:

.. math::

    J = \frac{1}{N} \sum_{i=1}^{N} \frac{1}{|o_i|} \sum_{t=1}^{|o_i|} \Big(
        \min\big(\rho_t A_i,\ \mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon) A_i\big)
        - \beta\, \mathrm{KL}_t + \alpha\, H_t \Big)

    \rho_t = \frac{\pi(o_t)}{\pi_{old}(o_t)}, \qquad
    A_i = \frac{r_i - \mathrm{mean}(r_{group})}{\mathrm{std}(r_{group}) + \delta}, \qquad
    \mathrm{KL}_t = \frac{\pi_{ref}(o_t)}{\pi(o_t)} - \log\frac{\pi_{ref}(o_t)}{\pi(o_t)} - 1

N is the number of trajectories, |o_i| the number of tokens that the policy sampled in trajectory i.

Where definitions differ, ours are these. The standard deviation is that of a sample, over n - 1, as
in verl and TRL. Its delta is 1e-6, as in verl (TRL: 1e-4). A group of one has advantage 0, having
nothing to be compared with (prime-rl does the same; verl keeps the raw reward). The mean is over
the trajectories, as in the equation; the authors' code, an early verl, took it over the tokens of
a micro-batch. The entropy bonus is not in the papers' equation; it is in the authors' settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from research_agent.algorithms.base import Tokens
from research_agent.algorithms.functional import (
    group_mean,
    group_std,
    importance_ratio,
    kl_k3,
    sequence_mean,
)
from research_agent.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from research_agent.batch import Batch


@dataclass(frozen=True, slots=True)
class GRPO:
    """GRPO; the defaults are ReSearch's. It logs ``clip_share``, and ``kl`` if that is used."""

    clip: float = 0.2
    """Ratios count only within 1 - clip and 1 + clip (epsilon)."""
    kl_coef: float = 1e-3
    """Weight of the KL to the reference policy, in the loss (beta); 0: no reference is run."""
    entropy_coef: float = 1e-3
    """Weight of the entropy bonus (alpha)."""
    std_epsilon: float = 1e-6
    """Added to the standard deviation of a group's rewards (delta)."""

    def __post_init__(self) -> None:
        for name in ("clip", "kl_coef", "entropy_coef", "std_epsilon"):
            if not 0 <= getattr(self, name) < float("inf"):
                message = f"grpo: {name} is {getattr(self, name)}; give a finite number, 0 or more"
                raise ConfigError(message)
        if self.std_epsilon == 0:
            raise ConfigError("grpo: std_epsilon is 0, but a group's rewards may all be equal")

    @property
    def needs_reference(self) -> bool:
        """True unless the KL counts for nothing."""
        return self.kl_coef > 0

    def advantages(self, batch: Batch) -> Tensor:
        """``(r - mean) / (std + delta)`` of the group; one value a trajectory."""
        mean, std = (f(batch.rewards, batch.groups) for f in (group_mean, group_std))
        return ((batch.rewards - mean) / (std + self.std_epsilon))[batch.sequence]

    def weights(self, batch: Batch) -> Tensor:
        """``1 / (N |o_i|)``."""
        return sequence_mean(batch.lengths, batch.sequence)

    def objective(self, tokens: Tokens) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The bracket of the equation, for each token."""
        ratio = importance_ratio(tokens.logprobs, tokens.old_logprobs)
        free = ratio * tokens.advantages
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip) * tokens.advantages
        objective = free.minimum(clipped) + self.entropy_coef * tokens.entropy
        metrics = {"clip_share": clipped < free}
        if tokens.reference_logprobs is not None:
            metrics["kl"] = kl_k3(tokens.logprobs, tokens.reference_logprobs)
            objective = objective - self.kl_coef * metrics["kl"]
        return objective, metrics
