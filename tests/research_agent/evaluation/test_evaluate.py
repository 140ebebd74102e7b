from __future__ import annotations

import gc
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import isnan, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from research_agent.cli import main
from research_agent.config import SamplingConfig
from research_agent.demonstrations import as_trajectory, demonstrations
from research_agent.engines.base import SamplingParams
from research_agent.engines.scripted import ScriptedEngine
from research_agent.environments import make_environments
from research_agent.errors import (
    ConfigError,
    ContextError,
    FolderInUseError,
    PredictionsError,
)
from research_agent.evaluation.difficulty import write_demonstrations
from research_agent.evaluation.evaluate import evaluate, record_evaluation
from research_agent.evaluation.fingerprint import model_fingerprint
from research_agent.evaluation.predictions import as_record, read_predictions
from research_agent.evaluation.summary import Outcome, Part, Summary, outcome, summarize
from research_agent.renderer import open_renderer
from research_agent.rollout import collect
from research_agent.system.files import folder_lock
from research_agent.trajectory import Segment, Trajectory
from tests import forks
from tests.research_agent.conftest import (
    byte_tokenizer,
    make_renderer,
    tiny_qwen2,
)
from tests.research_agent.quiz_env import Quiz

TOY = "tests.research_agent.toy_env:CopyLetter-v0"
QUIZ = "tests.research_agent.quiz_env:Quiz-v0"
RENDERER = make_renderer(byte_tokenizer())
END = RENDERER.tokenizer.eos_token_id
HEADER = {"model": {"name": "script", "fingerprint": "1"}, "versions": {"python": "3"}}

Record = dict[str, Any]
Script = Callable[[Sequence[int], SamplingParams], list[int]]

pytestmark = pytest.mark.usefixtures("one_thread")


def always(text: str) -> Script:
    def say(context: Sequence[int], params: SamplingParams) -> list[int]:
        return [*RENDERER.encode_text(text), END]

    return say


def drawn(context: Sequence[int], params: SamplingParams) -> list[int]:
    """Look it up once, and then say a letter that depends on the trajectory's seed alone."""
    if "!" not in RENDERER.decode(context):
        return [*RENDERER.encode_text(f"?{chr(97 + params.seed % 26)}"), END]
    return [*RENDERER.encode_text("abcd"[params.seed % 4]), END]


def run(
    output: Path,
    script: Script,
    env_args: dict[str, Any] | None = None,
    *,
    env: str = TOY,
    max_prompt: int = 512,
    **settings: Any,
) -> Summary:
    sampling = SamplingConfig(temperature=0.0, max_prompt=max_prompt)
    environments = make_environments(env, 3, env_args)
    engine = ScriptedEngine(script, RENDERER)
    return evaluate(engine, environments, RENDERER, sampling, output, show=False, **settings)


def quiz(output: Path, script: Script = drawn, **settings: Any) -> Summary:
    env_args = settings.pop("env_args", {})
    return run(output, script, env_args, env=QUIZ, **{"header": HEADER, **settings})


def in_order(output: Path) -> list[Record]:
    _, records = read_predictions(output)
    return sorted(records, key=lambda record: (record["episode"], record["sample"]))


# --- what is written ------------------------------------------------------------------------------


def test_every_task_once(tmp_path: Path) -> None:
    summary = run(tmp_path / "new", always("cé"), {"turns": 2})
    # The tasks are ab, bc, cd, da: half of bc and half of cd is right; a right turn is worth 1.
    assert (summary.episodes, summary.questions, summary.void, summary.samples) == (4, 4, 0, 1)
    assert summary.reward == 0.5
    assert summary.metrics == {"right": 0.25, "tokens": 8.0, "turns": 2.0}
    lines = (tmp_path / "new" / "predictions.jsonl").read_text().splitlines()
    records = {record["episode"]: record for record in map(json.loads, lines)}
    assert len(lines) == len(records) == 4
    assert records[1] == {
        "episode": 1,
        "sample": 0,
        "reward": 1.0,
        "terminated": True,
        "truncated": False,
        "stop_reason": "answer",
        "void": False,
        "metrics": {"right": 0.5},
        "segments": [
            {"provenance": "prompt", "text": "b=", "tokens": 2},
            {"provenance": "action", "text": "cé", "tokens": 4, "reward": 0.0, "end": "<|im_end|>"},
            {"provenance": "observation", "text": "?c=", "tokens": 3, "info": {}},
            {"provenance": "action", "text": "cé", "tokens": 4, "reward": 1.0, "end": "<|im_end|>"},
        ],
        "info": {"stop_reason": "answer", "void": False},
    }
    written = json.loads((tmp_path / "new" / "summary.json").read_text())
    assert written == json.loads(json.dumps(asdict(summary)))
    assert sorted(p.name for p in (tmp_path / "new").glob("[!.]*")) == [
        "predictions.jsonl",
        "summary.json",
    ]


