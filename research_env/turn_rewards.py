r"""Rewards of single turns, by name, and sums such as ``0.2*new_support-0.02*searches``.

Each function takes the episode before a turn and after it, and returns what the turn has earned.
An environment with ``turn_reward=...`` returns their sum at every step, in addition to the reward
of the whole episode at the end. Passages are compared by id; their text has no influence.

A turn earns something only for what is new in it: the same thing said again pays nothing. Four
functions are costs, which each turn pays again: `redundancy`, `searches`, `repeated_query` and
`invalid_action`; give them negative weights. The potentials (`support_progress`, `pivot_progress`)
sum to 0 over an episode, so they move credit between turns and do not change which policy is best
(Ng et al. 1999). All others change it: give them weights well below that of the answer's reward.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

from research_env.episode import Episode, Turn
from research_env.metrics import normalize
from research_env.rewards import Term, evaluate, read_terms, sum_text, support_recall

__all__ = ["TURN_REWARDS", "TurnReward", "TurnRewards", "resolve_turn_rewards"]

TurnReward = Callable[[Episode, Episode], float]
"""From the episode before a turn and after it to what the turn has earned."""


def new_support(before: Episode, after: Episode) -> float:
    """Number of gold passages that this turn found and no earlier one did."""
    golds = set(after.question.supporting)
    return float(len(golds & _seen(after)) - len(golds & _seen(before)))


def information_gain(before: Episode, after: Episode) -> float:
    """Share of the gold passages that this turn found first; sums to `support_recall`.

    References:
        The information gain of StepSearch (Wang et al. 2025, arXiv:2505.15107): the mean over gold
        passages of how much closer than before a search came. There closeness is a cosine of word
        vectors; here it is 1 for the passage itself and 0 for any other.
    """
    return support_recall(after) - support_recall(before)


def redundancy(before: Episode, after: Episode) -> float:
    """Share of this turn's passages that an earlier turn had found; give it a negative weight.

    References:
        The redundancy penalty of StepSearch (see `information_gain`).
    """
    ids = [hit.passage.id for turn in _new(before, after) for hit in turn.hits]
    return sum(each in _seen(before) for each in ids) / len(ids) if ids else 0.0


def first_search(before: Episode, after: Episode) -> float:
    """1 for the first search that returned a passage, else 0."""
    return float(bool(_seen(after)) and not _seen(before))


def searches(before: Episode, after: Episode) -> float:
    """How many of the turn's searches were answered; give it a negative weight."""
    return float(after.searches - before.searches)


def repeated_query(before: Episode, after: Episode) -> float:
    """1 if one of the turn's searches repeats a query, else 0; give it a negative weight.

    Queries are normalized as answers are. A blank query repeats any other blank one.
    """
    asked = {normalize(query) for turn in before.turns for query in turn.queries}
    new = [normalize(query) for turn in _new(before, after) for query in turn.queries]
    return float(len(set(new) - asked) < len(new))


def invalid_action(before: Episode, after: Episode) -> float:
    """1 for an action that the protocol cannot read, else 0; give it a negative weight."""
    return float(any(turn.kind == "invalid" for turn in _new(before, after)))


def evidence_found(before: Episode, after: Episode) -> float:
    """1 for an answer after all gold passages were found, else 0; 0 if none are known."""
    return float(after.stop_reason == "answer" and support_recall(before) == 1.0)


def support_progress(before: Episode, after: Episode) -> float:
    r"""Potential-based shaping with the share of gold passages found: ``Phi(after) - Phi(before)``.

    Phi is 0 at the start and at the end, so the last turn pays back what the others earned.

    References:
        Ng, Harada and Russell 1999, with gamma = 1: such rewards do not change which policies are
        best. Use ``gamma=1`` in the algorithm.
    """
    return _potential(after, support_recall) - _potential(before, support_recall)


def pivot_progress(before: Episode, after: Episode) -> float:
    """Potential-based shaping with the pivots reached: gold passages found, sub-answers written.

    The pivots are the gold passage of each hop of the question's decomposition, if one is named,
    and its answer, which the policy must write itself. Phi is the share of them that is reached; 0
    if no decomposition is known, and at the end.

    References:
        The pivots of PiCA (Liu et al. 2026, arXiv:2605.09287), whose potential is a learned
        probability of success given gold sub-queries and sub-answers.
    """
    return _potential(after, _share_reached) - _potential(before, _share_reached)


