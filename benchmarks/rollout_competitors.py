"""What ``benchmarks.rollouts`` compares: this project's collector and TRL's trainer.

Both compute what they compute anyway, with the same small policy, and then the token of the script
is put in the place of the sampled one.
"""

from __future__ import annotations

import asyncio
import copy
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.synthetic import make_model
from research_agent.config import SamplingConfig
from research_agent.engines import make_engine
from research_agent.engines.base import Engine
from research_agent.environments import Environments, make_environments
from research_agent.renderer import Renderer
from research_agent.rollout import collect
from research_agent.trajectory import Trajectory
from research_env import RESEARCH, Dataset, Hit, Passage, Protocol, Question, Tag
from research_env.errors import RetrievalError
from research_env.protocol import Parsed

TURNS = 4  # turns per episode; all but the last search
SAMPLES = 2  # episodes per question: the fewest that TRL allows
CONTEXT = 4096
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SPECIALS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
TAGS = ("tool_call>", "tool_response>")
CALL = Tag('<tool_call>\n{"name": "search", "arguments": {"query": "', '"}}\n</tool_call>')
RESULT = ("The company was founded in the spring of 1912 by a clockmaker and his sister. " * 4)[
    :256
]
LIMITS = SamplingConfig(temperature=1.0, overlap=True, max_prompt=CONTEXT, max_response=CONTEXT)
clock = time.perf_counter


def make_renderer() -> Renderer:
    """Make a tokenizer with a token per byte, and the special tokens of Qwen3's chats."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    begin, end, pad = SPECIALS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, pad_token=pad, additional_special_tokens=[begin]
    )
    tokenizer.add_tokens([part + name for part in ("<", "</") for name in TAGS])  # not special
    return Renderer(tokenizer, frozenset({tokenizer.eos_token_id}))


def make_policy(renderer: Renderer) -> Any:
    """A Qwen2 of a million random weights."""
    return make_model({**SIZES, "vocab_size": len(renderer.tokenizer)}, "cpu")


def query(episode: int, turn: int) -> str:
    """Return what the script searches for in a turn; every query is different."""
    return f"company {episode}.{turn}"


def make_script(episodes: int, renderer: Renderer, scale: float = 1.0) -> NDArray[np.int64]:
    """Write every turn; their lengths are distributed like those of R1-Searcher's trajectories.

    Args:
        episodes: number of episodes.
        renderer: tokenizes the turns.
        scale: lengths are multiplied by this.

    Returns:
        Tokens, end tokens included, and -1 after the end of a turn; [episodes, turns, longest].
    """
    rng = random.Random(3)
    turns = []
    for episode in range(episodes):
        for turn in range(TURNS):
            mean, deviation = (4.55, 0.3) if turn < TURNS - 1 else (4.37, 0.43)
            call = f"{CALL.open}{query(episode, turn)}{CALL.close}" if turn < TURNS - 1 else ""
            action = renderer.encode_text(call)
            thought = round(scale * rng.lognormvariate(mean, deviation)) - len(action)
            action[:0] = renderer.encode_text(("I should look for it. " * 50)[: max(1, thought)])
            turns.append([*action, *renderer.end_ids])
    script = np.full((episodes * TURNS, max(map(len, turns))), -1, dtype=np.int64)
    for row, said in zip(script, turns, strict=True):
        row[: len(said)] = said
    return script.reshape(episodes, TURNS, -1)


class Search:
    """A search engine that takes as long for any batch, and remembers when it answered."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.answered: dict[str, list[float]] = {}  # by query: at which times

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit] | RetrievalError]:
        """Answer a request."""
        time.sleep(self.seconds)
        for query in queries:
            self.answered.setdefault(query, []).append(clock())
        return [[Hit(Passage("p", "", RESULT), 1.0)] for _ in queries]

    def close(self) -> None:
        """Nothing is held."""


def _parse(protocol: Protocol, text: str) -> Parsed:
    _, called, rest = text.rpartition(protocol.query.open)
    return Parsed("search", rest.partition(protocol.query.close)[0]) if called else Parsed("answer")


def _render(protocol: Protocol, hits: Sequence[Hit]) -> str:
    tag = protocol.result
    text = "".join(hit.passage.text for hit in hits)
    return f"\n^user\n{tag.open}\n{text}\n{tag.close}^\n^assistant\n"  # as in Qwen3's chats


PROTOCOL = replace(
    RESEARCH,
    name="tools",
    query=CALL,
    result=Tag("<tool_response>", "</tool_response>"),
    terminators=(),  # a turn ends with the end token
    parser=_parse,
    renderer=_render,
    extractor=lambda _, response: response,
)


