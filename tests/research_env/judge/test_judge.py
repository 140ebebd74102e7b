"""The judge, against a local server that speaks OpenAI's protocol and fails in many ways."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from research_env.cli import main
from research_env.errors import ConfigurationError, DataError, ResearchEnvError, UnknownNameError
from research_env.judge import (
    JudgeError,
    JudgeSettings,
    JudgeSummary,
    format_summary,
    judge_predictions,
    read_predictions,
)
from research_env.judge.prompts import parse_r1_searcher, parse_research
from research_env.judge.verdicts import VerdictCache
from research_env.retrieval.url import secret_of
from tests.research_env.fakes import Terminal
from tests.research_env.servers import Call, Reply, Server, as_json, serving

KEY = "sk-s3cret-0123456789"
RIGHT = '{"rationale": "the same city", "judgement": "correct"}'
WRONG = '{"rationale": "another city", "judgement": "incorrect"}'
USAGE = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only for speed: the pauses of openai's retries begin at half a second."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001, raising=False)


def completion(text: str | None, usage: dict[str, int] | None = USAGE) -> dict[str, Any]:
    """An answer in the documented form of a chat completion."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    body = {"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    return body | ({"usage": usage} if usage else {})


def says(text: str | None) -> Reply:
    return as_json(completion(text))


def question_of(call: Call) -> str:
    """The question that a request asks about."""
    (line,) = [
        line
        for line in call.json()["messages"][0]["content"].split("\n")
        if line.lower().startswith("question: ")
    ]
    return str(line.partition(": ")[2])


def episode(
    number: int, prediction: str = "Paris", answers: tuple[str, ...] = ("Paris",), **more: Any
) -> dict[str, Any]:
    """A line of predictions.jsonl; ``more`` replaces what stands beside ``info``."""
    info = {
        "question_id": f"q{number}",
        "question": f"Which city is number {number}?",
        "answers": list(answers),
        "prediction": prediction,
    }
    record = {"episode": number, "sample": 0, "void": False, "reward": 0.0, "segments": []}
    return {**record, "info": info, **more}


def write(folder: Path, *records: dict[str, Any], name: str = "predictions.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    return path


def run(path: Path, server: Server, output: Path | None = None, **settings: Any) -> JudgeSummary:
    chosen = {"deadline": 20.0, "concurrency": 4, **settings}
    return judge_predictions(path, JudgeSettings(f"{server.url}/v1", "m", **chosen), output)


def judged(folder: Path) -> list[dict[str, Any]]:
    header, *lines = (folder / "judged.jsonl").read_text(encoding="utf-8").splitlines()
    assert "header" in json.loads(header)
    return [json.loads(line) for line in lines]


# What is asked


def test_the_prompt_of_research(tmp_path: Path) -> None:
    """The text of scripts/evaluation/llm_judge.py in Agent-RL/ReCall, written here once more."""
    with serving(lambda _: says(RIGHT)) as server:
        run(write(tmp_path, episode(1, "a {b}", ("Paris", "L'Aquila"))), server)
    (call,) = server.calls
    assert (call.method, call.path) == ("POST", "/v1/chat/completions")
    body = call.json()
    ((role, text),) = [(each["role"], each["content"]) for each in body["messages"]]
    assert role == "user"
    assert text == (
        "You will be given a question and its ground truth answer list where each item can be a "
        "ground truth answer. Provided a pred_answer, you need to judge if the pred_answer "
        "correctly answers the question based on the ground truth answer list. You should first "
        "give your rationale for the judgement, and then give your judgement result (i.e., correct "
        "or incorrect).\n"
        "\n"
        "Here is the criteria for the judgement:\n"
        "1. The pred_answer doesn't need to be exactly the same as any of the ground truth "
        "answers, but should be semantically same for the question.\n"
        "2. Each item in the ground truth answer list can be viewed as a ground truth answer for "
        "the question, and the pred_answer should be semantically same to at least one of them.\n"
        "\n"
        "question: Which city is number 1?\n"
        "ground truth answers: ['Paris', \"L'Aquila\"]\n"
        "pred_answer: a {b}\n"
        "\n"
        "The output should in the following json format:\n"
        "```json \n"
        "{\n"
        '    "rationale": "your rationale for the judgement, as a text",\n'
        "    \"judgement\": \"your judgement result, can only be 'correct' or 'incorrect'\"\n"
        "}\n"
        "```\n"
        "\n"
        "Your output:"
    )
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0, 1024)
    assert body["response_format"]["type"] == "json_schema"