def test_an_observation_says_what_came_with_it_and_is_not_said_elsewhere(tmp_path: Path) -> None:
    quiz(tmp_path, limit=1, log_tokens=True)
    header, [record] = read_predictions(tmp_path)
    assert header == HEADER
    _, first, observation, last = record["segments"]
    assert observation["info"] == {"query": first["text"][1:], "ids": [7, 8]}
    assert set(observation) == {"provenance", "text", "tokens", "info"}
    assert first["pieces"] == ["?", first["text"][1], "<|im_end|>"]
    assert first["logprobs"] == [0.0, 0.0, 0.0]
    assert len(last["pieces"]) == last["tokens"] == 2
    assert record["info"]["answers"] == ["a"]
    assert record["info"]["question_id"] == "q0"
    assert "metrics" not in record["info"]


def test_an_episode_that_the_budget_cuts_keeps_its_question_and_strata(tmp_path: Path) -> None:
    def look_up(context: Sequence[int], params: SamplingParams) -> list[int]:
        return [*RENDERER.encode_text("?"), END]

    environments = make_environments(QUIZ, 2)
    sampling = SamplingConfig(temperature=0.0, max_response=12)
    engine = ScriptedEngine(look_up, RENDERER)
    summary = evaluate(engine, environments, RENDERER, sampling, tmp_path, limit=2, show=False)
    _, records = read_predictions(tmp_path)
    assert {r["stop_reason"] for r in records} == {"length"}
    # All observations say the same, and so does the last info, which came with one unseen.
    told = [s["info"] for r in records for s in r["segments"] if s["provenance"] == "observation"]
    assert told == [{"ids": [7, 8]}] * 4
    assert summary.metrics == {"tokens": 6.0, "turns": 3.0}
    assert set(summary.strata["hops"]) == {"1", "2"}


def test_log_probabilities_are_rounded_to_four_digits() -> None:
    action = Segment("action", (97, 98, 99), logprobs=(-0.123456, -2.0, nan), text="abc")
    trajectory = replace(ended(1.0), segments=(Segment("prompt", (1,)), action))
    record = as_record(trajectory, lambda tokens: [chr(token) for token in tokens])
    assert record["segments"][1] == {
        "provenance": "action",
        "text": "abc",
        "tokens": 3,
        "reward": 0.0,
        "pieces": ["a", "b", "c"],
        "logprobs": [-0.1235, -2.0, None],
    }


def ended(reward: float, void: bool = False, **metrics: float) -> Trajectory:
    return Trajectory(
        episode=0,
        sample=0,
        segments=(Segment("prompt", (1,)),),
        reward=reward,
        terminated=True,
        truncated=False,
        void=void,
        metrics=metrics,
        info={"ids": np.array([1, 2]), "hits": (np.float32(0.5), None), "x": {"y": {1}}},
    )


def test_infos_become_plain_json() -> None:
    info = json.loads(json.dumps(as_record(ended(1.0))))["info"]
    assert info == {"ids": [1, 2], "hits": [0.5, None], "x": {"y": "{1}"}}
    long = {"one": np.longdouble(0.5), "many": np.ones(2, np.longdouble), "c": np.clongdouble(1)}
    info = json.loads(json.dumps(as_record(replace(ended(1.0), info=long))))["info"]
    assert info == {"one": 0.5, "many": [1.0, 1.0], "c": "(1+0j)"}


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    made = replace(ended(1.0, em=1.0, perplexity=nan), info={"score": float("inf"), "x": [nan]})
    summary = record_evaluation([made], tmp_path, RENDERER, {})
    _, line = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert not re.search("NaN|Infinity", line)
    _, (record,) = read_predictions(tmp_path)
    assert record["metrics"] == {"em": 1.0, "perplexity": None}
    assert record["info"] == {"score": None, "x": [None]}
    assert summary.metrics["em"] == 1.0
    assert isnan(summary.metrics["perplexity"])


