"""What the single and the vector environment share: questions, engine, rules, reward.

A :class:`EnvCore` is made once from the keyword arguments of an environment and does not change. It
starts an episode, asks the engine for the pending ones, and describes an episode in Gymnasium's
terms; what happens in between is :mod:`research_env.episode`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import version
from typing import Any, NamedTuple, TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from research_env.datasets.base import Dataset, Question
from research_env.episode import Episode, fail, observe
from research_env.errors import (
    ConfigurationError,
    RetrievalError,
    UnknownNameError,
    UnknownTaskError,
)
from research_env.metrics import LANGUAGES
from research_env.papers import protocol
from research_env.protocol import Protocol
from research_env.retrieval.base import Retriever
from research_env.retrieval.batching import Found
from research_env.retrieval.documents import require_reader
from research_env.retrieval.requests import Request
from research_env.retrieval.url import split_options
from research_env.rewards import METRICS, Reward, WeightedSum, episode_metrics, evaluate, reward
from research_env.spaces import UnicodeText
from research_env.system.redaction import redact_url
from research_env.templates import Template, own_template
from research_env.tools import FORMATS, Tool, ToolTurn
from research_env.tools.builtin import find_tools
from research_env.turn_rewards import TurnReward, TurnRewards, turn_rewards

OWN = "own"
"""The name that stands for a user's own template."""

MAX_PASSAGE_CHARS = 10_000
"""The longest passage of the published data sets has 8,237 characters."""


