"""Play a list of actions through the transition function, for the tests of rewards."""

from __future__ import annotations

from collections.abc import Sequence

from research_env.datasets.base import Question
from research_env.episode import Episode, advance, observe
from research_env.papers import PROTOCOLS
from research_env.retrieval.base import Hit, Passage

PLAIN = (
    Hit(Passage("p1", "Paris", "Paris is the capital of France."), 2.0),
    Hit(Passage("p2", "Lyon", "Lyon is a city."), 1.0),
)


def play(
    protocol: str,
    actions: Sequence[str],
    golds: Sequence[str] = ("Paris",),
    *,
    hits: Sequence[Hit] = PLAIN,
    supporting: Sequence[str] = (),
) -> Episode:
    """The episode after these actions; every search finds ``hits``. None may come after the end."""
    rules = PROTOCOLS[protocol]
    question = Question("q1", "Which city?", tuple(golds), tuple(supporting))
    episode = Episode(question, rules, rules.max_searches, rules.max_turns)
    for action in actions:
        episode = advance(episode, action)
        while episode.pending is not None:
            episode = observe(episode, hits)
    return episode
