"""Tools, calls, and the turn that makes them."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from research_env.errors import ActionError, ConfigurationError, ToolError
from research_env.markup import defuse
from research_env.retrieval.base import Retriever
from research_env.retrieval.requests import ToolResult
from research_env.system.imports import import_named

TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
}
"""JSON Schema's types of an argument, and Python's."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")

Runner = Callable[[Retriever, Sequence[Mapping[str, Any]]], Sequence[ToolResult | Exception]]
"""Runs a batch of calls of one tool: takes the search engine and the arguments of each call.

Returns a result per call. A :class:`RetrievalError` says that the infrastructure failed: it makes
the episode void. Any other exception is a bug, and is raised to the caller of ``step``.
"""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the policy calls by name; :func:`tool` makes one of a Python function.

    Attributes:
        name: up to 64 letters, digits, _ and -.
        description: what it does, for the model.
        parameters: JSON Schema per argument: ``type`` (see `TYPES`), ``description``, ``enum``, ...
        required: the arguments that each call must have.
        runner: runs its calls. None: its ``query``, a required string, goes to the search engine,
            and ``top_n``, if it has that argument, an integer, limits the passages that are shown.
        reads: whether it needs a search engine that can read whole documents.

    Raises:
        ConfigurationError: a field that cannot be used.
    """

    name: str
    description: str
    parameters: Mapping[str, Mapping[str, Any]] = field(hash=False)
    required: tuple[str, ...] = ()
    runner: Runner | None = None
    reads: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        parameters = {name: dict(each) for name, each in self.parameters.items()}
        made = (self.name, self.description, parameters, self.required, self.runner, self.reads)
        return Tool, made

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigurationError(
                f"a tool's name is up to 64 letters, digits, _ and -, not {self.name!r:.100}"
            )
        for argument, schema in self.parameters.items():
            if schema.get("type") not in TYPES:
                raise ConfigurationError(
                    f"the argument {argument!r} of the tool {self.name!r} has the type "
                    f"{schema.get('type')!r}; it is one of {', '.join(TYPES)}"
                )
        missing = [each for each in self.required if each not in self.parameters]
        if missing or (self.runner is None and "query" not in self.parameters):
            raise ConfigurationError(
                f"the tool {self.name!r} needs a JSON Schema for the argument "
                f"{(missing or ['query'])[0]!r}; it has: {', '.join(self.parameters) or 'none'}"
            )
        if defuse(text := json.dumps(self.schema, ensure_ascii=False)) != text:
            raise ConfigurationError(
                f"the schema of the tool {self.name!r} holds markup such as <tag> or <|token|>, "
                "which a model could take for its own; describe it in other words"
            )
        if self.runner is None:
            limit_type = self.parameters.get("top_n", {"type": "integer"})["type"]
            is_string = self.parameters["query"]["type"] == "string"
            if not is_string or "query" not in self.required or limit_type != "integer":
                raise ConfigurationError(
                    f"the tool {self.name!r} has no runner, so its calls are searches: 'query' is "
                    "of type string and required, and 'top_n', if it has it, of type integer; "
                    f"mend its parameters, or give it a runner; it has: {dict(self.parameters)!r}, "
                    f"required: {', '.join(self.required) or 'none'}"
                )

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


def import_tool(place: str) -> Tool:
    """The tool at "module:NAME".

    Raises:
        ConfigurationError: it cannot be imported, or is no tool.
    """
    found = import_named(place, "tool")
    if not isinstance(found, Tool):
        raise ConfigurationError(
            f"the tool {place!r} is {found!r:.80}; decorate a function with research_env.tools.tool"
        )
    return found


def tool(**parameters: Mapping[str, Any]) -> Callable[[Callable[..., str]], Tool]:
    """Make a tool of a function, which gets the arguments by name and returns text.

    The name is the function's, the description its docstring; arguments without a default are
    required. The same arguments must always give the same result, since results are cached. To tell
    the policy what it did wrong, raise :class:`~research_env.errors.ToolError`; any other exception
    is a bug and is raised to the caller of ``step``.

    Args:
        **parameters: JSON Schema per argument.

    Raises:
        ConfigurationError: a schema without an argument, or an argument without a schema.

    Example:
        >>> @tool(text={"type": "string", "description": "What to count."})
        ... def count_words(text: str) -> str:
        ...     "Count the words of a text."
        ...     return str(len(text.split()))
        >>> count_words.schema["function"]["parameters"]["required"]
        ['text']
    """

    def make(function: Callable[..., str]) -> Tool:
        arguments = inspect.signature(function).parameters
        if arguments.keys() != parameters.keys():
            raise ConfigurationError(
                f"the function {function.__name__} takes {', '.join(arguments) or 'nothing'}; the "
                f"schemas given are for {', '.join(parameters) or 'nothing'}"
            )

        required = [name for name, each in arguments.items() if each.default is each.empty]
        return Tool(
            function.__name__,
            inspect.cleandoc(function.__doc__ or ""),
            parameters,
            tuple(required),
            _FunctionRunner(function),
        )

    return make


@dataclass(frozen=True, slots=True)
class _FunctionRunner:
    """Runs the calls of a tool by a function."""

    function: Callable[..., str]

    def __call__(
        self, _: Retriever, calls: Sequence[Mapping[str, Any]]
    ) -> list[ToolResult | Exception]:
        return [_run(self.function, arguments) for arguments in calls]

    def __reduce__(self) -> tuple[Any, ...]:
        place = f"{self.function.__module__}:{self.function.__qualname__}"
        found = import_named(place, "function of a tool")
        if isinstance(found, Tool) and found.runner == self:
            return _import_runner, (place,)  # the decorated function has the function's name
        return _FunctionRunner, (self.function,)


def _import_runner(place: str) -> Runner | None:
    return import_tool(place).runner


def _run(function: Callable[..., str], arguments: Mapping[str, Any]) -> ToolResult | Exception:
    try:
        text = function(**arguments)
    except ToolError as error:
        return ToolResult(f"error: {error}")
    except Exception as error:  # whoever made this call raises it
        return error
    if not isinstance(text, str):
        return ConfigurationError(
            f"the tool {function.__name__} returned {text!r:.80}; a tool returns text"
        )
    return ToolResult(text)


@dataclass(frozen=True, slots=True)
class Call:
    """A call as a policy makes it; nothing in it is checked yet.

    Attributes:
        id: "": the environment gives it one.
        name: the tool's name.
        arguments: a mapping of argument to JSON value.
        raw: the arguments as JSON text, in place of ``arguments``; None: they are there.
    """

    id: str = ""
    name: str = ""
    arguments: Any = field(default=None, hash=False)
    raw: str | None = None


@dataclass(frozen=True, slots=True)
class ToolTurn:
    """A policy's turn as a structured action, in place of text.

    Attributes:
        content: the message; without calls it is the answer.
        reasoning: the thought before it.
        calls: in order.

    Raises:
        ActionError: a field of another type.
    """

    content: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.content, str) or not isinstance(self.reasoning, str):
            raise ActionError(
                f"content and reasoning of a turn are text, not {self.content!r:.100} and "
                f"{self.reasoning!r:.100}"
            )
        calls = self.calls if isinstance(self.calls, tuple | list) else [self.calls]
        wrong = [each for each in calls if not isinstance(each, Call)]
        if wrong:
            raise ActionError(f"calls of a turn are a tuple of Call, not {wrong[0]!r:.200}")

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> ToolTurn:
        """The turn of an assistant message in the form of OpenAI's API.

        Args:
            message: with ``content``, ``tool_calls`` (each with ``id`` and ``function``, which has
                ``name`` and ``arguments``), and ``reasoning_content`` or ``reasoning``; each of
                them may be missing or None.

        Raises:
            ActionError: the message has another role, or a field is of another type. The calls
                themselves are not checked here.
        """
        if message.get("role", "assistant") != "assistant":
            raise ActionError(f"the policy's message has the role assistant, not {message!r:.200}")
        content = message.get("content") or ""
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
        calls = message.get("tool_calls") or ()
        if isinstance(calls, str) or not isinstance(calls, Sequence):
            raise ActionError(f"tool_calls of a message is a list, not {calls!r:.200}")
        return cls(content, reasoning, tuple(_call(each) for each in calls))


def _call(entry: Any) -> Call:
    """A call of a message; parts of another type are left out."""
    entry = entry if isinstance(entry, Mapping) else {}
    function = entry.get("function")
    function = function if isinstance(function, Mapping) else {}
    identifier, name, given = entry.get("id"), function.get("name"), function.get("arguments")
    return Call(
        identifier if isinstance(identifier, str) else "",
        name if isinstance(name, str) else "",
        None if isinstance(given, str) else given,
        given if isinstance(given, str) else None,
    )
