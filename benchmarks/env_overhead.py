"""What a step costs in the environment itself, against two other search environments.

``python -m benchmarks.env_overhead [--json]``

Every system plays the same episode in one process: a reset, three actions of 500 characters that
search, one that answers; every search returns the same three passages of 600 characters. Two cuts:

- ``search stubbed``: the function that searches is replaced by one that has the passages at hand,
  so that only parsing, rendering, bookkeeping and reward are left.
- ``socket stubbed``: the search client stays and only the transport of ``requests`` or ``httpx`` is
  replaced, so that nothing is sent. This package is there three times: with its engine in the
  process, as by default (no client at all); with ``retriever="http://..."``; and so in a vector
  environment of 64, each with a query of its own, which asks once per step (a 64th of it is shown).

The peers are gem-llm's question answering with its search tool and skyrl-gym's search environment,
both from PyPI (``pip install .[benchmarks]``). Times are the best of several interleaved rounds;
read the ratios, not the microseconds.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import timeit
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from importlib.util import find_spec
from typing import Any, NamedTuple
from unittest import mock

from benchmarks.tables import print_table
from research_env import Dataset, Hit, Passage, Question
from research_env.env import SearchQAEnv
from research_env.errors import RetrievalError
from research_env.vector_env import SearchQAVectorEnv

TARGET_MICROSECONDS = 20.0
TARGET_RATIO = 5.0
SEARCHES = 3
STEPS = SEARCHES + 1
TOGETHER = 64


def _padded(end: str) -> str:
    """An action of 500 characters: a thought, and what is asked for."""
    return f"<think>{('word ' * 100)[: 500 - 15 - len(end)]}</think>{end}"


SEARCH = _padded("<search>who founded the company</search>")
ANSWER = _padded(r"<answer>\boxed{Ann}</answer>")
PLAIN_ANSWER = _padded("<answer>Ann</answer>")
TEXT = ("The company was founded in the spring of 1912 by a clockmaker and his sister. " * 8)[:600]
PASSAGES = [Passage(f"p{i}", f"Company {i}", TEXT) for i in range(3)]
DOCUMENTS = [{"document": {"contents": f'"{p.title}"\n{p.text}'}, "score": 1.0} for p in PASSAGES]


class System(NamedTuple):
    """An environment that can be timed.

    Attributes:
        name: name of the package.
        reset: starts an episode.
        search: takes one step that searches.
        answer: takes the step that ends the episode.
        copies: how many environments a call moves.
    """

    name: str
    reset: Callable[[], object]
    search: Callable[[], object]
    answer: Callable[[], object]
    copies: int = 1


class _Stub:
    def __init__(self) -> None:
        self._hits = [Hit(passage, 1.0) for passage in PASSAGES]

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit] | RetrievalError]:
        return [self._hits for _ in queries]

    def close(self) -> None:
        pass


QUESTIONS = Dataset(
    "stub", tuple(Question(str(i), f"Who founded it, {i}?", ("Ann",)) for i in range(100)), None
)
URL = "http://stub/retrieve"


def ours(retriever: str | None = None) -> System:
    """This package's environment, with the passages at hand or with those of a server."""
    env = SearchQAEnv(dataset=QUESTIONS, retriever=retriever or _Stub(), top_k=3)
    env.reset(seed=0)
    name = "research_env, http" if retriever else "research_env"
    return System(name, env.reset, lambda: env.step(SEARCH), lambda: env.step(ANSWER))


def ours_together() -> System:
    """This package's vector environment, with the passages of a server."""
    envs = SearchQAVectorEnv(
        TOGETHER, autoreset_mode="Disabled", dataset=QUESTIONS, retriever=URL, top_k=3, cache_size=0
    )
    envs.reset(seed=0)
    searches = [_padded(f"<search>who founded company {i:03}</search>") for i in range(TOGETHER)]
    answers = [ANSWER] * TOGETHER
    return System(
        f"research_env, http, {TOGETHER}",
        envs.reset,
        lambda: envs.step(searches),
        lambda: envs.step(answers),
        TOGETHER,
    )


