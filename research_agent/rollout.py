"""Play episodes: the engine and the environments in one loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, repeat
from typing import Any, Literal, Protocol

import numpy as np

from research_agent.engines.base import Completion, Engine, Interruptible, SamplingParams
from research_agent.environments import Environments, StepResult, Truncating
from research_agent.errors import ContextError, OverlongPromptError
from research_agent.renderer import Renderer
from research_agent.trajectory import SKIPPED, Segment, Trajectory
from research_agent.trees import CHAINS, TreePlan, Trees

Episode = tuple[int, int]
"""The number of a task, and which of its samples."""


class Sampling(Protocol):
    """How episodes are played; the configuration's classes have these fields among others."""

    @property
    def temperature(self) -> float:
        """Of the softmax that tokens are drawn from; 0 is greedy."""
        ...

    @property
    def max_prompt(self) -> int:
        """Longest first observation, in tokens."""
        ...

    @property
    def max_response(self) -> int:
        """Longest rest of an episode, in tokens: actions and observations together."""
        ...

    @property
    def max_turn_tokens(self) -> int | None:
        """Longest action, in tokens."""
        ...

    @property
    def overlap(self) -> bool:
        """Go on with some trajectories while others wait for their environments."""
        ...


@dataclass
class InFlight:
    """Episodes that started before their step asked for them."""

    active: dict[int, ActiveRollout] = field(default_factory=dict)  # by slot
    awaiting_env: set[int] = field(default_factory=set)  # slots whose environment has an action
    done: dict[Episode, Trajectory] = field(default_factory=dict)

    def clear(self) -> None:
        """Drop them. They start again when a step asks for them."""
        self.active.clear()
        self.awaiting_env.clear()
        self.done.clear()