SHOWS = {
    "request": "query",
    "requests": "searches",
    "ids": "passage_ids",
    "titles": "passage_titles",
    "scores": "passage_scores",
    "marked": "supporting_ids",
    "item": "passage",
    "mark": "gold",
}
"""Which parts of the info describe an observation: ``metadata["shows"]`` of the environments, by
which trainers can show passages without knowing what they are."""


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
    """The fixed part of an environment; pickled as its settings, so that no connection travels."""

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
        """Which question the numbered episode asks, in the order drawn from the seed.

        Every ``len(questions)`` episodes are one pass over all questions, each pass in another
        order; the result depends on seed and number alone.

        Raises:
            ConfigurationError: the number is not an integer from 0 on.
        """
        if not isinstance(episode, int | np.integer) or episode < 0:
            raise ConfigurationError(f"an episode's number is an integer from 0 on, not {episode}")
        epoch, at = divmod(int(episode), len(self.questions))
        return int(_permutation(seed, epoch, len(self.questions))[at])

    def find_question(self, question_id: str) -> int:
        """Which question has this id.

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
        chat = self.protocol.messages(self.template, question.question)
        episode = Episode(
            question,
            self.protocol,
            self.max_searches,
            self.max_turns,
            self.max_passage_chars,
            self.is_chat and chat[-1]["role"] == "user",
            self._language(question),
        )
        info = _info(episode, chat)
        info["tools"] = self.tool_schemas()
        return episode, self.protocol.prompt(self.template, question.question), info

    def action_space(self) -> UnicodeText:
        """The space of actions: text, and structured turns if the protocol has tool calls."""
        also = (ToolTurn, Mapping) if self.protocol.tool_format else ()
        return UnicodeText(terminators=self.protocol.terminators, also=also)

    @property
    def is_chat(self) -> bool:
        """Whether the prompt is a chat, rather than one text."""
        return self.template == "instruct" or (
            self.template == OWN and len(self.protocol.prompts[OWN]) > 1
        )

    def tool_schemas(self) -> list[Mapping[str, Any]]:
        """JSON Schemas of the tools for a chat template; none where the prompt lists them."""
        tool_format = self.protocol.tool_format
        if tool_format is None or not tool_format.lists_tools:
            return []
        return [tool.schema for tool in self.protocol.tools]

    def _language(self, question: Question) -> str:
        language = self.metric_language or question.extra.get("metric_language", "en")
        if language not in LANGUAGES:
            raise UnknownNameError(
                f"metric_language of question {question.id!r}:", language, LANGUAGES
            )
        return str(language)

    def search(self, requests: Sequence[Request]) -> list[Found]:
        """Run a batch: the queries of searches, and requests of other tools.

        The engine is asked once, and so is each tool. If a whole batch fails, each of its requests
        gets the error.
        """
        queries: Sequence[str] = requests  # type: ignore[assignment]
        if self.protocol.tools:
            queries = [each for each in requests if isinstance(each, str)]
        if len(queries) == len(requests):
            return self._search_queries(queries)
        found: dict[Request, Found] = {}
        if queries:
            found.update(zip(queries, self._search_queries(queries), strict=True))
        for tool in self.protocol.tools:
            calls = [r for r in requests if not isinstance(r, str) and r.tool == tool.name]
            if calls and tool.runner is not None:
                arguments = [json.loads(each.arguments) for each in calls]
                try:
                    results = tool.runner(self.retriever, arguments)
                except RetrievalError as error:
                    results = [error] * len(calls)
                found.update(zip(calls, results, strict=True))
        return [found[each] for each in requests]

    def _search_queries(self, queries: Sequence[str]) -> list[Found]:
        try:
            return [*self.retriever.search(queries, self.top_k)]
        except RetrievalError as error:
            return [error] * len(queries)

    def output(self, episode: Episode) -> StepOutput:
        """What ``step`` returns after the last turn of an episode that is not pending.

        The reward comes at the end. Metrics come with it; of a sum of rewards each component,
        before its weight, as ``reward/NAME``. If the engine failed, all of them are 0. With
        ``turn_reward`` each turn has a reward of its own, and the last one gets the episode's too.
        """
        turn = episode.turns[-1] if episode.turns and not episode.over else None
        info = _info(episode, [call.message for call in turn.calls] if turn else [])
        of_turn = self.turn_reward.earned(episode) if self.turn_reward else 0.0
        if not episode.over:
            return StepOutput(episode.turns[-1].observation, of_turn, False, False, info)
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
                named = self.settings.get("reward")
                earned = evaluate(self.reward, episode, named if isinstance(named, str) else "")
            if self.turn_reward:
                earned += of_turn
                metrics |= self.turn_reward.totals(episode)
        return StepOutput("", earned, not episode.truncated, episode.truncated, info)

    def _blank_metrics(self) -> dict[str, float]:
        """The metrics of a void episode: the keys of any other, so that trainers can batch them."""
        terms = self.reward.terms if isinstance(self.reward, WeightedSum) else ()
        names = [*METRICS, *(f"reward/{term.name}" for term in terms)]
        if self.turn_reward:
            names += [f"turn_reward/{name}" for _, name, _ in self.turn_reward.terms]
        return dict.fromkeys(names, 0.0)

    def transcript(self, episode: Episode) -> str:
        """The prompt, all that was written and observed, and at the end its reason and reward."""
        text = self.protocol.prompt(self.template, episode.question.question)
        text += "".join(turn.action + turn.observation for turn in episode.turns)
        return text + self.closing(episode)

    def closing(self, episode: Episode) -> str:
        """The last line of a transcript; empty while the episode goes on."""
        if not episode.over:
            return ""
        return f"\n[{episode.stop_reason}, reward {self.output(episode).reward:g}]\n"

    def provenance(self) -> dict[str, str]:
        """What results depend on besides the policy, each in words or by its SHA-256.

        ``questions`` (ids, texts, answers and extra fields), ``retriever`` (its kind and options),
        ``index`` (the fingerprint of the corpus in it; "" if unknown), ``protocol``, ``template``
        (its text), ``limits``, ``reward``, and the version of ``research_env``. ``place:
        retriever`` is its URL without user and password: results do not depend on it. Where the
        fingerprint is not known, the URL stands for the corpus, and ``retriever`` is the URL.
        """
        shown = ""
        if self.max_passage_chars != MAX_PASSAGE_CHARS:
            shown = f", max_passage_chars {self.max_passage_chars}"
        if self.metric_language:
            shown += f", metric_language {self.metric_language}"
        asked = [
            [q.id, q.question, q.answers, *([dict(q.extra)] if q.extra else [])]
            for q in self.questions
        ]
        named = self.settings.get("retriever") or "the corpus of the data set"
        place = redact_url(named) if isinstance(named, str) else repr(type(named))
        index = str(getattr(self.retriever, "fingerprint", None) or "")
        is_url = isinstance(named, str) and ":" in named
        text = json.dumps(self.protocol.messages(self.template, "{question}"))
        return {
            "questions": f"{len(asked)}, sha256 {_sha256(json.dumps(asked, default=str))}",
            "retriever": _kind_and_options(place) if index and is_url else place,
            "place: retriever": place,
            "index": index,
            "protocol": self.protocol.name + self._tools_named(),
            "template": f"{self.template}, sha256 {_sha256(text)}",
            "limits": f"top_k {self.top_k}, max_searches {self.max_searches}, "
            f"max_turns {self.max_turns}" + shown,
            "reward": str(getattr(self.reward, "__name__", type(self.reward).__name__))
            + (f", per turn {self.turn_reward.__name__}" if self.turn_reward else ""),
            "research_env": version("research-env"),
        }

    def _tools_named(self) -> str:
        """Text format and schemas of the tools, where they are not the protocol's own."""
        if self.settings.get("tools") is None and self.settings.get("tool_format") is None:
            return ""
        assert self.protocol.tool_format is not None
        schemas = json.dumps([tool.schema for tool in self.protocol.tools])
        names = "+".join(tool.name for tool in self.protocol.tools)
        return f", {self.protocol.tool_format.name}, {names}, sha256 {_sha256(schemas)}"

    def close(self) -> None:
        """Close the retriever, unless it was given as an object: then it is its owner's."""
        if not hasattr(self.settings.get("retriever"), "search"):
            self.retriever.close()


