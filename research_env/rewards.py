r"""Rewards by name, sums of rewards such as ``research+0.1*support_recall-0.02*searches``, metrics.

The papers' rewards are in :mod:`research_env.papers`. The functions here take a finished
:class:`~research_env.episode.Episode` too. Some give a number that is no reward by itself, but
worth adding to one, or subtracting: R1-Searcher's rewards do not see how often the policy searches,
for what, or what comes back.

The policy can be paid to game any of them: a cost that is too high teaches never to search, and a
bonus for found passages to search without end. Use weights well below those of the answer's reward,
and watch the components, which are logged as ``reward/NAME``.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import combinations
from typing import NamedTuple

from research_env.episode import Episode
from research_env.errors import ConfigurationError, ResearchEnvError, RewardError, UnknownNameError
from research_env.metrics import cover_exact_match, normalize
from research_env.papers import PAPERS
from research_env.papers.base import Reward, em_reward, f1_reward
from research_env.papers.r1_searcher import MAX_ANSWER_WORDS, r1_searcher_stage1_guarded

__all__ = ["REWARDS", "Reward", "Term", "WeightedSum", "em_reward", "f1_reward", "reward"]


def cem_reward(episode: Episode) -> float:
    """Cover exact match with any gold (`metrics.cover_exact_match`); 0 without a prediction."""
    answers, language = episode.question.answers, episode.metric_language
    return cover_exact_match(episode.prediction, answers, language=language)


def cem_guarded(episode: Episode) -> float:
    """`cem_reward` in which an answer of more than ten words covers nothing.

    Whoever copies all passages into the answer is paid by `cem_reward`. Ten words is the limit of
    R1-Searcher's second stage. Ours, not a paper's.
    """
    short = len((episode.prediction or "").split()) <= MAX_ANSWER_WORDS
    return cem_reward(episode) if short else 0.0


def format_reward(episode: Episode) -> float:
    """1 where the protocol's format holds, as its paper's reward defines it, else 0.

    For a protocol of one's own: where the episode ended with an answer.
    """
    paper = PAPERS.get(episode.protocol.name)
    follows = paper.follows_format(episode) if paper else episode.stop_reason == "answer"
    return float(follows)


def searches(episode: Episode) -> float:
    """Number of searches that were answered; with a negative weight the cost of a search.

    A search that a limit refused does not count, one with a blank query does. Source: the cost of
    tool calls in Wang et al. 2025, "OTC" (arXiv:2504.14870), there a factor, here a term.
    """
    return float(episode.searches)


def retrieved(episode: Episode) -> float:
    """1 if at least one search returned a passage, else 0.

    A blank query returns none, so writing empty search tags earns nothing. The number of passages
    is looked at, their words are not.

    References:
        The retrieval reward of R1-Searcher's first stage (Song et al. 2025, section 3.1), 0.5
        there.
    """
    return float(any(turn.hits for turn in episode.turns))


def support_recall(episode: Episode) -> float:
    """Share of the question's gold passages that some search returned; 0 where none are known.

    Passages are told apart by their ids, and no word of theirs is read: whatever a passage says, it
    changes nothing. But of all the rewards this is the one that depends on what was retrieved: on
    the engine, the corpus and ``top_k`` too, not on the policy's words alone. It is 0 for every
    question without gold passages, and where the engine's ids are not those of the data set (an
    index of Wikipedia, the web).
    """
    golds = set(episode.question.supporting)
    if not golds:
        return 0.0
    seen = {hit.passage.id for turn in episode.turns for hit in turn.hits}
    return len(golds & seen) / len(golds)


def query_diversity(episode: Episode) -> float:
    """Mean Jaccard distance between the queries, pair by pair; 1 for fewer than two.

    ``1 - |A & B| / |A | B|`` with A and B the sets of words of two queries, normalized as answers
    are (`metrics.normalize`); 0 where both are empty. So it is 1 where no two queries share a word,
    0 where all are the same, and an episode that searches once or never loses nothing by it.

    Source of the distance: Jaccard 1912, "The distribution of the flora in the alpine zone".
    """
    asked = [query for turn in episode.turns for query in turn.queries]
    bags = [set(normalize(query).split()) for query in asked[: episode.searches]]
    pairs = [1 - len(a & b) / len(a | b) if a | b else 0.0 for a, b in combinations(bags, 2)]
    return sum(pairs) / len(pairs) if pairs else 1.0


def answer_length(episode: Episode) -> float:
    """Number of words of the final answer; 0 without one.

    With a small negative weight it answers what R1-Searcher found of the CEM reward: that it is
    covered best by long answers (Song et al. 2025, arXiv:2503.05592, the study of rewards).
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
"""Guarded variants of the papers' rewards, and what is worth adding to a reward, by name."""


class Term(NamedTuple):
    """A term of a sum: the weight, the name as it was written, and the function."""

    weight: float
    name: str
    reward: Reward


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """A weighted sum of rewards, itself a reward."""

    terms: tuple[Term, ...]

    @property
    def __name__(self) -> str:
        """The sum as it may be written: files of results name what they are of."""
        return "".join(f"{term.weight:+g}*{term.name}" for term in self.terms).removeprefix("+")

    def __call__(self, episode: Episode) -> float:
        """The sum for a finished episode."""
        return self.total(self.components(episode))

    def components(self, episode: Episode) -> dict[str, float]:
        """The value of each term by its name, before its weight; always the same keys."""
        return {term.name: evaluate(term.reward, episode, term.name) for term in self.terms}

    def total(self, components: Mapping[str, float]) -> float:
        """The sum of these values, each with its weight."""
        return sum((term.weight * components[term.name] for term in self.terms), start=0.0)


