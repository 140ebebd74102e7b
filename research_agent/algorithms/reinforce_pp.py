r"""REINFORCE++: PPO's clipped objective without a critic, advantages normalized over the batch.

Hu et al. 2025 (arXiv:2501.03262), section 3:

.. math::

    J = \frac{1}{N} \sum_{i=1}^{N} \frac{1}{|o_i|} \sum_{t=1}^{|o_i|}
        \min\big(\rho_t \hat A_t,\ \mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon) \hat A_t\big)

    \hat A_t = \frac{A_t - \mathrm{mean}(A)}{\mathrm{std}(A)}, \qquad
    A_t = R_i - \beta \sum_{t'=t}^{|o_i|} \log\frac{\pi_{old}(o_{t'})}{\pi_{ref}(o_{t'})}

mean and std are those of all action tokens of the rollout; the KL (k1) is part of the reward.

``baseline`` is what R is. ``none``: the reward. ``group``: the reward less the mean of its group,
REINFORCE++-baseline; the paper then has the KL in the loss, by k2 (``kl_in=loss``):
:math:`J - \beta \frac{1}{2} \log^2(\pi / \pi_{ref})`, and no KL in the reward.

R1-Searcher (Song et al. 2025, arXiv:2503.05592) changes it for tools: documents are masked out
of loss, KL and normalization. That is so here for every algorithm, for observations have no action
tokens. Its published script uses the baseline of the group, with KL 0 (the presets
``r1-searcher-qwen`` and ``r1-searcher-llama``).

The sum runs over the action tokens of a trajectory, across its observations: verl once reset it at
each observation (issue 7278), and only the last action saw the reward. There is no discount.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from research_agent.algorithms.base import Tokens
from research_agent.algorithms.functional import (
    batch_normalized,
    clipped_objective,
    discounted_sum,
    group_mean,
    kl_k1,
    require,
    require_one_of,
    rewards_at_end,
    sequence_mean,
)

if TYPE_CHECKING:
    from torch import Tensor

    from research_agent.batch import Batch


@dataclass(frozen=True, slots=True)
class ReinforcePP:
    """REINFORCE++. It logs ``clip_fraction``, and ``kl`` if that is used."""

    clip: float = 0.2
    """Ratios count only within 1 - clip and 1 + clip (epsilon)."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference policy (beta); 0: no reference is run."""
    baseline: Literal["none", "group"] = "none"
    """What is taken off the reward: nothing, or the mean of the group."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL counts: in the reward (k1), or in the loss (k2)."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus, which the paper has not."""

    def __post_init__(self) -> None:
        require("reinforce_pp", self, "clip", "kl_coef", "entropy_coef")
        require_one_of("reinforce_pp", self, "baseline", ("none", "group"))
        require_one_of("reinforce_pp", self, "kl_in", ("reward", "loss"))

    @property
    def needs_reference(self) -> bool:
        """True unless the KL counts for nothing."""
        return self.kl_coef > 0

    def advantages(self, batch: Batch) -> Tensor:
        """What is still to come of reward less KL, normalized over the action tokens."""
        rewards = batch.rewards
        if self.baseline == "group":
            rewards = rewards - group_mean(rewards, batch.groups)
        of_tokens = rewards_at_end(rewards, batch.lengths)
        if self.kl_in == "reward" and batch.reference_logprobs is not None:
            kl = kl_k1(batch.old_logprobs, batch.reference_logprobs)
            of_tokens = of_tokens - self.kl_coef * kl
        return batch_normalized(discounted_sum(of_tokens, batch.seq_ids, 1.0))

    def weights(self, batch: Batch) -> Tensor:
        """``1 / (N |o_i|)``."""
        return sequence_mean(batch.lengths, batch.seq_ids)

    def objective(self, tokens: Tokens) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The minimum in the equation, for each token; less KL where that is in the loss."""
        in_loss = self.kl_in == "loss"
        return clipped_objective(
            tokens,
            clip=self.clip,
            entropy_coef=self.entropy_coef,
            kl_coef=self.kl_coef if in_loss else 0.0,
            kl_estimator="k2" if in_loss else "k1",
        )
