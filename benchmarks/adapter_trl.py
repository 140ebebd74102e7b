"""TRL's part of :mod:`benchmarks.adapters`: ``rollout_func``, and its loop of tools.

A script stands in for the model.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from importlib import import_module
from pathlib import Path
from typing import Any

import datasets
import httpx
import transformers

from benchmarks.adapter_alone import ALONE, OBSERVATION, Waits, make_waits
from benchmarks.adapter_script import ANSWER, SEARCHES, Play, System, query, search, settings
from research_agent.models.source import resolve_model
from research_env.adapters.trl import Rollouts
from research_env.sessions import Sessions

library: Any = import_module("trl")


class _Policy:
    """Writes the next turn of all episodes, and counts turns."""

    def __init__(self, tokenizer: Any, episodes: int) -> None:
        self.tokenizer = tokenizer
        self.episodes = episodes
        self.number = self.turn = 0

    def write(self, action: Callable[[int, int, int], str], last: str) -> list[list[int]]:
        """The tokens of the next turn per episode: a search, and ``last`` after all searches."""
        searching = self.turn < SEARCHES
        texts = [
            action(i, self.turn, self.number) if searching else last for i in range(self.episodes)
        ]
        self.turn += 1
        return self.encode(texts)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each text."""
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    def player(self, trainer: Any, prompts: list[Any]) -> Play:
        """Plays by the trainer's generation of completions."""

        def play(number: int) -> None:
            self.number, self.turn = number, 0
            trainer._generate(prompts)
            assert self.turn == SEARCHES + 1

        return play


def systems(url: str, episodes: int, seconds: float, stack: ExitStack) -> Iterator[System]:
    """Our ``rollout_func``, one that only waits, and a search function as a tool."""
    folder = resolve_model("miniworld-starter")
    policy = _Policy(_make_tokenizer(folder), episodes)
    waits = stack.enter_context(closing(make_waits(seconds)))
    sessions = stack.enter_context(Sessions(**settings(url, episodes)))
    rollouts = Rollouts(sessions, generate=lambda *_: (policy.write(search, ANSWER), None))
    rows = rollouts.rows()
    prompts = [row["prompt"] for row in rows]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    output = stack.enter_context(tempfile.TemporaryDirectory())

    def make(trainer: Any, rows: list[Any], **arguments: Any) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        model.config.max_position_embeddings = 1_000_000  # the model is never asked
        return trainer(
            model,
            args=_config(output),
            processing_class=policy.tokenizer,
            train_dataset=datasets.Dataset.from_list(rows),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            **arguments,
        )

    ours = make(library.GRPOTrainer, rows, rollout_func=rollouts)
    yield System("TRL", "adapter, rollout_func", policy.player(ours, prompts))
    alone = make(library.GRPOTrainer, rows, rollout_func=_waiting_rollouts(policy, waits))
    yield System("TRL", ALONE, policy.player(alone, prompts))
    client = stack.enter_context(httpx.Client(timeout=60))
    lookup = _make_tool(client, url)
    loop = make(_scripted(policy), [{"prompt": chat} for chat in chats], tools=[lookup])
    # The trainer's step does this before it generates; it would compute log-probabilities, too.
    loop._sync_tool_dicts = [{"search": lookup}] * episodes
    loop._async_tool_dicts = [{}] * episodes
    yield System("TRL", "tool loop", policy.player(loop, chats))


def _waiting_rollouts(policy: _Policy, waits: Waits) -> Callable[[list[str], Any], dict[str, Any]]:
    """The smallest ``rollout_func``: one list of tokens per episode, and who wrote them."""

    def rollouts(prompts: list[str], _: Any) -> dict[str, Any]:
        ids = policy.write(search, ANSWER)
        mask = [[1] * len(turn) for turn in ids]
        for _ in range(SEARCHES):
            for future in [waits.request(str(i)) for i in range(len(prompts))]:
                future.result()
            observed = policy.encode([OBSERVATION] * len(prompts))
            said = policy.write(search, ANSWER)
            for i in range(len(prompts)):
                ids[i] += observed[i] + said[i]
                mask[i] += [0] * len(observed[i]) + [1] * len(said[i])
        return {
            "prompt_ids": policy.tokenizer(prompts)["input_ids"],
            "completion_ids": ids,
            "logprobs": None,
            "env_mask": mask,
        }

    return rollouts


def _scripted(policy: _Policy) -> Any:
    """A trainer whose tool loop hears the script's calls."""

    def call(episode: int, turn: int, number: int) -> str:
        arguments = json.dumps({"query": query(episode, turn, number)})
        return (
            f'<tool_call>\n{{"name": "search", "arguments": {arguments}}}\n</tool_call><|im_end|>'
        )

    class Scripted(library.GRPOTrainer):  # type: ignore[misc]
        def _generate_single_turn(self, *_: Any, **__: Any) -> Any:
            return policy.write(call, f"{ANSWER}<|im_end|>"), None

    return Scripted


def _make_tool(client: httpx.Client, url: str) -> Callable[[str], str]:
    def search(query: str) -> str:
        """Search.

        Args:
            query: What to look for.

        Returns:
            The passages found.
        """
        reply = client.post(url, json={"queries": [query], "topk": 3})
        return "\n".join(each["document"]["contents"] for each in reply.json()["result"][0])

    return search


def _make_tokenizer(folder: str) -> Any:
    """The starter's tokenizer with the chat template of Qwen3, whose tool calls TRL can parse."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    template = Path(library.__file__).parent / "chat_templates" / "qwen3.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"])
    return tokenizer


def _config(output: str) -> Any:
    return library.GRPOConfig(
        output_dir=output,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_completion_length=100_000,
        num_generations=2,
        per_device_train_batch_size=2,
    )
