from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from research_agent.config import (
    AlgorithmConfig,
    EnvironmentConfig,
    RunConfig,
    TrainConfig,
    as_json,
    complete,
    flatten,
)
from research_agent.config_changes import ENVIRONMENT, FREE, NEUTRAL, changes, require_same
from research_agent.config_checks import validate
from research_agent.errors import CheckpointError, ConfigError
from research_agent.presets import DESCRIPTIONS, PRESETS
from research_agent.settings import parse_settings


def parse(words: list[str], preset: TrainConfig) -> TrainConfig:
    config = tyro.cli(TrainConfig, args=words, default=preset, config=(tyro.conf.OmitArgPrefixes,))
    return complete(config, preset)


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("top_k=3", "top_k", 3),
        ("rate=1e-3", "rate", 1e-3),
        ("split=dev", "split", "dev"),
        ("retriever=none", "retriever", None),
        ("flag=True", "flag", True),
        ("flag=false", "flag", False),
        ("hops=[2, 3]", "hops", [2, 3]),
        ("path=a=b", "path", "a=b"),
        ("id=007", "id", "007"),
        ("empty=", "empty", ""),
        ('text="7"', "text", "7"),
    ],
)
def test_a_setting_is_read_as_json_or_else_as_text(word: str, key: str, value: object) -> None:
    assert parse_settings([word]) == {key: value}
    assert type(parse_settings([word])[key]) is type(value)


@pytest.mark.parametrize("word", ["top_k", "=3", ""])
def test_a_setting_without_key_or_value_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        parse_settings([word])


SCALARS = st.none() | st.booleans() | st.integers() | st.text("abc xyz_-/:", min_size=1)


@given(st.dictionaries(st.text("abc_", min_size=1), SCALARS | st.lists(st.integers())))
def test_settings_shown_as_default_parse_to_themselves(settings: dict[str, Any]) -> None:
    shown = [
        f"{key}={value}" if isinstance(value, str) else f"{key}={str(value).lower()}"
        for key, value in settings.items()
    ]
    assert parse_settings(shown) == settings


def test_flags_reach_every_concern_without_prefixes() -> None:
    words = (
        "--env mine:Env-v0 --env-args a=1 b=two --model m --chat-template --engine scripted "
        "--group-size 3 --algorithm my:Own --algorithm-args x=0.5 --minibatches 2 --steps 7 "
        "--seed 5 --output out --time-limit 1.5 --eval-every 4"
    )
    config = parse(words.split(), PRESETS["miniworld"])
    assert config.environment == EnvironmentConfig(env="mine:Env-v0", env_args={"a": 1, "b": "two"})
    assert (config.policy.model, config.policy.chat_template) == ("m", True)
    assert (config.sampling.engine, config.rollout.group_size) == ("scripted", 3)
    assert config.algorithm.algorithm == "my:Own"
    assert config.algorithm.algorithm_args == {"x": 0.5}
    assert config.learner.minibatches == 2
    assert (config.run.steps, config.run.seed, config.run.time_limit) == (7, 5, 1.5)
    assert (config.run.output, config.run.eval_every) == (Path("out"), 4)


@pytest.mark.parametrize("preset", ["miniworld", "research-7b"])
def test_arguments_that_equal_the_presets_are_given_all_the_same(preset: str) -> None:
    """With another environment or algorithm the preset's arguments count only if they are typed."""
    before = PRESETS[preset]
    env_args = ["split=train", "template=question", "top_k=1"]
    words = ["--env", "mine:Env-v0", "--algorithm", "gigpo", "--env-args", *env_args]
    words += ["--eval-args", "split=dev", "--algorithm-args", "kl_coef=0", "entropy_coef=0"]
    config = parse(words, before)
    wanted = {"split": "train", "template": "question", "top_k": 1}
    assert (config.environment.env_args, config.run.eval_args) == (wanted, {"split": "dev"})
    assert config.algorithm.algorithm_args == {"kl_coef": 0, "entropy_coef": 0}
    config = parse(["--env", "mine:Env-v0", "--algorithm", "gigpo"], before)
    assert (config.environment.env_args, config.run.eval_args) == ({}, {})
    assert config.algorithm.algorithm_args == {}


def test_a_folder_may_be_given_as_text() -> None:
    run = replace(PRESETS["miniworld"].run, output="runs/x")  # type: ignore[arg-type]
    assert run.output == Path("runs/x")
    assert run == replace(run, output=Path("runs/x"))


def test_no_two_settings_share_a_flag() -> None:
    names = Counter(key.split(".")[-1] for key, _ in flatten(as_json(TrainConfig())))
    assert [name for name, times in names.items() if times > 1] == []


def test_arguments_are_added_to_those_of_the_preset() -> None:
    preset = TrainConfig(
        environment=EnvironmentConfig(env="A-v0", env_args={"top_k": 5, "split": "train"}),
        algorithm=AlgorithmConfig(algorithm="grpo", algorithm_args={"clip": 0.2}),
        run=RunConfig(eval_args={"split": "dev"}),
    )
    config = parse(["--env-args", "top_k=1", "split=none", "--algorithm-args", "kl_coef=0"], preset)
    assert config.environment.env_args == {"top_k": 1, "split": None}
    assert config.algorithm.algorithm_args == {"clip": 0.2, "kl_coef": 0}
    assert config.run.eval_args == {"split": "dev"}


