r"""CISPO: clip the importance-sampling weight, never a token's gradient.

MiniMax 2025, MiniMax-M1 (arXiv:2506.13585), equations 4 and 5:

.. math::

    J = \frac{1}{\sum_i |o_i|} \sum_{i=1}^{N} \sum_{t=1}^{|o_i|}
        \mathrm{sg}\big(\mathrm{clip}(\rho_t, 1-\epsilon_{low}, 1+\epsilon_{high})\big)\,
        A_i \log \pi(o_t), \qquad
    A_i = \frac{r_i - \mathrm{mean}(r_{group})}{\mathrm{std}(r_{group}) + \delta}

sg stops the gradient. PPO's minimum drops tokens whose ratio went too far, such as the rare
"However" that begins a second thought; here all tokens stay, with a bounded weight.

Libraries differ in these definitions. epsilon_low is 1, which bounds nothing, because the paper
sets no lower bound. The paper does not print its epsilon_high; ours makes the bound 1 + 4 = 5,
which TRL's documentation recommends. TRL's ``epsilon_high`` is the bound itself, 5.

Symbols that are not explained here are those of ``grpo.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from research_agent.algorithms.base import Tokens
from research_agent.algorithms.checks import require
from research_agent.algorithms.functional import (
    group_normalized,
    importance_ratio,
    token_mean,
)

if TYPE_CHECKING:
    from torch import Tensor

    from research_agent.batch import Batch


@dataclass(frozen=True, slots=True)
class CISPO:
    """CISPO. It logs ``clip_fraction``: the fraction of tokens whose weight is bounded."""

    needs_reference = False

    clip_low: float = 1.0
    """Weights are at least 1 - clip_low (epsilon_low); 1 bounds nothing."""
    clip_high: float = 4.0
    """Weights are at most 1 + clip_high (epsilon_high)."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus, which is not in the equation."""
    std_epsilon: float = 1e-6
    """Added to the standard deviation of a group's rewards (delta)."""

    def __post_init__(self) -> None:
        require("cispo", self, "clip_low", "clip_high", "entropy_coef")
        require("cispo", self, "std_epsilon", above=0)

    def advantages(self, batch: Batch) -> Tensor:
        """``A_i``: the group-normalized reward, on every token of trajectory i."""
        return group_normalized(batch.rewards, batch.groups, self.std_epsilon)[batch.seq_ids]

    def weights(self, batch: Batch) -> Tensor:
        """``1 / sum_i |o_i|``, the factor before the sums in J."""
        return token_mean(batch.lengths, batch.seq_ids)

    def objective(self, tokens: Tokens) -> tuple[Tensor, Mapping[str, Tensor]]:
        """``sg(clip(rho_t)) A_i log pi(o_t)``, the term in J; plus entropy."""
        ratio = importance_ratio(tokens.logprobs, tokens.old_logprobs).detach()
        bounded = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        objective = bounded * tokens.advantages * tokens.logprobs
        return objective + self.entropy_coef * tokens.entropy, {"clip_fraction": bounded != ratio}
