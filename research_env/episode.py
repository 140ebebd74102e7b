"""One episode as a value, and the one transition function: what happens after an action.

Nothing here touches a search engine, a clock or a random number. A driver (the environment, the
vector environment, a test) calls :func:`advance` with what the policy wrote. Where the new episode
has a ``pending`` request it asks its engine and calls :func:`observe` with the hits, or
:func:`fail` if the engine failed. :func:`truncate` stops an episode whose budget of
tokens is spent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from research_env.datasets.base import Question
from research_env.errors import ActionError, EpisodeError, UnknownNameError
from research_env.markup import defuse
from research_env.protocol import ActionKind, Protocol
from research_env.retrieval.base import Hit, Passage
from research_env.retrieval.requests import Request, ToolResult
from research_env.tools.base import ToolTurn
from research_env.tools.builtin import show_hits
from research_env.tools.calls import CallRecord, WrittenCall, record_calls, structured

StopReason = Literal["answer", "no_answer", "max_searches", "max_turns", "length", "backend_error"]
CutReason = Literal["length"]
Action = str | ToolTurn | Mapping[str, Any]
"""What the policy wrote: text; where tools are called, also a structured turn, or an assistant
message in the form of OpenAI's API."""

CUT_MARK = " […]"
"""Stands where a passage was cut."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One action and what came back.

    Attributes:
        action: what the policy wrote, up to and with the terminator.
        kind: what it asked for.
        query: the search's query, as the engine got it; several queries are one per line.
        hits: the search's hits, best first; those of several searches, and of documents that were
            read, one after the other.
        observation: the text that was appended after the action.
        calls: the tool calls, in order.
    """

    action: str
    kind: ActionKind
    query: str | None = None
    hits: tuple[Hit, ...] = ()
    observation: str = ""
    calls: tuple[CallRecord, ...] = ()

    @property
    def queries(self) -> tuple[str, ...]:
        """The queries of its searches; a blank one is "" and finds nothing."""
        if self.calls:
            return tuple([call.query for call in self.calls if call.query is not None])
        return (self.query or "",) if self.kind == "search" else ()

    @property
    def requests(self) -> int:
        """How many searches, and valid calls of other tools, it asks for."""
        if self.calls:
            return sum([call.request is not None for call in self.calls])
        return int(self.kind == "search")


