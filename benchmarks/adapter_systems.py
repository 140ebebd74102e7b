"""The systems that :mod:`benchmarks.adapters` measures: our adapters, and each framework's own."""

from __future__ import annotations

import asyncio
import io
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, redirect_stderr
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.adapter_script import ANSWER, SEARCHES, Play, System, query, search, settings
from research_env.sessions import Sessions
from research_env.vector_env import SearchQAVectorEnv


def vector_environment(url: str, episodes: int, stack: ExitStack) -> Iterator[System]:
    """Our vector environment, with which all others are compared."""
    envs = SearchQAVectorEnv(episodes, autoreset_mode="Disabled", **settings(url, episodes))
    stack.callback(envs.close)
    yield System("", "research_env, vector environment", _stepping(envs, episodes))


def _stepping(envs: Any, episodes: int) -> Play:
    """Play a vector environment, all episodes at the same step."""

    def play(number: int) -> None:
        envs.reset(seed=number)
        for turn in range(SEARCHES):
            envs.step([search(i, turn, number) for i in range(episodes)])
        _, _, terminated, *_ = envs.step([ANSWER] * episodes)
        assert all(terminated)

    return play


def gem(url: str, episodes: int, stack: ExitStack) -> Iterator[System]:
    """GEM's threaded vector environment."""
    from datasets import Dataset as Table  # noqa: PLC0415
    from gem.envs.qa_env import QaEnv  # noqa: PLC0415
    from gem.tools.search_tool import SearchTool  # noqa: PLC0415
    from gem.tools.tool_env_wrapper import ToolEnvWrapper  # noqa: PLC0415
    from gem.vector.async_vector_env import AsyncVectorEnv  # noqa: PLC0415

    from research_env.adapters.gem import ResearchEnv  # noqa: PLC0415

    sessions = stack.enter_context(Sessions(**settings(url, episodes)))
    rows = Table.from_list([{"question": "Who founded it?", "answer": "Ann"}] * episodes)

    def theirs() -> Any:
        with redirect_stderr(io.StringIO()):  # a progress bar
            return ToolEnvWrapper(QaEnv(dataset=rows), [SearchTool(search_url=url, timeout=60)])

    makers = {"adapter": lambda: ResearchEnv(sessions=sessions), "QaEnv with SearchTool": theirs}
    for name, make in makers.items():
        envs = AsyncVectorEnv([name] * episodes, [make] * episodes)
        stack.callback(envs.thread_pool_executer.shutdown)
        yield System("GEM", name, _stepping(envs, episodes))


def skyrl(url: str, episodes: int, stack: ExitStack) -> Iterator[System]:
    """skyrl-gym, one environment per rollout, in threads as SkyRL's generator has them."""
    from skyrl_gym.envs.search.env import SearchEnv, SearchEnvConfig  # noqa: PLC0415

    from research_env.adapters.skyrl import ResearchTextEnv  # noqa: PLC0415

    sessions = stack.enter_context(Sessions(**settings(url, episodes)))
    config = SearchEnvConfig(search_url=url, log_requests=False, timeout=60)
    extras = {"reward_spec": {"ground_truth": {"target": ["Ann"]}}, "max_turns": SEARCHES + 1}
    pool = stack.enter_context(ThreadPoolExecutor(episodes))

    def player(make: Callable[[int], Any]) -> Play:
        def rollout(job: tuple[int, int]) -> bool:
            episode, number = job
            env = make(episode)
            env.init([{"role": "user", "content": "Who founded it?"}])
            for turn in range(SEARCHES):
                env.step(search(episode, turn, number))
            return bool(env.step(ANSWER)["done"])

        def play(number: int) -> None:
            assert all(pool.map(rollout, [(i, number) for i in range(episodes)]))

        return play

    def ours(episode: int) -> Any:
        return ResearchTextEnv(extras={"question_id": str(episode)}, sessions=sessions)

    yield System("skyrl-gym", "adapter", player(ours))
    yield System("skyrl-gym", "SearchEnv", player(lambda episode: SearchEnv(config, extras)))


def torchrl(url: str, episodes: int, stack: ExitStack) -> Iterator[System]:
    """TorchRL's pool of threads; it has no search of its own."""
    from tensordict import NonTensorStack  # noqa: PLC0415
    from torchrl.envs import AsyncEnvPool  # noqa: PLC0415

    from research_env.adapters.torchrl import make_env  # noqa: PLC0415

    sessions = stack.enter_context(Sessions(**settings(url, episodes)))
    pool = AsyncEnvPool([lambda: make_env(sessions)] * episodes, backend="threading")
    stack.callback(pool.close)

    def play(number: int) -> None:
        data = pool.reset()
        for turn in range(SEARCHES + 1):
            texts = [search(i, turn, number) for i in range(episodes)]
            actions = texts if turn < SEARCHES else [ANSWER] * episodes
            data = pool.step(data.set("action", NonTensorStack(*actions)))["next"].clone()
        assert bool(data["terminated"].all())

    yield System("TorchRL", "adapter", play)


