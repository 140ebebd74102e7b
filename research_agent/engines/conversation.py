"""A trajectory as an OpenAI-compatible endpoint sees it: one text, or chat messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

Message = dict[str, Any]


@dataclass
class Conversation:
    """A trajectory as text or messages.

    Attributes:
        prompt: the prompt as plain text.
        messages: the prompt as chat messages; empty if it is plain text.
        length: length of the whole, in the renderer's tokens.
        tools: schemas of what the policy may call; then its turns are messages of their own, and
            results have the role ``tool``.
        later: everything said since.
    """

    prompt: str
    messages: list[Message]
    length: int
    tools: list[Mapping[str, Any]] = field(default_factory=list)
    later: list[Message] = field(default_factory=list)

    def add(self, message: Message, length: int) -> None:
        """Append a message."""
        self.later.append(message)
        self.length += length

    def add_results(self, results: Sequence[Message], length: int) -> None:
        """Append the results of the last turn's calls.

        The calls get the ids of their results, since the environment renames ids that come twice.
        Arguments that are no JSON object are replaced by an empty one, since endpoints refuse a
        conversation that holds them; the result says what was wrong. The results of calls that the
        policy wrote in its text are a user message.
        """
        calls = self.later[-1].get("tool_calls", ()) if self.later else ()
        if len(calls) != len(results):
            text = "\n\n".join(str(result["content"]) for result in results)
            self.add({"role": "user", "content": text}, length)
            return
        for call, result in zip(calls, results, strict=True):
            call["id"] = result["tool_call_id"]
            call["function"]["arguments"] = _json_object(call["function"]["arguments"])
        self.later += results
        self.length += length

    def has_answer(self, text: str) -> bool:
        """Whether there is an answer to continue, with the current turn's text."""
        if self.tools:
            return False
        return bool(text or self.later or self.messages[-1]["role"] == "assistant")

    def request(self, text: str, *, continuing: bool) -> dict[str, Any]:
        """The conversation as fields of a request, with the current turn's text."""
        if self.tools:
            return {"messages": [*self.messages, *self.later], "tools": self.tools}
        rest = "".join(each["content"] for each in self.later) + text
        if not self.messages:
            return {"prompt": self.prompt + rest}
        later = [each for each in self.later if each["content"]]
        if continuing:
            later = [{"role": "assistant", "content": rest}]
        flags = {"continue_final_message": True, "add_generation_prompt": False}
        return {
            "messages": [*self.messages[:-1], *_merged([self.messages[-1], *later])],
            **(flags if continuing else {}),
        }


def assistant_message(said: Any, content: str) -> Message | None:
    """The assistant message of an answer that calls tools; None if it calls none.

    Args:
        said: the message as the client gives it; a server may have put anything into it.
        content: its text.
    """
    calls = getattr(said, "tool_calls", None)
    if not isinstance(calls, list) or not calls:
        return None
    message: Message = {"role": "assistant", "content": content}
    if reasoning := thought(said):
        message["reasoning_content"] = reasoning
    message["tool_calls"] = [_call(call) for call in calls]
    return message


def thought(said: Any) -> str:
    """The reasoning that a server took out of an answer; "" if there is none."""
    found = getattr(said, "reasoning_content", None) or getattr(said, "reasoning", None)
    return found if isinstance(found, str) else ""


def sendable(message: Message) -> Message:
    """The message as endpoints take it back: without the thought."""
    return {key: value for key, value in message.items() if key != "reasoning_content"}


def message_text(message: Message) -> str:
    """A message with calls as text, for logs and for counting tokens."""
    functions = [call["function"] for call in message["tool_calls"]]
    calls = [f"{each['name']}({each['arguments']})" for each in functions]
    return "\n".join(filter(None, [message["content"], *calls]))


def _call(call: Any) -> Message:
    function = getattr(call, "function", None)
    name, arguments = getattr(function, "name", None), getattr(function, "arguments", None)
    identifier = getattr(call, "id", None)
    return {
        "id": identifier if isinstance(identifier, str) else "",
        "type": "function",
        "function": {
            "name": name if isinstance(name, str) else "",
            "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments),
        },
    }


def _json_object(text: str) -> str:
    try:
        return text if isinstance(json.loads(text), dict) else "{}"
    except (ValueError, RecursionError):
        return "{}"


def _merged(messages: Sequence[Message]) -> list[Message]:
    """Join consecutive messages of the same role."""
    return [
        {"role": role, "content": "".join(message["content"] for message in group)}
        for role, group in groupby(messages, key=lambda message: message["role"])
    ]
