r"""Rewards of single turns, by name, and sums such as ``0.2*new_support-0.02*searches``.

Each function sees the episode before an action and after all that followed from it, and says what
that turn has earned. An environment with ``turn_reward=...`` returns the sum at every step, in
addition to the reward of the whole episode at the end. As everywhere, the words of passages are not
read: passages are told apart by their ids.

What an episode has earned, it cannot earn again: a turn is paid for what is new in it, and saying
the same thing again pays nothing. Four functions are costs, which every turn pays: `redundancy`,
`searches`, `repeated_query` and `invalid_action`; give them negative weights. The potentials
(`support_progress`, `pivot_progress`) sum to 0 over an episode, so they move credit between turns
and leave the best policy the best (Ng et al. 1999). All others change what is optimal: give them
weights well below the answer's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from research_env.episode import Episode, Turn
from research_env.errors import ConfigurationError
from research_env.metrics import normalize
from research_env.rewards import WeightedSum, reward

__all__ = ["TURN_REWARDS", "TurnReward", "TurnRewards", "turn_rewards"]

TurnReward = Callable[[Episode, Episode], float]
"""Takes the episode before a turn and after it; returns what the turn has earned."""


def new_support(before: Episode, after: Episode) -> float:
    """Number of gold passages that this turn's search returned and no earlier one did."""
    golds = set(after.question.supporting)
    return float(len(golds & _seen(after)) - len(golds & _seen(before)))


def information_gain(before: Episode, after: Episode) -> float:
    """Share of the question's gold passages that this turn found; 0 where none are known.

    Over an episode it sums to ``support_recall``.

    References:
        The information gain of StepSearch (Wang et al. 2025, arXiv:2505.15107): the mean over gold
        passages of how much nearer than before a search came. There nearness is a cosine of words;
        here it is 1 for the passage itself and 0 for any other, as passages are not read.
    """
    return _share_found(after) - _share_found(before)


def redundancy(before: Episode, after: Episode) -> float:
    """Share of the passages that this turn's search returned which had been returned before.

    References:
        The redundancy penalty of StepSearch; give it a negative weight.
    """
    ids = [hit.passage.id for turn in _new(before, after) for hit in turn.hits]
    return sum(each in _seen(before) for each in ids) / len(ids) if ids else 0.0


def first_search(before: Episode, after: Episode) -> float:
    """1 for the first search that returned a passage, else 0."""
    return float(bool(_seen(after)) and not _seen(before))


def searches(before: Episode, after: Episode) -> float:
    """1 for a search that was answered, else 0; give it a negative weight."""
    return float(after.searches - before.searches)


def repeated_query(before: Episode, after: Episode) -> float:
    """1 for a search whose query was asked before, else 0; give it a negative weight.

    Queries are compared as answers are, normalized. A blank query repeats any other blank one.
    """
    asked = {normalize(query) for turn in before.turns for query in turn.queries}
    new = [query for turn in _new(before, after) for query in turn.queries]
    return float(any(normalize(query) in asked for query in new))


def invalid_action(before: Episode, after: Episode) -> float:
    """1 for an action that the protocol cannot read, else 0; give it a negative weight."""
    return float(any(turn.kind == "invalid" for turn in _new(before, after)))


def evidence_found(before: Episode, after: Episode) -> float:
    """1 for an answer given after all gold passages were returned, else 0.

    0 where no gold passage is known.
    """
    return float(after.stop_reason == "answer" and _share_found(before) == 1.0)


def support_progress(before: Episode, after: Episode) -> float:
    r"""Potential-based shaping with the share of gold passages found: ``Phi(after) - Phi(before)``.

    Phi is 0 at the start and at the end, so the last turn pays back what the others earned.

    References:
        Ng, Harada and Russell 1999, with gamma = 1: such rewards leave the best policies the best.
        Use ``gamma=1`` in the algorithm.
    """
    return _potential(after, _share_found) - _potential(before, _share_found)


