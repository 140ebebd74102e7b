"""What the single and the vector environment share: questions, search engine, rules, reward.

An :class:`EnvCore` is made once, from the keyword arguments of an environment, and does not change.
It starts episodes, runs the searches that they ask for, and turns an episode into what ``step``
returns. The rules of an episode are in :mod:`research_env.episode`.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple, TypedDict, Unpack

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import VectorEnv

from research_env.datasets.base import Dataset, Question
from research_env.episode import Episode, fail, observe
from research_env.errors import (
    ConfigurationError,
    DataError,
    RetrievalError,
    UnknownNameError,
    UnknownTaskError,
)
from research_env.info import make_info
from research_env.metrics import LANGUAGES
from research_env.papers import PAPERS, resolve_protocol
from research_env.protocol import Protocol
from research_env.retrieval.base import Retriever
from research_env.retrieval.batching import Found, raise_bug
from research_env.retrieval.documents import require_reader
from research_env.retrieval.requests import Request, ToolResult
from research_env.rewards import (
    METRICS,
    REWARDS,
    SHAPING,
    Reward,
    WeightedSum,
    episode_metrics,
    evaluate,
    read_terms,
    resolve_reward,
)
from research_env.spaces import UnicodeText
from research_env.templates import Template, own_template
from research_env.tools import FORMATS, Tool, ToolTurn
from research_env.tools.builtin import find_tools
from research_env.turn_rewards import TurnReward, TurnRewards, resolve_turn_rewards

_LOG = logging.getLogger(__name__)

OWN = "own"
"""The name of a user's own template among the prompts of the protocol."""

MAX_PASSAGE_CHARS = 10_000
"""Default of ``max_passage_chars``; the longest passage of the published data sets has 8,237."""


class EnvSettings(TypedDict, total=False):
    """The keyword arguments of both environments; see :class:`research_env.env.SearchQAEnv`."""

    dataset: str | Dataset
    split: str
    questions: str | None
    corpus: str | None
    hops: int | Sequence[int] | None
    world_seed: int
    difficulty: int
    grades: str | None
    grade: str | None
    retriever: str | Retriever | None
    top_k: int | None
    protocol: str | Protocol
    reward: str | Reward | None
    turn_reward: str | TurnReward | None
    template: Template
    tools: str | Sequence[str | Tool] | None
    tool_format: str | None
    max_searches: int | None
    max_turns: int | None
    max_passage_chars: int | None
    metric_language: str | None


class StepOutput(NamedTuple):
    """What ``step`` returns, in its order."""

    observation: str
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


