"""What becomes of episodes when the search engine fails, by causing the failures.

``python -m benchmarks.faults [--json] [--only WORDS]``

A real Elasticsearch server of its own is started, MiniWorld's passages are indexed, and a vector
environment plays eight episodes of two searches and an answer. After the first search the fault
begins: a proxy before the server misbehaves, or the server itself is paused, killed, stopped or
loses its index. Then the fault ends and the same environment plays on.

An episode is right when all that it observed is what the embedded engine finds for the same
searches, and its reward that of its answer. Else it must be void: truncated, stop reason
``backend_error``, reward 0, nothing observed. Anything in between is counted as ``wrong``.

Hostile input follows, as :mod:`benchmarks.hostile` counts it.

``--distributed`` causes faults in training on two ranks instead, as
:mod:`benchmarks.distributed_faults` says.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import gymnasium as gym

import research_env  # noqa: F401  (registers the ids)
from benchmarks import distributed_faults
from benchmarks.hostile import report
from research_env.datasets import load_dataset
from research_env.datasets.base import Corpus
from research_env.retrieval.elasticsearch.indexing import index_elasticsearch
from tests.elasticsearch.proxy import FAULTS as ANSWERS
from tests.elasticsearch.proxy import Proxy
from tests.elasticsearch.server import Server, start

EPISODES = 8
INDEX = "faults"


@dataclass
class Stage:
    """A server, a proxy before it, and the corpus in it.

    Attributes:
        server: the present server; a restart replaces it.
        proxy: passes requests on to it.
        corpus: what is indexed under ``INDEX``.
    """

    server: Server
    proxy: Proxy
    corpus: Corpus

    def index(self) -> None:
        """Index the corpus, if it is not."""
        index_elasticsearch(self.corpus, f"{_scheme(self.server.url)}/{INDEX}")


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        name: what it is.
        cause: begins and ends it, as a context.
        deadline: deadline of the retriever, in seconds.
        outcome: what must become of the episodes: ``complete``, ``void``, or ``some`` of either.
        proxied: whether the environment searches through the proxy.
    """

    name: str
    cause: Callable[[Stage], AbstractContextManager[None]]
    deadline: float
    outcome: str
    proxied: bool = False


@dataclass(frozen=True)
class Row:
    """What became of the episodes of one fault.

    Attributes:
        fault: its name.
        deadline: deadline of the retriever, in seconds.
        complete: episodes that are right.
        void: episodes that are void as they must be.
        wrong: the others; there must be none.
        seconds: the longest step while the fault lasted.
        after: episodes that are right once it is over, of ``EPISODES``.
    """

    fault: str
    deadline: float
    complete: int
    void: int
    wrong: int
    seconds: float
    after: int


@contextmanager
def stage() -> Iterator[Stage]:
    """Start a server and a proxy, and index MiniWorld.

    Raises:
        ServerError: no server can be started here.
    """
    with ExitStack() as stack:
        server = start()
        corpus = load_dataset("miniworld", split="train").corpus
        assert corpus is not None
        made = Stage(server, stack.enter_context(Proxy(server.url)), corpus)
        stack.callback(lambda: made.server.stop())  # noqa: PLW0108  (that of then)
        made.index()
        yield made


def measure(fault: Fault, on: Stage) -> Row:
    """Play while the fault lasts, and after it."""
    base = on.proxy.url if fault.proxied else on.server.url
    url = f"{_scheme(base)}/{INDEX}?deadline={fault.deadline:g}"
    with _environment(None) as perfect:
        right, _ = _play(perfect, lambda: None)
    with _environment(url) as env, ExitStack() as persistent:
        played, seconds = _play(env, lambda: persistent.enter_context(fault.cause(on)))
        persistent.close()
        after, _ = _play(env, lambda: None)
    complete = sum(one == other for one, other in zip(played, right, strict=True))
    void = sum(_is_void(one) for one in played)
    return Row(
        fault.name,
        fault.deadline,
        complete,
        void,
        len(played) - complete - void,
        round(seconds, 2),
        sum(one == other for one, other in zip(after, right, strict=True)),
    )


PlayedTurn = tuple[str, float, bool, bool, str, tuple[str, ...]]


def _play(env: Any, begin: Callable[[], object]) -> tuple[list[list[PlayedTurn]], float]:
    """Play the first episodes; the fault begins after the first turn.

    Returns:
        The turns of each episode, and the seconds of the longest step after the first.
    """
    questions = {each.id: each for each in load_dataset("miniworld", split="train").questions}
    _, infos = env.reset(seed=0, options={"episodes": range(EPISODES)})
    asked = [questions[id_] for id_ in infos["question_id"]]
    scripts = [
        (
            f"<think>Look.</think><search>{question.question}</search>",
            f"<think>Again.</think><search>{question.answers[0]} of {question.question}</search>",
            rf"<think>So.</think><answer>It is \boxed{{{question.answers[0]}}}</answer>",
        )
        for question in asked
    ]
    turns: list[list[PlayedTurn]] = [[] for _ in scripts]
    longest = 0.0
    for number in range(3):
        if number == 1:
            begin()
        playing = [not (each and (each[-1][2] or each[-1][3])) for each in turns]
        if not any(playing):
            break
        began = time.monotonic()
        seen, rewards, terminated, truncated, infos = env.step(
            [script[number] for script in scripts], playing
        )
        longest = max(longest, time.monotonic() - began) if number else 0.0
        for i, goes_on in enumerate(playing):
            if goes_on:
                reason = "" if infos["stop_reason"] is None else infos["stop_reason"][i]
                void = f"void {infos['void'][i]}"
                turns[i].append(
                    (
                        seen[i],
                        float(rewards[i]),
                        bool(terminated[i]),
                        bool(truncated[i]),
                        f"{reason} {void}",
                        infos["passage_ids"][i],
                    )
                )
    return turns, longest


