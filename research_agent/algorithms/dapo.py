r"""DAPO: decoupled clip and dynamic sampling policy optimization.

Yu et al. 2025 (arXiv:2503.14476), equations 8, 9 and 13:

.. math::

    J = \frac{1}{\sum_i |o_i|} \sum_{i=1}^{N} \sum_{t=1}^{|o_i|} \min\big(\rho_t A_i,\
        \mathrm{clip}(\rho_t, 1-\epsilon_{low}, 1+\epsilon_{high}) A_i\big), \qquad
    A_i = \frac{R_i - \mathrm{mean}(R_{group})}{\mathrm{std}(R_{group}) + \delta}

    R_i = r_i + \mathrm{clip}\Big(\frac{L_{max} - L_{cache} - |o_i|}{L_{cache}}, -1, 0\Big)

Its four ideas, by their names in the paper. *Clip-higher*: epsilon_high is above epsilon_low, so
that unlikely tokens can become likely. *Token-level loss*: every token has the same weight.
*Dynamic sampling*: a group whose rewards are all equal teaches nothing; a group of another task
replaces it. *Soft overlong punishment*: R falls linearly, by up to 1, over the last L_cache tokens
before L_max. There is no KL.

Libraries differ in these definitions. |o_i| counts action tokens only, since the policy cannot help
the length of observations. Dynamic sampling looks at r, before the punishment. It plays as many
more tasks as groups are missing (verl plays a whole batch and discards the surplus), and after
``max_rounds`` rounds it learns from the groups that it has (verl stops with an error).

Symbols that are not explained here are those of ``grpo.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from research_agent.algorithms.base import Tokens
from research_agent.algorithms.checks import require
from research_agent.algorithms.functional import (
    clipped_objective,
    group_normalized,
    token_mean,
)

if TYPE_CHECKING:
    from torch import Tensor

    from research_agent.batch import Batch


@dataclass(frozen=True, slots=True)
class DAPO:
    """DAPO; the defaults are the paper's. It logs ``clip_fraction``."""

    needs_reference = False

    clip_low: float = 0.2
    """Ratios are clipped from below at 1 - clip_low (epsilon_low)."""
    clip_high: float = 0.28
    """Ratios are clipped from above at 1 + clip_high (epsilon_high)."""
    dynamic: bool = True
    """Replace groups whose rewards are all equal (dynamic sampling)."""
    max_rounds: int = 10
    """Rounds of playing per step, the first one included."""
    overlong_limit: int = 0
    """Action tokens from which a trajectory's reward is 1 less (L_max); 0: no punishment."""
    overlong_cache: int = 4096
    """Action tokens before L_max over which the reward falls linearly (L_cache)."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus, which is not in the equation."""
    std_epsilon: float = 1e-6
    """Added to the standard deviation of a group's rewards (delta)."""

    def __post_init__(self) -> None:
        require("dapo", self, "clip_low", "clip_high", "overlong_limit", "entropy_coef")
        require("dapo", self, "max_rounds", "overlong_cache", "std_epsilon", above=0)

    def keeps(self, rewards: Sequence[float]) -> bool:
        """Dynamic sampling: keep a group unless its rewards are all equal."""
        return not self.dynamic or len(set(rewards)) > 1

    def advantages(self, batch: Batch) -> Tensor:
        """``A_i``, on every token of trajectory i."""
        rewards = batch.rewards
        if self.overlong_limit:
            margin = self.overlong_limit - self.overlong_cache - batch.lengths.double()
            rewards = rewards + (margin / self.overlong_cache).clamp(-1, 0)
        return group_normalized(rewards, batch.groups, self.std_epsilon)[batch.seq_ids]

    def weights(self, batch: Batch) -> Tensor:
        """``1 / sum_i |o_i|``, the factor before the sums in J."""
        return token_mean(batch.lengths, batch.seq_ids)

    def objective(self, tokens: Tokens) -> tuple[Tensor, Mapping[str, Tensor]]:
        """``min(rho_t A_i, clip(rho_t) A_i)``, the term in J; plus entropy."""
        clip = (self.clip_low, self.clip_high)
        return clipped_objective(tokens, clip=clip, entropy_coef=self.entropy_coef)
