"""The settings of trees: how many branches, in how many rounds, and what they may cost."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

from research_agent.errors import ConfigError

TreeChoice = Literal["random", "entropy"]


@dataclass(frozen=True, slots=True)
class TreePlan:
    """How a tree grows: a chain, then rounds of branches.

    Attributes:
        branches: branches per round (N in Tree-GRPO); 0: chains alone.
        rounds: rounds after the chain (L in Tree-GRPO). A round begins when the one before it has
            ended, and branches off any sample of the tree so far.
        choose: "random" takes each state before a turn with the same probability, as Tree-GRPO
            does; "entropy" in proportion to the probability with which ARPO branches there.
        max_tokens: action tokens that a tree may sample; None: any number.
        max_turns: turns that a tree may take, each a step of its environments; None: any number.

    Raises:
        ConfigError: a number that is too small, or an unknown choice.
    """

    branches: int
    rounds: int = 1
    choose: TreeChoice = "random"
    max_tokens: int | None = None
    max_turns: int | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        for name, least in (("branches", 0), ("rounds", 1)):
            if getattr(self, name) < least:
                value = getattr(self, name)
                raise ConfigError(f"a tree's {name} is {value}; give {least} or more")
        for name in ("max_tokens", "max_turns"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and self.branches):
                raise ConfigError(
                    f"a tree's {name} is {value} with {self.branches} branches; give 1 or more, "
                    "and branches that it can limit"
                )
        if self.choose not in ("random", "entropy"):
            raise ConfigError(f"a tree chooses by {self.choose!r}; known: 'random', 'entropy'")

    @property
    def size(self) -> int:
        """Samples of a tree."""
        return 1 + self.branches * self.rounds

    def root(self, sample: int) -> int:
        """The sample that is the chain of a sample's tree."""
        return sample - sample % self.size

    def round(self, sample: int) -> int:
        """0 for a chain, then the round that a branch belongs to."""
        return -(-(sample % self.size) // max(1, self.branches))

    def affords(self, tokens: int, turns: int) -> bool:
        """Whether a tree may have this many action tokens and turns."""
        return tokens <= (self.max_tokens or inf) and turns <= (self.max_turns or inf)

    def require_group(self, group_size: int) -> None:
        """Check that a group is a number of whole trees.

        Raises:
            ConfigError: it is not.
        """
        if group_size % self.size:
            raise ConfigError(
                f"a group of {group_size} samples is no number of trees of {self.size} "
                f"(a chain and {self.rounds} rounds of {self.branches} branches); "
                f"give a group size that is a multiple of {self.size}"
            )


CHAINS = TreePlan(branches=0)
"""No sample branches off another."""
