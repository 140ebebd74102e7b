"""The systems that :mod:`benchmarks.adapters` measures: our adapters, and each framework's own."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, redirect_stderr
from typing import Any

from benchmarks.adapter_alone import ALONE, WaitingEnv, make_waits
from benchmarks.adapter_script import ANSWER, SEARCHES, Play, System, search, settings
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


def gem(url: str, episodes: int, seconds: float, stack: ExitStack) -> Iterator[System]:
    """GEM's threaded vector environment."""
    from datasets import Dataset as Table  # noqa: PLC0415
    from gem.envs.qa_env import QaEnv  # noqa: PLC0415
    from gem.tools.search_tool import SearchTool  # noqa: PLC0415
    from gem.tools.tool_env_wrapper import ToolEnvWrapper  # noqa: PLC0415
    from gem.vector.async_vector_env import AsyncVectorEnv  # noqa: PLC0415

    from research_env.adapters.gem import ResearchEnv  # noqa: PLC0415

    waits = stack.enter_context(closing(make_waits(seconds)))
    sessions = stack.enter_context(Sessions(**settings(url, episodes)))
    rows = Table.from_list([{"question": "Who founded it?", "answer": "Ann"}] * episodes)

    def theirs() -> Any:
        with redirect_stderr(io.StringIO()):  # a progress bar
            return ToolEnvWrapper(QaEnv(dataset=rows), [SearchTool(search_url=url, timeout=60)])

    makers: dict[str, Callable[[], Any]] = {
        "adapter": lambda: ResearchEnv(sessions=sessions),
        ALONE: lambda: WaitingEnv(waits),
        "QaEnv with SearchTool": theirs,
    }
    for name, make in makers.items():
        envs = AsyncVectorEnv([name] * episodes, [make] * episodes)
        stack.callback(envs.thread_pool_executer.shutdown)
        yield System("GEM", name, _stepping(envs, episodes))


def skyrl(url: str, episodes: int, seconds: float, stack: ExitStack) -> Iterator[System]:
    """skyrl-gym, one environment per rollout, in threads as SkyRL's generator has them."""
    from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput  # noqa: PLC0415
    from skyrl_gym.envs.search.env import SearchEnv, SearchEnvConfig  # noqa: PLC0415

    from research_env.adapters.skyrl import ResearchTextEnv  # noqa: PLC0415

    waits = stack.enter_context(closing(make_waits(seconds)))
    sessions = stack.enter_context(Sessions(**settings(url, episodes)))
    config = SearchEnvConfig(search_url=url, log_requests=False, timeout=60)
    extras = {"reward_spec": {"ground_truth": {"target": ["Ann"]}}, "max_turns": SEARCHES + 1}
    pool = stack.enter_context(ThreadPoolExecutor(episodes))

    class Waiting(BaseTextEnv):  # type: ignore[misc]
        def init(self, prompt: Any) -> Any:
            self.env = WaitingEnv(waits)
            return prompt, {}

        def step(self, action: str) -> Any:
            text, reward, done, _, metadata = self.env.step(action)
            observations = [{"role": "user", "content": text}]
            return BaseTextEnvStepOutput(
                observations=observations, reward=reward, done=done, metadata=metadata
            )

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
    yield System("skyrl-gym", ALONE, player(lambda _: Waiting()))
    yield System("skyrl-gym", "SearchEnv", player(lambda episode: SearchEnv(config, extras)))


def torchrl(url: str, episodes: int, seconds: float, stack: ExitStack) -> Iterator[System]:
    """TorchRL's pool of threads; it has no search of its own."""
    from tensordict import NonTensorStack  # noqa: PLC0415
    from torchrl.envs import AsyncEnvPool, GymWrapper  # noqa: PLC0415

    from research_env.adapters.torchrl import make_env  # noqa: PLC0415

    waits = stack.enter_context(closing(make_waits(seconds)))
    sessions = stack.enter_context(Sessions(**settings(url, episodes)))

    def player(make: Callable[[], Any]) -> Play:
        pool = AsyncEnvPool([make] * episodes, backend="threading")
        stack.callback(pool.close)

        def play(number: int) -> None:
            data = pool.reset()
            for turn in range(SEARCHES + 1):
                texts = [search(i, turn, number) for i in range(episodes)]
                actions = texts if turn < SEARCHES else [ANSWER] * episodes
                data = pool.step(data.set("action", NonTensorStack(*actions)))["next"].clone()
            assert bool(data["terminated"].all())

        return play

    yield System("TorchRL", "adapter", player(lambda: make_env(sessions)))
    yield System("TorchRL", ALONE, player(lambda: GymWrapper(WaitingEnv(waits))))


def trl(url: str, episodes: int, seconds: float, stack: ExitStack) -> Iterator[System]:
    """TRL's generation of completions, by ``rollout_func`` and by its loop of tools."""
    from benchmarks.adapter_trl import systems  # noqa: PLC0415

    yield from systems(url, episodes, seconds, stack)


def openenv(url: str, episodes: int, seconds: float, stack: ExitStack) -> Iterator[System]:
    """OpenEnv's client, one per episode, over sockets; it has no search of its own."""
    from benchmarks.adapter_openenv import systems  # noqa: PLC0415

    yield from systems(url, episodes, seconds, stack)


def verl(url: str, episodes: int, seconds: float, stack: ExitStack) -> Iterator[System]:
    """The agent loops of verl."""
    from benchmarks.adapter_verl import systems  # noqa: PLC0415

    yield from systems(url, episodes, seconds, stack)


FRAMEWORKS: dict[str, tuple[str, Callable[[str, int, float, ExitStack], Iterator[System]]]] = {
    "TRL": ("trl", trl),
    "skyrl-gym": ("skyrl_gym", skyrl),
    "GEM": ("gem", gem),
    "TorchRL": ("torchrl", torchrl),
    "OpenEnv": ("openenv", openenv),
    "verl": ("verl", verl),
}
