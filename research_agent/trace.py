"""A timeline of a run: when each slot samples or waits for its environment, and when it learns.

The file is an array of Chrome's trace events, which https://ui.perfetto.dev and chrome://tracing
open. Events are appended as they end, and the format needs no closing bracket, so the trace of a
run that was killed opens too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research_agent.engines.base import (
    Completion,
    Engine,
    Interruptible,
    SamplingParams,
)
from research_agent.environments import (
    Action,
    Environments,
    StepResult,
    Truncating,
    read_fingerprints,
)
from research_agent.rollout import keeps_turns
from research_agent.trees import Forking

if TYPE_CHECKING:
    from torch import Tensor

_TRAINER = 0  # the row of the trainer; slot i has row i + 1
_MIN_WAIT = 0.001  # seconds; shorter waits for environments are not shown


class Trace:
    """A file of spans of time.

    Args:
        path: the file, which is replaced.
        start: the ``start`` of another process's trace in this file; then spans are added to it.
    """

    def __init__(self, path: Path, start: float | None = None) -> None:
        if start is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("[\n", encoding="utf-8")
        self._file = path.open("a", encoding="utf-8", buffering=1)  # a line is whole, or not there
        self.start = time.perf_counter() if start is None else start
        self._rows: set[int] = set()

    def add(self, name: str, row: int, begin: float, **details: Any) -> None:
        """Write a span that ends now.

        Args:
            name: what was going on.
            row: where it is shown.
            begin: what ``time.perf_counter`` said then, in seconds.
            details: shown when the span is clicked.
        """
        if row not in self._rows:
            self._rows.add(row)
            shown = f"slot {row - 1}" if row else "trainer"
            self._write({"name": "thread_name", "ph": "M", "tid": row, "args": {"name": shown}})
            self._write(
                {"name": "thread_sort_index", "ph": "M", "tid": row, "args": {"sort_index": row}}
            )
        micro, lasted = (begin - self.start) * 1e6, (time.perf_counter() - begin) * 1e6
        span = {"ts": round(micro, 1), "dur": round(lasted, 1)}
        self._write({"name": name, "ph": "X", "tid": row, **span, "args": details})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"pid": 0, **event}) + ",\n")


@contextmanager
def span(trace: Trace | None, name: str) -> Iterator[None]:
    """Show the block as a span of the trainer, if there is a trace."""
    begin = time.perf_counter()
    yield
    if trace:
        trace.add(name, _TRAINER, begin)


class TracedEngine:
    """An engine whose turns and new weights are shown in a trace."""

    def __init__(self, engine: Engine, trace: Trace) -> None:
        self.max_context = engine.max_context
        self._engine = engine
        self._trace = trace
        self._since: dict[int, float] = {}  # by slot: when its turn was submitted
        if isinstance(engine, Forking):
            self.fork = engine.fork  # no method: this engine is ``Forking`` only if that one is

    @property
    def busy(self) -> int:
        """Number of slots with a turn under way."""
        return self._engine.busy

    @property
    def keeps_turns(self) -> bool:
        """Whether the engine takes new weights while turns are under way."""
        return keeps_turns(self._engine)

    def submit(self, slot: int, tokens: Sequence[int], params: SamplingParams) -> None:
        """Let the engine sample a turn."""
        self._since[slot] = time.perf_counter()
        self._engine.submit(slot, tokens, params)

    def step(self) -> list[Completion]:
        """Let the engine do one unit of work."""
        return self._shown(self._engine.step())

    def interrupt(self) -> list[Completion]:
        """End the turns under way, if the engine can."""
        engine = self._engine
        return self._shown(engine.interrupt()) if isinstance(engine, Interruptible) else []

    def release(self, slot: int) -> None:
        """Let the engine forget what a slot holds."""
        self._engine.release(slot)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Give the engine new weights."""
        with span(self._trace, "sync"):
            self._engine.load_weights(weights, version)

    def _shown(self, turns: list[Completion]) -> list[Completion]:
        for turn in turns:
            details = {
                "tokens": len(turn.tokens),
                "finish": turn.finish_reason,
                "version": turn.version,
            }
            self._trace.add("generate", turn.slot + 1, self._since[turn.slot], **details)
        return turns


class TracedEnvironments:
    """Environments whose steps are shown in a trace, from the action to the answer."""

    def __init__(self, environments: Environments, trace: Trace) -> None:
        self.num_envs = environments.num_envs
        self.num_tasks = environments.num_tasks
        self.branches = getattr(environments, "branches", False)
        self.terminators = environments.terminators
        self._environments = environments
        self._trace = trace
        self._since: dict[int, float] = {}

    def reset(
        self, assignments: Mapping[int, int], seed: int
    ) -> dict[int, tuple[str, Mapping[str, Any]]]:
        """Begin episodes."""
        return self._environments.reset(assignments, seed)

    def send(self, env_ids: Sequence[int], actions: Sequence[Action]) -> None:
        """Take actions."""
        self._since |= dict.fromkeys(env_ids, time.perf_counter())
        self._environments.send(env_ids, actions)

    def recv(self, min_results: int) -> list[StepResult]:
        """The results that are ready; where they are waited for, nothing is sampled."""
        begin = time.perf_counter()
        results = self._environments.recv(min_results)
        if time.perf_counter() - begin > _MIN_WAIT:
            self._trace.add("wait", _TRAINER, begin)
        for result in results:
            details = {"over": result.terminated or result.truncated}
            self._trace.add("environment", result.env_id + 1, self._since[result.env_id], **details)
        return results

    def truncate(self, env_id: int) -> StepResult | None:
        """End an episode whose budget of tokens is spent."""
        inner = self._environments
        return inner.truncate(env_id) if isinstance(inner, Truncating) else None

    def branch(self, source: int, targets: Sequence[int]) -> None:
        """Let the targets continue from the source's present state."""
        inner: Any = self._environments
        inner.branch(source, targets)

    def close(self) -> None:
        """Release what the environments hold."""
        self._environments.close()

    def fingerprints(self) -> dict[str, str]:
        """What the tasks depend on, as the environments say."""
        return read_fingerprints(self._environments)