def reward(name: str | Reward, known: Mapping[str, Reward] | None = None) -> Reward:
    """The reward of that name, or the sum of rewards.

    Args:
        name: one of `REWARDS` or `SHAPING`; "module:function" for one of your own; a sum
            of them such as "research+0.1*support_recall-0.02*searches" (`parse_sum`); or
            the function itself.
        known: the rewards by name; None: `REWARDS` and `SHAPING`.

    Raises:
        UnknownNameError: there is no reward of that name.
        ConfigurationError: the sum cannot be read, "module:function" cannot be imported or called,
            or the function is async.
    """
    if callable(name):
        return _refuse_async(name, getattr(name, "__name__", repr(name)))
    name, known = str(name), REWARDS | SHAPING if known is None else known
    if name in known:
        return known[name]
    if not set("+-* ").isdisjoint(name):
        terms = parse_sum(name, known)
        return WeightedSum(tuple(Term(weight, each, reward(each, known)) for weight, each in terms))
    module, colon, function = name.partition(":")
    if not colon:
        hint = "Name one of your own as 'module:function'."
        raise UnknownNameError("reward", name, known, hint)
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"cannot import the reward {name!r}: {error}; "
            "write 'module:function' with a module that Python finds (see PYTHONPATH)"
        ) from error
    if not callable(found):
        raise ConfigurationError(f"the reward {name!r} is {found!r}, which is not a function")
    return _refuse_async(found, name)


def evaluate(function: Reward, episode: Episode, name: str = "") -> float:
    """The reward of a finished episode, checked to be a number.

    Args:
        function: the reward.
        episode: a finished one that is not void.
        name: what errors call it.

    Raises:
        RewardError: it raised an exception, or returned None, a tuple, a coroutine or anything else
            that is no finite number.
    """
    named = name or getattr(function, "__qualname__", repr(function))
    try:
        value = function(episode)
        number = float(value) if hasattr(type(value), "__float__") else math.nan
    except ResearchEnvError:
        raise
    except Exception as error:
        raise RewardError(
            f"the reward {named} failed for question {episode.question.id!r}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if math.isfinite(number):
        return number
    if inspect.iscoroutine(value):
        value.close()
    raise RewardError(
        f"the reward {named} returned {value!r:.80} for question {episode.question.id!r}; a reward "
        "is one finite number (to log more of them, add them up with weight 0)"
    )


def _refuse_async(function: Reward, name: str) -> Reward:
    call = getattr(function, "__call__", None)  # noqa: B004 (an object may have an async one)
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call):
        raise ConfigurationError(
            f"the reward {name} is async; rewards are plain functions: let it return a number, and "
            "run what it awaits with asyncio.run inside"
        )
    return function


METRICS = ("em", "f1", "cem", "format", "searches", "support_recall")
"""The keys of `episode_metrics`."""


def episode_metrics(episode: Episode) -> dict[str, float]:
    """What is known of an episode at its end; always the same keys.

    Returns:
        ``em``, ``f1``, ``cem``: of the prediction, with SQuAD's normalization and all golds.
        ``format``: `format_reward`.
        ``searches``: the number of searches.
        ``support_recall``: share of the gold passages that some search returned, by id; 0.0 where
        the question names none (`support_recall`).
    """
    return {
        "em": em_reward(episode),
        "f1": f1_reward(episode),
        "cem": cem_reward(episode),
        "format": format_reward(episode),
        "searches": float(episode.searches),
        "support_recall": support_recall(episode),
    }


# --- reading a sum ---

_NUMBER = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_OWN = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*")
_WORD = re.compile(r"[^\s+*]+")
_EXAMPLE = "'research+0.1*support_recall-0.02*searches'"


def parse_sum(text: str, known: Iterable[str]) -> list[tuple[float, str]]:
    """Read a sum such as ``research+0.1*support_recall-0.02*searches``; nothing is evaluated.

    ``sum = [sign] term {sign term}``, ``term = [number "*"] name``, where a name is a known one
    or ``module:function``, a number is decimal, and spaces may stand between all of them. Known
    names hold hyphens, and the longest that fits is read: ``r1-searcher-stage2-em`` is one name,
    ``r1-searcher-stage2 - em`` the difference of two.

    Args:
        text: the sum.
        known: the names there are.

    Returns:
        Weight and name of each term, in their order.

    Raises:
        UnknownNameError: a name that does not exist; the message lists those that do.
        ConfigurationError: anything else that is no such sum; the message tells the position.
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
    last = at  # where the name before this one began
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
    """The error for a word; for research-strickt it is about the whole, not about strickt."""
    start, name = word.start(), word[0]
    whole = text[before : word.end()]
    if _WORD.fullmatch(whole) and get_close_matches(whole, names):
        start, name = before, whole
    hint = f"It is at position {start + 1} of {text!r:.200}; your own is named 'module:function'."
    return UnknownNameError("reward", name[:80], names, hint)
