"""Episodes per second of the adapters, against each framework's own search and tool loops.

``python -m benchmarks.adapters [--json] [--rounds N] [--only FRAMEWORK ...]``

64 episodes at a time: three searches, each with a query of its own, and an answer. The policy is a
script. All systems ask the same search server over HTTP, in one of two kinds: one that answers one
request at a time, in 50 ms, whatever its number of queries, as an engine on one device does; and
one that takes 50 ms for each of any number of requests at once. The server counts requests and
queries. Our vector environment plays the same episodes in the same run.

Each framework also plays alone, with the smallest environment that it can have, which waits for 50
ms at a search and does nothing else (:mod:`benchmarks.adapter_alone`). What the adapter is slower
than that is the adapter's own cost; what that is slower than the vector environment is the
framework's.

Peers: TRL's tool loop with a search function, skyrl-gym's search environment in threads, GEM's
question answering with its search tool in its threaded vector environment, verl's tool agent loop.
Frameworks that are not installed are left out; OpenEnv and verl have environments of their own:
``.venv-openenv/bin/python -m benchmarks.adapters``.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

import httpx

from benchmarks.adapter_alone import ALONE
from benchmarks.adapter_script import SEARCHES, ServerProcess, System
from benchmarks.adapter_systems import FRAMEWORKS, vector_environment
from benchmarks.tables import print_table

EPISODES = 64
SECONDS = 0.05
GOAL = 3.0


class SearchServer:
    """A search server in a process of its own, as search servers are; it takes its time."""

    def __init__(self, seconds: float, *, parallel: bool) -> None:
        """Start it on a free port; :meth:`stop` ends it. See :mod:`benchmarks.adapter_server`."""
        kind = "in-parallel" if parallel else "one-at-a-time"
        self._process = ServerProcess("benchmarks.adapter_server", str(seconds), kind)
        self.url = self._process.url
        self.stop = self._process.stop

    def counts(self) -> tuple[int, int]:
        """How many requests it got so far, and how many queries these held."""
        counts = httpx.get(self.url, timeout=60).json()
        return counts["requests"], counts["queries"]


@contextmanager
def _systems(
    url: str, episodes: int, seconds: float, only: Sequence[str]
) -> Iterator[list[System]]:
    with ExitStack() as stack:
        made = list(vector_environment(url, episodes, stack))
        for name, (module, make) in FRAMEWORKS.items():
            if find_spec(module) and (not only or name in only):
                made += make(url, episodes, seconds, stack)
        yield made


def measure(
    parallel: bool, episodes: int, rounds: int, seconds: float, only: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Play with one kind of server, the systems taking turns.

    Returns:
        A row per system: episodes per second in its best round, these over the vector environment's
        and over those of its framework alone, and requests to the server per search.
    """
    server = SearchServer(seconds, parallel=parallel)
    try:
        with _systems(server.url, episodes, seconds, only) as systems:
            best = [float("inf")] * len(systems)
            requests = [0] * len(systems)
            for number in range(rounds + 1):  # the first warms up
                for place, system in enumerate(systems):
                    before, asked = server.counts()
                    began = time.perf_counter()
                    system.play(number * len(systems) + place)
                    spent = time.perf_counter() - began
                    after, answered = server.counts()
                    if answered - asked != (0 if system.name == ALONE else episodes * SEARCHES):
                        raise AssertionError(f"{system}: {answered - asked} queries")
                    if number:
                        best[place] = min(best[place], spent)
                        requests[place] += after - before
    finally:
        server.stop()
    alone = {s.framework: best[i] for i, s in enumerate(systems) if s.name == ALONE}
    return [
        {
            "framework": system.framework,
            "system": system.name,
            "parallel": parallel,
            "episodes_per_second": episodes / best[place],
            "of_vector_environment": best[0] / best[place],
            "of_framework_alone": alone[system.framework] / best[place] if place else None,
            "calls_per_search": requests[place] / rounds / episodes / SEARCHES,
        }
        for place, system in enumerate(systems)
    ]


def run(
    episodes: int = EPISODES,
    rounds: int = 3,
    seconds: float = SECONDS,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure with both kinds of server.

    Returns:
        ``rows`` (see :func:`measure`), frameworks that are ``missing``, and per kind of server by
        how many times our adapter plays more episodes per second than each peer.
    """
    rows = [row for each in (False, True) for row in measure(each, episodes, rounds, seconds, only)]
    speeds = {(r["framework"], r["parallel"], r["system"]): r["episodes_per_second"] for r in rows}
    ours = {key[:2]: speed for key, speed in speeds.items() if key[2].startswith("adapter")}
    return {
        "rows": rows,
        "missing": [name for name, (module, _) in FRAMEWORKS.items() if not find_spec(module)],
        "times_peer": {
            f"{framework}, {'in parallel' if parallel else 'one at a time'}": own
            / speeds[framework, parallel, system]
            for (framework, parallel), own in ours.items()
            for (other, kind, system) in speeds
            if (other, kind) == (framework, parallel) and not system.startswith(("adapter", ALONE))
        },
    }


def main(words: Sequence[str] | None = None) -> None:
    """Print the tables, or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--tiny", action="store_true", help="few short episodes, for a test")
    parser.add_argument("--rounds", type=int, default=3, help="take the best of so many")
    parser.add_argument("--only", nargs="*", default=[], choices=list(FRAMEWORKS))
    arguments = parser.parse_args(words)
    if arguments.tiny:
        result = run(4, 1, 0.005, arguments.only)
    else:
        result = run(rounds=arguments.rounds, only=arguments.only)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print_table(
        "adapters and the frameworks' own loops",
        (
            "requests",
            "framework",
            "system",
            "episodes/s",
            "of the vector env",
            "of the framework alone",
            "calls per search",
        ),
        [
            (
                "in parallel" if row["parallel"] else "one at a time",
                row["framework"],
                row["system"],
                f"{row['episodes_per_second']:.1f}",
                f"{row['of_vector_environment']:.2f}",
                f"{row['of_framework_alone']:.2f}" if row["framework"] else "",
                f"{row['calls_per_search']:.3f}",
            )
            for row in result["rows"]
        ],
    )
    for name, times in result["times_peer"].items():
        print(f"{name}: {times:.1f} times its own loop ({GOAL:g} is the goal)")
    for name in result["missing"]:
        print(f"not installed: {name}")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    main()
