"""Check the calls of a turn: each becomes a request, or an error that the policy reads."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from research_env.markup import clean, defuse
from research_env.retrieval.base import MAX_QUERY_CHARACTERS, Hit
from research_env.retrieval.requests import Request, ToolRequest
from research_env.tools.base import TYPES, Call, Tool

MAX_CALLS = 10
"""Most calls of a turn that are run; each further call gets an error."""

MAX_CALL_CHARACTERS = 10_000
"""Most characters of a call; a longer one gets an error."""

_SHOWN = 200  # characters of the policy's own words in an error
_MOST_BITS = 1024  # as in a float; Python does not write a number of 4,300 digits
_NOT_IN_NAME = re.compile(r"[^A-Za-z0-9_-]")
_TYPE_NAMES: Mapping[type, str] = {
    dict: "object",
    list: "array",
    str: "string",
    bool: "boolean",
    type(None): "null",
}


class WrittenCall(NamedTuple):
    """A call in the text of a turn.

    Attributes:
        text: the text between the marks.
        call: what could be read of it.
        problem: why it cannot be run; "": the text is a call.
    """

    text: str
    call: Call = Call()
    problem: str = ""


@dataclass(frozen=True, slots=True)
class CallRecord:
    """A checked call, and later its result.

    Attributes:
        id: unique in its episode.
        name: the tool's name as the policy wrote it; "" if it cannot be read.
        text: the call as the policy wrote it.
        request: the query of a search, or the call of another tool; None: the call has an error.
        limit: the most passages of a search that are shown; None: all.
        hits: the passages that a search found or a tool read, best first.
        result: what the policy reads; None while the request waits.
    """

    id: str
    name: str
    text: str
    request: Request | None = None
    limit: int | None = None
    hits: tuple[Hit, ...] = ()
    result: str | None = None

    @property
    def query(self) -> str | None:
        """The query of a search that is run; None for any other call."""
        return self.request if isinstance(self.request, str) else None

    @property
    def safe_name(self) -> str:
        """The tool's name with "_" for each character that could be markup."""
        return _NOT_IN_NAME.sub("_", self.name[:64]) or "unknown"

    @property
    def message(self) -> dict[str, str]:
        """The result as a chat message."""
        return {
            "role": "tool",
            "tool_call_id": self.id,
            "name": self.safe_name,
            "content": self.result or "",
        }


class BadCallError(ValueError):
    """A call that cannot be run; the policy reads the message."""


def record_calls(
    written: Iterable[WrittenCall],
    tools: Sequence[Tool],
    *,
    turn: int = 0,
    used: Collection[str] = (),
) -> tuple[CallRecord, ...]:
    """Check the calls of a turn.

    Args:
        written: the calls as they were written.
        tools: what may be called.
        turn: number of the turn, for the ids of calls that have none.
        used: ids of the calls of earlier turns.

    Returns:
        A record per call, in order, with a request or an error.
    """
    records: list[CallRecord] = []
    taken = set(used)
    named = {each.name: each for each in tools}
    for number, each in enumerate(written):
        record = _record(each, named, number, taken)
        fresh = f"call_{turn}_{number}"
        while not record.id or record.id in taken:
            record = replace(record, id=fresh)
            fresh += "_"
        taken.add(record.id)
        records.append(record)
    return tuple(records)


def structured(calls: Iterable[Call]) -> list[WrittenCall]:
    """Write the calls of a structured turn as JSON."""
    return [WrittenCall(call_text(call), call) for call in calls]


def call_text(call: Call) -> str:
    """A call as a JSON object; arguments that are not JSON stay as they are."""
    return f'{{"name": {_as_json(call.name)}, "arguments": {arguments_text(call)}}}'


def arguments_text(call: Call) -> str:
    """The arguments of a call as JSON; text that is not JSON stays as it is."""
    return _as_json(call.arguments) if call.raw is None else str(call.raw)


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=repr)
    except (TypeError, ValueError, RecursionError):
        return "a value that cannot be written"


