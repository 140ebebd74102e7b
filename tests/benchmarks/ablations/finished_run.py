"""A run as its folder looks when it is finished."""

from __future__ import annotations

import json

from benchmarks.ablations.registry import Arm
from benchmarks.ablations.runs import AblationsConfig, folder_of, training_of
from research_agent.config import as_json


def write_run(
    config: AblationsConfig,
    arm: Arm,
    seed: int,
    em: tuple[float, ...],
    worlds: tuple[str, ...] = ("in", "out"),
) -> None:
    """Write what a run leaves: its result, and if it learned by RL the logs of three steps."""
    folder = folder_of(config, arm, seed)
    folder.mkdir(parents=True)
    final = {
        name: {"em": value, "tokens": 30.0, "searches": 2.0, "reward": value}
        for name, value in zip(worlds, em, strict=True)
    }
    result = {
        "questions": config.questions,
        "seconds": 60.0 + seed,
        "final": final,
        "training": as_json(training_of(config, arm, seed)),
    }
    (folder / "result.json").write_text(json.dumps(result))
    if arm.by == "rl":
        lines: list[dict[str, float]] = [{"step": 0, "eval/em": 0.0}]
        lines += [
            {"step": n, "reward": n / 10, "episodes": 192, "env/searches": 1.0, "eval/em": n / 10}
            for n in (1, 2, 3)
        ]
        times = [{"step": line["step"], "seconds": line["step"]} for line in lines]
        for name, rows in (("metrics", lines), ("timings", times)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