def nested(depth: int) -> list[Any]:
    return [nested(depth - 1)] if depth else []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reward": nan}, "its reward is nan"),
        ({"segments": (Segment("action", (1,), (0.0,), reward=float("inf")),)}, "reward is inf"),
        ({"info": {"x": nested(70)}}, "it is nested more than 64 deep"),
        ({"info": {"x": 10**400}}, "the number 10+... is too large"),
        ({"info": {"x": 10**5000}}, "Exceeds the limit"),
        ({"info": {"strata": ["hops"]}}, "Expected `object | null`, got `array`"),
    ],
)
def test_a_record_that_could_not_be_read_again_is_refused(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    good, bad = ended(1.0, em=1.0), replace(ended(1.0, em=1.0), episode=3, **change)
    with pytest.raises(PredictionsError) as caught:
        record_evaluation([good, bad], tmp_path, RENDERER, {})
    message = str(caught.value)
    assert re.match(f"episode 3, sample 0, cannot be recorded: .*{said}.*; mend what", message)
    assert [record["episode"] for record in read_predictions(tmp_path)[1]] == [0]


def test_a_void_episode_may_have_no_reward(tmp_path: Path) -> None:
    void = replace(ended(math.nan, em=0.0), void=True)
    record_evaluation([void], tmp_path, RENDERER, {})
    [record] = read_predictions(tmp_path)[1]
    assert (record["void"], record["reward"]) == (True, 0.0)


def test_finished_episodes_are_not_kept_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, alive = Quiz.step, []

    def counting(self: Quiz, action: str) -> Any:
        if self.number == 19:
            alive.append(sum(type(each) is Trajectory for each in gc.get_objects()))
        return step(self, action)

    before = sum(type(each) is Trajectory for each in gc.get_objects())
    monkeypatch.setattr(Quiz, "step", counting)
    assert quiz(tmp_path, always("a"), env_args={"count": 20}).episodes == 20
    assert len(alive) == 1
    assert alive[0] - before <= 3  # as many as there are environments


def test_limit(tmp_path: Path) -> None:
    assert run(tmp_path, always("cé"), limit=3).reward == pytest.approx(1 / 3)
    assert run(tmp_path, always("cé"), limit=30).episodes == 4
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 4


def test_an_environment_without_end_needs_a_limit(tmp_path: Path) -> None:
    environments = make_environments(TOY, 1)
    environments.num_tasks = None
    sampling = SamplingConfig(temperature=0.0)
    engine = ScriptedEngine(always("c"), RENDERER)
    with pytest.raises(ConfigError, match="no last task"):
        evaluate(engine, environments, RENDERER, sampling, tmp_path, show=False)
    assert not list(tmp_path.iterdir())


def test_a_question_that_comes_again_is_refused_and_the_file_stays_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = Quiz.info

    def repeated(self: Quiz, **more: Any) -> dict[str, Any]:
        return info(self, question_id=f"q{self.number % 4}", **more)

    monkeypatch.setattr(Quiz, "info", repeated)
    with pytest.raises(PredictionsError, match=r"episode 4 has the question_id 'q0' of .*--limit"):
        quiz(tmp_path)
    assert quiz(tmp_path, limit=4, samples_per_task=2).episodes == 8
    assert len(in_order(tmp_path)) == 8


def test_an_episode_becomes_the_demonstration_that_a_rollout_would_sample(tmp_path: Path) -> None:
    """Turns end by the end token, also in the middle, or without it."""
    played: list[Trajectory] = []

    def play(*words: Any, on_finish: Callable[[Trajectory], None], **more: Any) -> Any:
        played.extend(collect(*words, on_finish=on_finish, **more))
        return played

    def say(context: Sequence[int], params: SamplingParams) -> list[int]:
        turn = RENDERER.decode(context).count("=")
        return [*RENDERER.encode_text("?x" if turn < 3 else "abcd"), *([END] if turn != 2 else [])]

    evaluate(
        ScriptedEngine(say, RENDERER),
        make_environments(QUIZ, 1),
        RENDERER,
        SamplingConfig(temperature=0.0, max_turn_tokens=5),
        tmp_path,
        limit=1,
        header=HEADER,
        show=False,
        play=play,
    )
    write_demonstrations(tmp_path, tmp_path / "d.jsonl")
    [parts] = demonstrations(str(tmp_path / "d.jsonl"), 1, 0, {})
    back = as_trajectory(parts, RENDERER)
    assert [turn.tokens[-1] == END for turn in back.turns] == [True, False, True]
    assert (back.tokens, back.action_mask) == (played[0].tokens, played[0].action_mask)


def test_an_episode_of_a_run_becomes_a_demonstration_with_its_chat(tmp_path: Path) -> None:
    chat = make_renderer(RENDERER.tokenizer, chat_template=True)
    engine = ScriptedEngine(always("abcd"), chat)
    sampling = SamplingConfig(temperature=0.0)
    played = collect(engine, make_environments(QUIZ, 1), chat, [(0, 0)], sampling, seed=0)
    record_evaluation(played, tmp_path, chat, {})
    write_demonstrations(tmp_path, tmp_path / "d.jsonl")
    [parts] = demonstrations(str(tmp_path / "d.jsonl"), 1, 0, {})
    assert as_trajectory(parts, chat).tokens == played[0].tokens


# --- going on -------------------------------------------------------------------------------------


def test_what_is_missing_is_played_and_the_rest_stays(tmp_path: Path) -> None:
    whole = quiz(tmp_path / "whole", samples_per_task=2)
    quiz(tmp_path / "parts", samples_per_task=2)
    path = tmp_path / "parts" / "predictions.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 12
    kept = lines[:8]
    path.write_bytes(b"".join(kept) + lines[8][:40])  # killed in the middle of writing
    (tmp_path / "parts" / "summary.json").unlink()
    assert quiz(tmp_path / "parts", samples_per_task=2) == whole
    assert path.read_bytes().splitlines(keepends=True)[:8] == kept
    assert in_order(tmp_path / "parts") == in_order(tmp_path / "whole")


def test_a_line_that_lacks_only_its_end_is_gone_on_behind(tmp_path: Path) -> None:
    quiz(tmp_path, limit=2)
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert quiz(tmp_path, limit=3).episodes == 3
    assert [record["episode"] for record in in_order(tmp_path)] == [0, 1, 2]


def test_a_finished_evaluation_plays_nothing_again(tmp_path: Path) -> None:
    first = quiz(tmp_path)
    before = (tmp_path / "predictions.jsonl").read_bytes()

    def nothing(context: Sequence[int], params: SamplingParams) -> list[int]:
        raise AssertionError("played again")

    assert quiz(tmp_path, nothing) == first
    assert (tmp_path / "predictions.jsonl").read_bytes() == before


def test_more_tasks_and_samples_are_added_and_fewer_refused(tmp_path: Path) -> None:
    quiz(tmp_path / "grown", limit=2)
    quiz(tmp_path / "grown", limit=4, samples_per_task=2)
    quiz(tmp_path / "whole", limit=4, samples_per_task=2)
    assert in_order(tmp_path / "grown") == in_order(tmp_path / "whole")
    before = (tmp_path / "grown" / "predictions.jsonl").read_bytes()
    with pytest.raises(
        PredictionsError, match=r"sample . of episode ., which .* --samples-per-task"
    ):
        quiz(tmp_path / "grown", limit=4)
    with pytest.raises(PredictionsError, match=r"episode 3, which this evaluation would not play"):
        quiz(tmp_path / "grown", limit=3, samples_per_task=2)
    assert (tmp_path / "grown" / "predictions.jsonl").read_bytes() == before
    assert not (tmp_path / "grown" / "predictions.tmp").exists()


def test_void_episodes_are_played_again(tmp_path: Path) -> None:
    down = tmp_path / "down"
    down.touch()
    args = {"down": str(down)}
    first = quiz(tmp_path / "run", always("a"), env_args=args)
    assert (first.episodes, first.void) == (3, 3)
    assert first.metrics["em"] == pytest.approx(2 / 3)  # mean over a, c, a
    down.unlink()
    again = quiz(tmp_path / "run", always("a"), env_args=args)
    assert (again.episodes, again.void) == (6, 0)
    assert again.metrics["em"] == pytest.approx(2 / 6)
    assert [r["episode"] for r in in_order(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]


def test_without_a_header_everything_is_played_afresh(tmp_path: Path) -> None:
    quiz(tmp_path, always("a"), header=None)
    assert quiz(tmp_path, always("b"), header=None).metrics["em"] == pytest.approx(2 / 6)
    header, records = read_predictions(tmp_path)
    assert header == {}
    assert len(records) == 6


def test_another_model_or_setting_is_refused_by_name(tmp_path: Path) -> None:
    quiz(tmp_path)
    before = (tmp_path / "predictions.jsonl").read_bytes()
    other = {"model": {"name": "script", "fingerprint": "2"}, "settings": {"temperature": 1}}
    with pytest.raises(PredictionsError) as caught:
        quiz(tmp_path, header=other)
    message = str(caught.value)
    assert "model.fingerprint: '1' in the file, '2' now" in message
    assert "settings.temperature: '(unset)' in the file, 1 now" in message
    assert "python" not in message
    assert (tmp_path / "predictions.jsonl").read_bytes() == before


def test_other_versions_of_the_libraries_are_written_between(tmp_path: Path) -> None:
    quiz(tmp_path, limit=2)
    newer = {**HEADER, "versions": {"python": "4"}}
    quiz(tmp_path, limit=3, header=newer)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").open()]
    assert [line.get("header", {}).get("versions") for line in lines] == [
        {"python": "3"},
        None,
        None,
        {"python": "4"},
        None,
    ]
    assert read_predictions(tmp_path)[0] == HEADER


def test_a_model_may_have_another_name(tmp_path: Path) -> None:
    first = quiz(tmp_path)
    moved = {**HEADER, "model": {"name": "elsewhere", "fingerprint": "1"}}
    assert replace(quiz(tmp_path, header=moved), header=HEADER) == first


def with_place(path: str, questions: str, host: str) -> dict[str, Any]:
    return {
        **HEADER,
        "environment": {"questions": questions, "place: index": host},
        "settings": {"env_args": {"questions": path}, "split": None, "temperature": 0},
    }


def test_the_environments_fingerprints_decide_and_not_its_paths(tmp_path: Path) -> None:
    quiz(tmp_path, limit=2, header=with_place("a.jsonl", "sha256 1", "here"))
    quiz(tmp_path, limit=3, header=with_place("/b/a.jsonl", "sha256 1", "there"))
    assert len(in_order(tmp_path)) == 3
    with pytest.raises(PredictionsError, match=r"environment\.questions: 'sha256 1' in the file"):
        quiz(tmp_path, header=with_place("a.jsonl", "sha256 2", "here"))


def test_an_environment_without_fingerprints_is_known_by_its_settings(tmp_path: Path) -> None:
    quiz(tmp_path, limit=2, header={**HEADER, "settings": {"env_args": {"questions": "a"}}})
    with pytest.raises(PredictionsError, match=r"settings\.env_args"):
        quiz(tmp_path, header={**HEADER, "settings": {"env_args": {"questions": "b"}}})


def test_predictions_that_do_not_say_what_they_are_of_are_refused(tmp_path: Path) -> None:
    quiz(tmp_path, header=None)
    with pytest.raises(PredictionsError, match="does not say what it was made with"):
        quiz(tmp_path)


def test_only_one_process_writes(tmp_path: Path) -> None:
    message = rf"process {os.getpid()} on .* writes to .*; wait for it"
    with folder_lock(tmp_path), pytest.raises(FolderInUseError, match=message):
        quiz(tmp_path)
    assert quiz(tmp_path).episodes == 6


def test_a_prompt_that_is_too_long_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    args = {"long": 4}
    quiz(tmp_path, env_args=args, max_prompt=8, limit=2)
    assert (tmp_path / "summary.json").exists()
    with pytest.raises(ContextError, match=r"episode 4 \(question q4\) has 21 tokens, not 1 to 8"):
        quiz(tmp_path, env_args=args, max_prompt=8)
    played = {record["episode"] for record in in_order(tmp_path)}
    assert {0, 1} <= played <= {0, 1, 2, 3}
    assert not (tmp_path / "summary.json").exists()  # it was of fewer
    assert quiz(tmp_path, env_args=args).episodes == 6


# --- reading --------------------------------------------------------------------------------------


def record_line(episode: int, **more: Any) -> str:
    return json.dumps({**as_record(ended(1.0, em=1.0)), "episode": episode, **more}) + "\n"


def test_a_line_cut_in_the_middle_is_left_out_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text(record_line(0) + record_line(1)[:50])
    with pytest.warns(UserWarning, match=r"predictions\.jsonl:2: the last line is cut short"):
        header, records = read_predictions(path)
    assert header == {}
    assert [record["episode"] for record in records] == [0]


def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps({"header": HEADER}) + "\n" + record_line(0), encoding="utf-8-sig")
    header, records = read_predictions(path)
    assert (header, len(records)) == (HEADER, 1)


def test_a_last_line_that_lacks_only_its_end_counts(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text((record_line(0) + record_line(1)).rstrip("\n"))
    assert len(read_predictions(tmp_path)[1]) == 2


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([record_line(0)[:50] + "\n", record_line(1)], r":1: this line is no record"),
        ([record_line(0), "[1]\n"], r":2: this line is no record"),
        (
            [record_line(0), '{"episode": 1}\n'],
            r":2: this line is no record.*missing",
        ),
        ([record_line(0), record_line(1, metrics=None)], r":2: this line is no record"),
        ([record_line(0), record_line(1, reward="x")], r":2: this line is no record"),
        (['{"header": 3}\n'], r":1: this line is no record"),
        ([record_line(0), record_line(1), record_line(0)], r":3: sample 0 of question 0 .* line 1"),
    ],
)
def test_broken_files_are_refused_by_line(tmp_path: Path, lines: list[str], said: str) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(lines))
    with pytest.raises(PredictionsError, match=said):
        read_predictions(path)