@dataclass(frozen=True, slots=True)
class EnvCore:
    """The fixed part of an environment; pickled as its settings, so that no connection travels.

    Attributes:
        settings: the keyword arguments that it was made from.
        questions: the tasks.
        retriever: the search engine.
        protocol: the rules, with the user's own template and tools.
        reward: the reward of a whole episode.
        turn_reward: the rewards of single turns, if any.
        template: the name of a template of the protocol.
        top_k: passages that a search returns.
        max_searches: as in :class:`~research_env.episode.Episode`.
        max_turns: as in :class:`~research_env.episode.Episode`.
        max_passage_chars: the most characters that are shown of a passage; None: all.
        metric_language: the language of all answers; None: each question's own.
        by_id: index of each question by its id; filled when it is first needed.
    """

    settings: EnvSettings
    questions: Sequence[Question]
    retriever: Retriever
    protocol: Protocol
    reward: Reward
    turn_reward: TurnRewards | None
    template: str
    top_k: int
    max_searches: int | None
    max_turns: int | None
    max_passage_chars: int | None
    metric_language: str | None
    by_id: dict[str, int] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Callable[[EnvSettings], EnvCore], tuple[EnvSettings]]:
        return _rebuild, (self.settings,)

    def draw_question(self, seed: int, episode: int) -> int:
        """The index of the question of an episode, in the order drawn from the seed.

        Every ``len(questions)`` episodes are one pass over all questions, each pass in another
        order. The result depends on seed and number alone.

        Args:
            seed: draws the orders.
            episode: the number of the episode, from 0 on.

        Raises:
            ConfigurationError: the seed or the number is not an integer from 0 on.
        """
        _check_seed(seed)
        if not isinstance(episode, int | np.integer) or episode < 0:
            raise ConfigurationError(f"an episode's number is an integer from 0 on, not {episode}")
        epoch, at = divmod(int(episode), len(self.questions))
        return int(_permutation(seed, epoch, len(self.questions))[at])

    def find_question(self, question_id: str) -> int:
        """The index of the question with an id.

        Raises:
            UnknownTaskError: there is none.
        """
        if not self.by_id:
            # One update: other threads must not see a part of the mapping.
            self.by_id.update({each.id: i for i, each in enumerate(self.questions)})
        if question_id not in self.by_id:
            raise UnknownTaskError(
                f"no question has the id {question_id!r}; there are {len(self.questions)}, "
                f"the first is {self.questions[0].id!r}"
            )
        return self.by_id[question_id]

    def start(self, index: int) -> tuple[Episode, str, dict[str, Any]]:
        """A new episode of a question, its prompt, and the info of ``reset``."""
        question = self.questions[index]
        messages = self.protocol.messages(self.template, question.question)
        is_chat = self.template == "instruct" or (self.template == OWN and len(messages) > 1)
        episode = Episode(
            question,
            self.protocol,
            max_searches=self.max_searches,
            max_turns=self.max_turns,
            max_passage_chars=self.max_passage_chars,
            chat=is_chat and messages[-1]["role"] == "user",
            metric_language=self.metric_language or _language(question),
        )
        info = make_info(episode, messages)
        info["tools"] = self.tool_schemas()
        return episode, self.protocol.prompt(self.template, question.question), info

    def action_space(self) -> UnicodeText:
        """The space of actions: text, and structured turns if the protocol has tool calls."""
        also = (ToolTurn, Mapping) if self.protocol.tool_format else ()
        return UnicodeText(terminators=self.protocol.terminators, also=also)

    def tool_schemas(self) -> list[Mapping[str, Any]]:
        """JSON Schemas of the tools for a chat template; none where the prompt lists them."""
        tool_format = self.protocol.tool_format
        if tool_format is None or not tool_format.lists_tools:
            return []
        return [tool.schema for tool in self.protocol.tools]

    def search(self, requests: Sequence[Request]) -> list[Found | Exception]:
        """Run a batch of queries and of requests of other tools.

        The engine is asked once, and so is each tool. If it fails as a whole, each of its requests
        gets the error.

        Returns:
            What was found for each request, in order, or the exception that a bug in a tool raised:
            the batch holds requests of other episodes too.

        Raises:
            RuntimeError: the engine did not answer each query (a bug in a retriever).
        """
        queries = [each for each in requests if isinstance(each, str)]
        if len(queries) == len(requests):
            return self._search_queries(queries)
        found: dict[Request, Found | Exception] = {}
        if queries:
            found.update(zip(queries, self._search_queries(queries), strict=True))
        for tool in self.protocol.tools:
            calls = [r for r in requests if not isinstance(r, str) and r.tool == tool.name]
            if calls and tool.runner is not None:
                arguments = [json.loads(each.arguments) for each in calls]
                results: Sequence[Found | Exception]
                try:
                    results = list(tool.runner(self.retriever, arguments))
                    _check_results(tool, results, len(calls))
                except Exception as error:
                    results = [error] * len(calls)
                found.update(zip(calls, results, strict=True))
        return [found[each] for each in requests]

    def _search_queries(self, queries: Sequence[str]) -> list[Found | Exception]:
        try:
            found: list[Found | Exception] = [*self.retriever.search(queries, self.top_k)]
        except RetrievalError as error:
            return [error] * len(queries)
        if len(found) != len(queries):
            raise RuntimeError(
                f"the retriever answered {len(queries)} queries with {len(found)} results"
            )
        return found

    def output(self, episode: Episode) -> StepOutput:
        """What ``step`` returns after the last turn of an episode that is not pending.

        The reward of the episode comes at its end, with the metrics. If the reward is a sum, each
        of its terms, before its weight, is a metric ``reward/NAME``. If the engine failed, reward
        and metrics are 0. With ``turn_reward`` every turn has a reward, and the last one gets the
        episode's too.
        """
        turn = episode.turns[-1] if episode.turns and not episode.over else None
        info = make_info(episode, [call.message for call in turn.calls] if turn else [])
        turn_earned = self.turn_reward.earned(episode) if self.turn_reward else 0.0
        if not episode.over:
            return StepOutput(episode.turns[-1].observation, turn_earned, False, False, info)
        info["prediction"] = episode.prediction or ""
        info["answers"] = episode.question.answers
        info["supporting_ids"] = episode.question.supporting
        info["stop_reason"] = episode.stop_reason
        info["void"] = episode.void
        earned = 0.0
        if episode.void:
            info["metrics"] = self._blank_metrics()
        else:
            info["metrics"] = metrics = episode_metrics(episode)
            if isinstance(self.reward, WeightedSum):
                components = self.reward.components(episode)
                earned = self.reward.total(components)
                metrics |= {f"reward/{name}": value for name, value in components.items()}
            else:
                name = self.settings.get("reward")
                earned = evaluate(self.reward, episode, name=name if isinstance(name, str) else "")
            if self.turn_reward:
                earned += turn_earned
                metrics |= self.turn_reward.totals(episode)
        return StepOutput("", earned, not episode.truncated, episode.truncated, info)

    def _blank_metrics(self) -> dict[str, float]:
        """The metrics of a void episode: the same keys as of any other, so that they batch."""
        terms = self.reward.terms if isinstance(self.reward, WeightedSum) else ()
        names = [*METRICS, *(f"reward/{term.name}" for term in terms)]
        if self.turn_reward:
            names += [f"turn_reward/{term.name}" for term in self.turn_reward.terms]
        return dict.fromkeys(names, 0.0)

    def transcript(self, episode: Episode, reward: float) -> str:
        """The prompt, all that was written and observed, and at the end stop reason and reward.

        Args:
            episode: may go on.
            reward: what its last step returned.
        """
        text = self.protocol.prompt(self.template, episode.question.question)
        text += "".join(turn.action + turn.observation for turn in episode.turns)
        return text + closing_line(episode, reward)

    def close(self) -> None:
        """Close the retriever, unless it was given as an object: then its owner closes it."""
        if not hasattr(self.settings.get("retriever"), "search"):
            self.retriever.close()


