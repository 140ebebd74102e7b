"""What each reward pays to a policy that knows nothing, on the real data sets.

    RESEARCH_DATA=../shared/data python -m benchmarks.cheap_strategies [--questions 400] [--all]

A policy finds the weak spots of a reward. Here strategies without any reading or reasoning (copy
what was found, answer "yes", give up, ...) play development questions of MuSiQue, HotpotQA and
2WikiMultiHopQA, with the embedded index over each set's own passages, and every reward scores the
same episodes. The table in docs/how-to/rewards.md has the best-paid strategy of each reward.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import tyro

from benchmarks.tables import print_table
from research_env import Episode, Hit, Protocol, Question, advance, observe
from research_env.core import EnvCore, make_core
from research_env.papers import PAPERS
from research_env.rewards import REWARDS, SHAPING

SETS = ("musique", "hotpotqa", "2wiki")
PROTOCOLS = ("research", "r1-searcher", "search-r1")
PLAIN = ("f1", "em", "cem", "guarded-cem", "format")  # scored with the protocol research
TOP_K = 5
_MARKUP = re.compile(r"[{}<>$\\]")
_NAME = re.compile(r"(?:[A-Z][\w'.]+ ?)+")


@dataclass(frozen=True, slots=True)
class StrategyConfig:
    """Which questions, and how much to print."""

    questions: int = 400
    """Development questions of each set, the first in the order of seed 0."""
    all: bool = False
    """Print every strategy, not only the best-paid one."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """How to play without knowing anything.

    Attributes:
        name: what the table calls it.
        searches: whether it searches for the question first.
        answer: its answer, from the question and the passages found; None: it gives none.
    """

    name: str
    searches: bool
    answer: Callable[[str, Sequence[Hit]], str | None]


def _copied(question: str, hits: Sequence[Hit]) -> str:
    return " ".join(f"{hit.passage.title} {hit.passage.text}" for hit in hits)


def _names(question: str, hits: Sequence[Hit]) -> str:
    return " ".join(sorted(_NAME.findall(question[4:]), key=len)[-2:]) or "x"


STRATEGIES = (
    Strategy("gives up", False, lambda q, hits: None),
    Strategy("searches, gives up", True, lambda q, hits: None),
    Strategy("a wrong answer", False, lambda q, hits: "zzz"),
    Strategy("searches, a wrong answer", True, lambda q, hits: "zzz"),
    Strategy('answers "yes"', False, lambda q, hits: "yes"),
    Strategy("copies the question", False, lambda q, hits: q),
    Strategy("copies two names of the question", False, _names),
    Strategy(
        "copies the first title", True, lambda q, hits: hits[0].passage.title if hits else "x"
    ),
    Strategy("copies all passages", True, _copied),
    Strategy(
        'copies all passages, "yes" and "no"', True, lambda q, hits: f"{_copied(q, hits)} yes no"
    ),
)


def rewards_of(protocol: str) -> list[str]:
    """The rewards that go with a protocol; the plain ones go with research."""
    more = {"research": PLAIN, "r1-searcher": ("guarded-r1-searcher-stage1",)}
    return [*PAPERS[protocol].rewards, *more.get(protocol, ())]


def play(core: EnvCore, question: Question, strategy: Strategy, hits: Sequence[Hit]) -> Episode:
    """The episode of one strategy, in the protocol's own tags."""
    rules = core.protocol
    episode = Episode(question, rules, core.max_searches, core.max_turns)
    thought = "" if rules.name == "r1-searcher" else f"{rules.think.open}t{rules.think.close}"
    if strategy.searches:
        query = f"{thought}{rules.query.open}{_clean(question.question)}{rules.query.close}"
        episode = observe(advance(episode, query), hits)
    answer = strategy.answer(question.question, hits)
    last = "I do not know." if answer is None else _answer(rules, thought, _clean(answer))
    episode = advance(episode, last)
    while not episode.over:  # Search-R1 gives hints
        episode = advance(episode, last)
    return episode


def measure(questions: int) -> dict[str, dict[str, dict[str, float]]]:
    """Mean rewards: by reward, strategy and data set."""
    earned: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    functions = REWARDS | SHAPING
    for name in SETS:
        first: EnvCore | None = None
        for protocol in PROTOCOLS:
            core = make_core(
                dataset=name,
                split="dev",
                protocol=protocol,
                top_k=TOP_K,
                retriever=first.retriever if first else None,
            )
            first = first or core
            numbers = range(min(questions, len(core.questions)))
            asked = [core.questions[core.draw_question(0, number)] for number in numbers]
            found = core.search([_clean(each.question)[:1000] for each in asked])
            for question, hits in zip(asked, found, strict=True):
                assert isinstance(hits, list), hits
                for strategy in STRATEGIES:
                    episode = play(core, question, strategy, hits)
                    for reward in rewards_of(protocol):
                        earned[reward][strategy.name][name].append(functions[reward](episode))
        if first:
            first.close()
    return {
        reward: {
            strategy: {name: fmean(values) for name, values in sets.items()}
            for strategy, sets in strategies.items()
        }
        for reward, strategies in earned.items()
    }


def main() -> None:
    """Measure, and print a table in Markdown."""
    config = tyro.cli(
        StrategyConfig, prog="python -m benchmarks.cheap_strategies", description=__doc__
    )
    means = measure(config.questions)
    rows = []
    for reward, strategies in means.items():
        ranked = sorted(strategies, key=lambda name: -fmean(strategies[name].values()))
        for strategy in ranked if config.all else ranked[:1]:
            numbers = [f"{strategies[strategy][name]:.2f}" for name in SETS]
            rows.append([reward, strategy, *numbers])
    print_table("what knowing nothing pays", ["reward", "strategy", *SETS], rows)


def _clean(text: str) -> str:
    """Remove what would be markup in any protocol."""
    return _MARKUP.sub("", text)


def _answer(rules: Protocol, thought: str, answer: str) -> str:
    if rules.name == "r1-searcher":  # its prompt has opened the thought
        thought = f"t{rules.think.close}\n"
    text = f"\\boxed{{{answer}}}" if rules.name == "research" else answer
    return f"{thought}{rules.answer.open}{text}{rules.answer.close}"


if __name__ == "__main__":
    main()