def test_nobody_is_told_to_remove_lines_of_a_file_that_holds_no_predictions(tmp_path: Path) -> None:
    log, renamed = tmp_path / "metrics.jsonl", tmp_path / "first.jsonl"
    log.write_text('{"step": 0, "reward": 0.5}\n')
    with pytest.raises(PredictionsError) as caught:
        read_predictions(log)
    message = str(caught.value)
    assert message.startswith(f"{log}:1: this line is no record of an episode")
    assert message.endswith(
        "; the file is no predictions.jsonl: give the folder of the run or evaluation"
    )
    renamed.write_text(record_line(0) + "[1]\n")
    with pytest.raises(PredictionsError, match=r":2: .*; remove it, and evaluate that episode"):
        read_predictions(renamed)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PredictionsError, match="there is no file"):
        read_predictions(tmp_path / "nowhere.jsonl")
    with pytest.raises(PredictionsError, match="there is no file"):
        read_predictions(tmp_path)


# --- the summary ----------------------------------------------------------------------------------


def one(question: str, sample: int = 0, prediction: str | None = None, **more: Any) -> Outcome:
    settings: dict[str, Any] = {"void": False, "reward": 0.0, "metrics": {}, "strata": {}} | more
    return Outcome(question, sample, prediction=prediction, asked="", **settings)


