"""An algorithm and a reward of a reader's own, as the documents show them, train on MiniWorld."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from research_agent.cli import main
from research_agent.run_logger import METRICS, read_lines

ROOT = Path(__file__).resolve().parents[3]


def _shown(document: str, name: str) -> str:
    """The file of that name, as a document shows it."""
    text = (ROOT / document).read_text(encoding="utf-8")
    (code,) = re.findall(rf"```python\n(# {re.escape(name)}\n.*?)```", text, flags=re.S)
    assert isinstance(code, str)
    return code


def _train(folder: Path, *words: str) -> list[dict[str, float]]:
    output = folder / "run"
    main(
        [
            *("train", "miniworld", "--steps", "2", "--prompts-per-step", "3", "--group-size", "4"),
            *("--eval-limit", "4", "--quiet", "--output", str(output), *words),
        ]
    )
    return [line for line in read_lines(output / METRICS) if "reward" in line]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_algorithm", "own_algorithm", "my_turns", "my_reward"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("document", "file", "words"),
    [
        (
            "docs/tutorials/write-an-algorithm.md",
            "my_algorithm.py",
            ["my_algorithm:Reinforce", "scale=0.5"],
        ),
        ("research_agent/README.md", "my_turns.py", ["my_turns:TurnReinforce", "gamma=1"]),
    ],
)
def test_an_algorithm_of_at_most_thirty_lines(
    document: str, file: str, words: list[str], folder: Path
) -> None:
    code = _shown(document, file)
    assert len(code.splitlines()) <= 30
    (folder / file).write_text(code)
    lines = _train(folder, "--algorithm", words[0], "--algorithm-args", words[1])
    assert len(lines) == 2
    assert all(line["learner/grad_norm"] > 0 for line in lines)


def test_what_it_logs_is_logged(folder: Path) -> None:
    shutil.copy(ROOT / "docs/examples/own_algorithm.py", folder)
    rule = ("--algorithm", "own_algorithm:LeaveOneOut", "--algorithm-args", "entropy_coef=0.001")
    assert all(line["learner/entropy_bonus"] > 0 for line in _train(folder, *rule))


def test_a_reward_of_ones_own(folder: Path) -> None:
    code = _shown("docs/how-to/own-reward.md", "my_reward.py")
    assert len(code.splitlines()) <= 30
    (folder / "my_reward.py").write_text(code)
    args = ("reward=my_reward:thrifty", "split=train", "template=question", "top_k=1")
    lines = _train(folder, "--env-args", *args)
    for line in lines:  # exact match, less 0.05 a search
        assert line["reward"] == pytest.approx(line["env/em"] - 0.05 * line["env/searches"])
