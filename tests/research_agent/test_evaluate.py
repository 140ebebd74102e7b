from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from research_agent.config import EvalConfig
from research_agent.engines.base import SamplingParams
from research_agent.engines.scripted import ScriptedEngine
from research_agent.environments import make_environments
from research_agent.errors import ConfigError
from research_agent.evaluate import Summary, as_record, evaluate, summarize
from research_agent.trajectory import Segment, Trajectory
from tests.research_agent.conftest import byte_tokenizer, codec_of

TOY = "tests.research_agent.toy_env:CopyLetter-v0"
CODEC = codec_of(byte_tokenizer())
END = CODEC.tokenizer.eos_token_id


def always_c(context: Sequence[int], params: SamplingParams) -> list[int]:
    return [*CODEC.encode_text("cé"), END]


def run(output: Path, limit: int | None = None, **env_args: Any) -> Summary:
    config = EvalConfig(env=TOY, model="", output=output)
    environments = make_environments(TOY, 3, env_args)
    engine = ScriptedEngine(always_c, CODEC)
    return evaluate(engine, environments, CODEC, config, output, limit=limit, show=False)


def test_every_task_once(tmp_path: Path) -> None:
    summary = run(tmp_path / "new", turns=2)
    # Of ab, bc, cd, da: half of bc and of cd is right, and a right turn is worth 1.
    assert summary == Summary(episodes=4, void=0, reward=0.5, metrics={"right": 0.25})
    lines = (tmp_path / "new" / "predictions.jsonl").read_text().splitlines()
    records = {record["episode"]: record for record in map(json.loads, lines)}
    assert len(lines) == len(records) == 4
    assert records[1] == {
        "episode": 1,
        "sample": 0,
        "reward": 1.0,
        "terminated": True,
        "truncated": False,
        "stop_reason": "answer",
        "void": False,
        "metrics": {"right": 0.5},
        "segments": [
            {"provenance": "prompt", "text": "b=", "tokens": 2},
            {"provenance": "action", "text": "cé", "tokens": 4},
            {"provenance": "observation", "text": "?c=", "tokens": 3},
            {"provenance": "action", "text": "cé", "tokens": 4},
        ],
        "info": {"stop_reason": "answer", "void": False},
    }
    assert json.loads((tmp_path / "new" / "summary.json").read_text()) == {
        "episodes": 4,
        "void": 0,
        "reward": 0.5,
        "metrics": {"right": 0.25},
    }
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "predictions.jsonl",
        "summary.json",
    ]


def test_limit(tmp_path: Path) -> None:
    assert run(tmp_path, limit=3).reward == pytest.approx(1 / 3)
    assert run(tmp_path, limit=30).episodes == 4
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 4


def test_an_environment_without_end_needs_a_limit(tmp_path: Path) -> None:
    environments = make_environments(TOY, 1)
    environments.num_tasks = None
    config = EvalConfig(env=TOY, model="", output=tmp_path)
    engine = ScriptedEngine(always_c, CODEC)
    with pytest.raises(ConfigError, match="no last task"):
        evaluate(engine, environments, CODEC, config, tmp_path, show=False)
    assert not list(tmp_path.iterdir())


def ended(reward: float, void: bool = False, **metrics: float) -> Trajectory:
    return Trajectory(
        episode=0,
        sample=0,
        segments=(Segment("prompt", (1,)),),
        reward=reward,
        terminated=True,
        truncated=False,
        void=void,
        metrics=metrics,
        info={"ids": np.array([1, 2]), "hits": (np.float32(0.5), None), "x": {"y": {1}}},
    )


def test_void_episodes_are_in_no_mean_and_missing_metrics_count_as_zero() -> None:
    episodes = [ended(1.0, em=1.0), ended(0.5), ended(9.0, void=True, em=9.0)]
    assert summarize(episodes) == Summary(episodes=2, void=1, reward=0.75, metrics={"em": 0.5})
    assert summarize([ended(1.0, void=True)]) == Summary(0, 1, 0.0, {})


def test_infos_become_plain_json() -> None:
    info = json.loads(json.dumps(as_record(ended(1.0))))["info"]
    assert info == {"ids": [1, 2], "hits": [0.5, None], "x": {"y": "{1}"}}
