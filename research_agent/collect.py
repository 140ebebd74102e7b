"""Play episodes: the engine and the environments in one loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from research_agent.codec import Codec
from research_agent.engines.base import Completion, Engine, SamplingParams
from research_agent.environments import Environments, StepResult
from research_agent.errors import ContextError
from research_agent.trajectory import Segment, Trajectory


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
    def max_turn(self) -> int | None:
        """Longest action, in tokens."""
        ...

    @property
    def overlap(self) -> bool:
        """Go on with some trajectories while others wait for their environments."""
        ...


def collect(
    engine: Engine,
    environments: Environments,
    codec: Codec,
    episodes: Sequence[tuple[int, int]],
    sampling: Sampling,
    *,
    seed: int = 0,
    on_finish: Callable[[Trajectory], None] | None = None,
) -> list[Trajectory]:
    """Play episodes to their ends.

    Args:
        engine: a sampler with as many slots as there are environments, none of them in use.
        environments: each plays one episode at a time, and the next one right after.
        codec: the policy's tokenizer.
        episodes: (episode number, sample number) of each.
        sampling: temperature and limits. With ``overlap`` a trajectory that waits for its
            environment does not hold the others up; without it nothing depends on timing.
        seed: of the order of the tasks, and of the draws. A trajectory's draws depend on this, its
            episode and its sample only.
        on_finish: called with each trajectory as it ends.

    Returns:
        The trajectories in the order of ``episodes``. Those of failed infrastructure are ``void``.

    Raises:
        ContextError: a prompt that is empty, or longer than ``max_prompt`` or the context allows.
    """
    waiting = deque(range(len(episodes)))
    free = list(range(environments.num_envs))
    plays: dict[int, _Play] = {}
    sent: set[int] = set()
    done: dict[int, Trajectory] = {}

    def finish(slot: int, result: StepResult, budget: str = "") -> None:
        play = plays.pop(slot)
        engine.release(slot)
        free.append(slot)
        done[play.index] = play.trajectory(result, budget)
        if on_finish:
            on_finish(done[play.index])

    try:
        while waiting or plays:
            starting = {slot: waiting.popleft() for slot in free[: len(waiting)]}
            del free[: len(starting)]
            plays |= {s: _Play(i, *episodes[i], seed, sampling) for s, i in starting.items()}
            numbers = {slot: episodes[index][0] for slot, index in starting.items()}
            begun = environments.reset(numbers, seed) if numbers else {}
            for slot, (observation, info) in begun.items():
                prompt = codec.encode_prompt(observation, info.get("messages"))
                plays[slot].begin(prompt, observation, engine.max_context)
                engine.submit(slot, prompt, plays[slot].params(environments.terminators))

            completions = engine.step()
            for completion in completions:
                plays[completion.slot].act(completion)
                sent.add(completion.slot)
            if completions:
                environments.send([c.slot for c in completions], [c.text for c in completions])

            patience = (0 if engine.busy else 1) if sampling.overlap else len(sent)
            results = environments.recv(min(patience, len(sent))) if sent else []
            for result in sorted(results, key=lambda result: result.env_id):
                slot, play = result.env_id, plays[result.env_id]
                sent.discard(slot)
                play.reward += result.reward
                if result.terminated or result.truncated:
                    finish(slot, result)
                    continue
                tokens = codec.encode_text(result.observation)
                if budget := play.out_of_budget(len(tokens), engine.max_context):
                    finish(slot, result, budget)
                    continue
                play.observe(tokens, result)
                engine.submit(slot, tokens, play.params(environments.terminators))
    finally:
        for slot in plays:  # an error ended the loop
            engine.release(slot)
    return [done[index] for index in range(len(episodes))]


@dataclass
class _Play:
    """An episode under way."""

    index: int
    episode: int
    sample: int
    seed: int  # of the run
    sampling: Sampling
    segments: list[Segment] = field(default_factory=list)
    reward: float = 0.0  # so far: an environment may give some on the way
    prompt: int = 0  # tokens
    response: int = 0  # tokens, of the policy and of the environment

    def begin(self, tokens: Sequence[int], text: str, max_context: int) -> None:
        limit = min(self.sampling.max_prompt, max_context - 1)
        if not 1 <= len(tokens) <= limit:
            raise ContextError(
                f"the prompt of episode {self.episode} has {len(tokens)} tokens, not 1 to {limit} "
                f"(max_prompt {self.sampling.max_prompt}, context {max_context}); "
                "raise the limit, or leave such tasks out"
            )
        self.prompt = len(tokens)
        self.segments.append(Segment("prompt", tuple(tokens), text=text))

    def params(self, stop: tuple[str, ...]) -> SamplingParams:
        left = self.sampling.max_response - self.response
        return SamplingParams(
            temperature=self.sampling.temperature,
            max_tokens=min(left, self.sampling.max_turn or left),
            stop=stop,
            seed=trajectory_seed(self.seed, self.episode, self.sample),
        )

    def act(self, turn: Completion) -> None:
        self.response += len(turn.tokens)
        self.segments.append(
            Segment("action", turn.tokens, turn.logprobs, version=turn.version, text=turn.text)
        )

    def out_of_budget(self, new: int, max_context: int) -> str:
        """The limit that leaves no room for new tokens and one more; "" where none does."""
        if self.response + new >= self.sampling.max_response:
            return "length"
        return "context" if self.prompt + self.response + new >= max_context else ""

    def observe(self, tokens: Sequence[int], result: StepResult) -> None:
        self.response += len(tokens)
        if tokens:
            self.segments.append(
                Segment("observation", tuple(tokens), text=result.observation, info=result.info)
            )

    def trajectory(self, last: StepResult, budget: str) -> Trajectory:
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
        )


def trajectory_seed(seed: int, episode: int, sample: int) -> int:
    """The seed of a trajectory's draws: 64 bits that depend on all three numbers."""
    state = np.random.SeedSequence([seed, episode, sample]).generate_state(1, np.uint64)
    return int(state[0])
