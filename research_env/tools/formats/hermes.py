"""Hermes, as Qwen2.5 and Qwen3 write it.

A call is JSON between ``<tool_call>`` and ``</tool_call>``, several per turn; the results stand in
one message of the user, each between ``<tool_response>`` and ``</tool_response>``.

References:
    The chat templates of Qwen2.5 and Qwen3 (as in TRL); NousResearch/Hermes-Function-Calling.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from research_env.markup import Tag, defuse
from research_env.tools.base import Tool, ToolTurn
from research_env.tools.calls import CallRecord, WrittenCall, call_text, read_json_call
from research_env.tools.formats.base import ToolFormat, spans

CALL = Tag("<tool_call>", "</tool_call>")
RESPONSE = Tag("<tool_response>", "</tool_response>")
MARKUP = ("<|im_start|>", "<|im_end|>")
NOT_CLOSED = f"the call is not closed by {defuse(CALL.close)}"


def read_hermes(text: str, tools: Sequence[Tool]) -> list[WrittenCall]:
    """A call per opening mark; one that is never closed has a problem."""
    return [
        read_json_call(each.strip()) if closed else WrittenCall(each.strip(), problem=NOT_CLOSED)
        for each, closed in spans(text, *CALL)
    ]


def write_call(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as a policy writes it, for demonstrations, tests and adapters.

    Args:
        name: name of the tool.
        arguments: JSON values.
    """
    return _marked(json.dumps({"name": name, "arguments": dict(arguments)}, ensure_ascii=False))


def write_calls(turn: ToolTurn) -> Iterator[str]:
    """The calls of a structured turn, each between its marks."""
    return (_marked(call_text(call)) for call in turn.calls)


def write_hermes(turn: ToolTurn) -> str:
    """The reasoning, the content and the calls, as Qwen3's template writes them."""
    thought = f"<think>\n{turn.reasoning.strip()}\n</think>\n\n" if turn.reasoning else ""
    said = [turn.content] if turn.content else []
    return thought + "\n".join([*said, *write_calls(turn)])


def frame_hermes(calls: Sequence[CallRecord]) -> str:
    """One message with a block per result, and the opening of the next turn."""
    blocks = "".join(f"\n{RESPONSE.open}\n{call.result}\n{RESPONSE.close}" for call in calls)
    return f"\n<|im_start|>user{blocks}<|im_end|>\n<|im_start|>assistant\n"


def chat_text(system: str, opening: str = "") -> str:
    """A system message and the question in ChatML, and the opening of the first turn."""
    return (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
        f"{{question}}<|im_end|>\n<|im_start|>assistant\n{opening}"
    )


def schemas_text(tools: Sequence[Tool]) -> str:
    """The schemas of the tools, one per line."""
    return "\n".join(json.dumps(tool.schema, ensure_ascii=False) for tool in tools)


def _prompt(system: str, tools: Sequence[Tool]) -> str:
    return chat_text(
        f"{system}\n\n# Tools\n\n"
        "You may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        f"{schemas_text(tools)}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


def _marked(call: str) -> str:
    if "tool_call>" in call:  # an argument must not end the call, so JSON escapes its bracket
        call = call.replace("<", "\\u003c")
    return f"{CALL.open}\n{call}\n{CALL.close}"


HERMES = ToolFormat(
    name="hermes",
    reader=read_hermes,
    writer=write_hermes,
    framer=frame_hermes,
    terminators=("<|im_end|>",),
    markup=MARKUP,
    prompter=_prompt,
)
