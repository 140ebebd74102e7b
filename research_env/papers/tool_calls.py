r"""Tool calls in the form of Hermes, as Qwen2.5 and Qwen3 write them: no paper's protocol.

The prompt ``base`` and the observations are, to the letter, what the chat templates of these models
make of the messages. The final answer is the last ``\boxed{}`` of a turn without calls.

References:
    The chat templates of Qwen2.5 and Qwen3 (as in TRL); NousResearch/Hermes-Function-Calling.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from research_env.episode import Episode
from research_env.markup import Tag
from research_env.papers.base import Paper
from research_env.papers.research import last_boxed
from research_env.protocol import Parsed, Protocol
from research_env.retrieval.base import Hit
from research_env.tools import (
    CALL,
    END_OF_TURN,
    RESPONSE,
    Call,
    Tool,
    ToolFormat,
    has_calls,
    read_calls,
    show_hits,
)

SEARCH = Tool(
    name="search",
    description="Search Wikipedia; returns the passages that fit best.",
    parameters={"query": {"type": "string", "description": "What to search for."}},
)

_ROLE = (
    "You are a helpful assistant that answers questions with the help of a search tool. "
    "Search as often as you need. When you know the answer, call no tool, and enclose the final "
    "answer within \\boxed{}."
)


def _tools_section(tools: Sequence[Tool]) -> str:
    """What the models' chat templates append to the system message."""
    schemas = "\n".join(json.dumps(tool.schema, ensure_ascii=False) for tool in tools)
    return (
        "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        f"{schemas}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


def parse_calls(protocol: Protocol, text: str) -> Parsed:
    """A search where a call can be run, invalid where none can, else an answer."""
    if protocol.tool_format is None or not has_calls(text):
        return Parsed("answer")
    for call in read_calls(text, protocol.tool_format.tools):
        if call.query is not None:
            return Parsed("search", call.query)
    return Parsed("invalid")


def extract_last_boxed(protocol: Protocol, response: str) -> str | None:
    r"""The last ``\boxed{}`` of the last turn."""
    return last_boxed(protocol.cut(response).removesuffix(END_OF_TURN).strip())


def render_response(protocol: Protocol, hits: Sequence[Hit]) -> str:
    """One result of a search, without the frame of its message."""
    return f"{protocol.result.open}\n{show_hits(hits)}\n{protocol.result.close}"


def _frame_hermes(calls: Sequence[Call]) -> str:
    """One message with a block for each result, and the opening of the next turn."""
    blocks = "".join(f"\n{RESPONSE.open}\n{call.result}\n{RESPONSE.close}" for call in calls)
    return f"\n<|im_start|>user{blocks}{END_OF_TURN}\n<|im_start|>assistant\n"


def chat_prompts(system: str, thought: str = "") -> dict[str, tuple[tuple[str, str], ...]]:
    """The prompts of a protocol with tool calls, by the name of their template.

    Args:
        system: the system message, tools included.
        thought: how the prompt opens the policy's first turn; empty: not at all.

    Returns:
        ``base``, the text that the models' chat templates make of the messages, and ``instruct``,
        the messages.
    """
    rendered = (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
        f"{{question}}<|im_end|>\n<|im_start|>assistant\n{thought}"
    )
    opened = (("assistant", thought),) if thought else ()
    return {
        "base": (("user", rendered),),
        "instruct": (("system", system), ("user", "{question}"), *opened),
    }


_SYSTEM = _ROLE + _tools_section([SEARCH])

TOOL_CALLS = Protocol(
    name="tool-calls",
    think=Tag("<think>", "</think>"),
    query=CALL,
    result=RESPONSE,
    answer=Tag("\\boxed{", "}"),
    terminators=(END_OF_TURN,),
    parser=parse_calls,
    renderer=render_response,
    extractor=extract_last_boxed,
    prompts=chat_prompts(_SYSTEM),
    top_k=5,
    reward="f1",
    tool_format=ToolFormat((SEARCH,), _frame_hermes),
)


def _answered(episode: Episode) -> bool:
    return episode.stop_reason == "answer"


PAPER = Paper(protocol=TOOL_CALLS, rewards={}, follows_format=_answered)
