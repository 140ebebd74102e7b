"""The papers' ablations: what each compares, what it makes of runs, and a small one."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from benchmarks.ablations import prepare, runs
from benchmarks.ablations.__main__ import main
from benchmarks.ablations.noise import MissingRetriever
from benchmarks.ablations.numbers import (
    EQUAL_BUDGETS,
    NUMBERS,
    FinishedRun,
    at_equal_budget,
    largest_fall,
    read_run,
    rows_of,
    self_correction,
    with_totals,
)
from benchmarks.ablations.prepare import missing, write_worlds
from benchmarks.ablations.registry import ABLATIONS, BY_NAME, Ablation, Arm, Claim
from benchmarks.ablations.report import draw, report, verdict, verdicts
from benchmarks.ablations.runs import AblationsConfig, folder_of, is_finished, training_of, world_of
from benchmarks.ablations.verbose_starter import demonstrations, verbose
from benchmarks.runs import run_all
from research_agent.algorithms import algorithm
from research_agent.config import TrainConfig, as_json
from research_agent.config_checks import validate
from research_agent.curriculum import parse_stages
from research_agent.errors import CheckpointError
from research_agent.evaluation.predictions import read_predictions
from research_agent.models.policy import load_model
from research_env.datasets import load_dataset, miniworld
from research_env.errors import RetrievalError
from research_env.retrieval.base import Hit, Passage
from research_env.rewards import reward

ROOT = Path(__file__).resolve().parents[2]
CONFIG = AblationsConfig("all")


def arms() -> list[Arm]:
    return [arm for ablation in ABLATIONS for arm in ablation.arms]


def training(ablation: str, arm: str) -> TrainConfig:
    (found,) = (each for each in BY_NAME[ablation].arms if each.name == arm)
    return training_of(CONFIG, found, 0)


# --- the plan -------------------------------------------------------------------------------------


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
        algorithm(training.algorithm.algorithm, **training.algorithm.algorithm_args)
        reward(training.environment.env_args.get("reward", "research"))
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
    _write_run(config, arm, 0, em=(0.5, 0.4))
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


# --- the engine that misses -----------------------------------------------------------------------


class _Two:
    """Finds two passages for every query, or fails."""

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit] | RetrievalError]:
        best = [Hit(Passage(name, name, ""), 1.0) for name in ("best", "next")][:top_k]
        return [RetrievalError("down") if query == "trouble" else best for query in queries]

    def close(self) -> None:
        pass


def test_an_engine_that_misses_gives_the_next_best() -> None:
    queries = [f"query {n}" for n in range(1000)]

    def found(miss: float, asked: Sequence[str], top_k: int = 1) -> list[list[str]]:
        answers = MissingRetriever(_Two(), miss).search(asked, top_k)
        return [[hit.passage.id for hit in a] for a in answers if not isinstance(a, RetrievalError)]

    assert found(0.0, queries) == [["best"]] * 1000
    assert found(1.0, queries) == [["next"]] * 1000
    assert found(1.0, queries, top_k=2) == [["next"]] * 1000
    some = found(0.2, queries)
    assert 150 < some.count(["next"]) < 250 and some.count(["best"]) + some.count(["next"]) == 1000
    assert found(0.2, queries[::-1]) == some[::-1]  # the same queries whenever they are asked
    assert found(0.2, [f"  QUERY  {n}" for n in range(1000)]) == some
    (error,) = MissingRetriever(_Two(), 0.2).search(["trouble"], 1)
    assert isinstance(error, RetrievalError)


def test_the_noisy_environment_is_searchqa_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    config = replace(CONFIG, output=tmp_path)
    write_worlds(config)
    (arm,) = BY_NAME["self-correction"].arms
    environment = training_of(config, arm, 0).environment
    for miss in (0.0, 1.0):
        args = {**environment.env_args, "miss": miss}
        single, many = gym.make(environment.env, **args), gym.make_vec(environment.env, 1, **args)
        single.reset(seed=0, options={"episode": 0})
        many.reset(seed=0, options={"episodes": [0]})
        question = single.unwrapped.episode.question  # type: ignore[attr-defined]
        action = f"<search> {question.decomposition[0].question} </search>"
        (found,) = single.step(action)[-1]["passage_ids"]
        (found_by_many,) = many.step([action])[-1]["passage_ids"][0]
        assert found == found_by_many
        assert (found == question.supporting[0]) == (miss == 0.0)
        single.close()
        many.close()


# --- numbers and verdicts -------------------------------------------------------------------------


def _search(*passages: str, query: str = "Ann home") -> dict[str, Any]:
    info = {"query": query, **({"passage_ids": list(passages)} if passages else {})}
    return {"provenance": "observation", "text": "", "tokens": 1, "info": info}


def _record(*observations: Mapping[str, Any], golds: tuple[str, ...] = ("a", "b")) -> Any:
    action = {"provenance": "action", "text": "", "tokens": 1}
    segments = [each for observation in observations for each in (action, observation)]
    info = {"supporting_ids": list(golds)}
    return {"void": False, "segments": [*segments, action], "info": info}


def test_self_correction() -> None:
    hint = {"provenance": "observation", "text": "", "tokens": 1, "info": {}}
    records = [
        _record(),  # never searched
        _record(_search("a", "x"), _search("b")),  # nothing useless
        _record(_search("x"), _search("a")),  # again, and found
        _record(_search("a"), _search(), _search("y"), hint),  # again, and not found
        _record(_search("x")),  # gave up
        _record(_search("x"), hint),  # a hint is no search
        _record(_search("x"), _search("a"), golds=()),  # nobody knows what is useless
        {**_record(_search("x"), _search("a")), "void": True},
    ]
    # Four of six episodes met a useless result; two of the four went on, and one found a gold.
    assert self_correction(records) == pytest.approx(
        {"met useless": 4 / 6, "searched again": 2 / 4, "recovered": 1 / 4}
    )
    assert self_correction(records[:2]) == {"met useless": 0.0}
    assert self_correction([]) == {}


def test_the_largest_fall() -> None:
    assert largest_fall([0.1, 0.2, 0.9, 0.3, 0.5, 0.2], window=1) == pytest.approx(0.7)
    # means of two: .15 .55 .6 .4 .35
    assert largest_fall([0.1, 0.2, 0.9, 0.3, 0.5, 0.2], window=2) == pytest.approx(0.25)
    assert largest_fall([1.0, 0.0]) == 0.0  # fewer than five steps are one mean
    assert largest_fall([]) == 0.0


def test_a_verdict_needs_ranges_that_do_not_overlap() -> None:
    claim = Claim("em in", "rl", "sft")
    assert verdict(claim, [0.5, 0.7], [0.3, 0.49]) == "as in the paper"
    assert verdict(claim, [0.3, 0.49], [0.5, 0.7]) == "the other way"
    assert verdict(claim, [0.5, 0.7], [0.3, 0.5]) == "cannot be told apart"
    assert verdict(claim, [0.5, 0.7], [0.6, 0.61]) == "cannot be told apart"
    assert verdict(claim, [0.5], [0.3, 0.4]) == "too few seeds to tell"
    assert verdict(claim, [], []) == "too few seeds to tell"
    unsaid = replace(claim, open=True)
    assert verdict(unsaid, [0.5, 0.7], [0.3, 0.4]) == "higher with rl"
    assert verdict(unsaid, [0.3, 0.4], [0.5, 0.7]) == "higher with sft"
    assert verdict(unsaid, [0.5, 0.7], [0.3, 0.6]) == "cannot be told apart"


def test_numbers_of_a_run() -> None:
    log = [{"step": 0, "eval/em": 0.1, "played": 0, "seconds": 0.0}]
    log += [
        {"step": n, "reward": n / 10, "env/format": 1.0 - n / 10, "env/searches": float(n)}
        for n in range(1, 10)
    ]
    final = {"in": {"em": 0.5, "tokens": 30.0, "answer words": 1.5}, "out": {"em": 0.25}}
    seen = FinishedRun(with_totals(log), final, 12.0)
    got = {name: find(seen) for name, (_, find) in NUMBERS.items()}
    assert got["em in"] == 0.5 and got["em out"] == 0.25
    assert got["tokens"] == 30.0 and got["answer words"] == 1.5 and got["seconds"] == 12.0
    assert got["f1 in"] is None  # not measured
    assert got["reward"] == pytest.approx(0.9)  # the last tenth of nine steps is one
    assert got["format early"] == pytest.approx((0.9 + 0.8 + 0.7) / 3)
    assert got["searches early"] == pytest.approx(2.0)
    assert NUMBERS["reward"][1](FinishedRun([], final, 1.0)) is None


def test_what_it_cost_to_reach_a_level() -> None:
    """After each step .1, .4, .5, .6; per step 10 tokens and 12 turns, of which four answer."""
    seen = FinishedRun(_steps([0.1, 0.4, 0.5, 0.6], tokens=10), {"hard": {"em": 0.25}}, 0.0)
    got = {name: find(seen) for name, (_, find) in NUMBERS.items()}
    assert (got["episodes to .5"], got["tokens to .5"], got["searches to .5"]) == (12, 30, 24)
    assert got["tokens to .3"] == pytest.approx(10 + 10 * 2 / 3)  # two thirds of the way to .4
    assert got["tokens to .8"] == math.inf
    assert NUMBERS["tokens to .8"][1](FinishedRun([], {}, 0.0)) is None
    assert (got["all tokens"], got["all searches"]) == (40, 32)
    assert (got["em hard"], got["em in"], got["em, T = 1"]) == (0.25, None, 0.6)


def _steps(em: Sequence[float], tokens: float) -> list[dict[str, Any]]:
    line = {"sampled_tokens": tokens, "sampled_turns": 12.0, "episodes": 4.0}
    log = [{"step": n, "eval/em": v, "played": 4 * n, **line} for n, v in enumerate(em, 1)]
    return with_totals([{"step": 0, "eval/em": 0.0, "played": 0}, *log])


def test_runs_are_compared_where_the_cheapest_ended() -> None:
    """It spent 20 tokens and 32 searches; the dear ones had .2 at 16 tokens and .3 at 24."""
    cheap = [FinishedRun(_steps([0.0, 0.3, 0.6, 0.9], tokens=5), {}, 0.0)]
    dear = [FinishedRun(_steps([0.1, 0.2, 0.3, 0.4, 0.8], tokens=8), {}, 0.0)] * 2
    one, other = at_equal_budget(dear, cheap, "all tokens")
    assert one == pytest.approx([0.25] * 2) and other == [0.9]
    one, other = at_equal_budget(cheap, dear, "all searches")
    assert one == [0.9] and other == pytest.approx([0.4] * 2)
    assert at_equal_budget([], [], "all tokens") == ([], [])
    assert at_equal_budget([FinishedRun([], {}, 0.0)], dear, "all tokens")[0] == []


def _answer(hops: int, em: float) -> str:
    """A line of predictions."""
    record = _record() | {"episode": hops, "sample": 0, "reward": em, "metrics": {"em": em}}
    return json.dumps(record | {"info": {"strata": {"hops": str(hops)}}}) + "\n"


def test_the_report_of_turns(tmp_path: Path) -> None:
    """Trees reach .3 with half of the tokens, and one seed of the chains never does."""
    config = replace(CONFIG, output=tmp_path)
    em = {"grpo, outcome": [[0.1, 0.1, 0.1], [0.5] * 3], "tree_grpo": [[0.5] * 3, [0.6] * 3]}
    arms = tuple(arm for arm in BY_NAME["turns"].arms if arm.name in em)
    for arm in arms:
        for seed, of_steps in enumerate(em[arm.name]):
            _write_run(config, arm, seed, em=(0.2,), worlds=("hard",))
            place = folder_of(config, arm, seed) / "final" / "hard"
            place.mkdir(parents=True)
            answers = [_answer(hops, right) for hops, right in ((4, 1.0), (5, 1.0), (6, 0.0))]
            (place / "predictions.jsonl").write_text("".join(answers))
            tokens = 60.0 if arm.name == "tree_grpo" else 120.0
            line = {"sampled_tokens": tokens, "sampled_turns": 12.0, "episodes": 4, "reward": 0.0}
            lines = [{"step": n, "eval/em": v, **line} for n, v in enumerate(of_steps, 1)]
            text = "".join(json.dumps(each) + "\n" for each in lines)
            (folder_of(config, arm, seed) / "metrics.jsonl").write_text(text)
    claims = tuple(c for c in BY_NAME["turns"].claims if {c.more, c.less} == em.keys())
    ablation = replace(BY_NAME["turns"], arms=arms, claims=claims)
    folder = report(config, ablation)
    text = (folder / "table.md").read_text()
    assert "| tree_grpo | 2 | 0.550 (0.500 to 0.600) | 4 (4 to 4) | 60 (60 to 60) |" in text
    assert "never (120 to never) |" in text
    assert [line.rpartition(": ")[2] for line in text.splitlines() if line.startswith("- ")] == [
        "cannot be told apart",  # at equal tokens .1 and .5 against .5 and .6
        "cannot be told apart",
        "as in the paper",  # 60 tokens against 120 and never
        "cannot be told apart",  # 8 searches each
    ]
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert rows["tree_grpo"]["em, 5+ hops"] == [0.5, 0.5]
    assert rows["grpo, outcome"]["tokens to .5"] == ["never", 120.0]
    runs_ = {arm.name: [run for i in (0, 1) if (run := read_run(config, arm, i))] for arm in arms}
    em_panel, *others = draw(ablation, runs_).axes
    assert [panel.get_title() for panel in (em_panel, *others)] == [
        "Exact match, held out, T = 1",
        "Reward in training",
        "Searches in training",
        "Support recall in training",
    ]
    grey, blue = em_panel.lines  # chains behind trees, over the tokens that were sampled
    assert (grey.get_xdata()[0], grey.get_xdata()[-1]) == (120, 360)
    assert (blue.get_xdata()[0], blue.get_xdata()[-1]) == (60, 180)
    assert [label.get_text() for label in em_panel.texts] == ["0.55", "0.30"]


def test_a_tiny_run_of_turns_is_reported_and_not_done_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of its arms: chains, trees within a budget, and a critic."""
    few = ("grpo, outcome", "tree_grpo, 10 turns", "mt_ppo")
    own = replace(
        BY_NAME["turns"], arms=tuple(a for a in BY_NAME["turns"].arms if a.name in few), claims=()
    )
    monkeypatch.setitem(BY_NAME, "turns", own)
    words = ["turns", "--tiny", "--workers", "1", "--output", str(tmp_path)]
    main(words)
    table = (tmp_path / "turns" / "table.md").read_text()
    assert all(f"| {name} | 1 |" in table for name in few)
    rows = json.loads((tmp_path / "turns" / "results.json").read_text())["rows"]
    assert all(values["all tokens"][0] > 0 for values in rows.values())
    assert (tmp_path / "turns" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    capsys.readouterr()
    main(words)
    assert "3 runs, 0 of them to do" in capsys.readouterr().err


def test_rows_over_time() -> None:
    def at(step: int, tokens: float) -> dict[str, float]:
        return {"step": step, "eval/em": 0.5, "eval/tokens": tokens, "eval/searches": 1.0}

    log = [at(0, 10.0), {"step": 1, "reward": 1.0}, at(5, 20.0), at(8, 30.0), at(9, 40.0)]
    rows = rows_of(
        BY_NAME["length"], {"grpo": [FinishedRun(log, {}, 0.0), FinishedRun(log, {}, 0.0)]}
    )
    assert list(rows) == ["before", "half-way", "after"]
    assert [rows[moment]["tokens"] for moment in rows] == [[10.0] * 2, [20.0] * 2, [40.0] * 2]
    assert rows["after"]["turns"] == []


def _write_run(
    config: AblationsConfig,
    arm: Arm,
    seed: int,
    em: tuple[float, ...],
    worlds: tuple[str, ...] = ("in", "out"),
) -> None:
    folder = folder_of(config, arm, seed)
    folder.mkdir(parents=True)
    final = {
        name: {"em": value, "tokens": 30.0, "searches": 2.0, "reward": value}
        for name, value in zip(worlds, em, strict=True)
    }
    result = {
        "questions": config.questions,
        "seconds": 60.0 + seed,
        "final": final,
        "training": as_json(training_of(config, arm, seed)),
    }
    (folder / "result.json").write_text(json.dumps(result))
    if arm.by == "rl":
        lines: list[dict[str, float]] = [{"step": 0, "eval/em": 0.0}]
        lines += [
            {"step": n, "reward": n / 10, "episodes": 192, "env/searches": 1.0, "eval/em": n / 10}
            for n in (1, 2, 3)
        ]
        times = [{"step": line["step"], "seconds": line["step"]} for line in lines]
        for name, rows in (("metrics", lines), ("timings", times)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three seeds of RL and of SFT: apart in domain, overlapping out of it."""
    config = replace(CONFIG, output=tmp_path)
    ablation = BY_NAME["sft"]
    rl, sft = ablation.arms
    for seed, (ours, theirs) in enumerate([(0.8, 0.3), (0.6, 0.5), (0.7, 0.4)]):
        _write_run(config, rl, seed, em=(ours, 0.5))
        _write_run(config, sft, seed, em=(theirs, 0.25 * (seed + 1)))
    folder = report(config, ablation)
    said = capsys.readouterr().out
    assert "RL is better than SFT in and out of domain" in said and "R1-Searcher" in said
    text = (folder / "table.md").read_text().splitlines()
    assert "| run | seeds | em in | em out | tokens | searches | seconds |" in text
    row = "| grpo | 3 | 0.700 (0.600 to 0.800) | 0.500 (0.500 to 0.500) | 30.0 (30.0 to 30.0) |"
    assert any(line.startswith(row) for line in text)
    assert text[-2:] == [
        "- em in: grpo > sft on right episodes: 0.700 (0.600 to 0.800) against "
        "0.400 (0.300 to 0.500): as in the paper",
        "- em out: grpo > sft on right episodes: 0.500 (0.500 to 0.500) against "
        "0.500 (0.250 to 0.750): cannot be told apart",
    ]
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert rows["grpo"]["em in"] == [0.8, 0.6, 0.7]


def test_an_ablation_without_runs_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = report(replace(CONFIG, output=tmp_path), BY_NAME["mask"])
    assert "? against ?: too few seeds to tell" in capsys.readouterr().out
    assert not (folder / "curves.png").exists()


def test_open_questions_have_no_side() -> None:
    ablation = BY_NAME["strict"]
    rows = {
        name: {key: [0.5, 0.6] for key in ablation.numbers} for name in ("grpo", "research-strict")
    }
    first = verdicts(ablation, rows, {})[0]
    assert first.startswith("em in: research-strict and grpo: 0.550 (0.500 to 0.600) against")
    assert first.endswith("cannot be told apart")


# --- the processes that do the runs ---------------------------------------------------------------


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


# --- the command ----------------------------------------------------------------------------------


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
