"""Qwen3.5's XML, which Qwen3-Coder writes too: functions and parameters are elements.

Each turn begins with a thought that the chat template has opened (``qwen3.5``), or with an empty
one that it has closed (``qwen3.5-nothink``, the default of the small models).

References:
    The chat templates of Qwen3.5 (as in TRL).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from research_env.markup import defuse
from research_env.tools.base import Call, Tool, ToolTurn
from research_env.tools.calls import (
    MAX_CALL_CHARACTERS,
    BadCallError,
    CallRecord,
    WrittenCall,
    parse_json,
)
from research_env.tools.formats.base import ToolFormat, spans
from research_env.tools.formats.hermes import (
    CALL,
    MARKUP,
    NOT_CLOSED,
    chat_text,
    frame_hermes,
    schemas_text,
)

_FUNCTION = re.compile(r"<function=([^>]*)>")
_PARAMETER = re.compile(r"\s*<parameter=([^>]*)>(.*?)</parameter>", re.DOTALL)
_THOUGHT = "<think>\n"
_NO_THOUGHT = "<think>\n\n</think>\n\n"

_INSTRUCTIONS = """

If you choose to call a function ONLY reply in the following format with NO suffix:

<tool_call>
<function=example_function_name>
<parameter=example_parameter_1>
value_1
</parameter>
<parameter=example_parameter_2>
This is the value for the second parameter
that can span
multiple lines
</parameter>
</function>
</tool_call>

<IMPORTANT>
Reminder:
- Function calls MUST follow the specified format: an inner <function=...></function> block must \
be nested within <tool_call></tool_call> XML tags
- Required parameters MUST be specified
- You may provide optional reasoning for your function call in natural language BEFORE the \
function call, but NOT after
- If there is no function call available, answer the question like normal with your current \
knowledge and do not tell the user about function calls
</IMPORTANT>

"""


def _read_all(text: str, tools: Sequence[Tool]) -> list[WrittenCall]:
    named = {tool.name: tool for tool in tools}
    return [_read(each.strip(), closed, named) for each, closed in spans(text, *CALL)]


def _read(text: str, closed: bool, tools: Mapping[str, Tool]) -> WrittenCall:
    if not closed:
        return WrittenCall(text, problem=NOT_CLOSED)
    if len(text) > MAX_CALL_CHARACTERS:
        return WrittenCall(text)
    start = _FUNCTION.match(text)
    if start is None or not text.endswith("</function>"):
        problem = f"the call is not one {defuse('<function=name>')} with its parameters"
        return WrittenCall(text, problem=problem)
    name = start[1].strip()
    body = text[start.end() : -len("</function>")]
    schemas = tools[name].parameters if name in tools else {}
    arguments: dict[str, Any] = {}
    at = 0
    while found := _PARAMETER.match(body, at):
        argument = found[1].strip()
        value = found[2].removeprefix("\n").removesuffix("\n")
        arguments[argument] = _value(value, schemas.get(argument, {}).get("type", "string"))
        at = found.end()
    if body[at:].strip():
        problem = f"the call has something else than parameters at {defuse(body[at:].strip()[:40])}"
        return WrittenCall(text, Call(name=name), problem)
    return WrittenCall(text, Call(name=name, arguments=arguments))


def _value(text: str, kind: str) -> Any:
    """Read a parameter by its type in the schema; it stays text if it has another type."""
    if kind == "string":
        return text
    if kind == "boolean" and text.lower() in ("true", "false"):  # the template writes Python's
        return text.lower() == "true"
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def write_xml(turn: ToolTurn) -> str:
    """The content and the calls."""
    parts = [f"{turn.content}\n"] if turn.content and turn.calls else [turn.content]
    return "\n".join([*filter(None, parts), *(_write(call) for call in turn.calls)])


def _write(call: Call) -> str:
    arguments = call.arguments
    if call.raw is not None:
        try:
            arguments = parse_json(call.raw)
        except BadCallError:
            arguments = {"arguments": call.raw}
    lines = [f"<function={call.name}>"]
    for name, value in arguments.items() if isinstance(arguments, Mapping) else ():
        nested = isinstance(value, Mapping | list | tuple)
        shown = json.dumps(value, ensure_ascii=False, default=repr) if nested else str(value)
        lines += [f"<parameter={name}>", shown, "</parameter>"]
    return "\n".join([CALL.open, *lines, "</function>", CALL.close])


def _write_thinking(turn: ToolTurn) -> str:
    """The rest of the thought, which the template has opened, the content and the calls."""
    return f"{turn.reasoning.strip()}\n</think>\n\n{write_xml(turn)}"


def _prompt(system: str, tools: Sequence[Tool], opening: str) -> str:
    listed = f"<tools>\n{schemas_text(tools)}\n</tools>"
    head = f"# Tools\n\nYou have access to the following functions:\n\n{listed}"
    return chat_text(head + _INSTRUCTIONS + system, opening)


def _frame(calls: Sequence[CallRecord], opening: str) -> str:
    return frame_hermes(calls) + opening


def _format(name: str, opening: str) -> ToolFormat:
    return ToolFormat(
        name=name,
        reader=_read_all,
        writer=_write_thinking if opening == _THOUGHT else write_xml,
        framer=partial(_frame, opening=opening),
        terminators=("<|im_end|>",),
        markup=MARKUP,
        prompter=partial(_prompt, opening=opening),
    )


QWEN3_5 = _format("qwen3.5", _THOUGHT)
QWEN3_5_NOTHINK = _format("qwen3.5-nothink", _NO_THOUGHT)