def _check_results(tool: Tool, results: Sequence[object], count: int) -> None:
    """Refuse what a runner must not return; only the callers of its tool get the error."""
    valid = all(isinstance(each, ToolResult | Exception) for each in results)
    if len(results) != count or not valid:
        raise ConfigurationError(
            f"the runner of the tool {tool.name!r} answered {count} calls with {results!r:.200}; "
            "return a ToolResult, or an exception, for each call"
        )


def closing_line(episode: Episode, reward: float) -> str:
    """Stop reason and reward as the last line of a transcript; empty while it goes on."""
    return f"\n[{episode.stop_reason}, reward {reward:g}]\n" if episode.over else ""


def resolve_search(episode: Episode, *found: Found | Exception) -> Episode:
    """The episode after its pending requests were answered; void if one of them failed.

    Args:
        episode: may be one that waits for nothing.
        found: what was found for each of its ``pending_requests``, in order.

    Raises:
        Exception: a bug in the engine or in a tool.
    """
    for each in map(raise_bug, found):
        if isinstance(each, RetrievalError):
            return fail(episode)
        episode = observe(episode, each)
    return episode


def make_core(**settings: Unpack[EnvSettings]) -> EnvCore:
    """Read the data, open the engine, check every setting.

    Raises:
        ResearchEnvError: a setting that cannot be used; the message says which and what to do.
    """
    for name in settings:
        if name not in EnvSettings.__annotations__:
            raise UnknownNameError("argument", name, EnvSettings.__annotations__)
    rules = _with_tools(resolve_protocol(settings.get("protocol", "research")), settings)
    chosen = settings.get("reward")
    episode_reward = resolve_reward(rules.reward if chosen is None else chosen)
    _warn_of_other_paper(chosen, rules)
    written = settings.get("turn_reward")
    turn_reward = None if written is None else resolve_turn_rewards(written)
    top_k = _read_limit(settings, "top_k", rules.top_k, 1)
    max_searches = _read_limit(settings, "max_searches", rules.max_searches, 0)
    max_turns = _read_limit(settings, "max_turns", rules.max_turns, 1)
    max_passage_chars = _read_limit(settings, "max_passage_chars", MAX_PASSAGE_CHARS, 1)
    given = settings.get("max_searches")
    one_per_turn = rules.tool_format is None
    if one_per_turn and given is not None and max_turns is not None and given >= max_turns:
        raise ConfigurationError(
            f"max_searches={given} cannot be used up within max_turns={max_turns}, the last of "
            f"which cannot search; set max_turns={given + 1}"
        )
    template = settings.get("template", "base")
    if (own := own_template(template)) is not None:
        rules, template = replace(rules, prompts={**rules.prompts, OWN: own}), OWN
    elif not isinstance(template, str):
        raise UnknownNameError("template", template, [*rules.prompts, "question"])
    rules.prompt(template, "")  # an unknown template is refused here, not at the first reset

    data = _load_dataset(settings)
    if not data.questions:
        raise ConfigurationError(f"the data set {data.name!r} has no question for {settings}")
    language = settings.get("metric_language") or data.metric_language
    if language not in (None, *LANGUAGES):
        raise UnknownNameError("metric_language", language, LANGUAGES)
    for question in data.questions if language is None else ():
        if (own := _language(question)) not in [*LANGUAGES]:
            raise UnknownNameError(f"metric_language of question {question.id!r}:", own, LANGUAGES)
    retriever = _open_engine(settings.get("retriever"), data)
    core = EnvCore(
        settings=settings,
        questions=data.questions,
        metric_language=language,
        retriever=retriever,
        protocol=rules,
        reward=episode_reward,
        turn_reward=turn_reward,
        template=template,
        top_k=5 if top_k is None else top_k,
        max_searches=max_searches,
        max_turns=max_turns,
        max_passage_chars=max_passage_chars,
    )
    try:
        if any(tool.reads for tool in rules.tools):
            require_reader(retriever)
    except BaseException:
        core.close()
        raise
    return core


