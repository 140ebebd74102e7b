"""Runs a baseline on many questions at once: its prompts in an engine, its searches in ours.

A baseline is a generator for one question. It yields what it wants, a generation or a search, is
sent what came of it, and returns its answer::

    def play(question: str) -> Moves:
        passages = yield from search(question)
        return (yield from generate(prompt(question, passages)))

Searches and answers are actions of the environment, in ReSearch's protocol. So the search engine,
its budget, the metrics and the prediction files are those of a policy that was trained to search.
The environment's ``format`` and reward are not meant for baselines, which write no tags.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from research_agent.active_rollout import trajectory_seed
from research_agent.config import SamplingConfig
from research_agent.engines.base import Completion, Engine, SamplingParams
from research_agent.errors import ContextError
from research_agent.renderer import Renderer
from research_agent.trajectory import Segment, Trajectory
from research_env import RESEARCH
from research_env.datasets.base import Question
from research_env.episode import Episode
from research_env.errors import ConfigurationError, EpisodeError
from research_env.retrieval.base import Hit
from research_env.vector_env import SearchQAVectorEnv, StepResult

Message = Mapping[str, str]

# What could be taken for a mark of the protocol. Metrics delete these characters from an answer.
_IN_QUERIES = str.maketrans("<", " ")
_IN_ANSWERS = str.maketrans("", "", "<{}\\")


@dataclass(frozen=True, slots=True)
class Generate:
    """Ask the model with a new prompt.

    Attributes:
        messages: the prompt as chat messages. A model without a chat template gets their contents
            with blank lines between them.
        stop: the reply ends before the first of these.
        chat: False: plain text, whatever the model.
    """

    messages: Sequence[Message]
    stop: tuple[str, ...] = ()
    chat: bool = True


@dataclass(frozen=True, slots=True)
class Search:
    """Ask the search engine, through the environment."""

    query: str


Request = Generate | Search
Reply = str | tuple[Hit, ...] | None
Moves = Generator[Request, Reply, str]
"""What a baseline does for one question: requests, and at the end the answer."""
Baseline = Callable[[str], Moves]
"""From a question to the generator that answers it."""


def generate(
    messages: Sequence[Message], stop: tuple[str, ...] = (), *, chat: bool = True
) -> Generator[Request, Reply, str]:
    """What the model says to a prompt; see :class:`Generate`."""
    reply = yield Generate(messages, stop, chat)
    assert isinstance(reply, str)
    return reply


def search(query: str) -> Generator[Request, Reply, tuple[Hit, ...]]:
    """The passages for a query, best first; none for a blank one."""
    reply = yield Search(query)
    assert isinstance(reply, tuple)
    return reply


def run(
    engine: Engine,
    environments: SearchQAVectorEnv,
    renderer: Renderer,
    episodes: Sequence[tuple[int, int]],
    sampling: SamplingConfig,
    *,
    baseline: Baseline,
    seed: int = 0,
    on_finish: Callable[[Trajectory], None] | None = None,
) -> list[Trajectory]:
    """Play episodes to their ends, as ``research_agent.rollout`` does with a policy.

    Args:
        engine: a sampler with as many slots as there are environments, none of them in use. Every
            prompt gets an empty slot.
        environments: environments of ReSearch's protocol.
        renderer: the model's tokenizer.
        episodes: (episode number, sample number) of each.
        sampling: temperature and limits: ``max_prompt`` of each prompt, ``max_response`` and
            ``max_turn_tokens`` of each reply.
        baseline: what to play.
        seed: seed of the order of the questions, and of the draws.
        on_finish: called with each trajectory as it ends.

    Returns:
        The trajectories in the order of ``episodes``. Each has a segment with the question, a
        prompt and an action segment per generation, and an observation segment per search. The
        question and the observations have no tokens, because prompts repeat them. If a later prompt
        is too long, the episode is truncated ("context"); if a search fails, it is void.

    Raises:
        ConfigurationError: the environments speak another protocol.
        ContextError: the first prompt of a question is longer than ``max_prompt`` or the context
            allows.
    """
    limit = min(sampling.max_prompt, engine.max_context - 1)
    waiting = deque(range(len(episodes)))
    free = list(range(environments.num_envs))
    in_flight: dict[int, _InFlight] = {}
    actions: dict[int, str] = {}  # not sent yet
    sent: set[int] = set()  # slots that wait for a result
    done: dict[int, Trajectory] = {}

    def finish(slot: int, result: StepResult | None) -> None:
        episode = in_flight.pop(slot)
        episode.moves.close()
        free.append(slot)
        done[episode.index] = episode.trajectory(result)
        if on_finish:
            on_finish(done[episode.index])

    def advance(slot: int, reply: Reply) -> None:
        """Send a baseline its reply, and pass its next request on."""
        episode = in_flight[slot]
        wanted = episode.next_request(reply)
        if isinstance(wanted, str):
            actions[slot] = wanted
        elif tokens := episode.encode_prompt(wanted, renderer, limit):
            engine.submit(slot, tokens, episode.sampling_params(sampling, seed))
        else:
            finish(slot, None)

    try:
        while waiting or in_flight:
            starting = {slot: waiting.popleft() for slot in free[: len(waiting)]}
            del free[: len(starting)]
            numbers = {slot: episodes[index][0] for slot, index in starting.items()}
            for slot, question in _reset(environments, numbers, seed).items():
                index = starting[slot]
                in_flight[slot] = _InFlight(
                    index, *episodes[index], question, baseline(question.question)
                )
                advance(slot, None)

            for completion in engine.step():
                engine.release(completion.slot)
                advance(completion.slot, in_flight[completion.slot].add_reply(completion))
            if actions:
                environments.send(list(actions), list(actions.values()))
                sent |= actions.keys()
                actions.clear()

            least = min((0 if engine.busy else 1) if sampling.overlap else len(sent), len(sent))
            results = environments.recv(None if least else 0, least) if sent else []
            for result in sorted(results, key=lambda result: result.env_id):
                sent.discard(result.env_id)
                in_flight[result.env_id].add_result(result)
                if result.terminated or result.truncated:
                    finish(result.env_id, result)
                else:
                    advance(result.env_id, _episode(environments, result.env_id).turns[-1].hits)
    finally:
        for slot in in_flight:  # an error ended the loop
            engine.release(slot)
    return [done[index] for index in range(len(episodes))]


def _reset(
    environments: SearchQAVectorEnv, numbers: Mapping[int, int], seed: int
) -> dict[int, Question]:
    """Begin episodes, and return the question of each environment; ``numbers`` has its episode."""
    if not numbers:
        return {}
    everywhere = range(environments.num_envs)
    options = {
        "episodes": [numbers.get(slot, 0) for slot in everywhere],
        "reset_mask": [slot in numbers for slot in everywhere],
    }
    environments.reset(seed=seed, options=options)
    for slot in numbers:
        spoken = _episode(environments, slot).protocol.name
        if spoken != RESEARCH.name:
            raise ConfigurationError(
                f"baselines speak the protocol {RESEARCH.name!r}; make the environments with it, "
                f"not with {spoken!r}"
            )
    return {slot: _episode(environments, slot).question for slot in numbers}


def _episode(environments: SearchQAVectorEnv, slot: int) -> Episode:
    episode = environments.episodes[slot]
    if episode is None:
        raise EpisodeError(f"sub-environment {slot} has no episode")
    return episode


@dataclass
class _InFlight:
    """An episode under way."""

    index: int
    episode: int
    sample: int
    question: Question
    moves: Moves
    segments: list[Segment] = field(init=False)
    reward: float = 0.0
    asked: int = 0  # prompts so far
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.segments = [
            Segment("prompt", (), text=self.question.question, info=self.question_info())
        ]

    def question_info(self) -> dict[str, Any]:
        """The question in the form of an environment's info."""
        return {
            "question_id": self.question.id,
            "question": self.question.question,
            "strata": {"hops": str(self.question.hops or ""), "type": self.question.type or ""},
        }

    def next_request(self, reply: Reply) -> Generate | str:
        """What the baseline wants next: a generation, or an action of the environment."""
        try:
            request = self.moves.send(reply)
        except StopIteration as end:
            return f"<answer> \\boxed{{{end.value.strip().translate(_IN_ANSWERS)}}} </answer>"
        if isinstance(request, Search):
            return f"<search> {request.query.translate(_IN_QUERIES)} </search>"
        return request

    def encode_prompt(self, wanted: Generate, renderer: Renderer, limit: int) -> list[int]:
        """Keep a prompt and return its tokens; none if it is too long and not the first."""
        text = "\n\n".join(message["content"] for message in wanted.messages)
        speaking = renderer if wanted.chat else replace(renderer, chat_template=False)
        tokens = speaking.encode_prompt(text, wanted.messages)
        if len(tokens) > limit:
            if self.asked:
                return []
            raise ContextError(
                f"the prompt of question {self.question.id!r} has {len(tokens)} tokens, more than "
                f"the {limit} that max_prompt and the model's context allow; raise the limit, or "
                "let a search return fewer passages (top_k)"
            )
        self.segments.append(Segment("prompt", tuple(tokens), text=text))
        self.stop = wanted.stop
        self.asked += 1
        return tokens

    def sampling_params(self, sampling: SamplingConfig, seed: int) -> SamplingParams:
        draws = trajectory_seed(seed, self.episode, self.sample) + self.asked - 1
        return SamplingParams(
            temperature=sampling.temperature,
            max_tokens=min(
                sampling.max_response, sampling.max_turn_tokens or sampling.max_response
            ),
            stop=self.stop,
            seed=draws % 2**64,
        )

    def add_reply(self, turn: Completion) -> str:
        """Keep a reply as it was sampled, and return what stands before the stop string."""
        versions = (turn.version,) * len(turn.tokens)
        self.segments.append(
            Segment("action", turn.tokens, turn.logprobs, versions=versions, text=turn.text)
        )
        ends = [turn.text.find(stop) for stop in self.stop if stop in turn.text]
        return turn.text[: min(ends)] if ends else turn.text

    def add_result(self, result: StepResult) -> None:
        self.reward += result.reward
        if result.observation:
            self.segments.append(
                Segment("observation", (), text=result.observation, info=result.info)
            )

    def trajectory(self, last: StepResult | None) -> Trajectory:
        """The whole episode; ``last`` is None if a prompt that was too long ended it."""
        info = last.info if last else self.question_info()
        return Trajectory(
            episode=self.episode,
            sample=self.sample,
            segments=tuple(self.segments),
            reward=self.reward,
            terminated=bool(last and last.terminated),
            truncated=last is None or last.truncated,
            stop_reason=str(info["stop_reason"]) if last else "context",
            void=bool(info.get("void")),
            metrics={name: float(value) for name, value in info.get("metrics", {}).items()},
            info=info,
        )
