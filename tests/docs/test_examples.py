"""Every program in docs/examples runs in an empty folder, and prints what its text promises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import forks

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"
RUN = {  # program -> its arguments, and lines that it prints
    "grpo_loop.py": (
        ["--steps", "1", "--prompts-per-step", "2", "--group-size", "4"],
        [r"step 1: mean reward \d\.\d{3}"],
    ),
    "own_algorithm.py": ([], ["runs/own is finished: 2 steps", r"last step: \d\.\d{3}"]),
    "own_paper.py": ([], [r"boxed\{answer\}", "<found>", "reward 1.0, ended True: answer"]),
    "own_reward.py": (
        [],
        ["right at once: 1.00", "two searches: 0.90", "wrong: 0.00", "runs/thrifty is finished"],
    ),
    "train_and_evaluate.py": (
        ["--steps", "1", "--questions", "4"],
        ["before: exact match", "after: exact match", "4 questions compared", "report.html"],
    ),
}


def run(folder: Path, program: str, arguments: list[str]) -> str:
    environment = {"RESEARCH_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = forks.run(str(EXAMPLES / program), *arguments, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("program", RUN)
def test_an_example_runs(program: str, tmp_path: Path) -> None:
    arguments, expected = RUN[program]
    output = run(tmp_path, program, arguments)
    for line in expected:
        assert re.search(line, output), output


@pytest.mark.elasticsearch
def test_elasticsearch_from_scratch(tmp_path: Path, elasticsearch: str) -> None:
    address = elasticsearch.partition("://")[2]
    output = run(tmp_path, "elasticsearch_from_scratch.py", [address])
    assert "3 passages in from-scratch" in output
    assert "Ada: Ada founded the company Nordwind." in output
    assert "reward 1.0, gold passages found: 100%" in output
    again = run(tmp_path, "elasticsearch_from_scratch.py", [address])
    assert "0 of them new" in again


def test_every_example_is_run_and_shown() -> None:
    programs = {path.name for path in EXAMPLES.glob("*.py")}
    assert programs == {*RUN, "elasticsearch_from_scratch.py"} | (
        programs & {"smollm2_from_wheel.py"}  # a test of its own runs this one
    )
    page = (ROOT / "docs/reference/examples.md").read_text(encoding="utf-8")
    for program in programs:
        assert f"../examples/{program}" in page


def test_the_loop_of_ones_own_is_short() -> None:
    lines = (EXAMPLES / "grpo_loop.py").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line.strip()]) <= 110