TURN_REWARDS: dict[str, TurnReward] = {
    "new_support": new_support,
    "information_gain": information_gain,
    "redundancy": redundancy,
    "first_search": first_search,
    "searches": searches,
    "repeated_query": repeated_query,
    "invalid_action": invalid_action,
    "evidence_found": evidence_found,
    "support_progress": support_progress,
    "pivot_progress": pivot_progress,
}
"""The rewards of turns by name; your own is named "module:function"."""


@dataclass(frozen=True, slots=True)
class TurnRewards:
    """A weighted sum of rewards of turns."""

    terms: tuple[Term, ...]

    @property
    def __name__(self) -> str:
        """The sum as text; `resolve_turn_rewards` reads it back."""
        return sum_text(self.terms)

    def earned(self, episode: Episode) -> float:
        """What the last turn of an episode has earned; 0 if the search engine failed.

        Raises:
            RewardError: a reward failed, or is no finite number.
        """
        if episode.void:
            return 0.0
        pair = _before(episode), episode
        earned = [
            term.weight * evaluate(term.function, *pair, name=term.name) for term in self.terms
        ]
        return sum(earned, start=0.0)

    def earned_before(self, episode: Episode) -> float:
        """What all turns of a finished episode but the last have earned.

        Raises:
            RewardError: a reward failed, or is no finite number.
        """
        return sum(map(self.earned, _states_before(episode)[1:]), start=0.0)

    def totals(self, episode: Episode) -> dict[str, float]:
        """Each term summed over the turns of a finished episode, before its weight.

        Returns:
            The sums as ``turn_reward/NAME``; always the same keys.

        Raises:
            RewardError: a reward failed, or is no finite number.
        """
        states = [*_states_before(episode), episode]
        return {
            f"turn_reward/{name}": sum(
                (evaluate(function, *pair, name=name) for pair in pairwise(states)), start=0.0
            )
            for _, name, function in self.terms
        }


def resolve_turn_rewards(name: str | TurnReward) -> TurnRewards:
    """Return the turn reward with a name, or the sum of several.

    Args:
        name: one of `TURN_REWARDS`; "module:function" for one of your own; a sum of them such as
            "0.2*new_support+0.1*first_search-0.02*searches"; or the function itself.

    Raises:
        UnknownNameError: there is no such reward.
        ConfigurationError: as in `research_env.rewards.read_terms`.
    """
    return TurnRewards(read_terms(name, TURN_REWARDS))


def _before(episode: Episode) -> Episode:
    """The episode before its last turn, or before `truncate` ended it after a complete turn."""
    turns = episode.turns[:-1]
    if episode.stop_reason == "length" and episode.turns and episode.turns[-1].observation:
        turns = episode.turns  # the last turn is complete, and has had its reward
    return replace(episode, turns=turns, pending=None, stop_reason=None, prediction=None)


def _states_before(episode: Episode) -> list[Episode]:
    """The states of an episode from its start to the one before its last turn."""
    return [
        replace(episode, turns=episode.turns[:k], pending=None, stop_reason=None, prediction=None)
        for k in range(len(_before(episode).turns) + 1)
    ]


def _new(before: Episode, after: Episode) -> tuple[Turn, ...]:
    return after.turns[len(before.turns) :]


def _seen(episode: Episode) -> set[str]:
    return {hit.passage.id for turn in episode.turns for hit in turn.hits}


def _share_reached(episode: Episode) -> float:
    hops = episode.question.decomposition
    seen, written = _seen(episode), _words(" ".join(episode.actions))
    reached = [hop.support in seen for hop in hops if hop.support]
    answers = [_words(hop.answer) for hop in hops]
    reached += [answer in written for answer in answers if answer.strip()]
    return sum(reached) / len(reached) if reached else 0.0


def _words(text: str) -> str:
    """The normalized words of a text with a space around each; tags and marks separate words."""
    apart = re.sub(r"[^\w\s]", " ", text)
    return f" {normalize(apart)} "


def _potential(episode: Episode, phi: Callable[[Episode], float]) -> float:
    return 0.0 if episode.over else phi(episode)
