"""How many searches of a training run the engine is spared.

``python -m benchmarks.saved_searches [--steps 40] [--json]``

The shipped starter is trained by GRPO in MiniWorld (24 questions x 8 samples per step, as in the
demo), twice with the same seed: with coalescing and a cache, as by default, and with coalescing
only. A query is *coalesced* when somebody is asking the same at that moment, and a *cache hit* when
its hits are in the cache. Rewards and losses of the two runs must be the same.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import tyro

from benchmarks.tables import print_table
from research_agent.presets import PRESETS
from research_env.vector_env import SearchQAVectorEnv

MINIWORLD = PRESETS["miniworld"]

ENV_ID = "SavedSearches-v0"
# Metrics that depend on the clock.
_TIMES = ("seconds", "collect", "learn", "sync", "episodes_per_second")


@dataclass(frozen=True)
class SavedConfig:
    """Train with and without a cache, and count the searches that reach the engine."""

    steps: int = 10
    """Training steps."""
    seed: int = 0
    """Seed of the runs."""
    json: bool = False
    """Print the results as one line of JSON."""


def main() -> None:
    """Run, and print what came of it."""
    config = tyro.cli(SavedConfig, prog="python -m benchmarks.saved_searches")
    results = {"with a cache": run(config, 10_000), "coalescing only": run(config, 0)}
    same = results["with a cache"]["curve"] == results["coalescing only"]["curve"]
    if config.json:
        print(json.dumps({"same_results": same, **results}))
    else:
        counted = ("asked", "searched", "coalesced", "cache_hits")
        rows = [
            (name, *(f"{result[key]:,}" for key in counted), f"{result['saved']:.1%}")
            for name, result in results.items()
        ]
        title = f"{config.steps} steps of GRPO in MiniWorld, seed {config.seed}"
        print_table(title, ("", *counted, "saved"), rows)
        print(f"rewards, losses and searches of all steps are {'' if same else 'NOT '}the same")
    sys.exit(0 if same else 1)


def run(config: SavedConfig, cache_size: int) -> dict[str, Any]:
    """Train once; returns the counts, and the metrics of each step without its times."""
    from research_agent.trainer import train  # noqa: PLC0415 - loads torch

    made: list[SearchQAVectorEnv] = []

    def make(num_envs: int, **settings: Any) -> SearchQAVectorEnv:
        made.append(SearchQAVectorEnv(num_envs, cache_size=cache_size, **settings))
        return made[-1]

    entry: Any = make  # Gymnasium's type of it wants every argument by name
    gym.register(ENV_ID, entry_point="research_env.env:SearchQAEnv", vector_entry_point=entry)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        settings = replace(
            MINIWORLD.run,
            steps=config.steps,
            seed=config.seed,
            output=output,
            eval_every=None,
            save_every=config.steps,
            log_episodes=0,
            quiet=True,
        )
        environment = replace(MINIWORLD.environment, env=ENV_ID)
        train(replace(MINIWORLD, environment=environment, run=settings))
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    del gym.registry[ENV_ID]
    curve = [{k: v for k, v in json.loads(line).items() if k not in _TIMES} for line in lines]
    names = ("asked", "searched", "coalesced", "cache_hits")
    counts = {name: sum(getattr(env.search_counts, name) for env in made) for name in names}
    return {**counts, "saved": 1 - counts["searched"] / counts["asked"], "curve": curve}


if __name__ == "__main__":
    main()