def test_the_prompt_of_r1_searcher(tmp_path: Path) -> None:
    """The text of evaluation/metric_calc_gpt_as_judge.py in RUCAIBox/R1-Searcher, once more."""
    several = episode(2, "Rome", ("Roma", "Rome"))
    with serving(lambda _: says("True")) as server:
        summary = run(write(tmp_path, episode(1), several), server, prompt="r1-searcher")
    assert summary.score == 1.0
    bodies = {question_of(call): call.json() for call in server.calls}
    body = bodies["Which city is number 1?"]
    assert [each["content"] for each in body["messages"]] == [
        "Given a Question and its Golden Answer, verify whether the Predicted Answer is correct. "
        "The prediction is correct if it fully aligns with the meaning and key information of the "
        "Golden Answer. Respond with True if the prediction is correct and False otherwise.\n"
        "\n"
        "Question: Which city is number 1?\n"
        "Golden Answer: Paris\n"
        "Predicted Answer: Paris\n"
        "    "
    ]
    assert body["temperature"] == 0
    assert "response_format" not in body
    said = bodies["Which city is number 2?"]["messages"][0]["content"]
    assert "Golden Answer: ['Roma', 'Rome']\n" in said


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (RIGHT, True),
        (WRONG, False),
        (f"  {RIGHT}\n", True),
        (f"```json\n{WRONG}\n```", False),
        (f"```\n{RIGHT}```\n", True),
        ('{"judgement": "correct", "rationale": "", "confidence": 1}', True),
        ('{"rationale": "r", "judgement": "Correct"}', None),
        ('{"rationale": "r", "judgement": true}', None),
        ('{"judgement": "correct"}', None),
        ('{"rationale": 1, "judgement": "correct"}', None),
        ('{"rationale": "r", "judgement": "incorrect", "judgement": "correct"}', None),
        (f"{RIGHT} {WRONG}", None),
        (f"Here it is: {RIGHT}", None),
        (f"```json\n{RIGHT}\n```\nI hope this helps.", None),
        (RIGHT[:-9], None),
        (f"[{RIGHT}]", None),
        ("correct", None),
        ("", None),
        ("[" * 100_000, None),
    ],
)
def test_verdicts_of_research(text: str, verdict: bool | None) -> None:
    assert parse_research(text) is verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("True", True),
        (" false.\n", False),
        ("TRUE", True),
        ("True, since both are cities", None),
        ("True False", None),
        ("yes", None),
        ("", None),
    ],
)
def test_verdicts_of_r1_searcher(text: str, verdict: bool | None) -> None:
    assert parse_r1_searcher(text) is verdict


# The score


def test_the_score_and_its_counts(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"header": {"model": "policy"}},
        episode(1),
        episode(2, "Rome"),
        episode(3, ""),
        episode(4, "  \n"),
        episode(5, void=True),
        episode(1, sample=1),
    )

    def answer(call: Call) -> Reply:
        return says(RIGHT if question_of(call) == "Which city is number 1?" else WRONG)

    with serving(answer) as server:
        summary = run(path, server, prices=(2.5, 10.0))
    # q1 twice right by one prompt, q2 wrong, q3 and q4 wrong without asking, q5 void
    assert (summary.n, summary.correct, summary.incorrect, summary.missing) == (5, 2, 3, 0)
    assert (summary.void, summary.no_prediction) == (1, 2)
    assert summary.score == pytest.approx(2 / 5)
    assert summary.range == pytest.approx((2 / 5, 2 / 5))
    assert len(server.calls) == summary.asked == 2
    assert (summary.replies, summary.tokens_in, summary.tokens_out) == (2, 200, 14)
    assert summary.cost == pytest.approx((200 * 2.5 + 14 * 10.0) / 1_000_000)
    assert summary.warnings == ()
    lines = {(each["question_id"], each["sample"]): each for each in judged(tmp_path)}
    assert {key: each["correct"] for key, each in lines.items()} == {
        ("q1", 0): True,
        ("q1", 1): True,
        ("q2", 0): False,
        ("q3", 0): False,
        ("q4", 0): False,
    }
    assert (lines["q2", 0]["raw"], lines["q2", 0]["asked"]) == (WRONG, True)
    assert (lines["q3", 0]["raw"], lines["q3", 0]["asked"]) == (None, False)
    saved = json.loads((tmp_path / "judge.json").read_text(encoding="utf-8"))
    assert (saved["score"], saved["range"], saved["n"]) == (0.4, [0.4, 0.4], 5)


def test_a_missing_verdict_makes_the_score_a_range(tmp_path: Path) -> None:
    def answer(call: Call) -> Reply:
        number = int(question_of(call).removesuffix("?").split()[-1])
        return {0: says(RIGHT), 1: says(WRONG), 2: says("I cannot say."), 3: says(RIGHT)}[
            number % 4
        ]

    with serving(answer) as server:
        summary = run(write(tmp_path, *(episode(n) for n in range(8))), server)
    # 0, 3, 4, 7 right; 1, 5 wrong; 2, 6 missing
    assert (summary.n, summary.correct, summary.incorrect, summary.missing) == (8, 4, 2, 2)
    assert summary.score is None
    assert summary.range == pytest.approx((4 / 8, 6 / 8))
    assert summary.reasons == {"no valid verdict": 2}
    shown = format_summary(summary)
    assert "score between 50.00% and 75.00%: 2 of 8 verdicts are missing" in shown
    assert "2 no valid verdict" in shown
    missing = [each for each in judged(tmp_path) if each["correct"] is None]
    assert {(each["raw"], each["problem"]) for each in missing} == {
        ("I cannot say.", "no valid verdict")
    }