def test_void_episodes_are_in_no_mean_and_missing_metrics_count_as_zero() -> None:
    records = [
        {**as_record(ended(1.0, em=1.0)), "episode": 0},
        {**as_record(ended(0.5)), "episode": 1},
        {**as_record(ended(9.0, void=True, em=9.0)), "episode": 2},
    ]
    summary = summarize(map(outcome, records))
    assert (summary.episodes, summary.questions, summary.void, summary.reward) == (2, 2, 1, 0.75)
    assert summary.metrics == {"em": 0.5, "tokens": 0.0, "turns": 0.0}
    assert summary.intervals["em"] == (0.0, 1.0)
    assert summary.intervals["reward"] == (0.5, 1.0)
    nothing = summarize([one("q", void=True)])
    assert (nothing.episodes, nothing.void, nothing.reward, nothing.metrics) == (0, 1, 0.0, {})
    assert summarize([]).episodes == 0


def test_means_are_over_episodes_and_intervals_over_questions() -> None:
    # Ten samples of one question are no ten questions: nothing is known of other questions.
    outcomes = [one("q", i, reward=float(i % 2)) for i in range(10)]
    summary = summarize(outcomes)
    assert (summary.reward, summary.intervals["reward"]) == (0.5, (0.5, 0.5))
    # Question a has one episode, b has three: the mean is that of four episodes.
    uneven = [one("a", reward=1.0), *(one("b", i) for i in range(3))]
    assert summarize(uneven).reward == 0.25
    assert summarize(uneven).intervals["reward"] == (0.0, 1.0)