def _kind_and_options(url: str) -> str:
    """The parts of a retriever's URL that change results: neither the address nor the deadline."""
    base, options = split_options(url)
    kept = [f"{key}={value}" for key, value in sorted(options.items()) if key != "deadline"]
    kind = base.partition(":")[0]
    return f"{kind}?{'&'.join(kept)}" if kept else kind


def resolve_search(episode: Episode, *found: Found) -> Episode:
    """The pending episode with what the engine said: hits, or a failure that makes it void.

    Args:
        episode: one that is pending.
        found: what was found for each of its ``pending_requests``.
    """
    for each in found:
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
    rules = _with_tools(protocol(settings.get("protocol", "research")), settings)
    chosen = settings.get("reward")
    scored = reward(rules.reward if chosen is None else chosen)
    of_turns = settings.get("turn_reward")
    top_k = _read_limit(settings, "top_k", rules.top_k, 1)
    max_searches = _read_limit(settings, "max_searches", rules.max_searches, 0)
    max_turns = _read_limit(settings, "max_turns", rules.max_turns, 1)
    asked = settings.get("max_searches")
    one_per_turn = rules.tool_format is None
    if one_per_turn and asked is not None and max_turns is not None and asked >= max_turns:
        raise ConfigurationError(
            f"max_searches={asked} cannot be used up within max_turns={max_turns}, the last of "
            f"which cannot search; set max_turns={asked + 1}"
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
    retriever = _open_engine(settings.get("retriever"), data)
    if any(tool.reads for tool in rules.tools):
        require_reader(retriever)
    return EnvCore(
        settings=settings,
        questions=data.questions,
        metric_language=language,
        retriever=retriever,
        protocol=rules,
        reward=scored,
        turn_reward=None if of_turns is None else turn_rewards(of_turns),
        template=template,
        top_k=5 if top_k is None else top_k,
        max_searches=max_searches,
        max_turns=max_turns,
        max_passage_chars=_read_limit(settings, "max_passage_chars", MAX_PASSAGE_CHARS, 1),
    )


def _with_tools(rules: Protocol, settings: EnvSettings) -> Protocol:
    """The protocol with the tools and the text format that the settings name."""
    tools, name = settings.get("tools"), settings.get("tool_format")
    if tools is None and name is None:
        return rules
    if name is not None and name not in FORMATS:
        raise UnknownNameError("tool_format", name, FORMATS)
    named = rules.tools if tools is None else find_tools(tools)
    return rules.with_tools(named, FORMATS[name] if name else None)


def _rebuild(settings: EnvSettings) -> EnvCore:
    return make_core(**settings)


def _read_limit(settings: EnvSettings, name: str, default: int | None, least: int) -> int | None:
    value: Any = settings.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(f"{name} is an integer from {least} on, not {value!r}")
    return value


def _load_dataset(settings: EnvSettings) -> Dataset:
    name = settings.get("dataset", "miniworld")
    if isinstance(name, Dataset):
        return name
    from research_env.datasets import load_dataset  # noqa: PLC0415 (readers are not always needed)

    return load_dataset(
        name,
        split=settings.get("split", "train"),
        hops=settings.get("hops"),
        questions=settings.get("questions"),
        corpus=settings.get("corpus"),
        world_seed=settings.get("world_seed", 0),
        difficulty=settings.get("difficulty", 0),
        grades=settings.get("grades"),
        grade=settings.get("grade"),
    )


def _open_engine(retriever: str | Retriever | None, data: Dataset) -> Retriever:
    if retriever is not None and not isinstance(retriever, str):
        if not hasattr(retriever, "search"):
            raise ConfigurationError(
                f"retriever is a name such as 'embedded:DIR', or an object with search(queries, "
                f"top_k) and close(), not {retriever!r:.80}"
            )
        return retriever
    from research_env.retrieval import open_retriever  # noqa: PLC0415 (nor are the engines)

    return open_retriever(retriever, data.corpus)


@lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, size: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(size)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def strata(question: Question) -> dict[str, str]:
    """The groups that evaluations report means of; "" where a value is not known."""
    return {"hops": str(question.hops or ""), "type": question.type or ""}


def _state_key(episode: Episode) -> str:
    """Equal where two samples of a question have found the same passages; "" at the end."""
    if episode.over:
        return ""
    found = frozenset([hit.passage.id for turn in episode.turns for hit in turn.hits])
    return _key_of_found(episode.question.id, found)


@lru_cache(maxsize=4096)  # a group of samples finds the same again and again
def _key_of_found(question_id: str, passage_ids: frozenset[str]) -> str:
    text = "\0".join([question_id, *sorted(passage_ids)])
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _info(episode: Episode, chat: list[dict[str, str]]) -> dict[str, Any]:
    """Constant keys and types, so that infos of many environments batch into arrays."""
    turn = episode.turns[-1] if episode.turns else None
    hits = turn.hits if turn else ()
    turn_format = episode.protocol.tool_format
    return {
        "question_id": episode.question.id,
        "question": episode.question.question,
        "messages": chat,
        "tools": [],
        "chat_markup": turn_format.markup if turn and turn.observation and turn_format else (),
        "query": (turn.query or "") if turn else "",
        "passage_ids": tuple([hit.passage.id for hit in hits]),
        "passage_titles": tuple([hit.passage.title for hit in hits]),
        "passage_scores": tuple([hit.score for hit in hits]),
        "state_key": _state_key(episode),
        "prediction": "",
        "answers": (),
        "supporting_ids": (),
        "strata": strata(episode.question),
        "metrics": {},
        "stop_reason": "",
        "void": False,
    }