def test_only_void_episodes_have_no_score(tmp_path: Path) -> None:
    with serving(lambda _: says(RIGHT)) as server:
        summary = run(write(tmp_path, episode(1, void=True)), server)
    assert (summary.score, summary.range, summary.n, summary.void) == (None, None, 0, 1)
    assert server.calls == []
    assert "every episode is void" in format_summary(summary)


@pytest.mark.parametrize(("text", "word"), [(RIGHT, "correct"), (WRONG, "incorrect")])
def test_a_judge_that_always_says_the_same_is_warned_of(
    tmp_path: Path, text: str, word: str
) -> None:
    unanswered = [episode(100, ""), episode(101, "")]  # wrong, but not by this judge
    records = [episode(n) for n in range(20)] + unanswered
    with serving(lambda _: says(text)) as server:
        few = run(write(tmp_path, *records[1:]), server)
        many = run(write(tmp_path, *records), server)
    assert few.warnings == ()  # 19 verdicts
    assert len(many.warnings) == 1
    assert f"all 20 predictions {word}" in many.warnings[0]


def test_one_other_verdict_is_enough(tmp_path: Path) -> None:
    def answer(call: Call) -> Reply:
        return says(WRONG if question_of(call) == "Which city is number 7?" else RIGHT)

    with serving(answer) as server:
        assert run(write(tmp_path, *(episode(n) for n in range(30))), server).warnings == ()


# Rubbish, and the repair


def test_one_repair_is_tried(tmp_path: Path) -> None:
    def answer(call: Call) -> Reply:
        return says("Sure! It is correct." if len(call.json()["messages"]) == 1 else RIGHT)

    with serving(answer) as server:
        summary = run(write(tmp_path, episode(1)), server)
    assert summary.score == 1.0
    first, second = (call.json()["messages"] for call in server.calls)
    assert second[:1] == first
    assert second[1] == {"role": "assistant", "content": "Sure! It is correct."}
    assert second[2]["role"] == "user"
    assert "JSON object" in second[2]["content"]
    assert (summary.replies, summary.tokens_in) == (2, 200)


@pytest.mark.parametrize("text", ["?!", "", None, RIGHT[:20], '{"judgement": "maybe"}'])
def test_rubbish_is_a_missing_verdict_after_one_repair(tmp_path: Path, text: str | None) -> None:
    with serving(lambda _: says(text)) as server:
        summary = run(write(tmp_path, episode(1)), server)
        assert len(server.calls) == 2
        assert all(each["content"] for each in server.calls[1].json()["messages"])
        assert (summary.missing, summary.reasons) == (1, {"no valid verdict": 1})
        assert summary.range == (0.0, 1.0)
        again = run(tmp_path / "predictions.jsonl", server)  # missing ones are asked for again
    assert len(server.calls) == 4
    assert again.missing == 1


def test_lone_surrogates_are_replaced(tmp_path: Path) -> None:
    """A policy or a judge may write half of a surrogate pair, which UTF-8 cannot hold."""
    text = '{"rationale": "\ud800", "judgement": "correct"}'
    with serving(lambda _: says(text)) as server:
        assert run(write(tmp_path, episode(1, "x\udfff")), server).score == 1.0
    assert "pred_answer: x\ufffd" in server.calls[0].json()["messages"][0]["content"]


# Servers that fail


def failing(count: int, failure: Reply) -> Callable[[Call], Reply]:
    """Fails so often, then answers."""
    calls = itertools.count()
    return lambda _: failure if next(calls) < count else says(RIGHT)


@pytest.mark.parametrize(
    "failure",
    [
        Reply(503),
        Reply(200, b""),
        Reply(200, b"<html>busy</html>"),
        Reply(200, json.dumps(completion(RIGHT)).encode()[:40]),
        Reply(200, json.dumps(completion(RIGHT)).encode(), cut=40),
        as_json({"error": {"message": "overloaded"}}),
        as_json({"choices": []}),
        as_json({"choices": [{"message": {"content": ["a part"]}}]}),
        as_json([1]),
    ],
    ids=lambda reply: f"{reply.status} {bytes(reply.body)[:12]!r} {reply.cut}",
)
def test_passing_failures_are_retried(tmp_path: Path, failure: Reply) -> None:
    with serving(failing(2, failure)) as server:
        summary = run(write(tmp_path, episode(1)), server)
    assert summary.score == 1.0
    assert len(server.calls) == 3
    assert summary.replies == 1


def test_a_wait_beyond_the_deadline_is_not_waited_for(tmp_path: Path) -> None:
    with serving(lambda _: Reply(429, b"", {"Retry-After": "3600"})) as server:
        summary = run(write(tmp_path, episode(1)), server)
    assert summary.reasons == {"status 429": 1}
    assert len(server.calls) == 1


def test_a_server_that_does_not_answer_in_time(tmp_path: Path) -> None:
    held = threading.Event()

    def answer(call: Call) -> Reply:
        if question_of(call) == "Which city is number 1?":
            held.wait(20)
        return says(RIGHT)

    with serving(answer) as server:
        summary = run(write(tmp_path, episode(1), episode(2)), server, deadline=3.0)
        held.set()
    assert (summary.correct, summary.missing) == (1, 1)
    assert summary.reasons == {"no answer in time": 1}
    hung = [call for call in server.calls if question_of(call) == "Which city is number 1?"]
    assert len(hung) >= 2  # an attempt may take half of the deadline: there was another one