def test_strata_are_told_apart_and_the_unknown_is_one() -> None:
    outcomes = [
        one("a", metrics={"em": 1.0}, strata={"hops": "2"}),
        one("b", metrics={"em": 0.0}, strata={"hops": "2"}),
        one("c", metrics={"em": 1.0}, strata={"hops": "3"}),
        one("d", void=True, strata={"hops": "3"}),
        one("e", metrics={"em": 0.0}),
    ]
    hops = summarize(outcomes).strata["hops"]
    assert list(hops) == ["2", "3", "unknown"]
    assert hops["2"] == Part(
        episodes=2,
        void=0,
        reward=0.0,
        metrics={"em": 0.5, "tokens": 0.0, "turns": 0.0},
        questions=2,
        intervals={"reward": (0, 0), "em": (0, 1), "tokens": (0, 0), "turns": (0, 0)},
    )
    assert (hops["3"].episodes, hops["3"].void, hops["3"].metrics["em"]) == (1, 1, 1.0)
    assert hops["unknown"].metrics["em"] == 0.0


def test_pass_at_k_is_over_the_questions_that_have_so_many_samples() -> None:
    def samples(question: str, *right: bool | None) -> list[Outcome]:
        return [
            one(question, i, void=mark is None, metrics={"f1": 0.7 if mark else 0.5})
            for i, mark in enumerate(right)
        ]

    outcomes = samples("a", True, False, False) + samples("b", False, False, None)
    found = summarize(outcomes).pass_at["f1"]
    assert list(found) == ["1", "2", "3"]
    assert found["1"].questions == found["2"].questions == 2
    assert found["1"].mean == pytest.approx(1 / 6)  # mean over 1/3 and 0
    assert found["2"].mean == pytest.approx(1 / 3)  # mean over 2/3 and 0
    assert found["2"].interval == pytest.approx((0.0, 2 / 3))
    assert (found["3"].mean, found["3"].questions) == (1.0, 1)  # b has only two
    assert summarize(samples("a", True)).pass_at == {}


