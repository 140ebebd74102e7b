r"""Tool calls in the text format of the policy's model, Hermes by default. No paper's protocol.

The prompt ``base`` and the observations are, to the letter, what the chat templates of these models
make of the messages. The final answer is the last ``\boxed{}`` of a turn without calls.
"""

from __future__ import annotations

from collections.abc import Sequence

from research_env.episode import Episode
from research_env.markup import Tag
from research_env.papers.base import Paper
from research_env.papers.research import last_boxed
from research_env.protocol import Parsed, Prompts, Protocol
from research_env.retrieval.base import Hit
from research_env.tools.base import Tool
from research_env.tools.builtin import SEARCH, show_hits
from research_env.tools.calls import record_calls
from research_env.tools.formats import ToolFormat
from research_env.tools.formats.hermes import CALL, HERMES, RESPONSE

_ROLE = (
    "You are a helpful assistant that answers questions with the help of a search tool. "
    "Search as often as you need. When you know the answer, call no tool, and enclose the final "
    "answer within \\boxed{}."
)


def _parse_calls(protocol: Protocol, text: str) -> Parsed:
    """A search if a call can be run, invalid if no call can be run, an answer without calls."""
    if protocol.tool_format is None:
        return Parsed("answer")
    written = protocol.tool_format.reader(text, protocol.tools)
    records = record_calls(written, protocol.tools)
    for record in records:
        if record.request is not None:
            return Parsed("search", record.query or "")
    return Parsed("invalid" if records else "answer")


def _extract_last_boxed(protocol: Protocol, response: str) -> str | None:
    r"""The last ``\boxed{}`` of a turn's answer, without the terminator."""
    for end in protocol.terminators:
        response = protocol.cut(response).removesuffix(end)
    answerer = protocol.tool_format.answerer if protocol.tool_format else str
    return last_boxed(answerer(response).strip())


def _render_response(protocol: Protocol, hits: Sequence[Hit]) -> str:
    """One result of a search, without the frame of its message."""
    return f"{protocol.result.open}\n{show_hits(hits)}\n{protocol.result.close}"


def _prompts(tools: Sequence[Tool], tool_format: ToolFormat) -> Prompts:
    """The template ``instruct``, for a chat template that gets the tools, and its text ``base``."""
    prompts: dict[str, Sequence[tuple[str, str]]] = {
        "instruct": (("system", _ROLE), ("user", "{question}"))
    }
    if tool_format.prompter is not None:
        prompts["base"] = (("user", tool_format.prompter(_ROLE, tools)),)
    return prompts


TOOL_CALLS = Protocol(
    name="tool-calls",
    think=Tag("<think>", "</think>"),
    query=CALL,
    result=RESPONSE,
    answer=Tag("\\boxed{", "}"),
    terminators=(),
    parser=_parse_calls,
    renderer=_render_response,
    extractor=_extract_last_boxed,
    top_k=5,
    reward="f1",
    tool_prompts=_prompts,
).with_tools([SEARCH], HERMES)


def _answered(episode: Episode) -> bool:
    return episode.stop_reason == "answer"


PAPER = Paper(protocol=TOOL_CALLS, rewards={}, follows_format=_answered)
