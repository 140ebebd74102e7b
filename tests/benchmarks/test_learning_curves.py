"""The comparison of algorithms: its plan, its runs, and what it makes of their logs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import learning_curves
from benchmarks.learning_curves import (
    CurvesConfig,
    Result,
    Run,
    draw,
    folder_of,
    is_finished,
    main,
    plan,
    read,
    report,
    training_of,
)
from benchmarks.runs import unmasked
from research_agent.algorithms import ALGORITHMS, make_algorithm
from research_agent.config_checks import validate
from research_agent.trajectory import Group
from tests.research_agent.rollouts import action, observation, prompt, trajectory


def test_the_plan() -> None:
    runs = plan(CurvesConfig())
    assert len(runs) == len({(run.name, run.seed) for run in runs}) == 18 * 3
    assert {run.algorithm for run in runs} == set(ALGORITHMS)
    alone = plan(CurvesConfig(algorithms=("ppo",), ablations=("mask",), seeds=(7,)))
    assert [(run.name, run.seed) for run in alone] == [
        ("ppo", 7),
        ("grpo", 7),
        ("grpo, unmasked", 7),
    ]
    folders = {folder_of(CurvesConfig(), run) for run in runs}
    assert len(folders) == len(runs)


def test_every_run_has_the_same_budget_and_differs_as_it_says() -> None:
    config = CurvesConfig()
    for run in plan(config):
        training = training_of(config, run)
        validate(training)
        rollout, rule = training.rollout, training.algorithm
        assert (
            rollout.prompts_per_step * rollout.group_size
            == config.prompts_per_step * config.group_size
        )
        made: Any = make_algorithm(rule.algorithm, **rule.algorithm_args)
        assert getattr(made, "kl_coef", 0.0) == (1e-3 if "KL" in run.name else 0.0)
        assert getattr(made, "entropy_coef", 0.0) == 0.0
        assert training.learner.old_logprobs == ("sampler" if run.masked else "recomputed")
        assert training.learner.learning_rate == 2e-4


def test_unmasked_takes_observations_for_actions() -> None:
    seen: list[Group] = []

    class Fake:
        def update(self, groups: list[Group]) -> dict[str, float]:
            seen.extend(groups)
            return {}

    sample = trajectory(prompt(1), action([2], [-1.0]), observation(3, 4), action([5], [-2.0]))
    unmasked(Fake)().update([Group(0, [sample])])
    (got,) = seen[0].trajectories
    assert got.tokens == sample.tokens
    assert got.action_mask == [False, True, True, True, True]
    assert [s.logprobs for s in got.segments] == [None, (-1.0,), (0.0, 0.0), (-2.0,)]


def _write(config: CurvesConfig, run: Run, rewards: list[float], episodes: float) -> Path:
    folder = folder_of(config, run)
    folder.mkdir(parents=True)
    lines: list[dict[str, float]] = [{"step": 0, "eval/em": 0.25}]
    lines += [
        {"step": step, "reward": reward, "episodes": episodes, "eval/em": step / 10}
        for step, reward in enumerate(rewards, 1)
    ]
    times = [{"step": line["step"], "seconds": 2.0 * line["step"]} for line in lines]
    for name, rows in (("metrics", lines), ("timings", times)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_logs_are_read_up_to_the_budget(tmp_path: Path) -> None:
    """Twice the episodes per step: half the steps count."""
    config = CurvesConfig(output=tmp_path, steps=10, prompts_per_step=2, group_size=3)
    run = Run("dapo", 0, "dapo")
    folder = _write(config, run, [0.1 * n for n in range(1, 9)], episodes=12.0)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "rew')  # cut short by a kill
    result = read(config, run)
    assert result is not None
    assert result.episodes == [12, 24, 36, 48, 60]
    assert result.seconds == [2, 4, 6, 8, 10]
    assert result.evaluations[0] == (0, 0.25) and result.evaluations[-1] == (60, 0.5)
    first, last = result.at_ends(60)
    assert (first, last) == pytest.approx((0.1, 0.5))
    assert not is_finished(config, run)
    (folder / "checkpoints" / "step-000008").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(
        "".join(f'{{"step": {n}, "reward": 1, "episodes": 12}}\n' for n in range(1, 9))
    )
    assert is_finished(config, run)
    assert read(config, replace(run, seed=5)) is None


def test_the_table_and_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = CurvesConfig(output=tmp_path, steps=4, prompts_per_step=2, group_size=3)
    runs = [Run("grpo", seed) for seed in (0, 1)]
    runs += [Run("grpo, unmasked", 0, masked=False), Run("grpo, G = 2", 0, group_size=2)]
    for run in runs:
        _write(config, run, [0.1, 0.2, 0.3, 0.4 + 0.2 * run.seed], episodes=6.0)
    report(config, [result for run in runs if (result := read(config, run))])
    assert "grpo" in capsys.readouterr().out
    rows = (tmp_path / "table.md").read_text().splitlines()
    assert rows[2].split(" | ")[1:4] == ["2", "0.100 (0.100 to 0.100)", "0.500 (0.400 to 0.600)"]
    assert rows[3].startswith("| grpo, unmasked | 1 | 0.100 | 0.400 |")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert len(json.loads((tmp_path / "results.json").read_text())["runs"]) == 4


def test_each_run_has_a_panel_with_grpo_behind_it() -> None:
    def ends_at(reward: float, name: str) -> list[Result]:
        return [Result(Run(name, seed), [6, 12], [], [0.0, reward], []) for seed in (0, 1)]

    rewards = {"dapo": 0.2, "grpo": 0.4, **{f"other {n}": 0.6 for n in range(5)}}
    figure = draw({name: ends_at(reward, name) for name, reward in rewards.items()})
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == [name for name in rewards if name != "grpo"]
    for axes in panels:
        (grey, blue), end = axes.lines, rewards[axes.get_title()] / 2  # the mean of both steps
        assert (grey.get_ydata()[-1], blue.get_ydata()[-1]) == pytest.approx((0.2, end))
        assert grey.get_color() != blue.get_color()
        assert {label.get_text() for label in axes.texts} == {"0.20", f"{end:.2f}"}
    assert "Reward on MiniWorld" in figure.get_suptitle() and "Grey: grpo" in figure.get_suptitle()
    alone = draw({"ppo": ends_at(1.0, "ppo")})
    assert [len(axes.lines) for axes in alone.axes] == [1] and "Grey" not in alone.get_suptitle()


def test_an_unknown_algorithm(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="unknown algorithm 'grop'; known: grpo"):
        main(["--output", str(tmp_path), "--algorithms", "grop"])


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_the_whole_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small runs in processes of their own; the second time nothing is run again."""
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    small = "--steps 2 --prompts-per-step 2 --group-size 2 --eval-limit 2 --seeds 0 --workers 1"
    chosen = "--algorithms grpo dapo --ablations mask"
    words = ["--output", str(tmp_path / "out"), *small.split(), *chosen.split()]
    main(words)
    logs = sorted((tmp_path / "out" / "runs").rglob("metrics.jsonl"))
    assert [log.parent.parent.name for log in logs] == ["dapo", "grpo", "grpo-unmasked"]
    before = [log.read_bytes() for log in logs]
    masked, other = (json.loads(text.splitlines()[1]) for text in before[1:])
    assert masked["reward"] == other["reward"]  # the same episodes, and another lesson
    assert masked["learner/action_length"] < other["learner/action_length"]
    monkeypatch.setattr(learning_curves, "do", None)
    main(words)
    assert [log.read_bytes() for log in logs] == before
