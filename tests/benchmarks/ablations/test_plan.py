"""The papers' ablations: what each compares, and what its runs need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ablations.__main__ import main
from benchmarks.ablations.numbers import EQUAL_BUDGETS, rows_of
from benchmarks.ablations.prepare import missing, write_worlds
from benchmarks.ablations.registry import ABLATIONS, BY_NAME, Ablation, Arm
from benchmarks.ablations.runs import AblationsConfig, folder_of, is_finished, training_of, world_of
from research_agent.algorithms import make_algorithm
from research_agent.config import TrainConfig
from research_agent.config_checks import validate
from research_agent.curriculum import parse_stages
from research_agent.errors import CheckpointError
from research_env.datasets import load_dataset
from research_env.rewards import resolve_reward
from tests.benchmarks.ablations.finished_run import write_run

CONFIG = AblationsConfig("all")


def arms() -> list[Arm]:
    return [arm for ablation in ABLATIONS for arm in ablation.arms]


def training(ablation: str, arm: str) -> TrainConfig:
    (found,) = (each for each in BY_NAME[ablation].arms if each.name == arm)
    return training_of(CONFIG, found, 0)


def test_arms_of_one_name_are_the_same_runs_and_have_a_folder_of_their_own() -> None:
    by_name = {arm.name: arm for arm in arms()}
    assert all(by_name[arm.name] == arm for arm in arms())
    assert len({folder_of(CONFIG, arm, 0) for arm in by_name.values()}) == len(by_name) == 33


@pytest.mark.parametrize("ablation", ABLATIONS, ids=lambda ablation: ablation.name)
def test_every_run_is_valid_and_plays_as_many_episodes(ablation: Ablation) -> None:
    for arm in ablation.arms:
        training = training_of(CONFIG, arm, 3)
        validate(training)
        parse_stages(training.rollout.stages)
        make_algorithm(training.algorithm.algorithm, **training.algorithm.algorithm_args)
        resolve_reward(training.environment.env_args.get("reward", "research"))
        episodes = training.rollout.prompts_per_step * training.rollout.group_size
        assert episodes == (180 if training.rollout.tree_branches else 192)  # whole trees
        assert training.run.seed == 3 and training.run.output == folder_of(CONFIG, arm, 3)
    rows = rows_of(ablation, {})
    for claim in ablation.claims:
        assert claim.number in (*ablation.numbers, *EQUAL_BUDGETS)
        assert claim.more in rows and claim.less in rows


def test_what_the_arms_change() -> None:
    base = training("algorithms", "grpo")
    assert base.algorithm.algorithm == "grpo" and base.algorithm.algorithm_args["kl_coef"] == 0.0

    def changed(ablation: str, arm: str) -> dict[str, Any]:
        ours = training(ablation, arm)
        parts = ("environment", "policy", "sampling", "rollout", "algorithm", "learner")
        return {
            f"{part}.{name}": value
            for part in parts
            for name, value in vars(getattr(ours, part)).items()
            if value != getattr(getattr(base, part), name)
        }

    assert changed("algorithms", "reinforce++") == {
        "algorithm.algorithm": "reinforce_pp",
        "algorithm.algorithm_args": {"baseline": "group", "kl_coef": 0.0},
    }
    assert changed("sft", "sft on right episodes") == {}  # as many episodes of the same policy
    rewards = {arm.name: training("reward", arm.name).environment for arm in BY_NAME["reward"].arms}
    assert {name: env.env_args["reward"] for name, env in rewards.items()} == {
        "f1 reward": "f1+2*format",
        "em reward": "em+2*format",
        "cem reward": "cem+2*format",
    }
    verbose = "runs/ablations/prepared/verbose"
    assert {training("reward", name).policy.model for name in rewards} == {verbose}
    hard = training("difficulty", "hard questions")
    assert hard.environment.env_args["grade"] == "hard"
    assert hard.run.eval_args == {"split": "dev", "grades": None, "grade": None}
    one, two = (training("stages", name) for name in ("one stage", "two stages"))
    first, last = parse_stages(two.rollout.stages)
    assert first.steps == 10 and first.env_args == {"reward": "0.5*retrieved+0.5*format"}
    assert last.env_args == {"reward": one.environment.env_args["reward"]}
    assert changed("mask", "grpo, unmasked") == {"learner.old_logprobs": "recomputed"}
    assert not BY_NAME["mask"].arms[1].masked
    assert training("strict", "research-strict").environment.env_args["reward"] == "research-strict"
    assert changed("start", "warm start") == {"policy.model": "runs/ablations/prepared/warm"}
    assert changed("start", "from nothing") == {"policy.model": "runs/ablations/prepared/nothing"}
    kl = changed("start", "grpo, KL 1e-3")["algorithm.algorithm_args"]
    assert kl == {"kl_coef": 1e-3, "entropy_coef": 0.0}
    assert changed("start", "grpo, G = 16") == {
        "rollout.group_size": 16,
        "rollout.prompts_per_step": 12,
    }


def test_what_the_arms_of_turns_change() -> None:
    base = training("turns", "grpo, outcome")
    assert base.environment.env_args["reward"] == "f1"
    assert base.environment.env_args["questions"] == "runs/ablations/worlds/hard/questions.jsonl"
    assert base.sampling.max_response > training("algorithms", "grpo").sampling.max_response
    for name in ("mt_grpo", "mt_ppo", "gigpo", "tree_grpo", "arpo"):
        assert training("turns", name).algorithm.algorithm == name
    rewards = {
        a.name: training("turns", a.name).environment.env_args for a in BY_NAME["turns"].arms
    }
    assert {args.get("turn_reward") for args in rewards.values()} == {
        None,
        "0.2*new_support",
        "0.1*first_search-0.1*repeated_query-0.1*invalid_action",
    }
    assert training("turns", "arpo").rollout.tree_choice == "entropy"
    assert training("turns", "tree_grpo, 120 tokens").rollout.tree_max_tokens == 120
    assert training("turns", "tree_grpo, 10 turns").rollout.tree_max_turns == 10


def test_the_hard_world(tmp_path: Path) -> None:
    config = replace(CONFIG, output=tmp_path)
    write_worlds(config, ["hard"])
    args = world_of(config, "hard")
    chosen = {key: args[key] for key in ("questions", "corpus")}
    data = {split: load_dataset("custom", split=split, **chosen) for split in ("train", "dev")}
    assert (len(data["train"].questions), len(data["dev"].questions)) == (4000, 400)
    assert {q.hops for q in data["dev"].questions} == {3, 4, 5, 6}
    assert all(q.supporting for q in data["dev"].questions)


def test_what_must_be_prepared(tmp_path: Path) -> None:
    config = replace(CONFIG, output=tmp_path)
    assert missing(config, BY_NAME["difficulty"].arms) == ["grades.jsonl"]
    assert missing(config, BY_NAME["start"].arms) == ["nothing", "warm"]
    (tmp_path / "prepared" / "warm").mkdir(parents=True)
    assert missing(config, BY_NAME["start"].arms) == ["nothing"]


def test_the_worlds_share_no_name_and_each_has_relations_of_its_own(tmp_path: Path) -> None:
    config = replace(CONFIG, output=tmp_path)
    write_worlds(config)
    names: dict[str, set[str]] = {}
    relations: dict[str, set[str]] = {}
    for world in ("in", "out"):
        args = world_of(config, world)
        chosen = {key: args[key] for key in ("questions", "corpus")}
        data = {split: load_dataset("custom", split=split, **chosen) for split in ("train", "dev")}
        assert (len(data["train"].questions), len(data["dev"].questions)) == (4000, 400)
        asked = [q for each in data.values() for q in each.questions]
        relations[world] = {
            hop.question.rsplit(" ", 1)[1] for q in asked for hop in q.decomposition
        }
        assert data["dev"].corpus is not None
        names[world] = {passage.title for passage in data["dev"].corpus}
    assert names["in"].isdisjoint(names["out"])
    assert relations["out"] - relations["in"] == {"spouse", "writer", "chair", "twin", "poet"}
    assert relations["in"] - relations["out"] == {"employer", "studio", "seat", "architect", "ally"}
    before = (tmp_path / "worlds" / "in" / "questions.jsonl").stat().st_mtime_ns
    write_worlds(config)
    assert (tmp_path / "worlds" / "in" / "questions.jsonl").stat().st_mtime_ns == before


def test_a_result_counts_for_its_own_settings(tmp_path: Path) -> None:
    config = replace(CONFIG, output=tmp_path)
    arm = BY_NAME["length"].arms[0]
    assert not is_finished(config, arm, 0)
    write_run(config, arm, 0, em=(0.5, 0.4))
    assert is_finished(config, arm, 0)
    assert not is_finished(replace(config, questions=100), arm, 0)
    with pytest.raises(CheckpointError, match="another configuration"):
        is_finished(replace(config, prompts_per_step=12), arm, 0)


def test_a_folder_is_of_one_number_of_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["length", "--output", str(tmp_path / "out"), "--seeds", "--workers", "1"]
    main(words)  # no seed, no run
    main(words)
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--steps", "40"])
    assert "holds runs with {'steps': 30" in capsys.readouterr().err
