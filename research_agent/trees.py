"""Trees of trajectories: where a group's samples branch off each other, and when.

A group of samples consists of M trees. A tree begins with a chain, an episode played from its start
to its end; then come rounds of branches. A branch starts in a state in which an earlier sample of
the tree took a turn, and plays on from there: what came before is neither sampled, prefilled nor
played again.

With a budget, a branch begins only if it fits: it is expected to cost what the sample that it
leaves cost from there on. A tree whose budget is spent has fewer samples.

An environment can branch from its present state only, so each branch has a slot from the start,
while the samples that it may branch off are still played. The slot holds the state with the highest
priority so far. Priorities depend on seed, task and samples, never on timing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, log
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from research_agent.errors import ConfigError
from research_agent.trajectory import NOT_GROWN, Segment, Trajectory
from research_agent.tree_plan import TreePlan

if TYPE_CHECKING:
    from research_agent.active_rollout import ActiveRollout, EpisodeKey, InFlight
    from research_agent.engines.base import Completion, Engine
    from research_agent.environments import Environments

# ARPO's alpha, beta and k, with the values of the paper's code; see Trees._branch_probability.
BRANCH_PROBABILITY = 0.5  # where the entropy is that of the first turn
ENTROPY_WEIGHT = 0.2
ENTROPY_TOKENS = 20


class Cost(NamedTuple):
    """What samples of a tree cost: action tokens, and turns."""

    tokens: int = 0
    turns: int = 0

    @classmethod
    def of(cls, turns: Sequence[Segment]) -> Cost:
        """The cost of turns."""
        return cls(sum(len(turn.tokens) for turn in turns), len(turns))

    def plus(self, other: Cost) -> Cost:
        """Add two costs."""
        return Cost(self.tokens + other.tokens, self.turns + other.turns)


@runtime_checkable
class Forking(Protocol):
    """An engine that can copy what a slot holds. With any other, a branch is prefilled anew."""

    def fork(self, source: int, target: int, length: int) -> None:
        """Let a slot hold the first tokens that another one holds; what it held is forgotten."""
        ...


@dataclass
class _PendingBranch:
    """A branch that has not begun: its slot, and the state from which it would begin."""

    slot: int
    priority: float = -inf  # the state's
    start: ActiveRollout | None = None  # the state; None: no turn has been sampled yet
    source: int = -1  # the sample that was in this state


class Trees:
    """The trees that are growing.

    Args:
        plan: how each grows.
        seed: seed of the run.
        environments: the environments to play in.
        vocabulary: how many tokens the policy chooses from.

    Raises:
        ConfigError: the plan has branches, and these environments cannot be branched, or are fewer
            than a tree has samples.
    """

    def __init__(
        self, plan: TreePlan, seed: int, environments: Environments, vocabulary: int
    ) -> None:
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
        self._highest_entropy = log(max(2, vocabulary))  # nats per token
        self._pending: dict[EpisodeKey, _PendingBranch] = {}  # by task and sample
        # By task and root of each tree: how many samples are under way, and those that have ended.
        self._playing: dict[EpisodeKey, int] = {}
        self._ended: dict[EpisodeKey, list[Trajectory]] = {}

    def begin(self, chains: Iterable[EpisodeKey], free: deque[int]) -> None:
        """Begin trees: each of their branches gets a slot.

        Args:
            chains: task and sample of each tree's chain.
            free: the free slots; those that branches get are removed.
        """
        for episode, root in chains if self._plan.branches else ():
            self._playing[episode, root] = 1
            for sample in range(root + 1, root + self._plan.size):
                self._pending[episode, sample] = _PendingBranch(free.popleft())

    def skip(self, chain: EpisodeKey, free: deque[int]) -> range:
        """Forget a tree that has begun without a turn.

        Args:
            chain: task and sample of its chain.
            free: the free slots; those of its branches are added.

        Returns:
            The numbers of its samples.
        """
        episode, root = chain
        samples = range(root, root + self._plan.size)
        self._playing.pop(chain, None)
        for branch in samples[1:]:
            free.append(self._pending.pop((episode, branch)).slot)
        return samples

    def consider(
        self, turns: Sequence[Completion], active: Mapping[int, ActiveRollout], engine: Engine
    ) -> None:
        """Let later branches consider the states before turns that have just been sampled.

        Args:
            turns: the turns. The environments have not been sent these actions yet.
            active: the trajectories by slot; the turns are not yet added to them.
            engine: the sampler.
        """
        plan = self._plan
        for turn in turns if plan.branches else ():
            rollout = active[turn.slot]
            root = plan.root(rollout.sample)
            for sample in range(rollout.sample + 1, root + plan.size):
                pending = self._pending.get((rollout.episode, sample))
                if pending is None or plan.round(sample) <= plan.round(rollout.sample):
                    continue
                priority = self._priority(rollout, sample, turn)
                if priority <= pending.priority:
                    continue
                self._environments.branch(turn.slot, [pending.slot])
                start = rollout.branch(sample, root)
                if isinstance(engine, Forking):
                    held = len(start.unsent_tokens) - 1  # the last gives the next token's logits
                    engine.fork(turn.slot, pending.slot, held)
                    start.unsent_tokens = start.unsent_tokens[held:]
                pending.priority, pending.start = priority, start
                pending.source = rollout.sample

    def finish(
        self,
        trajectory: Trajectory,
        in_flight: InFlight,
        free: deque[int],
        engine: Engine,
        stop: tuple[str, ...],
    ) -> None:
        """Note that a sample has ended, and begin the next round of its tree if that is due.

        Args:
            trajectory: the trajectory of the sample.
            in_flight: its ``active`` gets the branches that begin; its ``done`` gets a void
                trajectory for each branch that does not fit the budget.
            free: the free slots; those of branches that do not fit are added.
            engine: the sampler, which gets the branches that begin.
            stop: strings after which generation pauses.
        """
        plan, episode, sample = self._plan, trajectory.episode, trajectory.sample
        tree = episode, plan.root(sample)
        if not plan.branches:
            return
        self._playing[tree] -= 1
        self._ended.setdefault(tree, []).append(trajectory)
        if self._playing[tree]:
            return
        for number in range(plan.round(sample) + 1, plan.rounds + 1):
            for slot, start in self._begin_round(tree, number, in_flight, free, engine).items():
                in_flight.active[slot] = start
                start.submit(engine, slot, stop)
                self._playing[tree] += 1
            if self._playing[tree]:
                return
        del self._playing[tree], self._ended[tree]

    def _begin_round(
        self,
        tree: EpisodeKey,
        number: int,
        in_flight: InFlight,
        free: deque[int],
        engine: Engine,
    ) -> dict[int, ActiveRollout]:
        """Choose the branches of a round that fit the budget; returns them by slot."""
        episode, root = tree
        started: dict[int, ActiveRollout] = {}
        spent = Cost.of([turn for ended in self._ended[tree] for turn in ended.own_turns])
        for branch in range(root, root + self._plan.size):
            if self._plan.round(branch) != number:
                continue
            pending = self._pending.pop((episode, branch))
            assert pending.start is not None  # every episode has a turn to branch at
            source = next(t for t in self._ended[tree] if t.sample == pending.source)
            cost = spent.plus(Cost.of(source.turns[len(pending.start.lineage) :]))
            if self._plan.affords(*cost):
                spent = cost
                started[pending.slot] = pending.start
            else:
                engine.release(pending.slot)
                free.append(pending.slot)
                in_flight.done[episode, branch] = Trajectory(
                    episode, branch, (), 0.0, False, True, NOT_GROWN, void=True
                )
        return started

    @property
    def slots(self) -> set[int]:
        """Slots of the branches that have not begun."""
        return {pending.slot for pending in self._pending.values()}

    def release(self, engine: Engine) -> None:
        """Let the engine forget what it holds for branches that have not begun."""
        for pending in self._pending.values():
            engine.release(pending.slot)
            if pending.start:
                pending.start.unsent_tokens = pending.start.tokens

    def _priority(self, rollout: ActiveRollout, sample: int, turn: Completion) -> float:
        """Draw a state's priority for a branch; the state with the largest one is chosen.

        With u uniform in (0, 1), log(u) / w is largest with probability w / sum w.

        References:
            Efraimidis and Spirakis (2006), "Weighted random sampling with a reservoir".
        """
        place = sum(segment.provenance == "action" for segment in rollout.segments)
        words = [self._seed, rollout.episode, sample, rollout.sample, place]
        uniform = (np.random.SeedSequence(words).generate_state(1, np.uint64)[0] + 0.5) / 2.0**64
        weight = 1.0
        if self._plan.choose == "entropy":
            weight = self._branch_probability(rollout, turn)
        return log(uniform) / weight

    def _branch_probability(self, rollout: ActiveRollout, turn: Completion) -> float:
        """Return the probability with which ARPO branches before a turn.

        ``clip(alpha + beta (H_k - H_initial))``: H_k is the sum of the entropies of the turn's
        first k tokens, divided by the logarithm of the vocabulary; H_initial is that of the
        episode's first turn. The surprisals of the sampled tokens estimate the entropies.

        References:
            Dong et al. 2025 (arXiv:2507.19849), section 3.1.
        """

        def entropy(logprobs: Sequence[float]) -> float:
            return -sum(logprobs[:ENTROPY_TOKENS]) / self._highest_entropy

        first = next((s for s in rollout.segments if s.provenance == "action"), None)
        now = entropy([v for part in (*rollout.partial_turns, turn) for v in part.logprobs])
        initial = now if first is None else entropy(first.logprobs or ())
        probability = BRANCH_PROBABILITY + ENTROPY_WEIGHT * (now - initial)
        return min(1.0, max(probability, 1e-6))