def pivot_progress(before: Episode, after: Episode) -> float:
    """Potential-based shaping with the pivots reached: gold passages found, sub-answers written.

    Phi is the share of the question's decomposition that is reached: of each hop its gold passage,
    if one is named, and its answer, if the policy wrote it in words of its own. It is 0 where no
    decomposition is known, and at the end.

    References:
        The pivots of PiCA (Liu et al. 2026, arXiv:2605.09287), whose potential is a learned
        probability of success given golden sub-queries and sub-answers; here it is their share.
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
    """A weighted sum of rewards of turns.

    Attributes:
        terms: weight, name and function of each.
    """

    terms: tuple[tuple[float, str, TurnReward], ...]

    @property
    def __name__(self) -> str:
        """The sum as it may be written."""
        return "".join(f"{weight:+g}*{name}" for weight, name, _ in self.terms).removeprefix("+")

    def earned(self, episode: Episode) -> float:
        """What the last turn of an episode has earned; 0 where the search engine failed."""
        if episode.void:
            return 0.0
        before = _before(episode)
        return sum((w * float(f(before, episode)) for w, _, f in self.terms), start=0.0)

    def totals(self, episode: Episode) -> dict[str, float]:
        """Each term summed over the turns of a finished episode, before its weight.

        Returns:
            The sums as ``turn_reward/NAME``; always the same keys.
        """
        states = [
            replace(episode, turns=episode.turns[:k], pending=None, stop_reason=None)
            for k in range(len(_before(episode).turns) + 1)
        ]
        states.append(episode)
        return {
            f"turn_reward/{name}": sum(
                (float(f(states[k], states[k + 1])) for k in range(len(states) - 1)), start=0.0
            )
            for _, name, f in self.terms
        }


def turn_rewards(name: str | TurnReward) -> TurnRewards:
    """Return the turn reward with a name, or the sum of several.

    Args:
        name: one of `TURN_REWARDS`; "module:function" for one of your own; a sum of them such as
            "0.2*new_support+0.1*first_search-0.02*searches"; or the function itself.

    Raises:
        UnknownNameError: there is no such reward.
        ConfigurationError: the sum cannot be read, or "module:function" cannot be imported.
    """
    found = reward(name, TURN_REWARDS)  # type: ignore[arg-type]
    if isinstance(found, WeightedSum):
        return TurnRewards(tuple((t.weight, t.name, t.reward) for t in found.terms))  # type: ignore[misc]
    if not callable(found):
        raise ConfigurationError(f"turn_reward is a name, a sum or a function, not {name!r:.80}")
    named = name if isinstance(name, str) else str(getattr(name, "__name__", "own"))
    function: TurnReward = found  # type: ignore[assignment]
    return TurnRewards(((1.0, named, function),))


def _before(episode: Episode) -> Episode:
    """The episode before its last event: a turn, or a budget that was spent after one."""
    turns = episode.turns[:-1]
    if episode.stop_reason == "length" and episode.turns and episode.turns[-1].observation:
        turns = episode.turns  # the last one was answered, and has had its reward
    return replace(episode, turns=turns, pending=None, stop_reason=None, prediction=None)


def _new(before: Episode, after: Episode) -> tuple[Turn, ...]:
    return after.turns[len(before.turns) :]


def _seen(episode: Episode) -> set[str]:
    return {hit.passage.id for turn in episode.turns for hit in turn.hits}


def _share_found(episode: Episode) -> float:
    golds = set(episode.question.supporting)
    return len(golds & _seen(episode)) / len(golds) if golds else 0.0


def _share_reached(episode: Episode) -> float:
    seen, written = _seen(episode), _words(" ".join(episode.actions))
    reached = [hop.support in seen for hop in episode.question.decomposition if hop.support]
    answers = [_words(hop.answer) for hop in episode.question.decomposition]
    reached += [answer in written for answer in answers if answer.strip()]
    return sum(reached) / len(reached) if reached else 0.0


def _words(text: str) -> str:
    """The words of a text, normalized, with a space around each: tags and marks part words."""
    apart = re.sub(r"[^\w\s]", " ", text)
    return f" {normalize(apart)} "


def _potential(episode: Episode, phi: Callable[[Episode], float]) -> float:
    return 0.0 if episode.over else phi(episode)
