"""One episode under way: its segments so far, and the turn that is being sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np

from research_agent.config import SamplingConfig
from research_agent.engines.base import Completion, Engine, SamplingParams
from research_agent.environments import StepResult, read_number
from research_agent.errors import ContextError, EnvironmentContractError, OverlongPromptError
from research_agent.renderer import Renderer
from research_agent.trajectory import SKIPPED, Segment, Trajectory

EpisodeKey = tuple[int, int]
"""The number of a task, and which of its samples."""


@dataclass
class ActiveRollout:
    """An episode under way."""

    episode: int
    sample: int
    seed: int  # the run's
    sampling: SamplingConfig
    segments: list[Segment] = field(default_factory=list)
    reward: float = 0.0  # sum over its turns so far
    state_key: str = ""  # name of the state in which the next turn is taken
    prompt_length: int = 0  # tokens
    response_length: int = 0  # tokens after the prompt, from the policy and the environment
    partial_turns: list[Completion] = field(default_factory=list)  # parts of the unfinished turn
    unsent_tokens: list[int] = field(default_factory=list)  # not yet submitted to the engine
    lineage: tuple[int, ...] = ()  # as in Trajectory
    tree: int | None = None  # as in Trajectory

    def __post_init__(self) -> None:
        """Derive the seed of the draws."""
        self._draws = trajectory_seed(self.seed, self.episode, self.sample)

    @property
    def key(self) -> EpisodeKey:
        """Episode and sample number."""
        return self.episode, self.sample

    @property
    def tokens(self) -> list[int]:
        """All tokens so far."""
        parts: list[Segment | Completion] = [*self.segments, *self.partial_turns]
        return [token for part in parts for token in part.tokens]

    def branch(self, sample: int, tree: int) -> ActiveRollout:
        """Copy the finished turns as the beginning of another sample.

        Args:
            sample: number of the new sample.
            tree: number of the sample that the tree grew from.
        """
        turns = sum(segment.provenance == "action" for segment in self.segments)
        partial = sum(len(part.tokens) for part in self.partial_turns)
        return ActiveRollout(
            self.episode,
            sample,
            self.seed,
            self.sampling,
            segments=list(self.segments),
            reward=self.reward,
            state_key=self.state_key,
            prompt_length=self.prompt_length,
            response_length=self.response_length - partial,
            unsent_tokens=[token for segment in self.segments for token in segment.tokens],
            lineage=(*self.lineage, *[self.sample] * turns)[:turns],
            tree=tree,
        )

    def begin(
        self, observation: str, info: Mapping[str, Any], renderer: Renderer, max_context: int
    ) -> None:
        """Take the first observation.

        Raises:
            ContextError: the prompt is empty.
            OverlongPromptError: the prompt has more tokens than the limits allow.
        """
        tokens = renderer.encode_prompt(observation, info.get("messages"), info.get("tools") or ())
        limit = min(self.sampling.max_prompt, max_context - 1)
        if not 1 <= len(tokens) <= limit:
            question = info.get("question_id")
            named = f"episode {self.episode}" + (f" (question {question})" if question else "")
            kind = OverlongPromptError if tokens else ContextError
            cure = "a higher --max-prompt"
            if limit < self.sampling.max_prompt:
                cure = "a model with a longer context"
            raise kind(
                f"the prompt of {named} has {len(tokens)} tokens, not 1 to {limit} "
                f"(max_prompt {self.sampling.max_prompt}, context {max_context}); "
                f"give {cure}, or --overlong-prompts skip (training only) to leave such tasks out"
            )
        self.prompt_length = len(tokens)
        self.state_key = _state_key(info)
        self.unsent_tokens += tokens
        self.segments.append(Segment("prompt", tuple(tokens), text=observation, info=info))

    def submit(self, engine: Engine, slot: int, stop: tuple[str, ...]) -> None:
        """Let the engine sample a turn, or the rest of an interrupted turn."""
        resumed = sum(len(part.tokens) for part in self.partial_turns)
        left = self.sampling.max_response - self.response_length
        params = SamplingParams(
            temperature=self.sampling.temperature,
            max_tokens=min(left, (self.sampling.max_turn_tokens or left + resumed) - resumed),
            stop=stop,
            seed=self._draws,
            resumed_tokens=resumed,
        )
        engine.submit(slot, self.unsent_tokens, params)
        self.unsent_tokens = []

    def add_partial(self, part: Completion) -> None:
        """Keep the part of a turn that was sampled before it was interrupted."""
        self.response_length += len(part.tokens)
        if part.tokens:
            self.partial_turns.append(part)

    def finish_turn(self, last: Completion, renderer: Renderer) -> str | Mapping[str, Any]:
        """End a turn with its last part; returns the action for the environment."""
        parts = [*self.partial_turns, last]
        tokens = tuple(chain.from_iterable(part.tokens for part in parts))
        text = last.text
        if self.partial_turns:
            text = renderer.decode(tokens[:-1] if last.finish_reason == "end" else tokens)
        self.response_length += len(last.tokens)
        self.partial_turns = []
        self.segments.append(
            Segment(
                "action",
                tokens,
                logprobs=tuple(chain.from_iterable(part.logprobs for part in parts)),
                versions=tuple(chain.from_iterable(part.versions for part in parts)),
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
        """Take what the environment answers; returns the trajectory if the episode ends.

        Args:
            result: the environment's answer to the last action.
            renderer: the policy's tokenizer.
            max_context: tokens that the engine can hold.
            truncate: lets the environment score an episode whose next observation does not fit the
                budget of tokens; returns None if it cannot.
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
        length = self.response_length + len(tokens)
        budget = ""
        if length >= self.sampling.max_response:  # no room for a token after the observation
            budget = "length"
        elif self.prompt_length + length >= max_context:
            budget = "context"
        if budget:
            last = truncate()
            self._earn(last.reward if last else 0.0)
            return self._trajectory(last or result, budget)
        self.response_length = length
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
        """Add a reward to the last turn, and to the sum."""
        if reward == 0:  # most turns; copying the segment would cost microseconds
            return
        turn = self.segments[-1]
        self.segments[-1] = replace(turn, reward=turn.reward + reward)
        self.reward += reward

    def _trajectory(self, last: StepResult, budget: str) -> Trajectory:
        metrics = last.info.get("metrics") or {}
        if not isinstance(metrics, Mapping):
            raise EnvironmentContractError(
                f"the environment's metrics are {metrics!r:.60}; return a dict of names and numbers"
            )
        return Trajectory(
            episode=self.episode,
            sample=self.sample,
            segments=tuple(self.segments),
            reward=self.reward,
            terminated=bool(last.terminated),
            truncated=bool(last.truncated or budget),
            stop_reason=budget or str(last.info.get("stop_reason") or ""),
            void=bool(last.info.get("void", False)),
            metrics={name: read_number(value, f"metric {name}") for name, value in metrics.items()},
            info=last.info,
            lineage=self.lineage,
            tree=self.tree,
        )


@dataclass
class InFlight:
    """Episodes under way, and finished ones that no step has taken yet."""

    active: dict[int, ActiveRollout] = field(default_factory=dict)  # by slot
    awaiting_env: set[int] = field(default_factory=set)  # slots whose environment has an action
    done: dict[EpisodeKey, Trajectory] = field(default_factory=dict)

    @property
    def episodes(self) -> set[EpisodeKey]:
        """Episode and sample numbers of active and finished rollouts."""
        return {rollout.key for rollout in self.active.values()} | self.done.keys()


def _state_key(info: Mapping[str, Any]) -> str:
    return str(info.get("state_key") or "")


def trajectory_seed(seed: int, episode: int, sample: int) -> int:
    """The seed of a trajectory's draws: 64 bits that depend on all three numbers."""
    state = np.random.SeedSequence([seed, episode, sample]).generate_state(1, np.uint64)
    return int(state[0])