@dataclass(frozen=True, slots=True)
class Episode:
    """A question and all that has happened to it; immutable.

    Attributes:
        question: the task.
        protocol: its rules and texts.
        max_searches: searches, and calls of other tools, that may be run; asking for one more ends
            the episode. None: no cap.
        max_turns: actions that may be taken; the last one cannot search. None: no cap.
        max_passage_chars: characters of a passage, title and text together, that an observation
            shows; what is cut is marked by `CUT_MARK`. None: no cap.
        chat: the prompt is a chat, whose template may have opened `think` for the policy.
        metric_language: the language by whose rules answers are compared (`metrics.LANGUAGES`).
        turns: so far, in order.
        pending: the request that the last turn waits for: the query of a search, or the request of
            another tool; if there are several, the first.
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
    pending: Request | None = None
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
        """All that the policy wrote, one entry per turn."""
        return tuple(turn.action for turn in self.turns)

    @property
    def searches(self) -> int:
        """Searches and calls of other tools that were answered, or are about to be.

        Refused ones do not count, and neither do calls with an error.
        """
        asked = sum([turn.requests for turn in self.turns])
        last = self.turns[-1] if self.over and self.turns else None
        return asked - (last.requests if last and not last.observation else 0)

    @property
    def pending_requests(self) -> tuple[Request, ...]:
        """All that waits for its result, in the order in which `observe` takes them."""
        if self.pending is None:
            return ()
        if not self.turns[-1].calls:
            return (self.pending,)
        return tuple(
            [
                call.request
                for call in self.turns[-1].calls
                if call.request is not None and call.result is None
            ]
        )


def advance(episode: Episode, action: Action) -> Episode:
    """The episode after an action.

    A search makes its query ``pending`` (a blank query finds nothing, at once); an answer ends the
    episode; an invalid action ends it too, or gets the protocol's hint and the episode goes on.

    Args:
        episode: one that is not over and waits for no hits.
        action: what the policy wrote; all after the first terminator is ignored. A protocol with
            tool calls takes a structured turn, too.

    Raises:
        ActionError: the action is of another type.
        EpisodeError: the episode is over, or waits for the hits of its last search.
    """
    protocol = episode.protocol
    if not isinstance(action, str) and protocol.tool_format is None:
        raise ActionError(
            f"an action is text, not {type(action).__name__}: {action!r:.80}; "
            "structured turns are for protocols with tool calls"
        )
    if episode.stop_reason is not None:
        raise EpisodeError(f"the episode is over ({episode.stop_reason}); reset it first")
    if episode.pending is not None:
        raise EpisodeError(f"the search for {episode.pending!r} has no result yet")

    if protocol.tool_format is not None:
        text, written = _read_calls(protocol, action)
        if written:
            return _call_tools(episode, text, written)
        return _answer(_extend(episode, Turn(text, "answer"), stop_reason="answer"))
    assert isinstance(action, str)
    return _advance_text(episode, protocol.cut(action))


def _advance_text(episode: Episode, action: str) -> Episode:
    """The episode after the text of a protocol without tools."""
    protocol = episode.protocol
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
    return _answer(_extend(episode, Turn(action, kind), stop_reason="answer"))


def observe(episode: Episode, found: Sequence[Hit] | ToolResult) -> Episode:
    """The episode after its pending request was answered.

    Where a turn has several requests this answers the first that waits, and the next is pending.

    Args:
        episode: one that is pending.
        found: the hits of a search, best first, or the result of another tool.

    Raises:
        EpisodeError: nothing is pending.
    """
    if episode.pending is None:
        raise EpisodeError("there is no pending search that these hits could answer")
    turn = episode.turns[-1]
    if isinstance(found, ToolResult):
        return _answer_call(episode, found.hits, defuse(_cut(found.text, episode)))
    hits = tuple(found)
    shown = _shorten(hits, episode.max_passage_chars)
    if turn.calls:
        limit = next(call.limit for call in turn.calls if call.result is None)
        ids = any(tool.reads for tool in episode.protocol.tools)
        return _answer_call(episode, hits[:limit], show_hits(shown[:limit], ids=ids))
    seen = Turn(turn.action, turn.kind, turn.query, hits, episode.protocol.render(shown))
    return _with_turns(episode, (*episode.turns[:-1], seen))


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


def _cut(text: str, episode: Episode) -> str:
    """The result of a tool as an observation shows it: no longer than a passage may be."""
    limit = episode.max_passage_chars
    return text if limit is None or len(text) <= limit else text[:limit] + CUT_MARK


def _shorten(hits: tuple[Hit, ...], limit: int | None) -> tuple[Hit, ...]:
    """The hits with no more than ``limit`` characters of each passage."""
    sizes = [len(hit.passage.title) + len(hit.passage.text) for hit in hits]
    if limit is None or max(sizes, default=0) <= limit:
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
    pending: Request | None = None,
    stop_reason: StopReason | None = None,
) -> Episode:
    turns = (*episode.turns, turn)
    prediction = stop_reason and _final_answer(episode.protocol, turns)
    return _with_turns(episode, turns, pending, stop_reason, prediction)


def _with_turns(episode: Episode, turns: tuple[Turn, ...], *state: Any) -> Episode:
    """The episode with other turns and state, in half the time of ``replace``."""
    return Episode(
        episode.question,
        episode.protocol,
        episode.max_searches,
        episode.max_turns,
        episode.max_passage_chars,
        episode.chat,
        episode.metric_language,
        turns,
        *state,
    )


def _final_answer(protocol: Protocol, turns: Sequence[Turn]) -> str | None:
    """The prediction; with tools each turn is a message of its own, and the last one answers."""
    actions = [turn.action for turn in turns]
    return protocol.extract("".join(actions[-1:] if protocol.tool_format else actions))


def _answer(ended: Episode) -> Episode:
    return ended if ended.prediction is not None else replace(ended, stop_reason="no_answer")


def _read_calls(protocol: Protocol, action: Action) -> tuple[str, Sequence[WrittenCall]]:
    """The text of a turn, and the calls in it; a structured turn is written as text."""
    tool_format = protocol.tool_format
    assert tool_format is not None
    if isinstance(action, str):
        text = protocol.cut(action)
        return text, tool_format.reader(text, protocol.tools)
    if isinstance(action, Mapping):
        action = ToolTurn.from_message(action)
    if not isinstance(action, ToolTurn):
        raise ActionError(
            f"an action is text, a ToolTurn or an assistant message, not "
            f"{type(action).__name__}: {action!r:.80}"
        )
    return tool_format.writer(action), structured(action.calls)


def _call_tools(episode: Episode, action: str, written: Sequence[WrittenCall]) -> Episode:
    """The episode after a turn that calls tools.

    Requests over the limit get an error as their result, unless none is left at all.
    """
    used = {call.id for turn in episode.turns for call in turn.calls}
    number = len(episode.turns)
    calls = record_calls(written, episode.protocol.tools, turn=number, used=used)
    asked = sum(call.request is not None for call in calls)
    left = asked if episode.max_searches is None else episode.max_searches - episode.searches

    if asked and left <= 0:
        return _extend(episode, _turn(action, calls), stop_reason="max_searches")
    if episode.max_turns is not None and number + 1 >= episode.max_turns:
        return _extend(episode, _turn(action, calls), stop_reason="max_turns")
    run: list[CallRecord] = []
    for call in calls:
        over = call.request is not None and left <= 0
        left -= call.request is not None
        error = f"error: the limit of {episode.max_searches} calls is reached"
        run.append(replace(call, request=None, result=error) if over else call)
    return _go_on(episode, _turn(action, run))


def _answer_call(episode: Episode, hits: tuple[Hit, ...], result: str) -> Episode:
    """The episode after the first call that waits has its result."""
    calls = list(episode.turns[-1].calls)
    at = next(i for i, call in enumerate(calls) if call.result is None)
    calls[at] = replace(calls[at], hits=hits, result=result)
    before = replace(episode, turns=episode.turns[:-1], pending=None)
    return _go_on(before, _turn(episode.turns[-1].action, calls))


def _go_on(episode: Episode, turn: Turn) -> Episode:
    """The episode with a turn that waits for its first result, or is complete."""
    assert episode.protocol.tool_format is not None
    for call in turn.calls:
        if call.result is None:
            return _extend(episode, turn, pending=call.request)
    return _extend(
        episode, replace(turn, observation=episode.protocol.tool_format.framer(turn.calls))
    )


def _turn(action: str, calls: Sequence[CallRecord]) -> Turn:
    queries = [call.query for call in calls if call.query is not None]
    hits = [hit for call in calls for hit in call.hits]
    runs = any(call.request is not None for call in calls)
    kind: ActionKind = "search" if runs else "invalid"
    joined = "\n".join(queries) if queries else None
    return Turn(action, kind, joined, tuple(hits), calls=tuple(calls))