def test_a_refused_question_is_missing_and_the_others_go_on(tmp_path: Path) -> None:
    def answer(call: Call) -> Reply:
        if question_of(call) == "Which city is number 1?":
            return as_json({"error": {"message": "maximum context length is 512"}}, 400)
        return says(RIGHT)

    with serving(answer) as server:
        summary = run(write(tmp_path, episode(1), episode(2)), server)
    assert summary.reasons == {"status 400": 1}
    (line,) = [each for each in judged(tmp_path) if each["correct"] is None]
    assert "maximum context length is 512" in line["problem"]


def test_a_server_that_refuses_everything_ends_the_run(tmp_path: Path) -> None:
    path = write(tmp_path, *(episode(n) for n in range(60)))
    refusal = as_json({"error": {"message": "temperature does not support 0"}}, 400)
    lost = pytest.raises(JudgeError, match=r"8 questions in a row without .*temperature does not")
    with serving(lambda _: refusal) as server, lost:
        run(path, server)
    assert len(server.calls) < 60  # up to 16 questions, in three forms each


def test_nothing_listens(tmp_path: Path) -> None:
    with serving(lambda _: says(RIGHT)) as server:
        pass
    with pytest.raises(JudgeError, match="nothing answers"):
        run(write(tmp_path, *(episode(n) for n in range(50))), server)
    saved = json.loads((tmp_path / "judge.json").read_text(encoding="utf-8"))
    assert (saved["score"], saved["range"], saved["missing"]) == (None, [0.0, 1.0], 50)
    assert saved["reasons"] == {"not asked": 50}


def test_a_server_that_is_gone_ends_the_run_and_loses_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, *(episode(n) for n in range(60)))
    gone = Reply(503, b"down", {"Retry-After": "3600"})

    def answer(call: Call) -> Reply:
        return says(RIGHT) if int(question_of(call).removesuffix("?").split()[-1]) < 10 else gone

    lost = pytest.raises(JudgeError, match="8 questions in a row without an answer: status 503")
    with serving(answer) as server, lost:
        run(path, server)
    saved = json.loads((tmp_path / "judge.json").read_text(encoding="utf-8"))
    assert (saved["correct"], saved["missing"]) == (10, 50)
    assert saved["range"] == pytest.approx([10 / 60, 1.0])
    with serving(lambda _: says(RIGHT)) as server:
        summary = run(path, server)
        assert (summary.score, summary.kept, summary.asked) == (1.0, 10, 50)
        assert len(server.calls) == 50


@pytest.mark.parametrize(
    ("status", "words"), [(401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "/v1")]
)
def test_a_wrong_key_or_address_ends_the_run(tmp_path: Path, status: int, words: str) -> None:
    refusal = as_json({"error": "the model `m` does not exist"}, status)
    with serving(lambda _: refusal) as server, pytest.raises(JudgeError, match=words):
        run(write(tmp_path, *(episode(n) for n in range(50))), server)
    assert len(server.calls) <= 4


@pytest.mark.parametrize(
    ("taken", "asked"),
    [("json_schema", 3), ("json_object", 4), (None, 5)],
)
def test_the_strictest_form_that_the_server_takes(
    tmp_path: Path, taken: str | None, asked: int
) -> None:
    def answer(call: Call) -> Reply:
        form = call.json().get("response_format", {}).get("type")
        if form == taken:
            return says(RIGHT)
        return as_json({"error": {"message": "response_format is not supported"}}, 400)

    with serving(answer) as server:
        path = write(tmp_path, *(episode(n) for n in range(3)))
        assert run(path, server, concurrency=1).score == 1.0
    assert len(server.calls) == asked  # what was refused once is not tried again


def test_concurrency_and_rate(tmp_path: Path) -> None:
    lock = threading.Lock()
    busy, most, times = 0, 0, list[float]()

    def answer(_: Call) -> Reply:
        nonlocal busy, most
        with lock:
            times.append(time.monotonic())
            busy += 1
            most = max(most, busy)
        time.sleep(0.05)
        with lock:
            busy -= 1
        return says(RIGHT)

    records = [episode(n) for n in range(12)]
    with serving(answer) as server:
        run(write(tmp_path, *records, name="one.jsonl"), server, tmp_path / "one", concurrency=3)
        assert 1 < most <= 3
        times.clear()
        many = write(tmp_path, *(episode(n) for n in range(20, 26)), name="two.jsonl")
        began = time.monotonic()  # the arrival of the first request may be late on a busy machine
        run(many, server, tmp_path / "two", concurrency=6, rate=20.0)
    assert times[-1] - began >= 0.9 * 5 / 20  # six requests are five gaps


