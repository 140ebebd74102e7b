r"""DAPO: decoupled clip and dynamic sampling policy optimization.

Yu et al. 2025 (arXiv:2503.14476), equations 8, 9 and 13:

.. math::

    J = \frac{1}{\sum_i |o_i|} \sum_{i=1}^{N} \sum_{t=1}^{|o_i|} \min\big(\rho_t A_i,\
        \mathrm{clip}(\rho_t, 1-\epsilon_{low}, 1+\epsilon_{high}) A_i\big), \qquad
    A_i = \frac{r_i - \mathrm{mean}(r_{group})}{\mathrm{std}(r_{group}) + \delta}

Its four ideas, by their names in the paper. *Clip-higher*: epsilon_high is above epsilon_low, so
that unlikely tokens can become likely. *Token-level loss*: every token counts the same, whatever
trajectory it is in. *Dynamic sampling*: a group whose rewards are all equal teaches nothing, and is
replaced by that of another task. *Soft overlong punishment*: rewards fall linearly to one less as
a response nears ``overlong_limit``. There is no KL.

Where definitions differ, ours are these. Length counts what the policy wrote, for it cannot help
the length of observations. Dynamic sampling looks at the rewards before they are punished. It plays
as many tasks more as groups are missing (verl: a whole batch, of which it throws away what is too
much), and after ``max_rounds`` rounds learns from what there is (verl stops with an error).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from research_agent.algorithms.base import Tokens
from research_agent.algorithms.functional import (
    clipped_objective,
    group_normalized,
    overlong_penalty,
    require,
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
    """Ratios count only above 1 - clip_low (epsilon_low)."""
    clip_high: float = 0.28
    """Ratios count only below 1 + clip_high (epsilon_high)."""
    dynamic: bool = True
    """Replace groups whose rewards are all equal (dynamic sampling)."""
    max_rounds: int = 10
    """Rounds of playing a step, the first one included."""
    overlong_limit: int = 0
    """Action tokens from which a trajectory's reward is one less (L_max); 0: none is punished."""
    overlong_cache: int = 4096
    """Action tokens before that over which the reward falls linearly (L_cache)."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus, which the paper has not."""
    std_epsilon: float = 1e-6
    """Added to the standard deviation of a group's rewards (delta)."""

    def __post_init__(self) -> None:
        require("dapo", self, "clip_low", "clip_high", "overlong_limit", "entropy_coef")
        require("dapo", self, "max_rounds", "overlong_cache", "std_epsilon", above=0)

    def keeps(self, rewards: Sequence[float]) -> bool:
        """Dynamic sampling: the rewards of the group are not all equal."""
        return not self.dynamic or len(set(rewards)) > 1

    def advantages(self, batch: Batch) -> Tensor:
        """``(r - mean) / (std + delta)`` of the group, ``r`` with the penalty of the overlong."""
        rewards = batch.rewards
        if self.overlong_limit:
            penalty = overlong_penalty(batch.lengths, self.overlong_limit, self.overlong_cache)
            rewards = rewards + penalty
        return group_normalized(rewards, batch.groups, self.std_epsilon)[batch.seq_ids]

    def weights(self, batch: Batch) -> Tensor:
        """``1 / sum |o_i|``."""
        return token_mean(batch.lengths, batch.seq_ids)

    def objective(self, tokens: Tokens) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The minimum in the equation, for each token."""
        clip = (self.clip_low, self.clip_high)
        return clipped_objective(tokens, clip=clip, entropy_coef=self.entropy_coef)
