"""Tool calls: what a policy writes to call tools, and what it reads as their results.

The policy's text holds its calls in the form of Hermes, which Qwen2.5 and Qwen3 write::

    <tool_call>
    {"name": "search", "arguments": {"query": "who founded Citibank"}}
    </tool_call>

:func:`read_calls` never fails: a call that cannot be run carries its error as its result, which the
policy reads like any other result.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from research_env.markup import Tag, clean, defuse
from research_env.retrieval.base import MAX_QUERY_CHARACTERS, Hit

CALL = Tag("<tool_call>", "</tool_call>")
RESPONSE = Tag("<tool_response>", "</tool_response>")
END_OF_TURN = "<|im_end|>"

MAX_CALLS = 10
"""Calls per turn that are run; each one after them gets an error."""

MAX_CALL_CHARACTERS = 10_000
"""A longer call gets an error."""

_SHOWN = 200  # characters of the policy's own words in an error
_TYPES: Mapping[str, type] = {"string": str, "integer": int}


@dataclass(frozen=True, slots=True)
class Tool:
    """A search that the policy calls by name.

    Attributes:
        name: its name.
        description: what it does, for the model.
        parameters: JSON Schema per argument, of type ``string`` or ``integer``. ``query`` is what
            is searched for; ``top_n``, where there is one, limits the passages that are shown.
        required: the arguments that each call must have.
    """

    name: str
    description: str
    parameters: Mapping[str, Mapping[str, Any]] = field(hash=False)
    required: tuple[str, ...] = ("query",)

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON Schema, in the form of OpenAI's API and of chat templates."""
        parameters = {
            "type": "object",
            "properties": {name: dict(each) for name, each in self.parameters.items()},
            "required": list(self.required),
        }
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": parameters,
        }
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a tool.

    Attributes:
        id: unique in its episode.
        name: the tool's, as the policy wrote it; "" where it cannot be read.
        text: what stood between the marks.
        query: of a search that is run, as the engine gets it; None: the call has an error.
        limit: passages that are shown at most; None: all.
        hits: what the search found, best first.
        result: what the policy reads; None while the search waits for its hits.
    """

    id: str
    name: str
    text: str
    query: str | None = None
    limit: int | None = None
    hits: tuple[Hit, ...] = ()
    result: str | None = None

    @property
    def message(self) -> dict[str, str]:
        """The result as a chat message."""
        return {
            "role": "tool",
            "tool_call_id": self.id,
            "name": shown(self.name),
            "content": self.result or "",
        }


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """What a protocol with tool calls adds to one without.

    Attributes:
        tools: what may be called.
        framer: the text observation for the calls of a turn, all of which have their results.
        markup: the chat tokens that it writes; no result holds any of them.
    """

    tools: tuple[Tool, ...]
    framer: Callable[[Sequence[Call]], str]
    markup: tuple[str, ...] = ("<|im_start|>", END_OF_TURN)

    @property
    def schemas(self) -> list[Mapping[str, Any]]:
        """The JSON Schemas of the tools."""
        return [tool.schema for tool in self.tools]


class _Request(NamedTuple):
    """A valid call."""

    query: str
    limit: int | None


class _BadCallError(ValueError):
    """A call that cannot be run; its words are for the policy."""


def has_calls(text: str) -> bool:
    """Whether the policy calls tools, rightly or not, rather than giving its answer."""
    return CALL.open in text


def read_calls(
    text: str, tools: Sequence[Tool], *, turn: int = 0, used: Collection[str] = ()
) -> tuple[Call, ...]:
    """The calls in what the policy wrote.

    Args:
        text: one turn.
        tools: what may be called.
        turn: its number, for the ids of calls that bring none.
        used: ids of earlier turns.

    Returns:
        A call per opening mark, in order; a last one that is never closed is one with an error.
    """
    calls: list[Call] = []
    taken = set(used)
    start = text.find(CALL.open)
    while start >= 0:
        start += len(CALL.open)
        end = text.find(CALL.close, start)
        call = _read(
            text[start : end if end >= 0 else len(text)], tools, len(calls), taken, end < 0
        )
        fresh = f"call_{turn}_{len(calls)}"
        while not call.id or call.id in taken:
            call = _renamed(call, fresh)
            fresh += "_"
        taken.add(call.id)
        calls.append(call)
        start = text.find(CALL.open, end) if end >= 0 else -1
    return tuple(calls)


def write_call(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as a policy writes it, for demonstrations, tests and adapters.

    Args:
        name: of the tool.
        arguments: JSON values.
    """
    # No angle bracket of an argument may end the call; JSON has an escape for it.
    call = json.dumps({"name": name, "arguments": dict(arguments)}, ensure_ascii=False)
    return f"{CALL.open}\n{call.replace('<', chr(92) + 'u003c')}\n{CALL.close}"


