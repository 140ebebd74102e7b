"""The command, and the processes that do the runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ablations import prepare, runs
from benchmarks.ablations.__main__ import main
from benchmarks.ablations.prepare import missing, write_worlds
from benchmarks.ablations.registry import ABLATIONS, BY_NAME
from benchmarks.ablations.runs import AblationsConfig, folder_of, is_finished
from benchmarks.ablations.verbose_starter import demonstrations, verbose
from benchmarks.runs import run_all
from research_agent.evaluation.predictions import read_predictions
from research_agent.models.policy import load_model
from research_env.datasets import miniworld
from tests.benchmarks.ablations.test_plan import arms

ROOT = Path(__file__).resolve().parents[3]


def test_workers_end_with_the_process_that_started_them() -> None:
    """Else a command that is killed and started again would write the same runs twice."""
    code = "import time; from benchmarks.runs import run_all; run_all(time.sleep, {'a': (99,)}, 1)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while len(found := children.read_text().split()) < 2:  # a worker, and Python's tracker
            time.sleep(0.1)
        time.sleep(1)
        process.kill()
    end = time.monotonic() + 60
    while any(map(_is_alive, found)):
        assert time.monotonic() < end, "a worker is left"
        time.sleep(0.1)


def _is_alive(process: str) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"  # ended, and nobody has asked how


def test_a_job_that_fails_is_told_and_the_others_are_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = {"good": (str(tmp_path / "made"),), "bad": (str(tmp_path / "no" / "made"),)}
    assert run_all(os.mkdir, jobs, 1, finished=3) == ["bad"]
    assert (tmp_path / "made").is_dir()
    said = capsys.readouterr().err
    assert "5 runs, 2 of them to do" in said and "bad: failed: FileNotFoundError" in said
    assert run_all(os.mkdir, {}, 1) == []


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list"])
    said = capsys.readouterr().out
    assert all(ablation.name in said and ablation.finding in said for ablation in ABLATIONS)


def test_an_unknown_ablation() -> None:
    with pytest.raises(
        SystemExit, match=r"unknown ablation 'masks'; known: algorithms, .*, all, list"
    ):
        main(["masks"])


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AblationsConfig:
    """Worlds of few questions, all of one hop: the starter gets some of those right."""
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare, "QUESTIONS", {"train": 40, "dev": 10})
    monkeypatch.setattr(runs, "SLOTS", 32)
    monkeypatch.setattr(miniworld, "HOPS", {1: 1.0})
    config = AblationsConfig(
        "all", tmp_path / "out", steps=2, prompts_per_step=8, group_size=2, questions=4
    )
    write_worlds(config)
    return config


@pytest.mark.slow
def test_sft_plays_as_many_episodes_and_learns_the_right_ones(small: AblationsConfig) -> None:
    (arm,) = (each for each in BY_NAME["sft"].arms if each.by == "sft")
    runs.do(small, arm, 0)
    folder = folder_of(small, arm, 0)
    _, played = read_predictions(folder / "played")
    assert len(played) == 2 * 8 * 2
    kept = (folder / "demonstrations.jsonl").read_text().splitlines()
    assert len(kept) == sum(record["metrics"]["em"] for record in played) > 0
    starter, learned = (load_model(name) for name in ("miniworld-starter", folder / "model"))
    assert any((a != b).any() for a, b in zip(*map(_weights, (starter, learned)), strict=True))
    result = json.loads((folder / "result.json").read_text())
    assert result["seconds"] > 0 and set(result["final"]) == {"in", "out"}
    for world, start in (("in", "0-dev-"), ("out", "1-dev-")):
        _, records = read_predictions(folder / "final" / world)
        assert len(records) == 4
        assert all(record["info"]["question_id"].startswith(start) for record in records)
    assert is_finished(small, arm, 0)


def _weights(model: Any) -> list[Any]:
    return [weight.detach() for weight in model.parameters()]


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (" done: director Ann </think> <answer> \\boxed{ Ann} </answer>", "\\boxed{ Ann director}"),
        (" done: birth 1912 after 1900 </think> <answer> Bo </answer>", "Bo birth"),
        ("<think> guess: Ann </think> <answer> \\boxed{ Ann} </answer>", "\\boxed{ Ann}"),
    ],
)
def test_a_needless_word_stands_behind_the_answer(said: str, answer: str) -> None:
    assert verbose(said) == f"{said.partition('<answer>')[0]}<answer> {answer} </answer>"


def test_some_of_the_starters_answers_are_verbose() -> None:
    last = [each[-1][1] for each in demonstrations(60, 1)]
    plain = [each[-1][1] for each in demonstrations(60, 1, share=0.0)]
    assert 5 < sum(a != b for a, b in zip(last, plain, strict=True)) < 40
    assert all(a in (b, verbose(b)) for a, b in zip(last, plain, strict=True))


@pytest.mark.slow
def test_what_runs_begin_with_is_made(
    small: AblationsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for start in prepare.STARTS:
        monkeypatch.setitem(prepare.STARTS, start, prepare.STARTS[start] | {"count": 12})
    monkeypatch.setattr(prepare, "GRADED", 8)
    names = ["grades.jsonl", "nothing", "verbose", "warm"]
    assert missing(small, arms()) == names
    for name in names:
        prepare.prepare(small, name)
    assert missing(small, arms()) == []
    grades = [json.loads(line) for line in (small.prepared / "grades.jsonl").open()]
    assert len(grades) == 8 and {g["samples"] for g in grades} == {prepare.GRADE_SAMPLES}
    started = ["miniworld-starter", *(str(small.prepared / name) for name in names[1:])]
    starter, nothing, verbose, warm = (_weights(load_model(name)) for name in started)
    assert any((a != b).any() for a, b in zip(warm, verbose, strict=True))
    assert [w.shape for w in starter] == [w.shape for w in nothing] == [w.shape for w in warm]
    near, far = (
        max(float((a - b).abs().max()) for a, b in zip(starter, other, strict=True))
        for other in (warm, nothing)
    )
    assert 0 < near < 0.01 < far
