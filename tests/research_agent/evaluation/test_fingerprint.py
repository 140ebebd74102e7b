from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tyro

from research_agent.config import EvalConfig
from research_agent.environments import make_environments, read_fingerprints
from research_agent.errors import ModelError
from research_agent.evaluation.fingerprint import header, model_fingerprint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "state.safetensors"):
        (folder / name).write_text(name)
    return folder


def test_a_model_is_its_content_wherever_it_is(model: Path, tmp_path: Path) -> None:
    first = model_fingerprint(str(model))
    assert first.startswith("sha256 ")
    assert model_fingerprint(str(shutil.copytree(model, tmp_path / "copy"))) == first


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_every_file_of_a_model_counts(model: Path, name: str) -> None:
    first = model_fingerprint(str(model))
    (model / name).write_text("other")
    assert model_fingerprint(str(model)) != first
    (model / name).unlink()
    assert model_fingerprint(str(model)) != first


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda p: p.symlink_to("/dev/zero")])
def test_only_regular_files_are_read(model: Path, make: Callable[[Path], None]) -> None:
    make(model / "special.json")
    with pytest.raises(ModelError, match=r"special\.json is no regular file"):
        model_fingerprint(str(model))


def test_what_training_left_beside_a_model_does_not_count(model: Path) -> None:
    first = model_fingerprint(str(model))
    (model / "state.safetensors").write_text("other")
    (model / "state.json").write_text("{}")
    (model / "checksums.json").write_text('{"state.json": "it holds the seconds of training"}')
    assert model_fingerprint(str(model)) == first


def test_a_model_of_the_hub_is_its_commit() -> None:
    assert model_fingerprint("Qwen/Qwen2.5-7B", "abc123") == "Qwen/Qwen2.5-7B@abc123"


def test_a_header_names_what_episodes_depend_on_and_nothing_else() -> None:
    def of(*words: str) -> dict[str, object]:
        given = ["--env", "e", "--model", "m", "--output", "o", *words]
        config = tyro.cli(EvalConfig, args=given, config=(tyro.conf.OmitArgPrefixes,))
        return header(config, environments, "1")

    environments = make_environments("tests.research_agent.quiz_env:Quiz-v0", 2)
    first = of()
    assert first["model"] == {"name": "m", "fingerprint": "1"}
    assert first["environment"] == {"questions": "6"}
    assert {"code", "settings", "versions"} <= set(first)
    assert json.loads(json.dumps(first)) == first
    free = "--output p --limit 3 --samples-per-task 4 --max-in-flight 1 --max-prompt 9 --quiet"
    assert of(*free.split(), *["--json", "--device", "cpu", "--log-tokens", "--overlap"]) == first
    for flag, value in {
        "--temperature": 1.0,
        "--seed": 3,
        "--max-turn-tokens": 7,
        "--split": "dev",
    }.items():
        changed = of(flag, str(value))["settings"]
        assert isinstance(changed, dict)
        assert changed[flag[2:].replace("-", "_")] == value
        assert changed != first["settings"]


def test_an_environment_need_not_say_where_its_tasks_come_from() -> None:
    class Attribute:
        fingerprints = {"data": 3}  # noqa: RUF012

    class Method:
        def fingerprints(self) -> dict[str, str]:
            return {"data": "4"}

    assert read_fingerprints(object()) == {}
    assert read_fingerprints(Attribute()) == {"data": "3"}
    assert read_fingerprints(Method()) == {"data": "4"}
    for name in ("CopyLetter-v0", "CopyLetterNative-v0"):
        assert read_fingerprints(make_environments(f"tests.research_agent.toy_env:{name}", 2)) == {}
