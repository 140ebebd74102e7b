"""verl's part of :mod:`benchmarks.adapters`: our agent loop and its tool agent loop.

Each plays one rollout per coroutine. A server of scripted turns stands in for its LLM servers.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
from omegaconf import OmegaConf
from transformers import AutoTokenizer
from verl.experimental.agent_loop.agent_loop import (
    AgentLoopBase,
    AgentLoopMetrics,
    AgentLoopOutput,
    DictConfigWrap,
    ToolListWrap,
)
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
from verl.tools.function_tool import FUNCTION_TOOL_REGISTRY, function_tool
from verl.workers.rollout.replica import TokenOutput

from benchmarks.adapter_alone import ALONE, OBSERVATION, Waits, make_waits
from benchmarks.adapter_script import ANSWER, SEARCHES, System, query, search, settings
from research_env.adapters.shared import share
from research_env.adapters.verl import ResearchAgentLoop
from research_env.sessions import Sessions

STARTER = Path(__file__).resolve().parents[1] / "research_agent/starters/miniworld-starter"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {
    "prompt_length": 4000,
    "response_length": 100_000,
    "full_determinism": False,
    "multi_turn": {
        "max_user_turns": None,
        "max_assistant_turns": None,
        "max_parallel_calls": 1,
        "max_tool_response_length": 100_000,
        "tool_response_truncate_side": "middle",
        "format": "hermes",
    },
}


class _Script:
    """Says one turn after the other, as verl's client of LLM servers does."""

    def __init__(self, turns: Sequence[list[int]]) -> None:
        self._turns = list(turns)

    async def generate(self, **_: Any) -> TokenOutput:
        return TokenOutput(token_ids=self._turns.pop(0), stop_reason="completed")


class _WaitingLoop(AgentLoopBase):  # type: ignore[misc]
    """The smallest agent loop: the policy's turns, and the observation that it waits for."""

    def __init__(self, *arguments: Any, waits: Waits, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._waits = waits

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        prompt = self.tokenizer(row["raw_prompt"][0]["content"])["input_ids"]
        ids: list[int] = []
        mask: list[int] = []
        for turn in range(SEARCHES + 1):
            sampled = await self.server_manager.generate(prompt_ids=prompt + ids)
            ids += sampled.token_ids
            mask += [1] * len(sampled.token_ids)
            if turn < SEARCHES:
                await asyncio.wrap_future(self._waits.request(f"{row} {turn}"))
                observed = self.tokenizer(OBSERVATION, add_special_tokens=False)["input_ids"]
                ids += observed
                mask += [0] * len(observed)
        return AgentLoopOutput(
            prompt_ids=prompt,
            response_ids=ids,
            response_mask=mask,
            num_turns=2 * (SEARCHES + 1),
            metrics=AgentLoopMetrics(),
        )


def systems(url: str, episodes: int, seconds: float, stack: ExitStack) -> Iterator[System]:
    """Our agent loop, one that only waits, and verl's with a search function as its tool."""
    tokenizer = AutoTokenizer.from_pretrained(STARTER)
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.add_tokens(["<|im_start|>", "<tool_call>", "</tool_call>"])
    sessions = stack.enter_context(Sessions(**settings(url, episodes)))
    share(sessions, benchmark=url)
    client = httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=episodes))

    async def lookup(query: str) -> str:
        """Search.

        Args:
            query: What to look for.
        """
        reply = await client.post(url, json={"queries": [query], "topk": 3})
        return "\n".join(each["document"]["contents"] for each in reply.json()["result"][0])

    name = f"search_{len(FUNCTION_TOOL_REGISTRY)}"
    function_tool(name)(lookup)
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": CONFIG}, "data": {}})
    loop = asyncio.new_event_loop()
    stack.callback(loop.close)
    stack.callback(lambda: loop.run_until_complete(client.aclose()))

    def call(episode: int, turn: int, number: int) -> str:
        arguments = {"query": query(episode, turn, number)}
        return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"

    def make(kind: Any, turns: Sequence[str], **arguments: Any) -> Any:
        said = tokenizer([f"{text}<|im_end|>" for text in turns], add_special_tokens=False)
        return kind(
            trainer_config=DictConfigWrap(config),
            server_manager=_Script(said["input_ids"]),
            tokenizer=tokenizer,
            processor=None,
            dataset_cls=object,
            data_config=DictConfigWrap(config.data),
            **arguments,
        )

    def player(kind: Any, write: Any, arguments: Mapping[str, Any]) -> Any:
        async def rollout(episode: int, number: int) -> Any:
            turns = [write(episode, turn, number) for turn in range(SEARCHES)]
            row = {"raw_prompt": [{"role": "user", "content": "Who founded it?"}]}
            made = make(kind, [*turns, ANSWER], **arguments)
            return await made.run({}, **row, extra_info={"question_id": str(episode)})

        async def together(number: int) -> list[Any]:
            return await asyncio.gather(*(rollout(i, number) for i in range(episodes)))

        def play(number: int) -> None:
            outputs = loop.run_until_complete(together(number))
            assert all(output.num_turns >= 2 * (SEARCHES + 1) for output in outputs)

        return play

    ours = player(ResearchAgentLoop, search, {"args": {"benchmark": url}})
    yield System("verl", "adapter", ours)
    waits = stack.enter_context(closing(make_waits(seconds)))
    yield System("verl", ALONE, player(_WaitingLoop, search, {"waits": waits}))
    tools = {"tools": ToolListWrap([FUNCTION_TOOL_REGISTRY[name]])}
    yield System("verl", "tool agent loop", player(ToolAgentLoop, call, tools))
