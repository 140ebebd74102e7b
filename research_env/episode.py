"""One episode as a value, and the one transition function: what happens after an action.

Nothing here touches a search engine, a clock or a random number. A driver (the environment, the
vector environment, a test) calls :func:`advance` with what the policy wrote. If the new episode has
``pending_requests``, the driver asks its engine, and calls :func:`observe` with each result, or
:func:`fail` if the engine failed. It calls :func:`truncate` when a budget of tokens is spent.
"""

from __future__ import annotations

import re
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
TruncationReason = Literal["length"]
Action = str | ToolTurn | Mapping[str, Any]
"""What the policy wrote: text. A protocol with tool calls also takes a structured turn, or an
assistant message in the form of OpenAI's API."""

ELLIPSIS = " […]"
"""Stands where a passage or the result of a tool was shortened."""

# A full stop after a single capital letter ends an initial. More text has to follow.
_SENTENCE_END = re.compile(r"""(?<!\b[A-Z])[.!?]["')\]]*(?=\s)|[。！？](?=.)""", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Turn:
    """One action and what came back.

    Attributes:
        action: what the policy wrote, up to and with the terminator.
        kind: what it asked for.
        query: the search's query, as the engine got it; several queries are joined by newlines.
        hits: the search's hits, best first; with several tool calls, the hits and the passages read
            by each call in turn.
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
        """The queries of the turn's searches; a blank one is "" and finds nothing."""
        if self.calls:
            return tuple([call.query for call in self.calls if call.query is not None])
        return (self.query or "",) if self.kind == "search" else ()

    @property
    def request_count(self) -> int:
        """How many searches, and valid calls of other tools, the turn asks for."""
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
            the episode. None: no limit.
        max_turns: actions that may be taken; the last one cannot search. None: no limit.
        max_passage_chars: the most characters of a passage, title and text together, that an
            observation shows. A longer one ends after a whole sentence, or after the last character
            if its second half holds no end of a sentence; then comes `ELLIPSIS`. None: no limit.
        chat: whether the prompt is a chat, whose template may have opened `think` for the policy.
        metric_language: the language by whose rules answers are compared (`metrics.LANGUAGES`).
        turns: the turns so far, in order.
        pending: the first of the requests that the last turn waits for; None if it waits for none.
        stop_reason: why it is over; None while it goes on.
        prediction: once it is over, the final answer in all that the policy wrote, by the
            protocol's rule; None if there is none.
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
        """Whether the search engine failed, so that nothing may be learned from the episode."""
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
        """How many searches and calls of other tools were answered, or wait for their result.

        Neither refused ones count nor calls with an error.
        """
        return sum([turn.request_count for turn in self.answered_turns])

    @property
    def answered_turns(self) -> tuple[Turn, ...]:
        """All turns but the last one of an episode that is over, if that got no observation."""
        if self.over and self.turns and not self.turns[-1].observation:
            return self.turns[:-1]
        return self.turns

    @property
    def pending_requests(self) -> tuple[Request, ...]:
        """The requests without a result, in the order in which `observe` takes the results."""
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

    A search makes its query ``pending`` (a blank query finds nothing, at once). An answer ends the
    episode. An invalid action ends it too, unless the protocol has a hint to show.

    Args:
        episode: one that is not over and waits for no result.
        action: what the policy wrote; what follows the first terminator is ignored. A protocol with
            tool calls takes a structured turn too.

    Raises:
        ActionError: the action is of another type.
        EpisodeError: the episode is over, or waits for a result.
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
        return _finish(episode, Turn(text, "answer"))
    assert isinstance(action, str)
    return _advance_text(episode, protocol.cut(action))


def _advance_text(episode: Episode, action: str) -> Episode:
    """The episode after a text, already cut, by a protocol without tool calls."""
    protocol = episode.protocol
    kind, query = protocol.parse(action)
    is_last = episode.max_turns is not None and len(episode.turns) + 1 >= episode.max_turns

    if kind == "search":
        none_left = episode.max_searches is not None and episode.searches >= episode.max_searches
        if none_left or is_last:
            reason: StopReason = "max_searches" if none_left else "max_turns"
            return _extend(episode, Turn(action, kind, query), stop_reason=reason)
        shown = "" if query else protocol.render(())
        return _extend(episode, Turn(action, kind, query, (), shown), pending=query or None)
    if kind == "invalid" and protocol.hint is not None:
        if is_last:
            return _extend(episode, Turn(action, kind), stop_reason="max_turns")
        return _extend(episode, Turn(action, kind, observation=protocol.hint))
    return _finish(episode, Turn(action, kind))


def observe(episode: Episode, found: Sequence[Hit] | ToolResult) -> Episode:
    """The episode after the first of its pending requests was answered.

    Args:
        episode: one that waits for a result.
        found: the hits of a search, best first, or the result of another tool.

    Raises:
        EpisodeError: nothing is pending.
    """
    if episode.pending is None:
        raise EpisodeError("there is no pending search that these hits could answer")
    turn, limit = episode.turns[-1], episode.max_passage_chars
    if isinstance(found, ToolResult):
        call = next(call for call in turn.calls if call.result is None)
        if any(tool.reads and tool.name == call.name for tool in episode.protocol.tools):
            limit = None  # a page is short already, and has no more pages than it says
        return _answer_call(episode, found.hits, defuse(_shorten(found.text, limit)))
    hits = tuple(found)
    shown = shorten_hits(hits, limit)
    if turn.calls:
        most = next(call.limit for call in turn.calls if call.result is None)
        ids = any(tool.reads for tool in episode.protocol.tools)
        return _answer_call(episode, hits[:most], show_hits(shown[:most], ids=ids))
    answered = Turn(turn.action, turn.kind, turn.query, hits, episode.protocol.render(shown))
    return _with_turns(episode, (*episode.turns[:-1], answered))


def fail(episode: Episode) -> Episode:
    """The episode after the engine failed a pending request: void, and without an observation.

    Raises:
        EpisodeError: nothing is pending.
    """
    if episode.pending is None:
        raise EpisodeError("there is no pending search that could have failed")
    return replace(episode, pending=None, stop_reason="backend_error")


def truncate(episode: Episode, reason: TruncationReason = "length") -> Episode:
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
    if reason not in get_args(TruncationReason):
        raise UnknownNameError("reason to truncate an episode", reason, get_args(TruncationReason))
    if episode.stop_reason is not None:
        raise EpisodeError(f"the episode is over ({episode.stop_reason}); it cannot be truncated")
    written = _final_answer(episode.protocol, episode.turns)
    return replace(episode, pending=None, stop_reason=reason, prediction=written)


def shorten_hits(hits: tuple[Hit, ...], limit: int | None) -> tuple[Hit, ...]:
    """The hits as an observation shows them.

    Args:
        hits: whole passages.
        limit: the most characters of a passage, its title's first; None: all.
    """
    sizes = [len(hit.passage.title) + len(hit.passage.text) for hit in hits]
    if limit is None or max(sizes, default=0) <= limit:
        return hits
    shortened = []
    for hit in hits:
        title, text = hit.passage.title, hit.passage.text
        text = _shorten(text, max(0, limit - len(title)))
        shortened.append(Hit(Passage(hit.passage.id, _shorten(title, limit), text), hit.score))
    return tuple(shortened)


def _shorten(text: str, limit: int | None) -> str:
    """The text up to its last whole sentence, if that leaves half of the limit or more."""
    if limit is None or len(text) <= limit:
        return text
    ends = [end.end() for end in _SENTENCE_END.finditer(text, limit // 2, limit + 1)]
    return text[: ends[-1] if ends else limit] + ELLIPSIS


def _extend(
    episode: Episode,
    turn: Turn,
    *,
    pending: Request | None = None,
    stop_reason: StopReason | None = None,
) -> Episode:
    turns = (*episode.turns, turn)
    prediction = _final_answer(episode.protocol, turns) if stop_reason else None
    return _with_turns(episode, turns, pending, stop_reason, prediction)


def _with_turns(
    episode: Episode,
    turns: tuple[Turn, ...],
    pending: Request | None = None,
    stop_reason: StopReason | None = None,
    prediction: str | None = None,
) -> Episode:
    """The episode in another state: ``dataclasses.replace`` would take twice as long."""
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
        prediction,
    )


def _finish(episode: Episode, turn: Turn) -> Episode:
    """The episode ended by a turn that asks for nothing, with an answer or without one."""
    ended = _extend(episode, turn, stop_reason="answer")
    return ended if ended.prediction is not None else replace(ended, stop_reason="no_answer")


def _final_answer(protocol: Protocol, turns: Sequence[Turn]) -> str | None:
    """The prediction; with tools the last turn alone answers, unless it calls one."""
    if protocol.tool_format and turns and turns[-1].calls:
        return None
    actions = [turn.action for turn in turns]
    return protocol.extract("".join(actions[-1:] if protocol.tool_format else actions))


def _read_calls(protocol: Protocol, action: Action) -> tuple[str, Sequence[WrittenCall]]:
    """The text of a turn and the calls in it; a structured turn is turned into text."""
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

    Requests over the limit get an error as their result. If no request is left at all, the episode
    ends.
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
    error = f"error: the limit of {episode.max_searches} calls is reached"
    allowed: list[CallRecord] = []
    for call in calls:
        is_refused = call.request is not None and left <= 0
        left -= call.request is not None
        allowed.append(replace(call, request=None, result=error) if is_refused else call)
    return _ask_next(episode, _turn(action, allowed))


def _answer_call(episode: Episode, hits: tuple[Hit, ...], result: str) -> Episode:
    """The episode after the first waiting call of its last turn got its result."""
    *before, turn = episode.turns
    calls = list(turn.calls)
    first = next(i for i, call in enumerate(calls) if call.result is None)
    calls[first] = replace(calls[first], hits=hits, result=result)
    return _ask_next(_with_turns(episode, tuple(before)), _turn(turn.action, calls))


def _ask_next(episode: Episode, turn: Turn) -> Episode:
    """The episode with one more turn: its next request is pending, or all are answered."""
    assert episode.protocol.tool_format is not None
    for call in turn.calls:
        if call.result is None:
            return _extend(episode, turn, pending=call.request)
    return _extend(
        episode, replace(turn, observation=episode.protocol.tool_format.framer(turn.calls))
    )


def _turn(action: str, calls: Sequence[CallRecord]) -> Turn:
    """A turn that calls tools."""
    queries = [call.query for call in calls if call.query is not None]
    hits = [hit for call in calls for hit in call.hits]
    runs = any(call.request is not None for call in calls)
    kind: ActionKind = "search" if runs else "invalid"
    joined = "\n".join(queries) if queries else None
    return Turn(action, kind, joined, tuple(hits), calls=tuple(calls))
