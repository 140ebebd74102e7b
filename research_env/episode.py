"""One episode as a value, and the one transition function: what happens after an action.

Nothing here touches a search engine, a clock or a random number. A driver (the environment, the
vector environment, a test) calls :func:`advance` with what the policy wrote; where the new episode
has a ``pending`` query it asks its engine and calls :func:`observe` with the hits, or :func:`fail`
where there are none to be had. :func:`truncate` stops an episode whose budget of tokens is spent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from research_env.datasets.base import Question
from research_env.errors import ActionError, EpisodeError, UnknownNameError
from research_env.protocol import ActionKind, Protocol
from research_env.retrieval.base import Hit, Passage
from research_env.tools import Call, has_calls, read_calls, show_hits

StopReason = Literal["answer", "no_answer", "max_searches", "max_turns", "length", "backend_error"]
CutReason = Literal["length"]

CUT_MARK = " […]"
"""Stands where a passage was cut."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One action and what came back.

    Attributes:
        action: what the policy wrote, up to and with the terminator.
        kind: what it asked for.
        query: of a search, as the engine got it; of several, a line each.
        hits: of a search, best first; of several, one after the other.
        observation: the text that was appended after the action.
        calls: of tools, in order.
    """

    action: str
    kind: ActionKind
    query: str | None = None
    hits: tuple[Hit, ...] = ()
    observation: str = ""
    calls: tuple[Call, ...] = ()

    @property
    def queries(self) -> tuple[str, ...]:
        """The queries of its searches; a blank one is "" and finds nothing."""
        if self.calls:
            return tuple([call.query for call in self.calls if call.query is not None])
        return (self.query or "",) if self.kind == "search" else ()


@dataclass(frozen=True, slots=True)
class Episode:
    """A question and all that has happened to it; immutable.

    Attributes:
        question: the task.
        protocol: its rules and texts.
        max_searches: searches that may be run; asking for one more ends the episode. None: no cap.
        max_turns: actions that may be taken; the last one cannot search. None: no cap.
        max_passage_chars: characters of a passage, title and text together, that an observation
            shows; what is cut is marked by `CUT_MARK`. None: no cap.
        chat: the prompt is a chat, whose template may have opened `think` for the policy.
        metric_language: the language by whose rules answers are compared (`metrics.LANGUAGES`).
        turns: so far, in order.
        pending: the query of the last turn while it waits for its hits; of several, the first.
        stop_reason: why it is over; None while it goes on.
        prediction: once it is over, the final answer in all that the policy wrote, by the
            protocol's rule; None: there is none.
        memo: what has been computed from this value (format, F1, ...), so that it is computed once.
    """

    question: Question
    protocol: Protocol
    max_searches: int | None = None
    max_turns: int | None = None
    max_passage_chars: int | None = None
    chat: bool = False
    metric_language: str = "en"
    turns: tuple[Turn, ...] = ()
    pending: str | None = None
    stop_reason: StopReason | None = None
    prediction: str | None = None
    memo: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def over(self) -> bool:
        """Whether no further action is taken."""
        return self.stop_reason is not None

    @property
    def void(self) -> bool:
        """Whether the search engine failed, so that the episode is evidence of nothing."""
        return self.stop_reason == "backend_error"

    @property
    def truncated(self) -> bool:
        """Whether it was stopped from outside: by a limit, a spent budget or a failed engine."""
        return self.stop_reason in ("max_searches", "max_turns", "length", "backend_error")

    @property
    def actions(self) -> tuple[str, ...]:
        """All that the policy wrote, an entry a turn."""
        return tuple(turn.action for turn in self.turns)

    @property
    def searches(self) -> int:
        """Searches that were answered, or are about to be (refused ones do not count)."""
        asked = sum([len(turn.queries) for turn in self.turns])
        last = self.turns[-1] if self.over and self.turns else None
        refused = last is not None and not last.observation
        return asked - (len(last.queries) if last and refused else 0)

    @property
    def pending_queries(self) -> tuple[str, ...]:
        """All queries that wait for their hits, in the order in which `observe` takes them."""
        if self.pending is None:
            return ()
        calls = self.turns[-1].calls
        waiting = [each.query for each in calls if each.query is not None and each.result is None]
        return tuple(waiting) if calls else (self.pending,)


def advance(episode: Episode, action: str) -> Episode:
    """The episode after an action.

    A search makes its query ``pending`` (a blank query finds nothing, at once); an answer ends the
    episode; an invalid action ends it too, or gets the protocol's hint and the episode goes on.

    Args:
        episode: one that is not over and waits for no hits.
        action: what the policy wrote; all after the first terminator is ignored.

    Raises:
        ActionError: the action is not a string.
        EpisodeError: the episode is over, or waits for the hits of its last search.
    """
    if not isinstance(action, str):
        raise ActionError(f"an action is text, not {type(action).__name__}: {action!r:.80}")
    if episode.stop_reason is not None:
        raise EpisodeError(f"the episode is over ({episode.stop_reason}); reset it first")
    if episode.pending is not None:
        raise EpisodeError(f"the search for {episode.pending!r} has no result yet")

    protocol = episode.protocol
    action = protocol.cut(action)
    if protocol.tool_format is not None and has_calls(action):
        return _call_tools(episode, action)
    kind, query = protocol.parse(action)
    last = episode.max_turns is not None and len(episode.turns) + 1 >= episode.max_turns

    if kind == "search":
        full = episode.max_searches is not None and episode.searches >= episode.max_searches
        if full or last:
            reason: StopReason = "max_searches" if full else "max_turns"
            return _extend(episode, Turn(action, kind, query), stop_reason=reason)
        seen = "" if query else protocol.render(())
        return _extend(episode, Turn(action, kind, query, (), seen), pending=query or None)
    if kind == "invalid" and protocol.hint is not None:
        if last:
            return _extend(episode, Turn(action, kind), stop_reason="max_turns")
        return _extend(episode, Turn(action, kind, observation=protocol.hint))
    ended = _extend(episode, Turn(action, kind), stop_reason="answer")
    return ended if ended.prediction is not None else replace(ended, stop_reason="no_answer")


def observe(episode: Episode, hits: Sequence[Hit]) -> Episode:
    """The episode after its pending search was answered with these hits, best first.

    Where a turn has several searches this answers the first that waits, and the next is pending.

    Raises:
        EpisodeError: no search is pending.
    """
    if episode.pending is None:
        raise EpisodeError("there is no pending search that these hits could answer")
    turn, hits = episode.turns[-1], tuple(hits)
    shown = _shorten(hits, episode.max_passage_chars)
    if turn.calls:
        return _answer_call(episode, hits, shown)
    seen = Turn(turn.action, turn.kind, turn.query, hits, episode.protocol.render(shown))
    return Episode(
        episode.question,
        episode.protocol,
        episode.max_searches,
        episode.max_turns,
        episode.max_passage_chars,
        episode.chat,
        episode.metric_language,
        (*episode.turns[:-1], seen),
    )


def fail(episode: Episode) -> Episode:
    """The episode after the engine failed its pending search: void, and without an observation.

    Raises:
        EpisodeError: no search is pending.
    """
    if episode.pending is None:
        raise EpisodeError("there is no pending search that could have failed")
    return replace(episode, pending=None, stop_reason="backend_error")


def truncate(episode: Episode, reason: CutReason = "length") -> Episode:
    """The episode stopped from outside, because its budget of tokens is spent.

    It is scored as any episode that ends without an answer: what the policy wrote counts, and so do
    the searches that were answered. A search that is still pending is dropped.

    Args:
        episode: one that is not over.
        reason: becomes the ``stop_reason``.

    Raises:
        UnknownNameError: no such reason.
        EpisodeError: the episode is over.
    """
    if reason not in get_args(CutReason):
        raise UnknownNameError("reason to truncate an episode", reason, get_args(CutReason))
    if episode.stop_reason is not None:
        raise EpisodeError(f"the episode is over ({episode.stop_reason}); it cannot be truncated")
    written = _final_answer(episode.protocol, episode.turns)
    return replace(episode, pending=None, stop_reason=reason, prediction=written)


def _shorten(hits: tuple[Hit, ...], limit: int | None) -> tuple[Hit, ...]:
    """The hits with no more than ``limit`` characters of each passage."""
    if limit is None or all(len(h.passage.title) + len(h.passage.text) <= limit for h in hits):
        return hits
    shown = []
    for hit in hits:
        passage, room = hit.passage, max(0, limit - len(hit.passage.title))
        title = passage.title if len(passage.title) <= limit else passage.title[:limit] + CUT_MARK
        text = passage.text if len(passage.text) <= room else passage.text[:room] + CUT_MARK
        shown.append(Hit(Passage(passage.id, title, text), hit.score))
    return tuple(shown)


def _extend(
    episode: Episode,
    turn: Turn,
    *,
    pending: str | None = None,
    stop_reason: StopReason | None = None,
) -> Episode:
    turns = (*episode.turns, turn)
    return Episode(
        episode.question,
        episode.protocol,
        episode.max_searches,
        episode.max_turns,
        episode.max_passage_chars,
        episode.chat,
        episode.metric_language,
        turns,
        pending,
        stop_reason,
        stop_reason and _final_answer(episode.protocol, turns),
    )


def _final_answer(protocol: Protocol, turns: Sequence[Turn]) -> str | None:
    """The prediction; with tools each turn is a message of its own, and the last one answers."""
    actions = [turn.action for turn in turns]
    return protocol.extract("".join(actions[-1:] if protocol.tool_format else actions))


def _call_tools(episode: Episode, action: str) -> Episode:
    """The episode after a turn that calls tools.

    Searches over the limit get an error as their result, unless none is left at all.
    """
    assert episode.protocol.tool_format is not None
    used = {call.id for turn in episode.turns for call in turn.calls}
    number = len(episode.turns)
    calls = read_calls(action, episode.protocol.tool_format.tools, turn=number, used=used)
    asked = sum(call.query is not None for call in calls)
    left = asked if episode.max_searches is None else episode.max_searches - episode.searches

    if asked and left <= 0:
        return _extend(episode, _turn_of(action, calls), stop_reason="max_searches")
    if episode.max_turns is not None and number + 1 >= episode.max_turns:
        return _extend(episode, _turn_of(action, calls), stop_reason="max_turns")
    run: list[Call] = []
    for call in calls:
        over = call.query is not None and left <= 0
        left -= call.query is not None
        error = f"error: the limit of {episode.max_searches} searches is reached"
        run.append(replace(call, query=None, result=error) if over else call)
    return _go_on(episode, _turn_of(action, run))


def _answer_call(episode: Episode, hits: tuple[Hit, ...], shown: tuple[Hit, ...]) -> Episode:
    """The episode after the first call that waits has its hits."""
    calls = list(episode.turns[-1].calls)
    at = next(i for i, call in enumerate(calls) if call.result is None)
    limit = calls[at].limit
    result = show_hits(shown[:limit])
    calls[at] = replace(calls[at], hits=hits[:limit], result=result)
    before = replace(episode, turns=episode.turns[:-1], pending=None)
    return _go_on(before, _turn_of(episode.turns[-1].action, calls))


def _go_on(episode: Episode, turn: Turn) -> Episode:
    """The episode with a turn that waits for the first search without hits, or is complete."""
    assert episode.protocol.tool_format is not None
    for call in turn.calls:
        if call.result is None:
            return _extend(episode, turn, pending=call.query)
    return _extend(
        episode, replace(turn, observation=episode.protocol.tool_format.framer(turn.calls))
    )


def _turn_of(action: str, calls: Sequence[Call]) -> Turn:
    queries = [call.query for call in calls if call.query is not None]
    hits = [hit for call in calls for hit in call.hits]
    kind: ActionKind = "search" if queries else "invalid"
    joined = "\n".join(queries) if queries else None
    return Turn(action, kind, joined, tuple(hits), calls=tuple(calls))
