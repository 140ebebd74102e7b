from __future__ import annotations

import time
from pathlib import Path

from benchmarks.timeline import Config, Span, draw, one_step, read
from research_agent.trace import Trace, span


def test_a_step_of_a_trace_is_cut_out_and_drawn(tmp_path: Path) -> None:
    """The second of three steps is drawn; what began before it, or goes on after it, is cut."""
    trace = Trace(tmp_path / "trace.json")
    for number in range(3):
        with span(trace, "collect"):
            if number == 1:
                since = time.perf_counter()
            time.sleep(0.01)
    trace.add("environment", 2, since)  # from within the second to after the third
    trace.close()
    spans = one_step(read(tmp_path / "trace.json"))
    assert [each.name for each in spans] == ["collect", "environment"]
    collect, environment = spans
    assert collect.begin == 0
    assert 0.01 <= collect.end <= environment.end
    assert 0 <= environment.begin <= collect.end
    assert environment.row == 2

    picture = tmp_path / "picture.png"
    draw(
        {"one": spans, "other": [Span("update", 0, 0.0, 1.0)]},
        Config(output=picture, max_in_flight=2),
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
