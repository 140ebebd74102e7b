"""research_agent as a library: its public names, and that it does what the command line does."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest

import research_agent
from research_agent.cli import main
from tests.test_architecture import loaded_by

SMALL = ["--steps", "1", "--prompts-per-step", "2", "--eval-every", "0", "--quiet"]


def test_every_public_name_can_be_imported() -> None:
    assert len(research_agent.__all__) > 40
    for name in research_agent.__all__:
        assert getattr(research_agent, name) is not None
    assert set(research_agent.__all__) <= set(dir(research_agent))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = research_agent.Nothing


def test_every_algorithm_is_public() -> None:
    from research_agent.algorithms import ALGORITHMS

    assert {path.partition(":")[2] for path in ALGORITHMS.values()} <= set(research_agent.__all__)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(research_agent.__file__).read_text(encoding="utf-8"))
    (block,) = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == {n: f"research_agent.{m}" for n, m in research_agent._MODULES.items()}


def test_configurations_and_engines_without_torch() -> None:
    """What needs no model loads no torch, in a process of its own."""
    light = "from research_agent import PRESETS, Algorithm, EvalConfig, ScriptedEngine"
    assert loaded_by(light) & {"torch", "transformers"} == set()
    assert "torch" in loaded_by("from research_agent import train")


@pytest.mark.slow
def test_five_lines_of_python_do_what_the_command_line_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from research_agent import PRESETS, EvalConfig, PolicyConfig, evaluate_model, train

    preset = PRESETS["miniworld"]
    rollout = replace(preset.rollout, prompts_per_step=2)
    run = replace(preset.run, steps=1, eval_every=0, quiet=True, output=tmp_path / "python")
    summary = train(replace(preset, rollout=rollout, run=run))

    main(["train", "miniworld", *SMALL, "--output", str(tmp_path / "flags")])
    for file in ("metrics.jsonl", "checkpoints/step-000001/model.safetensors"):
        assert (tmp_path / "python" / file).read_bytes() == (tmp_path / "flags" / file).read_bytes()
    assert summary.numbers["steps"] == 1

    capsys.readouterr()
    played = EvalConfig(
        environment=preset.environment,
        policy=PolicyConfig(model=str(tmp_path / "python")),
        output=tmp_path / "eval",
        split="dev",
        limit=4,
        quiet=True,
    )
    means = evaluate_model(played)
    words = ["--env", preset.environment.env, "--model", str(tmp_path / "python")]
    words += ["--output", str(tmp_path / "eval-flags")]
    words += ["--env-args", "template=question", "top_k=1", "--split", "dev", "--limit", "4"]
    main(["eval", *words, "--quiet", "--json"])
    assert json.loads(capsys.readouterr().out)["metrics"] == means.metrics