def gem() -> System:
    """gem-llm's QaEnv with its SearchTool (the one of its search agents)."""
    from datasets import Dataset as Table  # noqa: PLC0415 (heavy, and a peer's)
    from gem.envs.qa_env import QaEnv  # noqa: PLC0415
    from gem.tools.search_tool import SearchTool  # noqa: PLC0415
    from gem.tools.tool_env_wrapper import ToolEnvWrapper  # noqa: PLC0415

    rows = [{"question": f"Who founded it, {i}?", "answer": "Ann"} for i in range(100)]
    with redirect_stderr(io.StringIO()):  # a progress bar
        inner = QaEnv(dataset=Table.from_list(rows))
    env = ToolEnvWrapper(inner, [SearchTool(search_url="http://stub/retrieve")])
    return System("gem-llm", env.reset, lambda: env.step(SEARCH), lambda: env.step(PLAIN_ANSWER))


def skyrl() -> System:
    """skyrl-gym's SearchEnv; it is made anew for every episode, as its trainer does."""
    from skyrl_gym.envs.search.env import SearchEnv, SearchEnvConfig  # noqa: PLC0415

    extras = {"reward_spec": {"ground_truth": {"target": ["Ann"]}}, "max_turns": STEPS}
    config = SearchEnvConfig(search_url="http://stub/retrieve")
    current: list[Any] = []

    def reset() -> None:
        current[:] = [SearchEnv(config, extras)]
        current[0].init([{"role": "user", "content": "Who founded it?"}])

    return System(
        "skyrl-gym",
        reset,
        lambda: current[0].step(SEARCH),
        lambda: current[0].step(PLAIN_ANSWER),
    )


PEERS = {"gem-llm": ("gem", gem), "skyrl-gym": ("skyrl_gym", skyrl)}


@contextmanager
def _search_stubbed(installed: Sequence[str]) -> Iterator[None]:
    """Let the peers find the documents at hand; what follows (rendering them) stays theirs."""
    with ExitStack() as stack:
        if "gem-llm" in installed:
            found = mock.patch(
                "gem.tools.search_tool.SearchTool._search",
                lambda tool, query: tool._passages2string(DOCUMENTS),
            )
            stack.enter_context(found)
        if "skyrl-gym" in installed:
            answer = {"result": [DOCUMENTS]}, None
            stub = mock.patch("skyrl_gym.tools.search.call_search_api", lambda **_: answer)
            stack.enter_context(stub)
        yield


def _written(asked: int) -> bytes:
    """The answer of a retrieval server to so many queries."""
    return json.dumps({"result": [DOCUMENTS] * asked}).encode()


@contextmanager
def _socket_stubbed(installed: Sequence[str]) -> Iterator[None]:
    """Let the HTTP clients do all their work but the sending; the reply has each one's format."""
    import httpx  # noqa: PLC0415

    written = {asked: _written(asked) for asked in (1, TOGETHER)}

    def answer(self: object, request: httpx.Request) -> httpx.Response:
        content = written[request.read().count(b"who founded")]
        return httpx.Response(200, stream=httpx.ByteStream(content))

    with mock.patch.object(httpx.HTTPTransport, "handle_request", answer):
        if not installed:
            yield
            return
        with _requests_stubbed():
            yield


@contextmanager
def _requests_stubbed() -> Iterator[None]:
    import msgspec  # noqa: PLC0415 (gem-llm's)
    import requests  # noqa: PLC0415 (the peers')

    packed = msgspec.msgpack.encode({"result": DOCUMENTS})
    written = _written(1)

    def reply(self: object, request: requests.PreparedRequest, **_: object) -> requests.Response:
        response = requests.Response()
        is_json = request.headers.get("Content-Type") == "application/json"
        response.status_code = 200
        response.raw = io.BytesIO(written if is_json else packed)
        response.request = request
        response.url = request.url or ""
        return response

    with mock.patch.object(requests.adapters.HTTPAdapter, "send", reply):
        yield