def reset_seed(env: gym.Env[Any, Any] | VectorEnv[Any, Any, Any], seed: int | None) -> int | None:
    """The seed of a ``reset``, checked; one drawn from ``np_random`` if the user has set that.

    Raises:
        ConfigurationError: the seed is not an integer from 0 on.
    """
    if seed is not None:
        _check_seed(seed)
        return int(seed)  # Gymnasium takes no integer of NumPy
    if env.np_random_seed == -1:  # Gymnasium does not know the seed of a generator that was set
        return int(env.np_random.integers(2**31))
    return seed


def _check_seed(seed: object) -> None:
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise ConfigurationError(f"a seed is an integer from 0 on, not {seed!r}")


def _language(question: Question) -> Any:
    return question.extra.get("metric_language", "en")


def _warn_of_other_paper(reward: str | Reward | None, rules: Protocol) -> None:
    """Warn if a reward's format can never hold, because it is that of another paper's protocol."""
    if reward is None or rules.name not in PAPERS:
        return
    for term in read_terms(reward, REWARDS | SHAPING):
        owners = [name for name, paper in PAPERS.items() if term.name in paper.rewards]
        if owners and rules.name not in owners:
            _LOG.warning(
                "the reward %r reads the format of protocol=%r, which no episode of %r has",
                *(term.name, owners[0], rules.name),
            )


def _with_tools(rules: Protocol, settings: EnvSettings) -> Protocol:
    """The protocol with the tools and the text format that the settings name."""
    tools, name = settings.get("tools"), settings.get("tool_format")
    if tools is None and name is None:
        return rules
    if name is not None and name not in FORMATS:
        raise UnknownNameError("tool_format", name, FORMATS)
    chosen = rules.tools if tools is None else find_tools(tools)
    return rules.with_tools(chosen, FORMATS[name] if name else None)


def _rebuild(settings: EnvSettings) -> EnvCore:
    return make_core(**settings)


def _read_limit(settings: EnvSettings, name: str, default: int | None, least: int) -> int | None:
    value: Any = settings.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ConfigurationError(f"{name} is an integer from {least} on, not {value!r}")
    return int(value)


def _load_dataset(settings: EnvSettings) -> Dataset:
    name = settings.get("dataset", "miniworld")
    keys = ("split", "hops", "questions", "corpus", "world_seed", "difficulty", "grades", "grade")
    given = {key: value for key, value in settings.items() if key in keys}
    if isinstance(name, Dataset):
        if unused := [key for key, value in given.items() if value is not None]:
            raise ConfigurationError(
                f"{unused[0]}={given[unused[0]]!r} is for data sets that are given by name; a "
                "Dataset object holds the questions and the corpus that are meant"
            )
        for question_id, count in Counter(each.id for each in name.questions).items():
            if count > 1:
                raise DataError(
                    f"{count} questions of {name.name!r} have the id {question_id!r}; an id is for "
                    "one question"
                )
        return name
    from research_env.datasets import load_dataset  # noqa: PLC0415 (not for a Dataset)

    given["metric_language"] = settings.get("metric_language")
    return load_dataset(name, **{"split": "train", **given})  # type: ignore[arg-type]


def _open_engine(retriever: str | Retriever | None, data: Dataset) -> Retriever:
    if retriever is not None and not isinstance(retriever, str):
        if not hasattr(retriever, "search"):
            raise ConfigurationError(
                f"retriever is a name such as 'embedded:DIR', or an object with search(queries, "
                f"top_k) and close(), not {retriever!r:.80}"
            )
        return retriever
    from research_env.retrieval import open_retriever  # noqa: PLC0415 (not for an object)

    return open_retriever(retriever, data.corpus)


@lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, size: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(size)