def _is_void(turns: list[PlayedTurn]) -> bool:
    """Whether an episode ended void, and observed nothing by it."""
    return turns[-1] == ("", 0.0, False, True, "backend_error void True", ())


@contextmanager
def _environment(retriever: str | None) -> Iterator[Any]:
    env = gym.make_vec(
        "ReSearch-MiniWorld-v0",
        num_envs=EPISODES,
        retriever=retriever,
        autoreset_mode="Disabled",
    )
    try:
        yield env
    finally:
        env.close()


def _scheme(url: str) -> str:
    return url.replace("http", "elasticsearch", 1)


# --- what goes wrong -----------------------------------------------------------------------------


def _answers(fault: str, times: int | None) -> Callable[[Stage], AbstractContextManager[None]]:
    @contextmanager
    def cause(on: Stage) -> Iterator[None]:
        on.proxy.fault, on.proxy.times = fault, times
        yield
        on.proxy.fault = ""

    return cause


@contextmanager
def _paused(on: Stage) -> Iterator[None]:
    on.server.pause()
    yield
    on.server.resume()


@contextmanager
def _paused_shortly(on: Stage) -> Iterator[None]:
    on.server.pause()
    timer = threading.Timer(2, on.server.resume)
    timer.start()
    yield
    timer.join()


@contextmanager
def _killed(on: Stage) -> Iterator[None]:
    on.server.kill()
    yield
    on.server = on.server.again()


@contextmanager
def _killed_in_a_batch(on: Stage) -> Iterator[None]:
    on.server.pause()  # so that it surely has the batch, and has not answered, when it dies

    def work() -> None:
        time.sleep(0.5)
        on.server.kill()
        on.server = on.server.again()

    thread = threading.Thread(target=work)
    thread.start()
    yield
    thread.join()


@contextmanager
def _restarted(on: Stage) -> Iterator[None]:
    def work() -> None:
        on.server.halt()
        on.server = on.server.again()

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.5)
    yield
    thread.join()


@contextmanager
def _deleted(on: Stage) -> Iterator[None]:
    def request(method: str, path: str) -> Any:
        asked = urllib.request.Request(f"{on.server.url}/{path}", method=method)
        with urllib.request.urlopen(asked) as answer:
            return json.loads(answer.read())

    for name in request("GET", INDEX):
        request("DELETE", name)
    yield
    on.index()


_PERMANENT = {"delayed": "complete"} | {
    name: "some" for name in ANSWERS if name.startswith("half")
}  # every try of a "half" fault answers half of what it asks for

FAULTS: tuple[Fault, ...] = (
    *(
        Fault(f"{name}, always", _answers(name, None), 2, _PERMANENT.get(name, "void"), True)
        for name in ANSWERS
    ),
    *(Fault(f"{name}, twice", _answers(name, 2), 6, "complete", True) for name in ANSWERS),
    Fault("paused (SIGSTOP) past the deadline", _paused, 3, "void"),
    Fault("paused (SIGSTOP) for 2 s", _paused_shortly, 60, "complete"),
    Fault("killed (SIGKILL), back after the deadline", _killed, 3, "void"),
    Fault("killed (SIGKILL) during a batch, restarted", _killed_in_a_batch, 240, "complete"),
    Fault("stopped (SIGTERM), restarted", _restarted, 240, "complete"),
    Fault("index deleted", _deleted, 20, "void"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the matrix; exits with 1 if an episode is wrong or those after a fault are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each fault")
    parser.add_argument("--only", default="", help="only faults whose name holds this")
    parser.add_argument(
        "--distributed", action="store_true", help="faults in training on two ranks"
    )
    chosen = parser.parse_args(arguments)
    if chosen.distributed:
        right = distributed_faults.matrix(chosen.only, as_json=chosen.json)
        raise SystemExit(0 if right else 1)
    line = "| {:<44} | {:>8} | {:>8} | {:>4} | {:>5} | {:>12} | {:>5} |"
    if not chosen.json:
        titles = ("fault", "deadline", "complete", "void", "wrong", "longest step", "after")
        print(line.format(*titles), line.format(*["---"] * 7), sep="\n")
    safe = True
    with stage() as on:
        for fault in FAULTS:
            if chosen.only not in fault.name:
                continue
            row = measure(fault, on)
            safe &= row.wrong == 0 and row.after == EPISODES
            if chosen.json:
                print(json.dumps(asdict(row)), flush=True)
            else:
                values = asdict(row) | {"deadline": f"{row.deadline:g} s"}
                values |= {"seconds": f"{row.seconds:.2f} s", "after": f"{row.after} of {EPISODES}"}
                print(line.format(*values.values()), flush=True)
    if not chosen.only:
        safe &= report(as_json=chosen.json)
    raise SystemExit(0 if safe else 1)


if __name__ == "__main__":
    main()
