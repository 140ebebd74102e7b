"""Play episodes: the engine and the environments in one loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from research_agent.active_rollout import ActiveRollout, EpisodeKey, InFlight
from research_agent.config import SamplingConfig
from research_agent.engines.base import Completion, Engine, Interruptible, KeepsTurns
from research_agent.environments import Environments, StepResult, Truncating
from research_agent.errors import OverlongPromptError
from research_agent.renderer import Renderer
from research_agent.trajectory import Trajectory
from research_agent.tree_plan import CHAINS, TreePlan
from research_agent.trees import Trees


def keeps_turns(engine: Engine) -> bool:
    """Whether an engine takes new weights while turns are under way."""
    return isinstance(engine, KeepsTurns) and engine.keeps_turns


def collect(
    engine: Engine,
    environments: Environments,
    renderer: Renderer,
    episodes: Sequence[EpisodeKey],
    sampling: SamplingConfig,
    *,
    seed: int = 0,
    on_finish: Callable[[Trajectory], None] | None = None,
    plan: TreePlan = CHAINS,
    overlong_prompts: Literal["error", "skip"] = "error",
    keep: bool = True,
) -> list[Trajectory]:
    """Play episodes to their ends.

    Args:
        engine: a sampler with as many slots as there are environments, none of them in use.
        environments: each plays one episode after another.
        renderer: the policy's tokenizer.
        episodes: (episode number, sample number) of each.
        sampling: temperature and limits. With ``overlap`` the others continue while a trajectory
            waits for its environment; without it nothing depends on timing.
        seed: decides the order of the tasks and the draws. A trajectory's draws depend only on
            this, its episode and its sample.
        on_finish: called with each trajectory as it ends.
        plan: how samples branch off each other. With branches ``episodes`` are whole trees, in
            order.
        overlong_prompts: what to do with a task whose prompt has more tokens than ``max_prompt`` or
            the context allows. With "skip" its trajectories are void and empty, with the stop
            reason ``SKIPPED``.
        keep: whether to return the trajectories; if not, they are freed after ``on_finish``.

    Returns:
        The trajectories in the order of ``episodes``; none without ``keep``. A trajectory is
        ``void`` if the infrastructure failed, or if the budget of its tree left it out
        (``NOT_GROWN``, without a token). No slot is in use afterwards.

    Raises:
        ConfigError: the plan needs more slots than there are, or an environment that branches.
        ContextError: a prompt that is empty, or one that is too long and not to be skipped.
    """
    loop = RolloutLoop(
        engine,
        environments,
        renderer,
        sampling,
        seed=seed,
        plan=plan,
        overlong_prompts=overlong_prompts,
        on_finish=on_finish,
    )
    loop.enqueue(episodes)
    try:
        if keep:
            return loop.finish(episodes)
        while loop.has_work:
            loop.advance()
            loop.in_flight.done.clear()
        return []
    finally:
        loop.release()


class RolloutLoop:
    """Plays episodes one engine step at a time; ``collect`` and the player run it.

    Args:
        engine: as in ``collect``.
        environments: as in ``collect``.
        renderer: as in ``collect``.
        sampling: as in ``collect``.
        seed: as in ``collect``.
        in_flight: the episodes under way; those that it holds already continue with ``resume``.
        plan: as in ``collect``.
        overlong_prompts: as in ``collect``.
        on_finish: as in ``collect``.
    """

    def __init__(
        self,
        engine: Engine,
        environments: Environments,
        renderer: Renderer,
        sampling: SamplingConfig,
        *,
        seed: int = 0,
        in_flight: InFlight | None = None,
        plan: TreePlan = CHAINS,
        overlong_prompts: Literal["error", "skip"] = "error",
        on_finish: Callable[[Trajectory], None] | None = None,
    ) -> None:
        self.in_flight = InFlight() if in_flight is None else in_flight
        self._engine = engine
        self._environments = environments
        self._renderer = renderer
        self._sampling = sampling
        self._seed = seed
        self._plan = plan
        self._skips = overlong_prompts == "skip"
        self._on_finish = on_finish
        self._stop = environments.terminators
        self._truncate: Callable[[int], StepResult | None] = (
            environments.truncate if isinstance(environments, Truncating) else lambda _: None
        )
        # Needed by branches only; the renderer of an endpoint does not know its vocabulary.
        vocabulary = len(renderer.tokenizer) if plan.size > 1 else 0
        self._trees = Trees(plan, seed, environments, vocabulary)
        self._waiting: deque[EpisodeKey] = deque()
        self._free: deque[int] = deque()

    @property
    def has_work(self) -> bool:
        """Whether ``advance`` has anything to do."""
        return bool(self.in_flight.active or self._waiting)

    def enqueue(self, episodes: Iterable[EpisodeKey]) -> None:
        """Set which episodes begin next, in this order; replaces what was enqueued before.

        Args:
            episodes: the episodes. Those in flight, and branches of a tree, are left out.
        """
        known = self.in_flight.episodes
        self._waiting = deque(
            each
            for each in dict.fromkeys(episodes)
            if each not in known and self._plan.root(each[1]) == each[1]
        )
        taken = self.in_flight.active.keys() | self._trees.slots
        self._free = deque(n for n in range(self._environments.num_envs) if n not in taken)

    def finish(self, episodes: Collection[EpisodeKey]) -> list[Trajectory]:
        """Play on until these episodes have ended; returns their trajectories, in this order."""
        done = self.in_flight.done
        wanted = set(episodes)
        while not wanted <= done.keys():
            self.advance()
        taken = {each: done.pop(each) for each in wanted}
        return [taken[each] for each in episodes]

    def advance(self) -> None:
        """Begin episodes in free slots, do one engine step, and take what environments answer."""
        self._begin()
        self._send(self._engine.step())
        awaiting_env = len(self.in_flight.awaiting_env)
        if not awaiting_env:
            return
        wanted = awaiting_env
        if self._sampling.overlap:
            wanted = 0 if self._engine.busy else 1
        results = self._environments.recv(wanted)
        for result in sorted(results, key=lambda result: result.env_id):
            if result.env_id in self.in_flight.awaiting_env:  # otherwise the episode was dropped
                self._observe(result)

    def suspend(self) -> None:
        """Free all slots of the engine for another use; ``resume`` continues the episodes.

        An engine that keeps its turns finishes those under way first. Another one interrupts them
        if it can, and otherwise loses what it has sampled of them.
        """
        active = self.in_flight.active
        if keeps_turns(self._engine):
            while self._engine.busy:
                self._send(self._engine.step())
        elif active and isinstance(self._engine, Interruptible):
            for turn in self._engine.interrupt():
                active[turn.slot].add_partial(turn)
        for rollout in active.values():
            rollout.unsent_tokens = rollout.tokens
        self.release()

    def release(self) -> None:
        """Let the engine forget all slots; turns under way are lost."""
        self._trees.release(self._engine)
        for slot in self.in_flight.active:
            self._engine.release(slot)

    def resume(self) -> None:
        """Submit all trajectories under way, after ``suspend`` or from a checkpoint."""
        for slot in sorted(self.in_flight.active.keys() - self.in_flight.awaiting_env):
            self._submit(slot)

    def _begin(self) -> None:
        """Begin waiting episodes in free slots; a tree begins if all its samples have a slot."""
        free, active = self._free, self.in_flight.active
        starting = {
            free.popleft(): self._waiting.popleft()
            for _ in range(min(len(free) // self._plan.size, len(self._waiting)))
        }
        if not starting:
            return
        self._trees.begin(starting.values(), free)
        for slot, each in starting.items():
            active[slot] = ActiveRollout(*each, self._seed, self._sampling)
        numbers = {slot: episode for slot, (episode, _) in starting.items()}
        prompts = self._environments.reset(numbers, self._seed)
        for slot, (observation, info) in prompts.items():
            rollout = active[slot]
            try:
                rollout.begin(observation, info, self._renderer, self._engine.max_context)
            except OverlongPromptError:
                if not self._skips:
                    raise
                del active[slot]
                free.append(slot)
                skipped = rollout.skipped(info)
                for sample in self._trees.skip(rollout.key, free):
                    self.in_flight.done[rollout.episode, sample] = replace(skipped, sample=sample)
        for slot in (each for each in prompts if each in active):
            self._submit(slot)

    def _send(self, completions: Sequence[Completion]) -> None:
        """Give finished turns to their environments."""
        if not completions:
            return
        active = self.in_flight.active
        slots = [turn.slot for turn in completions]
        self._trees.consider(completions, active, self._engine)
        actions = [active[turn.slot].finish_turn(turn, self._renderer) for turn in completions]
        self._environments.send(slots, actions)
        self.in_flight.awaiting_env.update(slots)

    def _observe(self, result: StepResult) -> None:
        """Add an environment's answer to its episode, which ends or has its next turn sampled."""
        slot = result.env_id
        self.in_flight.awaiting_env.discard(slot)
        trajectory = self.in_flight.active[slot].observe(
            result, self._renderer, self._engine.max_context, partial(self._truncate, slot)
        )
        if trajectory is None:
            self._submit(slot)
            return
        self._engine.release(slot)
        self._free.append(slot)
        self.in_flight.done[self.in_flight.active.pop(slot).key] = trajectory
        self._trees.finish(trajectory, self.in_flight, self._free, self._engine, self._stop)
        if self._on_finish:
            self._on_finish(trajectory)

    def _submit(self, slot: int) -> None:
        self.in_flight.active[slot].submit(self._engine, slot, self._stop)