def test_answers_that_could_fill_the_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacked = b"\0" * 30_000_000
    for _ in range(3):
        stacked = gzip.compress(stacked, mtime=0)
    assert len(stacked) < 1_000
    compressed = Reply(200, stacked, {"Content-Encoding": "gzip, gzip, gzip"})
    monkeypatch.setattr("research_env.judge.client._LARGEST_ANSWER", 1 << 20)

    def answer(call: Call) -> Reply:
        return compressed if question_of(call).endswith("1?") else says("x" * (2 << 20))

    with serving(answer) as server:
        summary = run(write(tmp_path, episode(1), episode(2)), server)
    assert len(server.calls) == 2  # neither is requested again
    assert summary.reasons == {
        "an answer in Content-Encoding 'gzip, gzip, gzip'": 1,
        "an answer of over 1 MB": 1,
    }


def test_a_proxy_of_the_environment_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(lambda _: says(RIGHT)) as server:
        monkeypatch.setenv("http_proxy", server.url)
        settings = JudgeSettings("http://model.invalid/v1", "m")
        assert judge_predictions(write(tmp_path, episode(1)), settings).score == 1.0
    assert server.calls[0].path == "http://model.invalid/v1/chat/completions"


# Resuming


def test_a_second_run_asks_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, *(episode(n) for n in range(5)), episode(9, ""))
    with serving(lambda _: says(WRONG)) as server:
        first = run(path, server, prices=(1.0, 1.0))
        lines = (tmp_path / "judged.jsonl").read_bytes()
        second = run(path, server, prices=(1.0, 1.0))
        assert len(server.calls) == 5
        assert (tmp_path / "judged.jsonl").read_bytes() == lines
        assert (second.kept, second.asked, second.cost) == (5, 0, first.cost)
        (tmp_path / "judged.jsonl").unlink()  # the cache is enough
        third = run(path, server)
        other = run(path, server, tmp_path / "elsewhere")
    assert len(server.calls) == 5
    assert third.from_cache == other.from_cache == 5
    assert first.score == second.score == third.score == other.score == 0.0
    assert third.tokens_in == 0
    assert [each["raw"] for each in judged(tmp_path / "elsewhere")].count(WRONG) == 5


def test_another_prediction_is_judged_anew(tmp_path: Path) -> None:
    def answer(call: Call) -> Reply:
        right = "pred_answer: Paris\n" in call.json()["messages"][0]["content"]
        return says(RIGHT if right else WRONG)

    with serving(answer) as server:
        assert run(write(tmp_path, episode(1, "Rome")), server).score == 0.0
        assert run(write(tmp_path, episode(1, "Paris")), server).score == 1.0
        assert run(write(tmp_path, episode(1, "")), server).score == 0.0
        assert run(write(tmp_path, episode(1, "Rome"), episode(2)), server).score == 0.5
    assert len(server.calls) == 3


def test_the_cache_tells_models_and_prompts_apart(tmp_path: Path) -> None:
    path = write(tmp_path, episode(1))
    with serving(lambda call: says(RIGHT if call.json()["model"] == "m" else WRONG)) as server:
        address = f"{server.url}/v1"
        one = judge_predictions(path, JudgeSettings(address, "m"), tmp_path / "1")
        two = judge_predictions(path, JudgeSettings(address, "n"), tmp_path / "2")
    assert (one.score, two.score) == (1.0, 0.0)


def test_verdicts_of_another_file_are_not_mixed_in(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    one, other = write(tmp_path / "a", episode(1)), write(tmp_path / "b", episode(1))
    with serving(lambda _: says(RIGHT)) as server:
        settings = JudgeSettings(f"{server.url}/v1", "m")
        judge_predictions(one, settings, tmp_path / "out")
        with pytest.raises(ConfigurationError, match=r"a/predictions.jsonl.*--output"):
            judge_predictions(other, settings, tmp_path / "out")


def test_verdicts_of_another_judge_are_not_mixed_in(tmp_path: Path) -> None:
    path = write(tmp_path, episode(1))
    with serving(lambda _: says(RIGHT)) as server:
        run(path, server)
        with pytest.raises(ConfigurationError, match="--output"):
            run(path, server, prompt="r1-searcher")
    assert len(judged(tmp_path)) == 1


def test_a_file_that_no_judge_wrote_is_left_alone(tmp_path: Path) -> None:
    path = write(tmp_path, episode(1))
    for held in (b"my notes", b"my notes\nmore\n", b'{"header": 1}\n{}\n', b"[]\n"):
        (tmp_path / "judged.jsonl").write_bytes(held)
        refused = pytest.raises(DataError, match=r"judged.jsonl:1: .*move the file away")
        with serving(lambda _: says(RIGHT)) as server, refused:
            run(path, server)
        assert (tmp_path / "judged.jsonl").read_bytes() == held
    (tmp_path / "judged.jsonl").unlink()
    (tmp_path / "judge-cache.sqlite").write_bytes(b"no database, but long enough to be one" * 9)
    with serving(lambda _: says(RIGHT)) as server, pytest.raises(JudgeError, match="cache"):
        run(path, server)


def test_a_cache_that_cannot_be_opened_is_refused_in_words(tmp_path: Path) -> None:
    path = write(tmp_path, episode(1))
    cache = tmp_path / "judge-cache.sqlite"
    cache.symlink_to(tmp_path / "none" / "cache")  # cannot be made, as in a read-only folder
    with serving(lambda _: says(RIGHT)) as server:
        refused = pytest.raises(JudgeError, match=rf"{cache}.*folder that can be written")
        with refused:
            run(path, server, tmp_path / "out")
    assert not server.calls


@pytest.mark.parametrize(
    "change",
    [
        "CREATE TRIGGER t AFTER INSERT ON verdicts BEGIN UPDATE verdicts SET verdict = 1; END",
        "CREATE TABLE more (x)",
        "ALTER TABLE verdicts ADD COLUMN x",
    ],
)
def test_a_cache_has_our_schema_and_nothing_else(tmp_path: Path, change: str) -> None:
    cache = tmp_path / "cache"
    VerdictCache(cache).close()
    VerdictCache(cache).close()  # as it was left, it opens
    with closing(sqlite3.connect(cache)) as database, database:
        database.execute(change)
    with pytest.raises(JudgeError, match=r"tables are not those of a cache.*move it away"):
        VerdictCache(cache)


def test_runs_that_start_together_make_one_cache(tmp_path: Path) -> None:
    threads = 8
    for number in range(10):
        path, together = tmp_path / str(number), threading.Barrier(threads)

        def open_it(_: int, path: Path = path, together: threading.Barrier = together) -> None:
            together.wait()
            VerdictCache(path).close()

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(open_it, range(threads)))


