"""Trees of trajectories: where a group's samples branch off each other, and when.

A group of samples is M trees. Each begins with a chain, an episode played from its start to its
end; then come rounds of branches. A branch takes up a state that an earlier sample of the tree was
in before one of its turns, and plays on from there: what came before is neither sampled, prefilled
nor searched again.

An environment can branch from its present state only, so every branch has its slot from the start
and keeps the state that it will begin with: one that a better choice replaces. Which states are
chosen depends on seed, task and samples, never on timing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from research_agent.errors import ConfigError

if TYPE_CHECKING:
    from research_agent.engines.base import Completion, Engine
    from research_agent.rollout import ActiveRollout

Choice = Literal["random", "entropy"]


@dataclass(frozen=True, slots=True)
class TreePlan:
    """How a tree grows: a chain, then rounds of branches.

    Attributes:
        branches: branches per round (N in Tree-GRPO).
        rounds: rounds after the chain (L in Tree-GRPO). A round begins when the one before it has
            ended, and branches off any sample of the tree so far.
        choose: "random" takes each state before a turn with the same probability, as Tree-GRPO
            does; "entropy" takes it in proportion to the entropy of the turn that followed, after
            ARPO.
        entropy_tokens: the first tokens of a turn that its entropy is estimated from.

    Raises:
        ConfigError: a number that is too small, or an unknown choice.
    """

    branches: int
    rounds: int = 1
    choose: Choice = "random"
    entropy_tokens: int = 20

    def __post_init__(self) -> None:
        """Check the settings."""
        for name in ("branches", "rounds", "entropy_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"a tree's {name} is {getattr(self, name)}; give 1 or more")
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
        return -(-(sample % self.size) // self.branches)

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


class Branching(Protocol):
    """Environments whose episodes can be branched."""

    def branch(self, source: int, targets: Sequence[int]) -> None:
        """Let the targets continue from the source's present state."""
        ...


def require_branching(environments: object, slots: int) -> Branching:
    """Check that episodes can be branched.

    Args:
        environments: as the rollout has them.
        slots: how many a tree needs.

    Raises:
        ConfigError: they cannot, or there are too few of them for a tree.
    """
    if not getattr(environments, "branches", False):
        raise ConfigError(
            "this environment has no branch(source, targets), which trees need; "
            "sample chains, or use a vector environment that offers it"
        )
    found: Any = environments
    if found.num_envs < slots:
        raise ConfigError(
            f"a tree of {slots} samples needs as many environments at once, and there are "
            f"{found.num_envs}; raise --max-in-flight"
        )
    checked: Branching = found
    return checked


@runtime_checkable
class Forking(Protocol):
    """An engine that can copy what a slot holds. With any other, a branch is prefilled anew."""

    def fork(self, source: int, target: int, length: int) -> None:
        """Let a slot hold the first tokens that another one holds; what it held is forgotten."""
        ...


@dataclass
class _Seedling:
    """A branch that has not begun: its slot, and the best state so far."""

    slot: int
    priority: float = -1.0
    start: ActiveRollout | None = None


@dataclass
class Trees:
    """The trees that are growing.

    Args:
        plan: how each grows.
        seed: of the run.
    """

    plan: TreePlan
    seed: int
    _seedlings: dict[tuple[int, int], _Seedling] = field(default_factory=dict)  # by task, sample
    _playing: dict[tuple[int, int], int] = field(default_factory=dict)  # by task, root

    def plant(self, episode: int, root: int, slots: Sequence[int]) -> None:
        """Begin a tree whose branches have these slots."""
        for place, slot in enumerate(slots, start=1):
            self._seedlings[episode, root + place] = _Seedling(slot)
        self._playing[episode, root] = 1

    def offer(
        self, slot: int, rollout: ActiveRollout, turn: Completion, env: Branching, engine: Engine
    ) -> None:
        """Let later branches consider the state before a turn that has just been sampled.

        Args:
            slot: where it was sampled. Its environment has not had the action yet.
            rollout: the trajectory, the turn not yet added.
            turn: the turn.
            env: the environments.
            engine: the sampler.
        """
        plan, root = self.plan, self.plan.root(rollout.sample)
        for sample in range(rollout.sample + 1, root + plan.size):
            seedling = self._seedlings.get((rollout.episode, sample))
            if seedling is None or plan.round(sample) <= plan.round(rollout.sample):
                continue
            priority = self._priority(rollout, sample, turn)
            if priority <= seedling.priority:
                continue
            env.branch(slot, [seedling.slot])
            start = rollout.branch(sample, root)
            if isinstance(engine, Forking):
                held = len(start.unsent_tokens) - 1  # the last one gives the next token's logits
                engine.fork(slot, seedling.slot, held)
                start.unsent_tokens = start.unsent_tokens[held:]
            seedling.priority, seedling.start = priority, start

    def finish(self, episode: int, sample: int) -> dict[int, ActiveRollout]:
        """Note that a sample has ended; returns the branches that begin now, by slot."""
        plan, root = self.plan, self.plan.root(sample)
        self._playing[episode, root] -= 1
        if self._playing[episode, root]:
            return {}
        starting = {}
        for branch in range(root, root + plan.size):
            if plan.round(branch) == plan.round(sample) + 1:
                seedling = self._seedlings.pop((episode, branch))
                assert seedling.start is not None  # every episode has a turn to branch at
                starting[seedling.slot] = seedling.start
        self._playing[episode, root] = len(starting)
        return starting

    @property
    def slots(self) -> list[int]:
        """The slots of branches that have not begun."""
        return [seedling.slot for seedling in self._seedlings.values()]

    def _priority(self, rollout: ActiveRollout, sample: int, turn: Completion) -> float:
        """A number per branch and state; the state with the largest is chosen.

        With u uniform, u ** (1 / w) is largest with probability w / sum w (Efraimidis and Spirakis
        2006, "Weighted random sampling with a reservoir").
        """
        place = sum(segment.provenance == "action" for segment in rollout.segments)
        words = [self.seed, rollout.episode, sample, rollout.sample, place]
        uniform = (np.random.SeedSequence(words).generate_state(1, np.uint64)[0] + 0.5) / 2.0**64
        if self.plan.choose == "random":
            return float(uniform)
        surprise = -fmean(turn.logprobs[: self.plan.entropy_tokens] or (0.0,))
        return float(uniform ** (1 / max(surprise, 1e-6)))