def test_another_environment_or_algorithm_drops_the_arguments_of_the_preset() -> None:
    preset = TrainConfig(
        environment=EnvironmentConfig(env="A-v0", env_args={"top_k": 5}),
        algorithm=AlgorithmConfig(algorithm="grpo", algorithm_args={"clip": 0.2}),
        run=RunConfig(eval_args={"split": "dev"}),
    )
    bare = parse(["--env", "B-v0", "--algorithm", "mine:Own"], preset)
    assert bare.environment.env_args == bare.algorithm.algorithm_args == bare.run.eval_args == {}
    given_ = parse(["--env", "B-v0", "--env-args", "size=3"], preset)
    assert given_.environment.env_args == {"size": 3}
    assert given_.algorithm.algorithm_args == {"clip": 0.2}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--prompts-per-step 0", "--prompts-per-step is 0"),
        ("--group-size 0", "--group-size is 0"),
        ("--max-turn-tokens 0", "--max-turn-tokens is 0"),
        ("--steps -1", "--steps is -1"),
        ("--keep 0", "--keep is 0"),
        ("--temperature 0", "--temperature is 0.0"),
        ("--temperature nan", "--temperature is nan"),
        ("--learning-rate nan", "--learning-rate is nan"),
        ("--max-void-fraction 1.5", "--max-void-fraction is 1.5"),
        (
            "--prompts-per-step 2 --minibatches 3",
            "--minibatches 3 is more than --prompts-per-step 2",
        ),
        ("--time-limit 0", "--time-limit is 0.0"),
    ],
)
def test_values_that_no_run_can_have_are_refused_by_name(words: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        validate(parse(words.split(), PRESETS["miniworld"]))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_valid_described_and_survive_the_command_line(name: str) -> None:
    preset = PRESETS[name]
    validate(preset)
    assert preset.preset == name
    assert name in DESCRIPTIONS
    assert parse([], preset) == preset


def test_research_has_the_settings_of_the_paper() -> None:
    config = PRESETS["research-7b"]
    assert (config.rollout.prompts_per_step, config.rollout.group_size) == (256, 5)
    assert (config.sampling.max_prompt, config.sampling.max_response) == (512, 8192)
    assert config.sampling.temperature == 1.0
    assert (config.learner.learning_rate, config.learner.minibatches) == (1e-6, 1)
    assert config.algorithm.algorithm_args == {"clip": 0.2, "kl_coef": 1e-3, "entropy_coef": 1e-3}
    assert config.environment.env_args["top_k"] == 5
    assert "max_searches" not in config.environment.env_args
    assert config.run.steps * 256 <= 2 * 19_938 < (config.run.steps + 1) * 256


def test_r1_searcher_has_the_settings_of_the_paper() -> None:
    config = PRESETS["r1-searcher-qwen"]
    assert (config.rollout.prompts_per_step, config.rollout.group_size) == (64, 16)
    assert (config.learner.learning_rate, config.learner.minibatches) == (2e-6, 4)
    assert config.environment.env_args["top_k"] == 3
    assert config.environment.env_args["max_searches"] == 8


def test_a_run_of_other_settings_is_refused_naming_each_difference() -> None:
    saved = as_json(PRESETS["miniworld"])
    config = PRESETS["miniworld"]
    other = replace(
        config,
        learner=replace(config.learner, learning_rate=0.5),
        environment=replace(config.environment, env_args={"split": "dev"}),
    )
    with pytest.raises(CheckpointError) as caught:
        require_same(changes(saved, other), Path("out"))
    message = str(caught.value)
    assert "learner.learning_rate: 0.0002 in the folder, 0.5 now" in message
    assert "environment.env_args" in message
    assert "seed" not in message
    assert "--output" in message


def test_what_changes_no_weight_may_differ() -> None:
    config = PRESETS["miniworld"]
    run = replace(config.run, steps=999, output=Path("elsewhere"), keep=9, eval_every=3, quiet=True)
    found = changes(as_json(config), replace(config, run=run))
    assert (found.results, found.neutral) == ({}, {})


def test_with_a_rollback_the_checkpoints_are_part_of_the_results() -> None:
    config = PRESETS["miniworld"]
    stops = replace(config.run, collapse=0.5, save_every=5, keep=3)
    rolls_back = replace(stops, on_collapse="rollback")
    for run, names in ((stops, []), (rolls_back, ["run.keep", "run.save_every"])):
        saved = as_json(replace(config, run=run))
        other = replace(config, run=replace(run, save_every=4, keep=2))
        assert list(changes(saved, other).results) == names


def test_eval_every_zero_means_never() -> None:
    config = PRESETS["miniworld"]
    validate(replace(config, run=replace(config.run, eval_every=0)))
    with pytest.raises(ConfigError, match="--eval-every is -1; it must not be negative"):
        validate(replace(config, run=replace(config.run, eval_every=-1)))


def test_every_setting_that_may_change_exists() -> None:
    assert dict(flatten(as_json(TrainConfig()))).keys() >= FREE | NEUTRAL | ENVIRONMENT