def test_a_pipe_is_no_cache(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "cache")
    with pytest.raises(JudgeError, match="no regular file"):
        VerdictCache(tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("correct", "yes"),
        ("replies", -1),
        ("tokens_in", 1e999),
        ("question_id", None),
    ],
)
def test_a_changed_line_of_the_log_is_refused_by_its_number(
    tmp_path: Path, name: str, value: Any
) -> None:
    path = write(tmp_path, episode(1), episode(2))
    with serving(lambda _: says(RIGHT)) as server:
        run(path, server)
        log = tmp_path / "judged.jsonl"
        header, first, second = log.read_text(encoding="utf-8").splitlines()
        changed = json.dumps(json.loads(second) | {name: value})
        log.write_text(f"{header}\n{first}\n{changed}\n", encoding="utf-8")
        with pytest.raises(DataError, match=r"judged.jsonl:3: no line of a judge's log"):
            run(path, server)


def test_a_log_cut_at_any_byte_is_resumed(tmp_path: Path) -> None:
    path = write(tmp_path, episode(1), episode(2, "Rome"), episode(3, ""))
    with serving(lambda _: says(RIGHT)) as server:
        whole = run(path, server)
        lines = (tmp_path / "judged.jsonl").read_bytes()
        for size in (1, 5, *range(0, len(lines), 61)):
            (tmp_path / "judged.jsonl").write_bytes(lines[:size])
            summary = run(path, server)
            assert (summary.score, summary.n) == (whole.score, 3)
            assert {each["question_id"] for each in judged(tmp_path)} == {"q1", "q2", "q3"}
            assert len(judged(tmp_path)) == 3
    assert len(server.calls) == 2