class Ours:
    """This project's collector: the transformers engine and the vector environment.

    Args:
        prompts: the questions as the policy sees them; each is played ``SAMPLES`` times.
        script: what is said, by slot: one that plays several episodes says the same in each.
    """

    def __init__(
        self,
        policy: Any,
        renderer: Renderer,
        prompts: Sequence[str],
        script: NDArray[np.int64],
        search: Search,
    ) -> None:
        for special in SPECIALS:
            prompts = [prompt.replace(special, "^") for prompt in prompts]
        questions = [Question(str(i), p.removesuffix("\n"), ("",)) for i, p in enumerate(prompts)]
        settings = {
            "dataset": Dataset("scripted", questions, None),
            "retriever": search,
            "protocol": PROTOCOL,
            "reward": "em",
            "template": "question",
            "cache_size": 0,
        }
        engine: Any = make_engine(
            "transformers", policy, renderer, max_slots=len(script), max_context=CONTEXT
        )
        self.engine: Engine = engine
        self.environments: Environments = make_environments(
            "research_env:SearchQA-v0", len(script), settings
        )
        numbers = {}  # question id to number of the episode that asks it; the seed draws the order
        for number in range(len(prompts)):
            [(_, info)] = self.environments.reset({0: number}, 0).values()
            numbers[int(info["question_id"])] = number
        self._episodes = [(numbers[i], k) for i in range(len(prompts)) for k in range(SAMPLES)]
        self._renderer = renderer
        self._script = script
        self._turn = np.zeros(len(script), dtype=np.int64)  # [slots]: turns played
        self._written = engine._written
        self._sample, engine._sample = engine._sample, self._forced
        self._played: list[Trajectory] = []

    def play(self) -> float:
        """Play all episodes; returns the seconds."""
        parts = self.engine, self.environments, self._renderer, self._episodes
        begin = clock()
        self._played = collect(*parts, LIMITS)
        return clock() - begin

    def tokens(self, provenance: str) -> list[list[int]]:
        """Return the tokens of that provenance in the last round, a list per episode."""
        return [
            [token for s in t.segments if s.provenance == provenance for token in s.tokens]
            for t in self._played
        ]

    def _forced(
        self, slots: NDArray[np.int64], logits: torch.Tensor
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Sample, and say what the script says."""
        _, logprobs = self._sample(slots, logits)
        tokens = self._script[slots, self._turn[slots], self._written[slots]]
        self._turn[slots] += np.isin(tokens, list(self._renderer.end_ids))
        self._turn %= TURNS
        return tokens, logprobs


class Theirs:
    """TRL's trainer, reduced to generation.

    Its chat template is Qwen3's, read from the installed package, so that it can parse tool calls.

    Args:
        batch: how many episodes it generates together.
        waits: whether its tool is a coroutine.
    """

    def __init__(
        self,
        policy: Any,
        renderer: Renderer,
        script: NDArray[np.int64],
        search: Search,
        *,
        batch: int,
        waits: bool,
    ) -> None:
        import trl  # noqa: PLC0415 - where it is installed
        from datasets import Dataset as Table  # noqa: PLC0415
        from transformers import PrinterCallback  # noqa: PLC0415

        async def wait(query: str) -> str:
            await asyncio.sleep(search.seconds)
            return RESULT

        def call(query: str) -> str:
            time.sleep(search.seconds)
            return RESULT

        tool: Any = wait if waits else call
        tool.__name__ = "search"
        tool.__doc__ = "Search for passages.\n\nArgs:\n    query: What to look for.\n"
        template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
        tokenizer = copy.deepcopy(renderer.tokenizer)
        tokenizer.chat_template = template.read_text(encoding="utf-8")
        asked = [f"Who founded company {i}?" for i in range(len(script) // SAMPLES)]
        chats = [[{"role": "user", "content": question}] for question in asked]
        self._folder = TemporaryDirectory()
        peer: Any = trl
        self._trainer = peer.GRPOTrainer(
            model=copy.deepcopy(policy),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=peer.GRPOConfig(
                output_dir=self._folder.name,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                max_steps=len(script) // batch,
                per_device_train_batch_size=batch,
                num_generations=SAMPLES,
                max_completion_length=CONTEXT,
                shuffle_dataset=False,
            ),
            train_dataset=Table.from_list([{"prompt": chat} for chat in chats]),
            processing_class=tokenizer,
            tools=[tool],
        )
        trainer, model = self._trainer, self._trainer.model
        trainer.remove_callback(PrinterCallback)
        prompts = trainer._tokenize_prompts(chats)[0]
        self.prompts: list[str] = [renderer.decode(ids) for ids in prompts]
        self._script, self._batch = script, batch
        self._sample, model.generate = model.generate, self._forced
        self._generate, trainer._generate = trainer._generate, self._timed
        trainer.training_step = self._step
        self._turn, self._seconds = 0, 0.0
        self._played: list[dict[str, list[int]]] = []

    def play(self) -> float:
        """Play all episodes; returns the seconds that ``_generate`` took."""
        self._played, self._seconds = [], 0.0
        self._trainer.train()
        return self._seconds

    def tokens(self, provenance: str) -> list[list[int]]:
        """Return the tokens of that provenance in the last round, a list per episode."""
        return [episode[provenance] for episode in self._played]

    def _forced(self, *, generation_config: Any, **inputs: Any) -> torch.Tensor:
        """Sample as many tokens as the longest turn has, and say what the script says."""
        first = len(self._played)
        said = self._script[first : first + self._batch, self._turn]
        longest = int((said >= 0).sum(axis=1).max())
        config = copy.deepcopy(generation_config)
        config.min_new_tokens = config.max_new_tokens = longest
        tokens: torch.Tensor = self._sample(**inputs, generation_config=config)
        tokens[:, -longest:] = torch.from_numpy(np.maximum(said[:, :longest], 0))
        self._turn = (self._turn + 1) % TURNS
        return tokens

    def _timed(self, prompts: list[Any]) -> Any:
        begin = clock()
        output = self._generate(prompts)
        self._seconds += clock() - begin
        for prompt, said, mask in zip(*output[:3], strict=True):
            parts = {"action": 1, "observation": 0}.items()
            kinds = {k: [t for t, m in zip(said, mask, strict=True) if m == v] for k, v in parts}
            self._played.append({"prompt": prompt, **kinds})
        return output

    def _step(self, model: Any, inputs: Any, *_: Any) -> torch.Tensor:
        """A step of training that ends where learning would begin."""
        model.train()
        self._trainer._prepare_inputs(inputs)
        self._trainer._step += 1
        return torch.zeros(())
