"""The command line: ``python -m benchmarks.real``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from unittest.mock import patch

import tyro

from benchmarks.real.results import in_markdown, read_results
from benchmarks.real.speed import measure_speed
from benchmarks.real.stages import RealConfig, plan, run_stage, scale_of
from benchmarks.real.tiny_data import write_tiny_data
from research_agent.errors import ConfigError, ResearchAgentError
from research_agent.formats import read_object
from research_agent.system.files import write_atomic
from research_env.errors import ResearchEnvError

FIXED = ("model", "seed", "tiny", "gpu", "precision", "questions", "demonstrations")
"""Settings with which a run is continued: finished stages are not made again."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stages that are missing, and print what came out."""
    config = tyro.cli(RealConfig, args=argv, prog="python -m benchmarks.real")
    try:
        print(run(config))
    except (ResearchAgentError, ResearchEnvError) as error:
        print(f"benchmarks.real: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where this one was", file=sys.stderr)
        sys.exit(130)


def run(config: RealConfig) -> str:
    """Run the stages that are missing; write results.json and results.md.

    Returns:
        The results in Markdown.

    Raises:
        ConfigError: a stage failed, ``until`` names none, or the folder holds a run with other
            settings.
    """
    config = replace(config, output=config.output.absolute())
    scale, model, data = scale_of(config), config.model, None
    if config.tiny:
        model, data = "miniworld-starter", config.output / "data"
        write_tiny_data(data, config.seed)
    names = [stage.name for stage in plan(config, scale, model)]
    if config.until not in (None, *names):
        raise ConfigError(f"no stage is named {config.until!r}; there is {', '.join(names)}")
    config.output.mkdir(parents=True, exist_ok=True)
    _require_same(config)
    with patch.dict(os.environ, {} if data is None else {"RESEARCH_DATA": str(data)}):
        speed = measure_speed(config, model, scale)
        for number, name in enumerate(names):
            stage = plan(config, scale, model)[number]
            if not stage.done():
                run_stage(stage, config.output)
            if name == config.until:
                break
    results = read_results(config, model, scale, speed)
    write_atomic(config.output / "results.json", json.dumps(results, indent=1) + "\n")
    text = in_markdown(results)
    write_atomic(config.output / "results.md", text)
    return text


def _require_same(config: RealConfig) -> None:
    """Note the settings of a run in its folder, or compare them with those that it has.

    Raises:
        ConfigError: they differ.
    """
    path = config.output / "run.json"
    now = {name: getattr(config, name) for name in FIXED}
    if not path.is_file():
        write_atomic(path, json.dumps(now) + "\n")
    before = read_object(path, ConfigError, "remove it, or give another --output")
    differing = [
        f"{name} {before.get(name)!r}, not {value!r}"
        for name, value in now.items()
        if before.get(name) != value
    ]
    if differing:
        raise ConfigError(
            f"{config.output} holds a run with {', '.join(differing)}; give another --output, or "
            "the settings of that run"
        )


if __name__ == "__main__":
    main()