def trl(url: str, episodes: int, stack: ExitStack) -> Iterator[System]:
    """TRL's generation of completions, by ``rollout_func`` and by its loop of tools."""
    import datasets  # noqa: PLC0415
    import httpx  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    from research_agent.models.source import resolve_model  # noqa: PLC0415
    from research_env.adapters.trl import Rollouts  # noqa: PLC0415

    library: Any = import_module("trl")
    folder = resolve_model("miniworld-starter")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.config.max_position_embeddings = 1_000_000  # the model is never asked
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    template = Path(library.__file__).parent / "chat_templates" / "qwen3.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"])
    state = {"round": 0, "turn": 0}
    client = stack.enter_context(httpx.Client(timeout=60))

    def encode(texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        state["turn"] += 1
        return ids

    def turns(write: Callable[[int, int, int], str], last: str) -> list[list[int]]:
        turn, number = state["turn"], state["round"]
        return encode(
            [write(i, turn, number) if turn < SEARCHES else last for i in range(episodes)]
        )

    def call(episode: int, turn: int, number: int) -> str:
        arguments = json.dumps({"query": query(episode, turn, number)})
        return (
            f'<tool_call>\n{{"name": "search", "arguments": {arguments}}}\n</tool_call><|im_end|>'
        )

    class Scripted(library.GRPOTrainer):  # type: ignore[misc]
        def _generate_single_turn(self, *_: Any, **__: Any) -> Any:
            return turns(call, f"{ANSWER}<|im_end|>"), None

    def lookup(query: str) -> str:
        """Search.

        Args:
            query: What to look for.

        Returns:
            The passages found.
        """
        reply = client.post(url, json={"queries": [query], "topk": 3})
        return "\n".join(each["document"]["contents"] for each in reply.json()["result"][0])

    lookup.__name__ = "search"
    sessions = stack.enter_context(Sessions(**settings(url, episodes)))
    rollouts = Rollouts(sessions, generate=lambda *_: (turns(search, ANSWER), None))
    output = stack.enter_context(tempfile.TemporaryDirectory())

    def player(trainer: Any, prompts: list[Any]) -> Play:
        def play(number: int) -> None:
            state.update(round=number, turn=0)
            trainer._generate(prompts)
            assert state["turn"] == SEARCHES + 1

        return play

    def make(trainer: Any, rows: list[Any], **arguments: Any) -> Any:
        config = library.GRPOConfig(
            output_dir=output,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_completion_length=100_000,
            num_generations=2,
            per_device_train_batch_size=2,
        )
        return trainer(
            model,
            args=config,
            processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list(rows),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            **arguments,
        )

    rows = rollouts.rows()
    ours = make(library.GRPOTrainer, rows, rollout_func=rollouts)
    yield System("TRL", "adapter, rollout_func", player(ours, [row["prompt"] for row in rows]))
    chats = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    theirs = make(Scripted, chats, tools=[lookup])
    # The trainer's step does this before it generates; it would compute log-probabilities, too.
    theirs._sync_tool_dicts = [{"search": lookup}] * episodes
    theirs._async_tool_dicts = [{}] * episodes
    yield System("TRL", "tool loop", player(theirs, [row["prompt"] for row in chats]))


def openenv(url: str, episodes: int, stack: ExitStack) -> Iterator[System]:
    """OpenEnv's client, one per episode, over sockets; it has no search of its own."""
    from research_env.adapters.openenv import SearchAction, SearchClient, make_app  # noqa: PLC0415
    from research_env.adapters.server import AppServer  # noqa: PLC0415

    sessions = stack.enter_context(Sessions(**settings(url, episodes)))
    server = stack.enter_context(AppServer(make_app(sessions, episodes)))

    async def episode(number: int, i: int) -> bool:
        async with SearchClient(base_url=server.url) as client:
            await client.reset(question_id=str(i))
            for turn in range(SEARCHES):
                await client.step(SearchAction(text=search(i, turn, number)))
            return bool((await client.step(SearchAction(text=ANSWER))).done)

    async def together(number: int) -> None:
        assert all(await asyncio.gather(*(episode(number, i) for i in range(episodes))))

    yield System("OpenEnv", "adapter", lambda number: asyncio.run(together(number)))


def verl(url: str, episodes: int, stack: ExitStack) -> Iterator[System]:
    """The agent loops of verl."""
    from benchmarks.adapter_verl import systems  # noqa: PLC0415

    yield from systems(url, episodes, stack)


FRAMEWORKS: dict[str, tuple[str, Callable[[str, int, ExitStack], Iterator[System]]]] = {
    "TRL": ("trl", trl),
    "skyrl-gym": ("skyrl_gym", skyrl),
    "GEM": ("gem", gem),
    "TorchRL": ("torchrl", torchrl),
    "OpenEnv": ("openenv", openenv),
    "verl": ("verl", verl),
}
