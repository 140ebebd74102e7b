r"""Rewards by name, sums such as ``research+0.1*support_recall-0.02*searches``, and metrics.

The papers' rewards are in :mod:`research_env.papers`. The functions here, too, take a finished
:class:`~research_env.episode.Episode`. Some are no reward by themselves, but can be added to one or
subtracted from it: how often the policy searches, for what, and what it finds.

A policy can learn to game each of them: if searches cost too much, it never searches; if found
passages pay too much, it searches without end. Use weights well below that of the answer's reward,
and watch the components, which are logged as ``reward/NAME``.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import combinations
from typing import NamedTuple, TypeVar

from research_env.episode import Episode
from research_env.errors import ConfigurationError, ResearchEnvError, RewardError, UnknownNameError
from research_env.metrics import cover_exact_match, normalize
from research_env.papers import PAPERS
from research_env.papers.base import Reward, em_reward, f1_reward
from research_env.papers.r1_searcher import has_long_answer, r1_searcher_stage1_guarded
from research_env.system.imports import import_named

__all__ = ["REWARDS", "Reward", "Term", "WeightedSum", "em_reward", "f1_reward", "resolve_reward"]


def cem_reward(episode: Episode) -> float:
    """Cover exact match with any gold (`metrics.cover_exact_match`); 0 without a prediction."""
    answers, language = episode.question.answers, episode.metric_language
    return cover_exact_match(episode.prediction, answers, language=language)


def cem_guarded(episode: Episode) -> float:
    """`cem_reward`, but 0 for a long answer (`has_long_answer`).

    `cem_reward` pays a policy that copies all passages into its answer. This variant is no paper's.
    """
    return 0.0 if has_long_answer(episode) else cem_reward(episode)


def format_reward(episode: Episode) -> float:
    """1 if the episode has the format that its protocol's paper asks for, else 0.

    For a protocol of your own: 1 if the episode ended with an answer.
    """
    paper = PAPERS.get(episode.protocol.name)
    follows = paper.follows_format(episode) if paper else episode.stop_reason == "answer"
    return float(follows)


def searches(episode: Episode) -> float:
    """Number of searches that were answered; with a negative weight a cost per search.

    A search that a limit refused does not count; one with a blank query does.

    References:
        The cost of tool calls in "OTC" (Wang et al. 2025, arXiv:2504.14870), a factor there.
    """
    return float(episode.searches)


def retrieved(episode: Episode) -> float:
    """1 if at least one search returned a passage, else 0.

    A blank query returns none, so empty search tags earn nothing.

    References:
        The retrieval reward of R1-Searcher's first stage (Song et al. 2025, section 3.1), 0.5
        there.
    """
    return float(any(turn.hits for turn in episode.turns))


def support_recall(episode: Episode) -> float:
    """Share of the question's gold passages that some search returned; 0 if none are known.

    Passages are compared by id, so their text has no influence. But unlike other rewards this one
    depends on the engine, the corpus and ``top_k``, not on the policy's words alone. It is 0 if the
    engine's ids are not those of the data set (an index of Wikipedia, the web).
    """
    golds = set(episode.question.supporting)
    if not golds:
        return 0.0
    seen = {hit.passage.id for turn in episode.turns for hit in turn.hits}
    return len(golds & seen) / len(golds)


def query_diversity(episode: Episode) -> float:
    """Mean Jaccard distance over all pairs of queries; 1 for fewer than two.

    The distance is ``1 - |A & B| / |A | B|``, with A and B the sets of words of two queries,
    normalized as answers are (`metrics.normalize`); 0 if both are empty. The mean is 1 if no two
    queries share a word, and 0 if all are the same.

    References:
        Jaccard 1912, "The distribution of the flora in the alpine zone".
    """
    asked = [query for turn in episode.answered_turns for query in turn.queries]
    bags = [set(normalize(query).split()) for query in asked]
    pairs = [1 - len(a & b) / len(a | b) if a | b else 0.0 for a, b in combinations(bags, 2)]
    return sum(pairs) / len(pairs) if pairs else 1.0


def answer_length(episode: Episode) -> float:
    """Number of words of the final answer; 0 without one.

    A small negative weight counters the long answers that a CEM reward leads to.

    References:
        R1-Searcher's study of rewards (Song et al. 2025, arXiv:2503.05592).
    """
    return float(len((episode.prediction or "").split()))


REWARDS: dict[str, Reward] = {
    **{name: each for paper in PAPERS.values() for name, each in paper.rewards.items()},
    "f1": f1_reward,
    "em": em_reward,
    "cem": cem_reward,
    "format": format_reward,
}
"""The rewards by name; your own is named "module:function"."""

SHAPING: dict[str, Reward] = {
    "guarded-r1-searcher-stage1": r1_searcher_stage1_guarded,
    "guarded-cem": cem_guarded,
    "searches": searches,
    "retrieved": retrieved,
    "support_recall": support_recall,
    "query_diversity": query_diversity,
    "answer_length": answer_length,
}
"""Guarded variants of the papers' rewards, and functions to add to a reward, by name."""


