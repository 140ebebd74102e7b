r"""ReCall (Chen et al. 2025): ReSearch's successor, with tool calls: prompt, tool and reward.

The prompt and each observation open ``<think>`` for the policy, so its turns do not.

References:
    The code of Agent-RL/ReCall, branch main: ``verl/utils/dataset/template.py`` (the prompt, word
    for word), ``data/prepare_musique_recall.py`` (the tool), ``vllm_rollout_spmd.py`` (calls and
    results) and ``verl/utils/reward_score/re_call.py``. There is no paper of its own; it names that
    of ReSearch (arXiv:2503.19470).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from research_env.episode import Episode
from research_env.papers.base import Paper, f1_reward, once_per_episode
from research_env.papers.tool_calls import TOOL_CALLS
from research_env.protocol import Prompts
from research_env.tools.base import Tool, ToolTurn
from research_env.tools.calls import MAX_CALL_CHARACTERS, CallRecord, shown
from research_env.tools.formats import ToolFormat
from research_env.tools.formats.base import spans
from research_env.tools.formats.hermes import CALL, HERMES, RESPONSE, chat_text, write_calls

WIKIPEDIA_SEARCH = Tool(
    name="wikipedia_search",
    description="Search Wikipedia for a given query.",
    parameters={
        "query": {"type": "string", "description": "Query to search for."},
        "top_n": {
            "type": "integer",
            "description": "Number of results to return. The default value is 5.",
            "default": 5,
        },
    },
    required=("query",),
)


def _system(tools: Sequence[Tool]) -> str:
    """The authors' system message, which lists the tools."""
    return (
        "In this environment you have access to a set of tools you can use to assist with the user "
        "query. You may perform multiple rounds of function calls. "
        "In each round, you can call one or more functions.\n"
        "\n"
        "Here are available functions in JSONSchema format: \n"
        f"```json\n{json.dumps([tool.schema for tool in tools], indent=4)}\n```\n"
        "\n"
        "In your response, you need to first think about the reasoning process in the mind and "
        "then conduct function calling to get the information or perform the actions if needed. "
        "The reasoning process and function calling are enclosed within <think> </think> and "
        "<tool_call> </tool_call> tags. "
        "The results of the function calls will be given back to you after execution, "
        "and you can continue to call functions until you get the final answer for the user's "
        "question. "
        "Finally, if you have got the answer, enclose it within \\boxed{} with latex format and do "
        "not continue to call functions, "
        "i.e., <think> Based on the response from the function call, I get the weather "
        "information. </think> The weather in Beijing on 2025-04-01 is \\[ \\boxed{20C} \\].\n"
        "\n"
        "For each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n"
        "<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n'
        "</tool_call>"
    )


def _frame(calls: Sequence[CallRecord]) -> str:
    """One message in which each result follows its call, and the opening of a thought."""
    blocks = "".join(
        f"{RESPONSE.open}{shown(call.text, MAX_CALL_CHARACTERS)}\n{call.result}\n{RESPONSE.close}\n"
        for call in calls
    )
    return f"\n<|im_start|>user\n{blocks}<|im_end|>\n<|im_start|>assistant\n<think>"


def _write(turn: ToolTurn) -> str:
    """The rest of the thought, which the prompt has opened, the content and the calls."""
    said = [turn.content] if turn.content else []
    return f"{turn.reasoning}</think>\n" + "\n".join([*said, *write_calls(turn)])


RECALL_FORMAT = replace(HERMES, name="recall", writer=_write, framer=_frame, lists_tools=False)


def _prompts(tools: Sequence[Tool], tool_format: ToolFormat) -> Prompts:
    """The authors' system message and the opening of a thought."""
    system = _system(tools)
    return {
        "base": (("user", chat_text(system, "<think>")),),
        "instruct": (("system", system), ("user", "{question}"), ("assistant", "<think>")),
    }


RECALL = replace(
    TOOL_CALLS, name="recall", max_turns=5, reward="recall", tool_prompts=_prompts
).with_tools([WIKIPEDIA_SEARCH], RECALL_FORMAT)


def recall(episode: Episode) -> float:
    r"""ReCall's reward: F1 of the boxed answer where the format holds, or 0.1 where F1 is 0.

    0 without the format (`recall_format`).

    Source: Agent-RL/ReCall, ``compute_score_with_format`` of
    ``verl/utils/reward_score/re_call.py``.
    """
    return (f1_reward(episode) or 0.1) if recall_format(episode) else 0.0


@once_per_episode
def recall_format(episode: Episode) -> bool:
    r"""Whether each turn has ReCall's format, and the last one an answer.

    Each turn, with the ``<think>`` that stands before it, has as many ``<think>`` as ``</think>``
    and as many ``<tool_call>`` as ``</tool_call>``; each call is JSON that says ``"name"`` and
    ``"arguments"``, of whatever tool. The last turn has a ``\boxed{...}`` that can be read, and the
    episode ended by itself (the authors need the end token).

    Source: ``validate_template_format`` of the same file.
    """
    if episode.prediction is None or episode.truncated:
        return False
    return all(_turn_holds(f"<think>{action}") for action in episode.actions)


def _turn_holds(text: str) -> bool:
    if text.count("<think>") != text.count("</think>"):
        return False
    if text.count(CALL.open) != text.count(CALL.close):
        return False
    for call, closed in spans(text, *CALL):
        if not closed:
            break
        if '"name"' not in call or '"arguments"' not in call:
            return False
        try:
            json.loads(call.strip())
        except (ValueError, RecursionError):
            return False
    return True


PAPER = Paper(protocol=RECALL, rewards={"recall": recall}, follows_format=recall_format)