def collect(
    engine: Engine,
    environments: Environments,
    renderer: Renderer,
    episodes: Sequence[Episode],
    sampling: Sampling,
    *,
    seed: int = 0,
    on_finish: Callable[[Trajectory], None] | None = None,
    ahead: Sequence[Episode] = (),
    in_flight: InFlight | None = None,
    plan: TreePlan = CHAINS,
    overlong_prompts: Literal["error", "skip"] = "error",
) -> list[Trajectory]:
    """Play episodes to their ends.

    Args:
        engine: a sampler with as many slots as there are environments, none of them in use.
        environments: each plays one episode at a time, and the next one right after.
        renderer: the policy's tokenizer.
        episodes: (episode number, sample number) of each.
        sampling: temperature and limits. With ``overlap`` a trajectory that waits for its
            environment does not hold the others up; without it nothing depends on timing.
        seed: of the order of the tasks, and of the draws. A trajectory's draws depend on this, its
            episode and its sample only.
        on_finish: called with each trajectory as it ends.
        ahead: episodes to begin with where slots would be empty otherwise. None is waited for.
        in_flight: what earlier calls left of theirs, and where this one leaves it. Between calls
            the engine may get new weights: turns that were cut go on with the new ones.
        plan: how samples branch off each other. With branches ``episodes`` are whole trees, in
            order, and none is played ahead.
        overlong_prompts: what becomes of a task whose prompt has more tokens than ``max_prompt`` or
            the context allows. With "skip" its trajectories are void, with the stop reason
            ``SKIPPED`` and no token.

    Returns:
        The trajectories in the order of ``episodes``. Those of failed infrastructure are ``void``.
        No slot is in use then.

    Raises:
        ConfigError: the plan needs more slots than there are, or an environment that branches.
        ContextError: a prompt that is empty, or one that is too long and not to be skipped.
    """
    in_flight = InFlight() if in_flight is None else in_flight
    active, awaiting_env, done = in_flight.active, in_flight.awaiting_env, in_flight.done
    known = {rollout.key for rollout in active.values()} | done.keys()
    waiting = deque(
        each
        for each in dict.fromkeys((*episodes, *ahead))
        if each not in known and plan.root(each[1]) == each[1]
    )
    wanted = set(episodes)
    free = deque(slot for slot in range(environments.num_envs) if slot not in active)
    stop = environments.terminators
    truncate = environments.truncate if isinstance(environments, Truncating) else _keep_reward
    skips = overlong_prompts == "skip" and plan.size == 1
    trees = Trees(plan, seed, environments)
    try:
        for slot in sorted(active.keys() - awaiting_env):  # turns that were cut
            active[slot].submit(engine, slot, stop)
        while not wanted <= done.keys():
            starting = {
                free.popleft(): waiting.popleft()
                for _ in range(min(len(free) // plan.size, len(waiting)))
            }
            trees.plant(starting.values(), free)
            active |= {
                slot: ActiveRollout(*each, seed, sampling) for slot, each in starting.items()
            }
            numbers = {slot: episode for slot, (episode, _) in starting.items()}
            prompts = environments.reset(numbers, seed) if numbers else {}
            free.extend(_begin(prompts, in_flight, renderer, engine.max_context, skips))
            for slot in (each for each in prompts if each in active):
                active[slot].submit(engine, slot, stop)

            completions = engine.step()
            if completions:
                slots = [turn.slot for turn in completions]
                trees.offer(completions, active, engine)
                environments.send(
                    slots, [active[turn.slot].finish_turn(turn, renderer) for turn in completions]
                )
                awaiting_env.update(slots)

            patience = (0 if engine.busy else 1) if sampling.overlap else len(awaiting_env)
            results = environments.recv(min(patience, len(awaiting_env))) if awaiting_env else []
            for result in sorted(results, key=lambda result: result.env_id):
                slot = result.env_id
                if slot not in awaiting_env:
                    continue  # the episode was dropped
                awaiting_env.discard(slot)
                trajectory = active[slot].observe(
                    result, renderer, engine.max_context, partial(truncate, slot)
                )
                if trajectory is None:
                    active[slot].submit(engine, slot, stop)
                    continue
                engine.release(slot)
                free.append(slot)
                done[active.pop(slot).key] = trajectory
                trees.finish(trajectory, active, engine, stop)
                if on_finish:
                    on_finish(trajectory)

        for turn in engine.interrupt() if isinstance(engine, Interruptible) else ():
            active[turn.slot].add_partial(turn)
    finally:
        trees.release(engine)
        for slot, rollout in active.items():
            engine.release(slot)
            rollout.unsent_tokens = rollout.tokens
    taken = {each: done.pop(each) for each in wanted}
    return [taken[each] for each in episodes]


def _begin(
    prompts: Mapping[int, tuple[str, Mapping[str, Any]]],
    in_flight: InFlight,
    renderer: Renderer,
    max_context: int,
    skips: bool,
) -> list[int]:
    """Give rollouts their prompts; returns the slots of those that were skipped."""
    skipped = []
    for slot, (observation, info) in prompts.items():
        rollout = in_flight.active[slot]
        try:
            rollout.begin(observation, info, renderer, max_context)
        except OverlongPromptError:
            if not skips:
                raise
            del in_flight.active[slot]
            in_flight.done[rollout.key] = rollout.skipped(info)
            skipped.append(slot)
    return skipped


@dataclass
class ActiveRollout:
    """An episode under way."""

    episode: int
    sample: int
    seed: int  # the run's
    sampling: Sampling
    segments: list[Segment] = field(default_factory=list)
    reward: float = 0.0  # the sum of its turns' so far
    state_key: str = ""  # name of the state in which the next turn is taken
    prompt: int = 0  # tokens
    response: int = 0  # tokens, of the policy and of the environment
    partial_turns: list[Completion] = field(default_factory=list)  # parts of the unfinished turn
    unsent_tokens: list[int] = field(default_factory=list)  # not yet submitted to the engine
    lineage: tuple[int, ...] = ()  # as in Trajectory
    tree: int | None = None  # as in Trajectory

    def __post_init__(self) -> None:
        """Seed the draws."""
        self._draws = trajectory_seed(self.seed, self.episode, self.sample)

    @property
    def key(self) -> Episode:
        """Which episode it is."""
        return self.episode, self.sample

    @property
    def tokens(self) -> list[int]:
        """All tokens so far."""
        parts: list[Segment | Completion] = [*self.segments, *self.partial_turns]
        return [token for part in parts for token in part.tokens]

    def branch(self, sample: int, tree: int) -> ActiveRollout:
        """Make the beginning of another sample out of what there is so far.

        Args:
            sample: its number.
            tree: that of the sample that the tree grew from.
        """
        turns = sum(segment.provenance == "action" for segment in self.segments)
        return ActiveRollout(
            self.episode,
            sample,
            self.seed,
            self.sampling,
            segments=list(self.segments),
            reward=self.reward,
            state_key=self.state_key,
            prompt=self.prompt,
            response=self.response,
            unsent_tokens=self.tokens,
            lineage=(*self.lineage, *[self.sample] * turns)[:turns],
            tree=tree,
        )

    def begin(
        self, observation: str, info: Mapping[str, Any], renderer: Renderer, max_context: int
    ) -> None:
        """Take the first observation."""
        tokens = renderer.encode_prompt(observation, info.get("messages"), info.get("tools") or ())
        limit = min(self.sampling.max_prompt, max_context - 1)
        if not 1 <= len(tokens) <= limit:
            question = info.get("question_id")
            named = f"episode {self.episode}" + (f" (question {question})" if question else "")
            kind = OverlongPromptError if tokens else ContextError
            raise kind(
                f"the prompt of {named} has {len(tokens)} tokens, not 1 to {limit} "
                f"(max_prompt {self.sampling.max_prompt}, context {max_context}); "
                "give a higher --max-prompt, or --overlong-prompts skip to leave such tasks out"
            )
        self.prompt = len(tokens)
        self.state_key = _state_key(info)
        self.unsent_tokens += tokens
        self.segments.append(Segment("prompt", tuple(tokens), text=observation, info=info))

    def submit(self, engine: Engine, slot: int, stop: tuple[str, ...]) -> None:
        """Let the engine sample a turn, or the rest of one that was cut."""
        begun = sum(len(part.tokens) for part in self.partial_turns)
        left = self.sampling.max_response - self.response
        params = SamplingParams(
            temperature=self.sampling.temperature,
            max_tokens=min(left, (self.sampling.max_turn_tokens or left + begun) - begun),
            stop=stop,
            seed=self._draws,
            resumed_tokens=begun,
        )
        engine.submit(slot, self.unsent_tokens, params)
        self.unsent_tokens = []

    def add_partial(self, part: Completion) -> None:
        """Keep the beginning of a turn that is cut."""
        self.response += len(part.tokens)
        if part.tokens:
            self.partial_turns.append(part)

    def finish_turn(self, last: Completion, renderer: Renderer) -> str | Mapping[str, Any]:
        """End a turn; returns the action."""
        parts = [*self.partial_turns, last]
        tokens = tuple(chain.from_iterable(part.tokens for part in parts))
        text = last.text
        if self.partial_turns:
            text = renderer.decode(tokens[:-1] if last.finish_reason == "end" else tokens)
        self.response += len(last.tokens)
        self.partial_turns = []
        self.segments.append(
            Segment(
                "action",
                tokens,
                logprobs=tuple(chain.from_iterable(part.logprobs for part in parts)),
                versions=tuple(
                    chain.from_iterable(repeat(part.version, len(part.tokens)) for part in parts)
                ),
                text=text,
                state_key=self.state_key,
            )
        )
        return text if last.message is None else last.message

    def observe(
        self,
        result: StepResult,
        renderer: Renderer,
        max_context: int,
        truncate: Callable[[], StepResult | None],
    ) -> Trajectory | None:
        """Take what the environment answers; returns the trajectory if it ends with that.

        If the answer does not fit the budget of tokens, the environment scores the episode.
        """
        self._earn(result.reward)
        self.state_key = _state_key(result.info)
        if result.terminated or result.truncated:
            return self._trajectory(result, "")
        tokens = renderer.encode_observation(
            result.observation,
            result.info.get("chat_markup", ()),
            result.info.get("messages") or (),
        )
        length = self.response + len(tokens)
        budget = ""
        if length >= self.sampling.max_response:  # no room for them and one more
            budget = "length"
        elif self.prompt + length >= max_context:
            budget = "context"
        if budget:
            last = truncate()
            self._earn(last.reward if last else 0.0)
            return self._trajectory(last or result, budget)
        self.response = length
        self.unsent_tokens += tokens
        if tokens:
            self.segments.append(
                Segment("observation", tuple(tokens), text=result.observation, info=result.info)
            )
        return None

    def skipped(self, info: Mapping[str, Any]) -> Trajectory:
        """The trajectory of a task that is not played."""
        return Trajectory(
            self.episode, self.sample, (), 0.0, False, True, SKIPPED, void=True, info=info
        )

    def _earn(self, reward: float) -> None:
        """Add a reward to the turn that was taken last, and to the sum."""
        turn = self.segments[-1]
        self.segments[-1] = replace(turn, reward=turn.reward + reward)
        self.reward += reward

    def _trajectory(self, last: StepResult, budget: str) -> Trajectory:
        metrics: Mapping[str, Any] = last.info.get("metrics") or {}
        return Trajectory(
            episode=self.episode,
            sample=self.sample,
            segments=tuple(self.segments),
            reward=self.reward,
            terminated=bool(last.terminated),
            truncated=bool(last.truncated or budget),
            stop_reason=budget or str(last.info.get("stop_reason") or ""),
            void=bool(last.info.get("void", False)),
            metrics={name: float(value) for name, value in metrics.items()},
            info=last.info,
            lineage=self.lineage,
            tree=self.tree,
        )


def _state_key(info: Mapping[str, Any]) -> str:
    return str(info.get("state_key") or "")


def _keep_reward(slot: int) -> None:
    """End an episode whose environment cannot score it: it keeps the rewards so far."""


def trajectory_seed(seed: int, episode: int, sample: int) -> int:
    """The seed of a trajectory's draws: 64 bits that depend on all three numbers."""
    state = np.random.SeedSequence([seed, episode, sample]).generate_state(1, np.uint64)
    return int(state[0])
