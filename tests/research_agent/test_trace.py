from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from research_agent.cli import main
from research_agent.engines.base import Interruptible
from research_agent.engines.scripted import ScriptedEngine
from research_agent.environments import StepResult
from research_agent.rollout import RolloutLoop, collect
from research_agent.trace import Trace, TracedEngine, TracedEnvironments, span
from tests.research_agent.test_rollout import END, RENDERER, Fake, Limits
from tests.research_agent.test_staleness import Unable
from tests.research_agent.test_trainer import final_bytes, flags


def read(path: Path) -> list[dict[str, Any]]:
    """As the viewers do: a closing bracket need not be there."""
    text = path.read_text().rstrip().removesuffix(",")
    events: list[dict[str, Any]] = json.loads(text + "]")
    return events


def spans(path: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in read(path) if event["ph"] == "X" and event["name"] == name]


def test_a_trace_can_be_read_at_any_moment(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "folder" / "trace.json")
    begin = time.perf_counter()
    for number in range(3):
        trace.add("work", 2, begin, number=number)
        assert len(spans(tmp_path / "folder" / "trace.json", "work")) == number + 1
    (first, *_) = spans(tmp_path / "folder" / "trace.json", "work")
    assert first["args"] == {"number": 0}
    assert first["tid"] == 2
    assert first["dur"] >= 0
    named = [
        e["args"]["name"]
        for e in read(tmp_path / "folder" / "trace.json")
        if e["ph"] == "M" and e["name"] == "thread_name"
    ]
    assert named == ["slot 1"]
    trace.close()


def test_turns_and_answers_are_shown_where_they_happen(tmp_path: Path) -> None:
    """Two slots; the environment takes 30 ms for each answer, and each episode has two turns."""

    class Slow(Fake):
        def recv(self, min_results: int) -> list[StepResult]:
            time.sleep(0.03)
            return super().recv(len(self.ready))

    trace = Trace(tmp_path / "trace.json")
    engine = TracedEngine(
        ScriptedEngine(lambda c, p: [*RENDERER.encode_text("abcde"), END], RENDERER), trace
    )
    environments = TracedEnvironments(Slow(2, random.Random(0)), trace)
    played = collect(engine, environments, RENDERER, [(i, 0) for i in range(4)], Limits())
    turns = sum(s.provenance == "action" for t in played for s in t.segments)
    trace.close()
    assert turns == 8
    generated, answered = (spans(tmp_path / "trace.json", n) for n in ("generate", "environment"))
    assert len(generated) == len(answered) == 8
    assert {event["tid"] for event in generated} == {1, 2}
    assert all(event["args"]["tokens"] == 6 for event in generated)
    assert all(event["dur"] >= 29_000 for event in answered)
    assert sum(event["args"]["over"] for event in answered) == 4
    waits = spans(tmp_path / "trace.json", "wait")
    assert len(waits) == 4  # in lockstep both answers are waited for together
    assert {event["tid"] for event in waits} == {0}
    for row in (1, 2):  # a slot does one thing at a time
        ours = sorted(
            (e["ts"], e["ts"] + e["dur"]) for e in (*generated, *answered) if e["tid"] == row
        )
        assert all(one[1] <= other[0] + 1 for one, other in pairwise(ours))


def test_a_traced_engine_is_the_engine(tmp_path: Path) -> None:
    def run(able: bool, traced: bool) -> Sequence[object]:
        pick = random.Random(1)
        engine: Any = ScriptedEngine(
            lambda c, p: [*RENDERER.encode_text("abc"), END],
            RENDERER,
            delay=lambda: pick.randint(0, 5),
        )
        engine = engine if able else Unable(engine)
        trace = Trace(tmp_path / "trace.json")
        if traced:
            engine = TracedEngine(engine, trace)
            assert isinstance(engine, Interruptible)
        wanted, later = [(0, 0), (1, 0)], [(2, 0), (3, 0)]
        loop = RolloutLoop(engine, Fake(2, pick), RENDERER, Limits())
        loop.enqueue([*wanted, *later])
        played = loop.finish(wanted)
        loop.suspend()
        engine.load_weights([], 3)
        trace.close()
        return played

    for able in (False, True):
        assert run(able, traced=True) == run(able, traced=False)
    assert len(spans(tmp_path / "trace.json", "sync")) == 0  # the untraced run wrote nothing
    run(able=True, traced=True)
    assert len(spans(tmp_path / "trace.json", "sync")) == 1


def test_a_span_without_a_trace_is_nothing() -> None:
    with span(None, "update"):
        pass


def test_a_run_with_a_trace_is_the_same_run(letters: Path, tmp_path: Path) -> None:
    more = ["--steps", "2", "--max-in-flight", "9", "--env-args", "turns=2"]
    main(flags(letters, tmp_path / "without", *more))
    path = tmp_path / "trace.json"
    main(flags(letters, tmp_path / "with", *more, "--trace", str(path)))
    assert final_bytes(tmp_path / "with") == final_bytes(tmp_path / "without")
    for name in ("collect", "update", "sync"):
        assert len(spans(path, name)) == 2
    (collected, _), (updated, _) = spans(path, "collect"), spans(path, "update")
    assert collected["ts"] + collected["dur"] <= updated["ts"] + 1
    assert len(spans(path, "generate")) == len(spans(path, "environment")) == 2 * 32 * 2
