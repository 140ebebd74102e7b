"""Harmony, the format of gpt-oss: messages have channels, and a call ends the turn.

A call is ``to=functions.NAME`` in the header of a message of the channel ``commentary``, before or
after the channel's name; its body is the JSON of the arguments. The final answer stands in the
channel ``final``. The prompt has no text of its own here, since the template writes the day's date
into it: use ``template=instruct`` and the model's chat template.

References:
    The chat template of gpt-oss (as in TRL); OpenAI's "Harmony response format".
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from research_env.tools.base import Call, Tool, ToolTurn
from research_env.tools.calls import CallRecord, WrittenCall, arguments_text
from research_env.tools.formats.base import ToolFormat

_CALL_END = "<|call|>"
_ENDS = (_CALL_END, "<|return|>")
_MARK = re.compile(r"<\|(?:start|channel|constrain|message|end|call|return)\|>")
_RECIPIENT = re.compile(r"\bto=(\S+)")
_TOOLS = "functions."
_FINAL = "<|channel|>final<|message|>"


def _read(text: str, tools: Sequence[Tool]) -> list[WrittenCall]:
    """The calls: messages to a recipient. The generation prompt has opened the first message."""
    calls = []
    for message in text.split("<|start|>"):
        header, begun, body = message.partition("<|message|>")
        recipient = _RECIPIENT.search(_MARK.sub(" ", header))
        # Text without any mark is not a header, though it may say "to=".
        if recipient is None or not (begun or _MARK.search(header)):
            continue
        end = _MARK.search(body)
        content = (body[: end.start()] if end else body).strip()
        name = recipient[1]
        problem = "" if begun else "the call has no body after its header"
        if not name.startswith(_TOOLS):
            problem = "the call is not to functions.NAME"
        calls.append(
            WrittenCall(content, Call(name=name.removeprefix(_TOOLS), raw=content), problem)
        )
    return calls


def _write(turn: ToolTurn) -> str:
    """The thought, then the calls or the answer; the prompt has opened the first message."""
    messages = [("analysis", turn.reasoning)] if turn.reasoning else []
    if turn.calls and turn.content:
        messages.append(("commentary" if turn.reasoning else "analysis", turn.content))
    parts = [f"<|channel|>{channel}<|message|>{text}<|end|>" for channel, text in messages]
    if not turn.calls:
        parts.append(f"{_FINAL}{turn.content}")
    for call in turn.calls:
        header = f" to={_TOOLS}{call.name}<|channel|>commentary json"
        parts.append(f"{header}<|message|>{arguments_text(call)}{_CALL_END}")
    return "<|start|>assistant".join(parts)


def _frame(calls: Sequence[CallRecord]) -> str:
    results = "".join(
        f"<|start|>{_TOOLS}{call.safe_name} to=assistant<|channel|>commentary<|message|>"
        f"{json.dumps(call.result, ensure_ascii=False)}<|end|>"
        for call in calls
    )
    return f"{results}<|start|>assistant"


def _final(text: str) -> str:
    """The text of the final channel; the whole turn if it has none."""
    return text.rpartition(_FINAL)[2]


HARMONY = ToolFormat(
    name="harmony",
    reader=_read,
    writer=_write,
    framer=_frame,
    terminators=_ENDS,
    markup=("<|start|>", "<|channel|>", "<|message|>", "<|end|>"),
    answerer=_final,
)
