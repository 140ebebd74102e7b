from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

import research_agent
from research_agent.cli import main
from research_agent.config import TrainConfig, as_json, flatten
from research_agent.presets import PRESETS
from research_agent.run_folder import TrainSummary

EVAL = ["eval", "--env", "e", "--model", "m", "--output", "o"]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[object, str, str]:
    """Exit status, standard output and standard error of a command that ends by exiting."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    out, err = capsys.readouterr()
    return caught.value.code, out, err


def test_help_tells_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for command in ("train", "eval", "compare", "sft", "report"):
        assert f"\n  {command} " in out


def test_no_command_shows_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys)
    assert code == 2
    assert out.startswith("usage: research-agent")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "unknown command 'trian'; known: train, eval, compare, "),
        (["train"], "no preset given"),
        (["train", "miniwrld"], "unknown preset 'miniwrld'"),
        (
            ["train", "miniworld", "--prompts-per-step", "0"],
            "--prompts-per-step is 0; it must be at least 1",
        ),
        (["train", "miniworld", "--seed", "-1"], "--seed is -1; give a number from 0 to 2**64 - 1"),
        (["train", "miniworld", "--seed", str(2**64)], "--seed is 18446744073709551616; give"),
        (["train", "miniworld", "--betas", "1", "0.9"], "--betas has 1.0; both are from 0 to"),
        (["train", "miniworld", "--betas", "0.9", "-0.1"], "--betas has -0.1; both are from 0 to"),
        (["train", "miniworld", "--env-args", "top_k"], "expected KEY=VALUE"),
        (["train", "miniworld", "--steps", "many"], "many"),
        (["train", "miniworld", "--stesp", "3"], "--stesp"),
        (
            ["train", "smollm2-wiki", "--plan", "1xH100"],
            "(the preset smollm2-wiki's; research-agent sft smollm2-wiki makes it)",
        ),
        (["eval", "--model", "m", "--output", "o"], "--env"),
        ([*EVAL, "--limit", "0"], "--limit is 0"),
        ([*EVAL, "--seed", "-1"], "--seed is -1"),
        (["compare", "a", "b", "--seed", "-1"], "--seed is -1"),
        ([*EVAL, "--temperature", "-1"], "-1"),
        ([*EVAL, "--samples-per-task", "0"], "--samples-per-task is 0"),
        (
            [*EVAL, "--samples-per-task", "2"],
            "--temperature 0 plays the same episode again and again",
        ),
        ([*EVAL, "--log-tokens", "--endpoint", "http://h/v1"], "--log-tokens with --endpoint"),
        (["compare", "a"], "PATH"),
    ],
)
def test_mistakes_are_named_with_status_2(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    code, _, err = run(capsys, *words)
    assert code == 2
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize("words", [EVAL, ["sft", "miniworld"]])
def test_torchrun_is_refused_where_every_rank_would_do_all_the_work(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run(capsys, *words)
    assert code == 2
    assert f"{words[0]} runs in one process; torchrun started 2" in err
    monkeypatch.setenv("RANK", "1")  # rank 0 has said it
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)  # vLLM holds a group
    assert run(capsys, *words) == (2, "", "")


def test_help_lists_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "train", "--help")
    assert code == 0
    assert all(f"  {name} " in out for name in PRESETS)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_setting_of_a_preset_is_a_flag_with_help(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    code, out, _ = run(capsys, "train", name, "--help")
    assert code == 0
    settings = [key.split(".")[-1] for key, _ in flatten(as_json(TrainConfig())) if "." in key]
    missing = [s for s in settings if f"--{s.replace('_', '-')}" not in out]
    assert missing == []


def test_help_names_the_settings_of_the_algorithm(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "train", "research-7b", "--help")
    assert "kl_coef=0.001" in out


def test_evaluations_on_the_tasks_of_training_are_noted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with the environment of one's own corpus, where --eval-args was forgotten."""
    summary = TrainSummary("done", {})
    monkeypatch.setattr("research_agent.trainer.train", lambda config: summary)
    words = ["train", "miniworld", "--env", "research_env:SearchQA-v0", "--eval-every", "5"]
    for more, noted in ([], True), (["--eval-args", "split=dev"], False), (["--quiet"], False):
        main([*words, *more])
        assert ("evaluations play the tasks of training" in capsys.readouterr().err) == noted
    main(["train", "miniworld", "--env-args", "split=dev"])  # as the preset's --eval-args say too
    assert "evaluations play the tasks of training" in capsys.readouterr().err
    for more, noted in ([], True), (["--algorithm", "ppo"], False), (["--group-size", "2"], False):
        main(["train", "miniworld", "--group-size", "1", *more])
        assert ("leaves nothing to compare" in capsys.readouterr().err) == noted


def test_sft_hands_its_configuration_on(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Settings:
        count: int = 5

    seen: list[Settings] = []
    fake = SimpleNamespace(
        SFTConfig=Settings,
        PRESETS={"small": Settings()},
        DESCRIPTIONS={"small": "A small one."},
        run=seen.append,
    )
    monkeypatch.setattr(research_agent, "sft", fake, raising=False)
    main(["sft", "small", "--count", "7"])
    assert seen == [Settings(count=7)]


@pytest.mark.parametrize("size", ["1", "2"])
def test_a_rank_ends_with_its_status_after_all_is_written(size: str) -> None:
    """Other than Python, a rank does not dismantle what its threads may still use."""

    def ended(main: str) -> tuple[int, str, str]:
        program = f"""
import atexit, os, sys
from research_agent import cli
class Remains:
    write = os.write
    def __del__(self): Remains.write(1, b"dismantled\\n")
remains = Remains()
atexit.register(print, "last words")
def failing(): 1 / 0
cli.main = lambda argv: {main}
cli.program()
"""
        environment = os.environ | {"WORLD_SIZE": size}
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    end = "last words\n" if size == "2" else "last words\ndismantled\n"
    assert ended("print('done')") == (0, f"done\n{end}", "")
    assert ended("sys.exit(130)") == (130, end, "")
    status, _, errors = ended("failing()")
    assert status == 1
    assert "ZeroDivisionError: division by zero" in errors