def test_the_majority_is_of_predictions_and_the_first_seen_wins_a_tie() -> None:
    def vote(question: str, *said: tuple[str, float]) -> list[Outcome]:
        return [
            one(question, i, prediction=text, metrics={"em": em}, reward=em + i / 10)
            for i, (text, em) in enumerate(said)
        ]

    outcomes = [
        *vote("most", ("Rome", 0.0), ("Paris", 1.0), (" PARIS\n", 1.0)),
        *vote("tie", ("Rome", 0.0), ("Paris", 1.0)),
        *vote("silent", ("", 0.0), ("", 0.0), ("Oslo", 1.0)),
        *vote("all silent", ("", 0.0), ("", 0.0)),
    ]
    majority = summarize(outcomes).majority
    assert majority is not None
    assert (majority.questions, majority.episodes) == (4, 4)
    assert majority.metrics["em"] == 0.5  # most and silent
    assert majority.reward == pytest.approx((1.1 + 0.0 + 1.2 + 0.0) / 4)  # the first winner's
    assert summarize([one("q"), one("q", 1)]).majority is None
    assert summarize(vote("q", ("Rome", 1.0))).majority is None


def test_a_void_sample_has_no_vote() -> None:
    outcomes = [
        one("q", 0, "Rome", void=True),
        one("q", 1, "Rome", void=True),
        one("q", 2, "Paris", metrics={"em": 1.0}),
    ]
    majority = summarize(outcomes).majority
    assert majority is not None
    assert (majority.void, majority.metrics["em"]) == (0, 1.0)
    assert summarize(outcomes[:2]).majority is None


# --- the command ----------------------------------------------------------------------------------


def words(model: Path, output: Path, fuse: Path, *more: str) -> list[str]:
    flags = f"eval --env {QUIZ} --env-args count=8 fuse={fuse} --model {model} --output {output}"
    flags += " --samples-per-task 2 --temperature 1 --max-in-flight 2 --max-turn-tokens 3"
    flags += " --max-response 20 --device cpu"
    return [*flags.split(), "--quiet", *more]