def start_command(path: Path, server: Server, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "research_env.cli", "judge", str(path)]
    command += ["--endpoint", f"{server.url}/v1", "--model", "m", "--concurrency", "2", *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    path = write(tmp_path, *(episode(n) for n in range(30)))
    served, reached, release = itertools.count(1), threading.Event(), threading.Event()

    def answer(_: Call) -> Reply:
        if next(served) > 10:
            reached.set()
            release.wait(60)
        return says(RIGHT)

    with serving(answer) as server:
        process = start_command(path, server)
        assert reached.wait(60)
        deadline = time.monotonic() + 30
        while len(judged(tmp_path)) < 10 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        release.set()
    assert process.returncode == code, errors
    assert KEY not in errors
    if number == signal.SIGINT:
        assert "Traceback" not in errors
        assert "the same command continues" in errors
        saved = json.loads((tmp_path / "judge.json").read_text(encoding="utf-8"))
        assert (saved["correct"], saved["missing"]) == (10, 20)
        assert saved["reasons"] == {"not asked": 20}
    with serving(lambda _: says(WRONG)) as server:
        summary = run(path, server)
    assert (summary.correct, summary.incorrect, summary.missing) == (10, 20, 0)
    assert len(server.calls) == 20


def test_two_runs_do_not_write_the_same_file(tmp_path: Path) -> None:
    path = write(tmp_path, episode(1))
    asked, release = threading.Event(), threading.Event()

    def answer(_: Call) -> Reply:
        asked.set()
        release.wait(60)
        return says(RIGHT)

    with serving(answer) as server:
        process = start_command(path, server)
        try:
            assert asked.wait(60)
            with pytest.raises(ConfigurationError, match="another run is writing"):
                run(path, server)
        finally:
            release.set()
            output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "score 100.00%: 1 of 1 correct" in output


# The prediction file


def test_a_last_line_that_is_cut_is_left_out_with_a_warning(tmp_path: Path) -> None:
    path = write(tmp_path, episode(1), episode(2), episode(3))
    path.write_bytes(path.read_bytes()[:-40])
    with serving(lambda _: says(RIGHT)) as server:
        summary = run(path, server)
    assert summary.n == 2
    assert summary.warnings == (f"{path}:3: the last line is cut, and is left out",)


def test_episodes_without_ids_go_by_their_number(tmp_path: Path) -> None:
    records = [episode(n) for n in range(2)]
    for record in records:
        del record["info"]["question_id"]
    with serving(lambda _: says(RIGHT)) as server:
        assert run(write(tmp_path, *records), server).n == 2
        assert run(write(tmp_path, *records), server).kept == 2
    assert {each["episode"] for each in judged(tmp_path)} == {0, 1}


def broken(records: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    first = records[0]["info"]
    match name:
        case "repeated":
            records.append(episode(1))
        case "no answers":
            first["answers"] = []
        case "no question":
            del first["question"]
        case "no info":
            del records[0]["info"]
        case "no key":
            del first["question_id"], records[0]["episode"]
        case "list":
            records[0] = [1]  # type: ignore[call-overload]
        case "empty":
            records.clear()
    return records


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("repeated", "lines 1 and 3 are both sample 0 of 'q1'"),
        ("no answers", "predictions.jsonl:1: the question 'q1' has no gold answers"),
        ("no question", "predictions.jsonl:1: the question of 'q1' is missing"),
        ("no info", "predictions.jsonl:1: no episode"),
        ("no key", "predictions.jsonl:1: an episode needs"),
        ("list", "predictions.jsonl:1: no episode"),
        ("empty", "holds no episode"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, words: str) -> None:
    path = write(tmp_path, *broken([episode(1), episode(2)], name))
    with pytest.raises(DataError, match=words):
        read_predictions(path)


def test_a_broken_line_before_the_last_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, episode(1))
    path.write_text('{"episode": 0,\n' + path.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(DataError, match=r"predictions.jsonl:1: no JSON"):
        read_predictions(path)
    with pytest.raises(DataError, match="there is no prediction file"):
        read_predictions(tmp_path / "absent.jsonl")


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("sample",), True),
        (("void",), "no"),
        (("info",), []),
        (("info", "question_id"), ["q1"]),
        (("info", "prediction"), ["Paris"]),
        (("info", "answers"), ["Paris", None]),
    ],
    ids=str,
)
def test_values_of_other_types_are_refused(
    tmp_path: Path, where: tuple[str, ...], value: Any
) -> None:
    record = episode(1)
    place = record
    for name in where[:-1]:
        place = place[name]
    place[where[-1]] = value
    with pytest.raises(DataError, match=rf"predictions.jsonl:1: .*`\$\.{where[0]}"):
        read_predictions(write(tmp_path, record))


def test_files_that_do_not_end_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="there is no prediction file /dev/zero"):
        read_predictions(Path("/dev/zero"))
    monkeypatch.setattr("research_env.judge.predictions.LONGEST_LINE", 1 << 20)
    path = write(tmp_path, episode(1), episode(2, "x" * (1 << 20)))
    with pytest.raises(DataError, match=r"predictions.jsonl:2: a line of over 1 MB"):
        read_predictions(path)


def test_a_question_without_answers_needs_none_where_nobody_is_asked(tmp_path: Path) -> None:
    """The episode is void or was cut: the environment has not written the answers then."""
    path = write(tmp_path, episode(1, "", ()), episode(2, "x", (), void=True))
    episodes, _ = read_predictions(path)
    assert [each.needs_judge for each in episodes] == [False, False]


# The key


def authorization(call: Call) -> str | None:
    return {name.lower(): value for name, value in call.headers.items()}.get("authorization")


def texts_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "answer",
    [
        lambda _: says(json.dumps({"rationale": KEY, "judgement": "correct"})),
        lambda _: says(f"your key is {KEY}"),
        lambda _: as_json({"error": f"bad key {KEY}"}, 400),
        lambda _: Reply(400, "".join(f"\\u{ord(c):04x}" for c in KEY).encode()),
        lambda _: Reply(400, "".join(f"%{ord(c):02X}" for c in KEY).encode()),
        lambda _: Reply(400, f"{'x' * 190} {KEY}".encode()),
        lambda _: as_json({"error": f"bad key {KEY}"}, 401),
        lambda _: as_json({"error": f"bad key {KEY}"}, 404),
        lambda _: as_json({"error": f"bad key {KEY}"}, 500),
        lambda _: Reply(200, f"<p>{KEY}</p>".encode()),
    ],
    ids=["verdict", "rubbish", "400", "escaped", "percent", "cut", "401", "404", "500", "html"],
)
def test_the_key_is_sent_and_never_repeated(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    answer: Callable[[Call], Reply],
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    caplog.set_level(logging.DEBUG)
    path = write(tmp_path, episode(1))
    with serving(answer) as server:
        key = secret_of("OPENAI_API_KEY")
        settings = JudgeSettings(f"{server.url}/v1", "m", key=key, deadline=1.0)
        try:
            told = repr(judge_predictions(path, settings))
        except ResearchEnvError as error:
            told = repr(error) + str(error) + repr(error.__cause__) + repr(error.__context__)
    assert all(authorization(call) == f"Bearer {KEY}" for call in server.calls)
    assert server.calls
    shown = told + repr(settings) + caplog.text + "".join(capfd.readouterr())
    shown += texts_in(tmp_path).decode("utf-8", "replace")
    for secret in (KEY[:8], r"\u0073\u006b\u002d", "%73%6B%2D"):
        assert secret not in shown


def test_without_a_key_none_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(lambda _: says(RIGHT)) as server:
        run(write(tmp_path, episode(1)), server, key=secret_of("OPENAI_API_KEY"))
    assert authorization(server.calls[0]) is None


def test_a_short_key_changes_no_answer(tmp_path: Path) -> None:
    """Users of a server that wants no key write EMPTY, or a letter."""
    with serving(lambda _: says(RIGHT)) as server:
        assert run(write(tmp_path, episode(1)), server, key="correct").score == 1.0


def test_an_invalid_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "se\ncret")
    with pytest.raises(ConfigurationError) as refused:
        secret_of("OPENAI_API_KEY")
    assert "cret" not in str(refused.value)