F = TypeVar("F", bound=Callable[..., float])


class Term(NamedTuple):
    """A term of a sum: its weight, its name as it was written, and its function."""

    weight: float
    name: str
    function: Callable[..., float]


def sum_text(terms: Sequence[Term]) -> str:
    """A sum as text, by which results name their reward; `read_terms` reads it back."""
    pieces = [f"{term.weight:+}".removesuffix(".0") + f"*{term.name}" for term in terms]
    return "".join(pieces).removeprefix("+")


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """A weighted sum of rewards, itself a reward."""

    terms: tuple[Term, ...]

    @property
    def __name__(self) -> str:
        """The sum as text; `resolve_reward` reads it back."""
        return sum_text(self.terms)

    def __call__(self, episode: Episode) -> float:
        """The sum for a finished episode."""
        return self.total(self.components(episode))

    def components(self, episode: Episode) -> dict[str, float]:
        """The value of each term by its name, before its weight; always the same keys."""
        return {term.name: evaluate(term.function, episode, name=term.name) for term in self.terms}

    def total(self, components: Mapping[str, float]) -> float:
        """The sum of these values, each with its weight."""
        return sum((term.weight * components[term.name] for term in self.terms), start=0.0)


def resolve_reward(name: str | Reward) -> Reward:
    """The reward with a name, or the sum of several.

    Args:
        name: one of `REWARDS` or `SHAPING`; "module:function" for one of your own; a sum such as
            "research+0.1*support_recall-0.02*searches" (`parse_sum`); or the function itself.

    Raises:
        UnknownNameError: there is no reward of that name.
        ConfigurationError: as in `read_terms`.
    """
    terms = read_terms(name, REWARDS | SHAPING)
    is_sum = not callable(name) and terms[0].name != name
    return WeightedSum(terms) if is_sum else terms[0].function


def read_terms(name: str | F, known: Mapping[str, F]) -> tuple[Term, ...]:
    """The terms of a sum of rewards; a single reward is one term of weight 1.

    Args:
        name: a known name, "module:function", a sum of them, or the function itself.
        known: the rewards by name.

    Raises:
        UnknownNameError: there is no reward of that name.
        ConfigurationError: the sum cannot be read, "module:function" cannot be imported or called,
            or the function is async.
    """
    if callable(name):
        own = str(getattr(name, "__name__", "own"))
        return (Term(1.0, own, _refuse_async(name, own)),)
    name = str(name)
    is_sum = name not in known and not set("+-* ").isdisjoint(name)
    terms = parse_sum(name, known) if is_sum else [(1.0, name)]
    return tuple([Term(weight, each, _find(each, known)) for weight, each in terms])


def _find(name: str, known: Mapping[str, F]) -> F:
    if name in known:
        return known[name]
    if ":" not in name:
        hint = "Name one of your own as 'module:function'."
        raise UnknownNameError("reward", name, known, hint)
    found = import_named(name, "reward")
    if not callable(found):
        raise ConfigurationError(f"the reward {name!r} is {found!r}, which is not a function")
    own: F = _refuse_async(found, name)
    return own


def evaluate(function: Callable[..., float], *episodes: Episode, name: str = "") -> float:
    """The reward of a finished episode or of a turn, checked to be a number.

    Args:
        function: the reward.
        episodes: what it takes: a finished episode that is not void, or the episodes before and
            after a turn.
        name: what errors call the reward.

    Raises:
        RewardError: it raised an exception, or returned None, a tuple, a coroutine or anything else
            that is no finite number.
    """
    name = name or getattr(function, "__qualname__", repr(function))
    try:
        value = function(*episodes)
        number = float(value) if hasattr(type(value), "__float__") else math.nan
    except ResearchEnvError:
        raise
    except Exception as error:
        raise RewardError(
            f"the reward {name} failed for question {episodes[0].question.id!r}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if math.isfinite(number):
        return number
    if inspect.iscoroutine(value):
        value.close()
    raise RewardError(
        f"the reward {name} returned {value!r:.80} for question {episodes[0].question.id!r}; a "
        "reward is one finite number (to log more of them, add them up with weight 0)"
    )


def _refuse_async(function: F, name: str) -> F:
    call = getattr(function, "__call__", None)  # noqa: B004 (an object may have an async one)
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call):
        raise ConfigurationError(
            f"the reward {name} is async; rewards are plain functions: let it return a number, and "
            "run what it awaits with asyncio.run inside"
        )
    return function