@pytest.mark.slow
def test_killed_in_the_middle_the_same_command_goes_on(
    letters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fuse = tmp_path / "fuse"
    fuse.touch()
    killed = forks.run("research_agent.cli", *words(letters, tmp_path / "run", fuse))
    assert killed.returncode == -9, killed.stderr
    path = tmp_path / "run" / "predictions.jsonl"
    before = path.read_bytes()
    assert 1 < len(before.splitlines()) < 17
    assert not (tmp_path / "run" / "summary.json").exists()
    path.write_bytes(before + b'{"episode": 3, "sam')  # had it been killed a little later

    main(words(letters, tmp_path / "run", fuse, "--json"))
    told = json.loads(capsys.readouterr().out)
    assert path.read_bytes().startswith(before)
    main(words(letters, tmp_path / "whole", fuse, "--json"))
    whole = json.loads(capsys.readouterr().out)
    assert told == whole
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == told
    assert in_order(tmp_path / "run") == in_order(tmp_path / "whole")
    assert (told["episodes"], told["questions"], told["samples"]) == (16, 8, 2)
    assert told["header"]["environment"] == {"questions": "8"}
    assert list(told["pass_at"]["em"]) == ["1", "2"]

    other = tmp_path / "other"
    tiny_qwen2(10, hidden=16, context=64).save_pretrained(other)
    for file in letters.glob("tokenizer*"):
        shutil.copy(file, other)
    with pytest.raises(SystemExit) as caught:
        main(words(other, tmp_path / "run", fuse, "--seed", "3"))
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "model.fingerprint: 'sha256 " in message
    assert "settings.seed: 0 in the file, 3 now" in message
    assert "settings.temperature" not in message

    moved = Path(shutil.copytree(letters, tmp_path / "moved"))
    main(words(moved, tmp_path / "run", fuse))  # the same model in another place
    shown = capsys.readouterr().out
    for text in ("em pass@2", "majority of 2", "by hops", "by type", "unknown", "questions"):
        assert text in shown
    assert len(in_order(tmp_path / "run")) == 16


def test_a_run_that_saves_while_it_is_evaluated_changes_nothing(
    letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer is opened before a checkpoint is written, and the weights after it."""
    first, second = (tmp_path / "run" / "checkpoints" / f"step-00000{i}" for i in (1, 2))
    shutil.copytree(letters, first)
    tiny_qwen2(10, hidden=16, context=64).save_pretrained(tmp_path / "other")

    def opened(*words: Any) -> Any:
        renderer = open_renderer(*words)
        shutil.copytree(letters, second)
        shutil.copytree(tmp_path / "other", second, dirs_exist_ok=True)
        return renderer

    main(words(first, tmp_path / "before", tmp_path / "fuse"))
    with monkeypatch.context() as patch:
        patch.setattr("research_agent.renderer.open_renderer", opened)
        main(words(tmp_path / "run", tmp_path / "during", tmp_path / "fuse"))
    header, _ = read_predictions(tmp_path / "during")
    assert header["model"]["fingerprint"] == model_fingerprint(str(first))
    assert in_order(tmp_path / "during") == in_order(tmp_path / "before")
    main(words(second, tmp_path / "after", tmp_path / "fuse"))
    assert in_order(tmp_path / "after") != in_order(tmp_path / "before")


class Endpoint(ThreadingHTTPServer):
    """An endpoint that says the first letter of its prompt, and after so many turns refuses."""

    def __init__(self, turns: int) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.left = turns
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Answering(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Endpoint)
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.left -= 1
        choice = {"text": asked["prompt"][0], "finish_reason": "stop", "stop_reason": None}
        refusal = {"error": {"message": "no more for you"}}
        refused = self.server.left < 0
        body = json.dumps(refusal if refused else {"choices": [choice]}).encode()
        self.send_response(403 if refused else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint(turns=5)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_endpoint_that_fails_loses_nothing(
    endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"eval --env {QUIZ} --env-args count=8 --endpoint {endpoint.url} --model parrot"
    command += f" --output {tmp_path} --max-in-flight 1 --quiet --json"
    with pytest.raises(SystemExit) as caught:
        main(command.split())
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "no more for you" in message
    assert endpoint.url in message
    assert [record["episode"] for record in in_order(tmp_path)] == [0, 1, 2, 3, 4]
    endpoint.left = 3  # no more than are missing
    main(command.split())
    told = json.loads(capsys.readouterr().out)
    assert (told["episodes"], told["metrics"]["em"]) == (8, 1.0)
    name, fingerprint = "parrot", f"parrot at {endpoint.url}"
    assert told["header"]["model"] == {"name": name, "fingerprint": fingerprint}


def test_stopped_by_hand_it_says_how_to_go_on(
    endpoint: Endpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(self: Quiz, action: str) -> Any:
        if self.number == 2:
            raise KeyboardInterrupt
        return step(self, action)

    step = Quiz.step
    monkeypatch.setattr(Quiz, "step", stop)
    command = f"eval --env {QUIZ} --endpoint {endpoint.url} --model parrot --output {tmp_path}"
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--max-in-flight", "1", "--quiet"])
    assert caught.value.code == 130
    assert "the same command continues where this one stopped" in capsys.readouterr().err
    assert [record["episode"] for record in in_order(tmp_path)] == [0, 1]


def test_questions_of_ones_own(
    endpoint: Endpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    questions, corpus = tmp_path / "questions.jsonl", tmp_path / "corpus.jsonl"
    asked: list[Record] = [
        {"id": f"q{i}", "question": "Who?", "answers": ["Ann"]} for i in range(2)
    ]
    asked[1]["hops"] = 2
    corpus.write_text(json.dumps({"id": "p", "title": "Ann", "text": "Ann did it."}) + "\n")
    command = "eval --env research_env:SearchQA-v0 --max-in-flight 2 --quiet --json --model parrot"
    command += f" --endpoint {endpoint.url} --output {tmp_path / 'run'}"
    command += f" --env-args template=question questions={questions} corpus={corpus}"

    questions.write_text("".join(json.dumps(question) + "\n" for question in asked))
    main(command.split())
    told = json.loads(capsys.readouterr().out)
    assert (told["episodes"], told["metrics"]["em"], told["metrics"]["turns"]) == (2, 0.0, 1.0)
    assert set(told["strata"]["hops"]) == {"2", "unknown"}
    assert told["header"]["environment"]["questions"].startswith("2, sha256 ")
    assert [record["info"]["answers"] for record in in_order(tmp_path / "run")] == [["Ann"]] * 2

    # The same questions at another path are the same evaluation; other ones at this path are not.
    moved = tmp_path / "moved.jsonl"
    moved.write_text(questions.read_text())
    main(command.replace("questions.jsonl", "moved.jsonl").split())
    assert json.loads(capsys.readouterr().out)["episodes"] == 2
    moved.write_text(moved.read_text().replace("Ann", "Bob"))
    with pytest.raises(SystemExit):
        main(command.replace("questions.jsonl", "moved.jsonl").split())
    assert "environment.questions" in capsys.readouterr().err
