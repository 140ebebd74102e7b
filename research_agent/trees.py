"""Trees of trajectories: where a group's samples branch off each other, and when.

A group of samples is M trees. Each begins with a chain, an episode played from its start to its
end; then come rounds of branches. A branch takes up a state that an earlier sample of the tree was
in before one of its turns, and plays on from there: what came before is neither sampled, prefilled
nor played again.

An environment can branch from its present state only, so every branch has its slot from the start
and keeps the state that it will begin with: one that a better choice replaces. Which states are
chosen depends on seed, task and samples, never on timing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, log
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from research_agent.errors import ConfigError

if TYPE_CHECKING:
    from research_agent.config import SamplingConfig
    from research_agent.engines.base import Completion, Engine
    from research_agent.environments import Environments
    from research_agent.rollout import ActiveRollout
    from research_agent.trajectory import Trajectory

Choice = Literal["random", "entropy"]


@dataclass(frozen=True, slots=True)
class TreePlan:
    """How a tree grows: a chain, then rounds of branches.

    Attributes:
        branches: branches per round (N in Tree-GRPO); 0: chains alone.
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
        for name, least in (("branches", 0), ("rounds", 1), ("entropy_tokens", 1)):
            if getattr(self, name) < least:
                value = getattr(self, name)
                raise ConfigError(f"a tree's {name} is {value}; give {least} or more")
        if self.choose not in ("random", "entropy"):
            raise ConfigError(f"a tree chooses by {self.choose!r}; known: 'random', 'entropy'")

    @classmethod
    def of(cls, sampling: SamplingConfig) -> TreePlan:
        """Read the plan from a configuration."""
        return cls(sampling.tree_branches, sampling.tree_rounds, sampling.tree_choice)

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
    priority: float = -inf
    start: ActiveRollout | None = None


class Trees:
    """The trees that are growing.

    Args:
        plan: how each grows.
        seed: of the run.
        environments: those that are played in.

    Raises:
        ConfigError: the plan has branches, and these environments cannot be branched, or are fewer
            than a tree has samples.
    """

    def __init__(self, plan: TreePlan, seed: int, environments: Environments) -> None:
        if plan.branches and not getattr(environments, "branches", False):
            raise ConfigError(
                "this environment has no branch(source, targets), which trees need; "
                "sample chains, or use a vector environment that offers it"
            )
        if plan.branches and environments.num_envs < plan.size:
            raise ConfigError(
                f"a tree of {plan.size} samples needs as many environments at once, and there are "
                f"{environments.num_envs}; raise --max-in-flight"
            )
        self._plan = plan
        self._seed = seed
        self._environments: Any = environments
        self._seedlings: dict[tuple[int, int], _Seedling] = {}  # by task and sample
        self._playing: dict[tuple[int, int], int] = {}  # by task and root: samples under way

    def plant(self, chains: Iterable[tuple[int, int]], free: deque[int]) -> None:
        """Begin trees whose branches get free slots.

        Args:
            chains: task and sample of each tree's chain.
            free: slots; those that are given away are taken out.
        """
        for episode, root in chains:
            self._playing[episode, root] = 1
            for sample in range(root + 1, root + self._plan.size):
                self._seedlings[episode, sample] = _Seedling(free.popleft())

    def offer(
        self, turns: Sequence[Completion], active: Mapping[int, ActiveRollout], engine: Engine
    ) -> None:
        """Let later branches consider the states before turns that have just been sampled.

        Args:
            turns: the turns. The environments of their slots have not had the actions yet.
            active: the trajectories by slot; the turns are not yet added to them.
            engine: the sampler.
        """
        plan = self._plan
        for turn in turns if plan.branches else ():
            rollout = active[turn.slot]
            root = plan.root(rollout.sample)
            for sample in range(rollout.sample + 1, root + plan.size):
                seedling = self._seedlings.get((rollout.episode, sample))
                if seedling is None or plan.round(sample) <= plan.round(rollout.sample):
                    continue
                priority = self._priority(rollout, sample, turn)
                if priority <= seedling.priority:
                    continue
                self._environments.branch(turn.slot, [seedling.slot])
                start = rollout.branch(sample, root)
                if isinstance(engine, Forking):
                    held = len(start.unsent_tokens) - 1  # the last gives the next token's logits
                    engine.fork(turn.slot, seedling.slot, held)
                    start.unsent_tokens = start.unsent_tokens[held:]
                seedling.priority, seedling.start = priority, start

    def finish(
        self,
        trajectory: Trajectory,
        active: dict[int, ActiveRollout],
        engine: Engine,
        stop: tuple[str, ...],
    ) -> None:
        """Note that a sample has ended, and begin the next round of its tree if that is due.

        Args:
            trajectory: of the sample.
            active: the trajectories by slot; those that begin are added.
            engine: the sampler, which gets them.
            stop: strings after which generation pauses.
        """
        plan, episode, sample = self._plan, trajectory.episode, trajectory.sample
        root = plan.root(sample)
        if not plan.branches:
            return
        self._playing[episode, root] -= 1
        if self._playing[episode, root]:
            return
        for branch in range(root, root + plan.size):
            if plan.round(branch) == plan.round(sample) + 1:
                seedling = self._seedlings.pop((episode, branch))
                assert seedling.start is not None  # every episode has a turn to branch at
                active[seedling.slot] = seedling.start
                seedling.start.submit(engine, seedling.slot, stop)
                self._playing[episode, root] += 1

    def release(self, engine: Engine) -> None:
        """Let the engine forget what it holds for branches that have not begun."""
        for seedling in self._seedlings.values():
            engine.release(seedling.slot)

    def _priority(self, rollout: ActiveRollout, sample: int, turn: Completion) -> float:
        """A number per branch and state; the state with the largest is chosen.

        With u uniform, log(u) / w is largest with probability w / sum w (Efraimidis and Spirakis
        2006, "Weighted random sampling with a reservoir").
        """
        place = sum(segment.provenance == "action" for segment in rollout.segments)
        words = [self._seed, rollout.episode, sample, rollout.sample, place]
        uniform = (np.random.SeedSequence(words).generate_state(1, np.uint64)[0] + 0.5) / 2.0**64
        weight = 1.0
        if self._plan.choose == "entropy":
            weight = max(-fmean(turn.logprobs[: self._plan.entropy_tokens] or (0.0,)), 1e-6)
        return log(uniform) / weight
