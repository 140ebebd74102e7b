"""What the stages left in their folders, as data and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.real.stages import HELD_OUT, TRAINED_ON, RealConfig, Scale, seconds_by_stage

TABLES = {"before": "warm start", "after": "GRPO", "blanked": "GRPO, results blanked"}
PAPER_TABLES = {
    "zero-shot": "Zero-shot, with the papers' prompts through the chat template:",
    "trained": "The trained weights, with the same prompts:",
}
CURVES = {
    "reward": "reward",
    "env/searches": "searches",
    "env/support_recall": "support recall",
    "env/em": "EM",
    "eval/reward": "held-out reward",
    "eval/searches": "searches",
    "eval/support_recall": "support recall",
    "eval/em": "EM",
}
METRICS = ("em", "f1", "cem", "format", "searches", "support_recall")


def read_results(
    config: RealConfig, model: str, scale: Scale, speed: Mapping[str, float]
) -> dict[str, Any]:
    """Read everything that was measured so far.

    Args:
        config: output folder and seed.
        model: the untrained model.
        scale: what was run.
        speed: what ``measure_speed`` returned.

    Returns:
        ``before``, ``after`` and ``blanked`` (data set to summary), ``paper_tables`` (name to
        method to data set to summary), ``curve`` and ``timings`` (the logs of GRPO), ``seconds``
        (by stage), ``speed``, and what was run. A stage that has not run is left out.
    """
    from research_agent.run_logger import read_lines  # noqa: PLC0415

    output = config.output
    tables: dict[str, dict[str, Any]] = {}
    for name in TABLES:
        for dataset in (*TRAINED_ON, HELD_OUT):
            path = output / name / dataset / "summary.json"
            if path.is_file():
                tables.setdefault(name, {})[dataset] = _read(path)
    papers = {
        name: _cells(path)
        for name in PAPER_TABLES
        if (path := output / name / "table.json").is_file()
    }
    return {
        "model": model,
        "seed": config.seed,
        "scale": asdict(scale),
        "speed": dict(speed),
        "seconds": seconds_by_stage(output),
        "paper_tables": papers,
        "curve": read_lines(output / "grpo" / "metrics.jsonl"),
        "timings": read_lines(output / "grpo" / "timings.jsonl"),
        **tables,
    }


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _cells(table: Path) -> dict[str, dict[str, Any]]:
    """The summaries of a papers' table: method to data set to summary."""
    return {
        row["label"]: {
            dataset: _read(Path(cell["folder"]) / "summary.json")
            for dataset, cell in row["cells"].items()
        }
        for row in _read(table)["rows"]
    }


def in_markdown(results: Mapping[str, Any]) -> str:
    """The results of ``read_results`` as tables and lists."""
    lines = [f"Model {results['model']}, seed {results['seed']}.", ""]
    for name, methods in results["paper_tables"].items():
        lines += [PAPER_TABLES[name], "", *_table("method", methods), ""]
    lines += _table("weights", {TABLES[name]: results[name] for name in TABLES if name in results})
    lines += [
        "",
        "GRPO, on training questions (sampled) and on held-out ones (greedy):",
        "",
        f"| step | {' | '.join(CURVES.values())} |",
        "|---:|" + "---:|" * len(CURVES),
    ]
    for line in results["curve"]:
        values = map(line.get, CURVES)
        shown = " | ".join("" if value is None else f"{value:.3f}" for value in values)
        lines.append(f"| {line['step']} | {shown} |")
    return "\n".join([*lines, "", *_times(results), ""])


def _table(first: str, rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A line for each summary, under a head whose first column has the name ``first``."""
    yield f"| {first} | data set | questions | {' | '.join(METRICS)} |"
    yield "|---|---|---:|" + "---:|" * len(METRICS)
    for label, summaries in rows.items():
        for dataset, summary in summaries.items():
            outside = ", not trained on" if dataset.lower() == HELD_OUT else ""
            cells = " | ".join(_with_interval(summary, metric) for metric in METRICS)
            yield f"| {label} | {dataset}{outside} | {summary['episodes']} | {cells} |"


def _with_interval(summary: Mapping[str, Any], metric: str) -> str:
    value = summary.get("metrics", {}).get(metric)
    if value is None:
        return "–"
    low, high = summary.get("intervals", {}).get(metric, (None, None))
    return f"{value:.3f}" if low is None else f"{value:.3f} ({low:.3f} to {high:.3f})"


def _times(results: Mapping[str, Any]) -> list[str]:
    """How fast this machine is, how long each stage took, and what GRPO's time went to."""
    lines = [
        "Tokens per second, measured here on a quiet or busy machine as it was, prefill and",
        "decoding with the transformers engine:",
    ]
    for name, value in results["speed"].items():
        if name not in ("threads", "rows"):
            lines.append(f"- {name.replace('_', ', ')}: {value:.0f}")
    lines += [f"- {stage}: {spent:.0f} s" for stage, spent in results["seconds"].items()]
    if timings := [line for line in results["timings"] if "collect" in line]:
        sums = {n: sum(line[n] for line in timings) for n in ("collect", "learn", "sync")}
        whole = max(1e-9, sum(sums.values()))
        parts = ", ".join(f"{name} {100 * value / whole:.0f} %" for name, value in sums.items())
        lines.append(f"- of GRPO's time: {parts}")
    return lines