def show_hits(hits: Sequence[Hit]) -> str:
    """Passages as FlashRAG's Wikipedia holds them, with blank lines between; harmless text."""
    passages = [
        f'"{defuse(hit.passage.title)}"\n{defuse(hit.passage.text)}'
        if hit.passage.title
        else defuse(hit.passage.text)
        for hit in hits
    ]
    return "\n\n".join(passages).strip() or "nothing found"


def shown(text: str, limit: int = _SHOWN) -> str:
    """The policy's own words as they may stand in an observation: short, and no markup."""
    return defuse(text if len(text) <= limit else f"{text[:limit]} […]")


def _read(
    text: str, tools: Sequence[Tool], number: int, taken: Collection[str], unclosed: bool
) -> Call:
    text = text.strip()
    name = given = ""
    try:
        if number >= MAX_CALLS:
            raise _BadCallError(f"at most {MAX_CALLS} calls per turn are run")
        if unclosed:
            raise _BadCallError(f"the call is not closed by {defuse(CALL.close)}")
        if len(text) > MAX_CALL_CHARACTERS:
            raise _BadCallError(
                f"the call has {len(text)} characters; at most {MAX_CALL_CHARACTERS} are read"
            )
        found = _parse(text)
        name = found["name"] if isinstance(found.get("name"), str) else ""
        given = clean(found["id"])[:_SHOWN] if isinstance(found.get("id"), str) else ""
        if given in taken:
            raise _BadCallError(f"the id {shown(given)!r} was used by another call")
        request = _check(found, tools)
    except _BadCallError as error:
        return Call(given, name, text, result=f"error: {error}")
    return Call(given, name, text, request.query, request.limit)


def _parse(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        where = ""
        if isinstance(error, json.JSONDecodeError):
            where = f" ({error.msg} at character {error.pos})"
        raise _BadCallError(f"the call is not valid JSON{where}") from error
    if not isinstance(found, dict):
        raise _BadCallError(
            f'the call is not a JSON object with "name" and "arguments", but {_kind(found)}'
        )
    return found


def _check(found: Mapping[str, Any], tools: Sequence[Tool]) -> _Request:
    named = {tool.name: tool for tool in tools}
    name, arguments = found.get("name"), found.get("arguments")
    if not isinstance(name, str):
        raise _BadCallError('the call has no "name" that is a string')
    if name not in named:
        raise _BadCallError(f"unknown tool {shown(name)!r}; the tools are: {', '.join(named)}")
    tool = named[name]
    if isinstance(arguments, str):  # as OpenAI's API writes them
        arguments = _parse(arguments)
    if not isinstance(arguments, dict):
        raise _BadCallError(f'"arguments" is a JSON object, not {_kind(arguments)}')
    for argument in tool.required:
        if argument not in arguments:
            raise _BadCallError(f"{name} needs the argument {argument!r}")
    for argument, value in arguments.items():
        if argument not in tool.parameters:
            raise _BadCallError(
                f"{name} has no argument {shown(argument)!r}; it takes: "
                f"{', '.join(tool.parameters)}"
            )
        expected = tool.parameters[argument]["type"]
        if not isinstance(value, _TYPES[expected]) or isinstance(value, bool):
            raise _BadCallError(f"{argument!r} is of type {expected}, not {_kind(value)}")
    query = clean(arguments["query"].strip()[:MAX_QUERY_CHARACTERS]).strip()
    if not query:
        raise _BadCallError("'query' is blank")
    limit = arguments.get("top_n")
    if limit is not None and limit < 1:
        raise _BadCallError(f"'top_n' is an integer from 1 on, not {str(limit)[:20]}")
    return _Request(query, limit)


def _kind(value: object) -> str:
    """JSON's name for the type of a value."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _renamed(call: Call, name: str) -> Call:
    return Call(name, call.name, call.text, call.query, call.limit, call.hits, call.result)
