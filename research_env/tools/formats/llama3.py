"""Llama 3.1 and 3.2: a turn that is JSON is a call; results have the role ``ipython``.

The chat template renders one call per turn. The models write several now and then, with ``;``
between them, and each gets its result here.

References:
    The chat template of Llama 3.1 (as in TRL); Meta's "Model Cards and Prompt formats".
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from research_env.tools.base import Tool, ToolTurn
from research_env.tools.calls import (
    MAX_CALL_CHARACTERS,
    CallRecord,
    WrittenCall,
    arguments_text,
    read_json_call,
)
from research_env.tools.formats.base import ToolFormat

_PYTHON = "<|python_tag|>"
_ENDS = ("<|eot_id|>", "<|eom_id|>")
_DECODER = json.JSONDecoder()


def _read(text: str, tools: Sequence[Tool]) -> list[WrittenCall]:
    """The calls of a turn that begins with ``{`` or ``<|python_tag|>``; other turns have none."""
    for mark in _ENDS:
        text = text.removesuffix(mark)
    text = text.strip()
    if not text.startswith(("{", _PYTHON)):
        return []
    calls: list[WrittenCall] = []
    text = text.removeprefix(_PYTHON).strip()
    while text or not calls:
        end = _end_of_object(text)
        calls.append(read_json_call(text[:end], "parameters"))
        text = text[end:].lstrip("; \t\r\n").removeprefix(_PYTHON)
    return calls


def _end_of_object(text: str) -> int:
    """Return where the JSON at the beginning ends; the end of the text if it cannot be read."""
    try:
        return _DECODER.raw_decode(text)[1] if len(text) <= MAX_CALL_CHARACTERS else len(text)
    except (ValueError, RecursionError):
        return len(text)


def _write(turn: ToolTurn) -> str:
    """The calls, or the content: the template does not render content beside calls."""
    calls = [
        f'{{"name": "{call.name}", "parameters": {arguments_text(call)}}}' for call in turn.calls
    ]
    return "; ".join(calls) or turn.content


def _frame(calls: Sequence[CallRecord]) -> str:
    results = "".join(
        f"<|start_header_id|>ipython<|end_header_id|>\n\n"
        f"{json.dumps(call.result, ensure_ascii=False)}<|eot_id|>"
        for call in calls
    )
    return f"{results}<|start_header_id|>assistant<|end_header_id|>\n\n"


def _prompt(system: str, tools: Sequence[Tool]) -> str:
    schemas = "".join(
        f"{json.dumps(tool.schema, ensure_ascii=False, indent=4)}\n\n" for tool in tools
    )
    return (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
        f"{system}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "Given the following functions, please respond with a JSON for a function call with its "
        "proper arguments that best answers the given prompt.\n\n"
        'Respond in the format {"name": function name, "parameters": dictionary of argument name '
        f"and its value}}.Do not use variables.\n\n{schemas}{{question}}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


LLAMA3 = ToolFormat(
    name="llama3",
    reader=_read,
    writer=_write,
    framer=_frame,
    terminators=_ENDS,
    markup=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    prompter=_prompt,
)
