"""What :mod:`benchmarks.adapters` plays in every framework: the same questions and actions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from research_env import Dataset, Question

SEARCHES = 3
ANSWER = "<think>I know.</think><answer>Ann</answer>"

Play = Callable[[int], None]


class System(NamedTuple):
    """One way to play all episodes.

    Attributes:
        framework: whose loop it is.
        name: what plays in it.
        play: plays a round, whose number is part of the queries.
    """

    framework: str
    name: str
    play: Play


class ServerProcess:
    """A server in a process of its own, as servers are.

    Attributes:
        url: its address.
    """

    def __init__(self, module: str, *words: str) -> None:
        """Start a module that prints its address first; :meth:`stop` ends it."""
        command = [sys.executable, "-m", module, *words]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()

    def stop(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.communicate()


def query(episode: int, turn: int, number: int) -> str:
    """What an episode searches for in a turn of a round."""
    return f"who founded company {number} {episode} {turn}"


def search(episode: int, turn: int, number: int) -> str:
    """The action that searches for it."""
    return f"<think>I look it up.</think><search>{query(episode, turn, number)}</search>"


def settings(url: str, episodes: int) -> dict[str, Any]:
    """Return the environment's settings, the same in all frameworks."""
    questions = tuple(Question(str(i), f"Who founded it, {i}?", ("Ann",)) for i in range(episodes))
    return {
        "dataset": Dataset("scripted", questions, None),
        "retriever": url,
        "protocol": "search-r1",
        "template": "question",
    }