def parse_json(text: str) -> Any:
    """Read JSON that a policy wrote.

    Raises:
        BadCallError: the text is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        where = ""
        if isinstance(error, json.JSONDecodeError):
            where = f" ({error.msg} at character {error.pos})"
        raise BadCallError(f"the call is not valid JSON{where}") from error


def read_json_call(text: str, arguments: str = "arguments") -> WrittenCall:
    """Read a call that is a JSON object; one that is too long is not parsed.

    Args:
        text: the object, with ``name``, ``arguments`` and perhaps ``id``.
        arguments: its key for the arguments.
    """
    if len(text) > MAX_CALL_CHARACTERS:
        return WrittenCall(text)
    try:
        found = parse_json(text)
    except BadCallError as error:
        return WrittenCall(text, problem=str(error))
    if not isinstance(found, dict):
        expected = f'a JSON object with "name" and "{arguments}"'
        return WrittenCall(text, problem=f"the call is not {expected}, but {_kind(found)}")
    name, identifier = found.get("name"), found.get("id")
    call = Call(
        identifier if isinstance(identifier, str) else "",
        name if isinstance(name, str) else "",
        found.get(arguments),
    )
    missing = call.arguments is None  # in the words of this format, so that the policy can mend it
    return WrittenCall(text, call, f'"{arguments}" is a JSON object, not null' if missing else "")


def shown(text: str, limit: int = _SHOWN) -> str:
    """The policy's own words in a form that is safe in an observation: short, without markup."""
    return defuse(text if len(text) <= limit else f"{text[:limit]} […]")


def _record(
    written: WrittenCall, tools: Mapping[str, Tool], number: int, taken: Collection[str]
) -> CallRecord:
    text, call, problem = written
    name = call.name if isinstance(call.name, str) else ""
    given = clean(call.id)[:_SHOWN] if isinstance(call.id, str) else ""
    try:
        if number >= MAX_CALLS:
            raise BadCallError(f"at most {MAX_CALLS} calls per turn are run")
        if len(text) > MAX_CALL_CHARACTERS:
            raise BadCallError(
                f"the call has {len(text)} characters; at most {MAX_CALL_CHARACTERS} are read"
            )
        if problem:
            raise BadCallError(problem)
        if given in taken:
            raise BadCallError(f"the id {shown(given)!r} was used by another call")
        if not name:
            raise BadCallError('the call has no "name" that is a string')
        if name not in tools:
            raise BadCallError(f"unknown tool {shown(name)!r}; the tools are: {', '.join(tools)}")
        tool = tools[name]
        request, limit = _request(tool, _check(call, tool))
    except BadCallError as error:
        return CallRecord(given, name, text, result=f"error: {error}")
    return CallRecord(given, name, text, request, limit)


def _check(call: Call, tool: Tool) -> dict[str, Any]:
    """The arguments of a call, checked by the tool's schema."""
    arguments = call.arguments if call.raw is None else parse_json(call.raw)
    if isinstance(arguments, str):  # OpenAI's API writes them as JSON text
        arguments = parse_json(arguments)
    if not isinstance(arguments, Mapping):
        raise BadCallError(f'"arguments" is a JSON object, not {_kind(arguments)}')
    for argument in tool.required:
        if argument not in arguments:
            raise BadCallError(f"{tool.name} needs the argument {argument!r}")
    for argument, value in arguments.items():
        if argument not in tool.parameters:
            raise BadCallError(
                f"{tool.name} has no argument {shown(str(argument))!r}; it takes: "
                f"{', '.join(tool.parameters)}"
            )
        schema = tool.parameters[argument]
        expected = schema["type"]
        is_bool = isinstance(value, bool)
        if not isinstance(value, TYPES[expected]) or (is_bool and expected != "boolean"):
            raise BadCallError(f"{argument!r} is of type {expected}, not {_kind(value)}")
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise BadCallError(f"{argument!r} is too large a number")
        if value not in (allowed := schema.get("enum", [value])):
            choices = ", ".join(map(repr, allowed))
            raise BadCallError(f"{argument!r} is one of {choices}, not {shown(repr(value))}")
    return dict(arguments)


def _request(tool: Tool, arguments: dict[str, Any]) -> tuple[Request, int | None]:
    """The request, and the most passages of a search that are shown."""
    if tool.runner is not None:
        try:
            text = json.dumps(arguments, sort_keys=True, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise BadCallError("the arguments are not JSON values") from error
        return ToolRequest(tool.name, clean(text)), None
    query = clean(arguments["query"].strip()[:MAX_QUERY_CHARACTERS]).strip()
    if not query:
        raise BadCallError("'query' is blank")
    limit = arguments.get("top_n")
    if limit is not None and limit < 1:
        raise BadCallError(f"'top_n' is an integer from 1 on, not {str(limit)[:20]}")
    return query, limit


def _kind(value: object) -> str:
    """JSON's name for the type of a value."""
    return _TYPE_NAMES.get(type(value), "number")