# Settings and the command


@pytest.mark.parametrize(
    "setting",
    [
        {"endpoint": "localhost:8000"},
        {"endpoint": "http://user:hunter2@localhost"},
        {"endpoint": "http://localhost/v1?api-key=hunter2"},
        {"model": " "},
        {"concurrency": 0},
        {"rate": 0.0},
        {"rate": float("nan")},
        {"deadline": 0.0},
        {"prices": (-1.0, 0.0)},
    ],
    ids=str,
)
def test_settings_that_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as refused:
        JudgeSettings(**{"endpoint": "http://localhost:8000/v1", "model": "m", **setting})
    assert "hunter2" not in str(refused.value)


def test_a_prompt_that_does_not_exist() -> None:
    with pytest.raises(UnknownNameError, match="r1-searcher"):
        JudgeSettings("http://localhost:8000/v1", "m", "r1searcher")


@pytest.fixture
def mixed() -> Iterator[Server]:
    """A judge that finds every other city right."""

    def answer(call: Call) -> Reply:
        number = int(question_of(call).removesuffix("?").split()[-1])
        return says(WRONG if number % 2 else RIGHT)

    with serving(answer) as server:
        yield server


def test_the_command(tmp_path: Path, mixed: Server, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, *(episode(n) for n in range(4)), episode(9, ""), episode(8, void=True))
    command = ["judge", str(path), "--endpoint", f"{mixed.url}/v1/", "--model", "m"]
    main([*command, "--price-in", "1", "--price-out", "2"])
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.splitlines() == [
        "score 40.00%: 2 of 5 correct",
        "2 correct, 3 incorrect; 1 of these have no prediction, which is incorrect without asking",
        "1 void episodes (failed infrastructure) are not counted",
        "asked 4 now, 0 from the cache, 0 kept from before",
        "4 replies of m in all: 400 tokens in, 28 out; cost 0.0005",
    ]
    main(["judge", str(tmp_path), *command[2:], "--json"])  # the folder will do
    summary = json.loads(capsys.readouterr().out)
    assert (summary["score"], summary["kept"], summary["cost"]) == (0.4, 4, None)
    assert summary == json.loads((tmp_path / "judge.json").read_text(encoding="utf-8"))


def test_the_command_exits_with_1_where_verdicts_are_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, episode(1))
    with serving(lambda _: says("?")) as server, pytest.raises(SystemExit) as stopped:
        main(["judge", str(path), "--endpoint", f"{server.url}/v1", "--model", "m"])
    assert stopped.value.code == 1
    assert "score between 0.00% and 100.00%" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--rate", "0"], ["--price-in", "1"]])
def test_the_command_refuses(
    tmp_path: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, episode(1))
    with pytest.raises(SystemExit) as stopped:
        main(["judge", str(path), "--endpoint", "http://localhost:1/v1", "--model", "m", *wrong])
    assert stopped.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["judge", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for word in ("For example", "OPENAI_API_KEY", "range", "without a prediction", "judged.jsonl"):
        assert word in " ".join(shown.split())


def test_a_progress_bar_in_a_terminal(
    tmp_path: Path, mixed: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    path = write(tmp_path, *(episode(n) for n in range(4)))
    judge_predictions(path, JudgeSettings(mixed.url, "m"))
    assert isinstance(sys.stderr, Terminal)
    shown = sys.stderr.getvalue()
    assert "4/4" in shown
    assert "2 correct, 2 incorrect, 0 missing" in shown


def test_control_characters_do_not_reach_the_terminal(
    tmp_path: Path, mixed: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, episode(0))
    main(["judge", str(path), "--endpoint", f"{mixed.url}/v1", "--model", "m\x1b]52;c;x\x07"])
    assert "1 replies of m?]52;c;x? in all" in capsys.readouterr().out


def test_importing_the_package_loads_no_judge() -> None:
    code = "import research_env, research_env.env, sys; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "research_env.env" in loaded.stdout.split()
    assert {"research_env.judge", "openai"}.isdisjoint(loaded.stdout.split())
    code = "import research_env.judge, sys; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "openai" not in loaded.stdout.split()  # an extra