METRICS: dict[str, Reward] = {
    "em": em_reward,
    "f1": f1_reward,
    "cem": cem_reward,
    "format": format_reward,
    "searches": searches,
    "support_recall": support_recall,
}
"""What is measured of every finished episode, by name."""


def episode_metrics(episode: Episode) -> dict[str, float]:
    """The `METRICS` of a finished episode; always the same keys."""
    return {name: metric(episode) for name, metric in METRICS.items()}


# --- reading a sum ---

_NUMBER = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_OWN = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_.]*")
_WORD = re.compile(r"[^\s+*]+")
_EXAMPLE = "'research+0.1*support_recall-0.02*searches'"


def parse_sum(text: str, known: Iterable[str]) -> list[tuple[float, str]]:
    """Read a sum such as ``research+0.1*support_recall-0.02*searches``; nothing is evaluated.

    The grammar is ``sum = [sign] term {sign term}`` and ``term = [number "*"] name``. A name is a
    known one or ``module:function``, a number is decimal, and spaces may stand anywhere between.
    Known names contain hyphens, and the longest one that fits is read: ``r1-searcher-stage2-em`` is
    one name, ``r1-searcher-stage2 - em`` the difference of two.

    Args:
        text: the sum.
        known: the known names.

    Returns:
        Weight and name of each term, in order.

    Raises:
        UnknownNameError: a name is not known; the message lists the known ones.
        ConfigurationError: the text is no such sum; the message says at which position.
    """
    names = sorted(known, key=len, reverse=True)
    fits = re.compile(f"(?:{'|'.join(map(re.escape, names))})(?![A-Za-z0-9_.:])")

    def wrong(at: int, what: str) -> ConfigurationError:
        found = repr(text[at : at + 20]) if at < len(text) else "the end"
        return ConfigurationError(
            f"the reward {text!r:.200} cannot be read: position {at + 1} must be {what}, not "
            f"{found}; write a sum of names with weights, such as {_EXAMPLE}"
        )

    terms: dict[str, float] = {}
    at = _after_space(text, 0)
    last = at  # where the previous name begins
    while at < len(text) or not terms:
        weight = 1.0
        if text[at : at + 1] in ("+", "-"):
            weight = -1.0 if text[at] == "-" else 1.0
            at = _after_space(text, at + 1)
        elif terms:
            raise wrong(at, "a + or -")
        if number := _NUMBER.match(text, at):
            weight *= float(number[0])
            if not math.isfinite(weight):
                raise wrong(at, "a number that is not too large")
            at = _after_space(text, number.end())
            if text[at : at + 1] != "*":
                raise wrong(at, "the * between a weight and its name")
            at = _after_space(text, at + 1)
        name = fits.match(text, at) or _OWN.match(text, at)
        if name is None:
            word = _WORD.match(text, at)
            if word is None or not (word[0][0].isalpha() or word[0][0] == "_"):
                raise wrong(at, "a name")
            raise _unknown(text, names, word, last if terms else at)
        if name[0] in terms:
            raise wrong(at, f"another name than {name[0]!r}, which has a weight already")
        terms[name[0]] = weight
        last, at = at, _after_space(text, name.end())
    return [(weight, name) for name, weight in terms.items()]


def _after_space(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


def _unknown(text: str, names: list[str], word: re.Match[str], before: int) -> UnknownNameError:
    """The error for a word that is no name.

    In "research-strickt" the word is "strickt", but the error is about the whole, which is close to
    a known name.
    """
    start, name = word.start(), word[0]
    whole = text[before : word.end()]
    if _WORD.fullmatch(whole) and get_close_matches(whole, names):
        start, name = before, whole
    hint = f"It is at position {start + 1} of {text!r:.200}; your own is named 'module:function'."
    return UnknownNameError("reward", name[:80], names, hint)