RACES = (
    ("search stubbed", "research_env"),
    ("socket stubbed", "research_env"),
    ("socket stubbed", f"research_env, http, {TOGETHER}"),
)
CUTS = {"search stubbed": _search_stubbed, "socket stubbed": _socket_stubbed}


def measure(systems: Sequence[System], rounds: int, episodes: int) -> list[dict[str, Any]]:
    """Best microseconds of each part of an episode, the systems taking turns.

    Returns:
        A row a system: ``reset``, ``search``, ``answer`` (a call each) and ``step`` (an episode,
        its reset included, divided by its steps).
    """
    best = [dict.fromkeys(("reset", "search", "answer"), float("inf")) for _ in systems]
    clock = timeit.default_timer
    for _ in range(rounds):
        for system, times in zip(systems, best, strict=True):
            spent = dict.fromkeys(times, 0.0)
            for _ in range(episodes):
                at = clock()
                system.reset()
                began = clock()
                for _ in range(SEARCHES):
                    system.search()
                searched = clock()
                system.answer()
                spent["answer"] += clock() - searched
                spent["search"] += (searched - began) / SEARCHES
                spent["reset"] += began - at
            for part, seconds in spent.items():
                times[part] = min(times[part], seconds / episodes / system.copies * 1e6)
    return [
        {
            "system": system.name,
            **times,
            "step": (times["reset"] + SEARCHES * times["search"] + times["answer"]) / STEPS,
        }
        for system, times in zip(systems, best, strict=True)
    ]


def run(rounds: int = 20, episodes: int = 100) -> dict[str, Any]:
    """Time all systems that are installed.

    Returns:
        ``rows`` (see :func:`measure`; the ratios say how many times as much as ours, of the same
        cut, a searching step and an episode's step of the system cost), ``missing`` peers, whether
        our searching step is cheap enough, and by how many times a mean step of ours is cheaper.
    """
    installed = [name for name, (module, _) in PEERS.items() if find_spec(module)]
    rows: list[dict[str, Any]] = []
    for cut, stubbed in CUTS.items():
        with stubbed(installed):
            systems = [ours(), *(PEERS[name][1]() for name in installed)]
            if cut == "socket stubbed":
                systems += [ours(URL), ours_together()]
            timed = measure(systems, rounds, episodes)
        own = timed[0]
        for row in timed:
            ratios = {f"{part}_ratio": row[part] / own[part] for part in ("search", "step")}
            rows.append({"cut": cut, **row, **ratios})
    steps = {(row["cut"], row["system"]): row["step"] for row in rows}
    return {
        "rows": rows,
        "missing": sorted(set(PEERS) - set(installed)),
        "cheap_enough": rows[0]["search"] <= TARGET_MICROSECONDS,
        "times_ours": {
            f"{peer} / {own_name}, {cut}": steps[cut, peer] / steps[cut, own_name]
            for cut, own_name in RACES
            for peer in installed
        },
    }


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--rounds", type=int, default=20, help="take the best of so many")
    arguments = parser.parse_args()
    result = run(arguments.rounds)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    times, ratios = ("reset", "search", "answer", "step"), ("search_ratio", "step_ratio")
    rows = [
        [row["system"], row["cut"], *(f"{row[t]:.1f}" for t in times),
         *(f"{row[r]:.2f}" for r in ratios)]
        for row in result["rows"]
    ]  # fmt: skip
    headings = ["system", "cut", *times, "search, against ours", "step, against ours"]
    print_table("microseconds", headings, rows)
    for name in result["missing"]:
        print(f"not installed: {name}; pip install .[benchmarks]")
    print(f"a searching step of ours within {TARGET_MICROSECONDS:g} us: {result['cheap_enough']}")
    for name, times in result["times_ours"].items():
        print(f"{name}: {times:.2f} times the cost of a mean step ({TARGET_RATIO:g} is the aim)")


if __name__ == "__main__":
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    main()
