"""The rollouts' benchmark: both sides play the same script, and the parts measure what they say."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks import rollout_competitors as competitors
from benchmarks import rollouts as bench
from research_agent.renderer import Renderer


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy of one narrow layer."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    monkeypatch.setattr(competitors, "SIZES", {**competitors.SIZES, **sizes})


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return competitors.make_renderer()


def test_the_script_searches_three_times_and_then_speaks(renderer: Renderer) -> None:
    script = competitors.make_script(4, renderer)
    turns = [[turn[turn >= 0].tolist() for turn in episode] for episode in script]
    assert all(len(episode) == 4 for episode in turns)
    for number, episode in enumerate(turns):
        texts = [renderer.decode(turn) for turn in episode]
        assert all(text.count("<|im_end|>") == 1 for text in texts)
        assert all(text.endswith("<|im_end|>") for text in texts)
        for turn, text in enumerate(texts[:3]):
            thought, call = text.removesuffix("<|im_end|>").split("<tool_call>\n")
            arguments = json.loads(call.removesuffix("\n</tool_call>"))
            asked = f"company {number}.{turn}"
            assert arguments == {"name": "search", "arguments": {"query": asked}}
            assert thought
        assert "<tool_call>" not in texts[3]
    lengths = {len(turn) for episode in turns for turn in episode}
    assert len(lengths) > 8  # ragged
    assert script.shape == (4, 4, max(lengths))


def test_the_scripts_turns_are_as_long_as_real_ones(renderer: Renderer) -> None:
    """On average 99 tokens up to a search, and 87 at the end; then comes the end token."""
    lengths = (competitors.make_script(400, renderer) >= 0).sum(axis=2)
    assert lengths[:, :3].mean() == pytest.approx(100, abs=3)
    assert lengths[:, 3].mean() == pytest.approx(88, abs=4)


def test_our_side_plays_the_script_and_searches_for_it(renderer: Renderer) -> None:
    search = competitors.Search()
    script = competitors.make_script(4, renderer, 0.3)
    prompts = ["<|im_start|>user\nfirst<|im_end|>\n", "<|im_start|>user\nsecond one<|im_end|>\n"]
    ours = competitors.Ours(competitors.make_policy(renderer), renderer, prompts, script, search)
    for _ in range(2):  # a round leaves nothing behind
        assert ours.play() > 0
        assert ours.tokens("action") == [turns[turns >= 0].tolist() for turns in script]
    seen = [renderer.decode(tokens) for tokens in ours.tokens("prompt")]
    assert seen == ["^user\nfirst^\n"] * 2 + ["^user\nsecond one^\n"] * 2
    results = renderer.decode(ours.tokens("observation")[0])
    assert results.count(competitors.RESULT) == 3
    asked = {competitors.query(episode, turn): 2 for episode in range(4) for turn in range(3)}
    assert {query: len(times) for query, times in search.answered.items()} == asked
    ours.environments.close()


@pytest.mark.slow
def test_both_sides_of_the_race_play_the_same_tokens() -> None:
    pytest.importorskip("trl")
    result = bench.race([0], episodes=4, rounds=1, scale=0.2)
    counts = result["tokens"]["ours"]
    assert all(each == counts for each in result["tokens"].values())
    script = competitors.make_script(4, competitors.make_renderer(), 0.2)
    assert counts["action"] == (script >= 0).sum()
    row = result["by_latency_ms"][0]
    rates = row["rates"]
    assert set(rates) == {"ours", *row["ratios"]}
    assert len(row["ratios"]) == 3
    for name, ratio in row["ratios"].items():
        assert ratio == pytest.approx(rates["ours"] / rates[name])


def test_a_side_that_plays_something_else_stops_the_race(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        prompts: Sequence[str] = ("question",)

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def play(self) -> float:
            return 1.0

        def tokens(self, provenance: str) -> list[list[int]]:
            return [[1, 2, 3]]

    monkeypatch.setattr(bench, "Ours", Other)
    monkeypatch.setattr(bench, "Theirs", Other)
    with pytest.raises(RuntimeError, match="ours did not play the script"):
        bench.race([0], episodes=4, rounds=1)


def test_medians_are_over_rounds_in_which_all_take_turns() -> None:
    order: list[str] = []
    times = {"a": iter([5.0, 1.0, 3.0]), "b": iter([2.0, 9.0, 4.0])}

    def competitor(name: str) -> float:
        order.append(name)
        return next(times[name])

    found = bench.medians({"a": lambda: competitor("a"), "b": lambda: competitor("b")}, 3)
    assert found == {"a": 3.0, "b": 4.0}
    assert order == ["a", "b"] * 3
    assert bench.compared({"ours": 6.0, "a": 3.0})["ratios"] == {"a": 2.0}


def test_the_overhead_leaves_engine_and_environments_out() -> None:
    row = bench.overhead(slots=4, episodes=8, rounds=1)
    assert 0 < row["tokenizer"] < row["collector"] < row["whole"]


def test_empty_time_is_what_ready_work_waits_until_the_queue_is_empty() -> None:
    """Two slots, five episodes, from 10 to 20: worked by hand."""
    log = bench.Log()

    def generate(slot: int, begin: float) -> None:
        log.add("generate", slot + 1, begin, tokens=3)

    def environment(slot: int, begin: float, over: bool) -> None:
        log.add("environment", slot + 1, begin, over=over)

    log.add("wait", 0, 11.0)  # stands in the trainer's row
    generate(0, 10.5)  # empty 0.5
    generate(1, 11.0)  # empty 1
    environment(0, 12.0, over=False)  # answered at 13: searching 1
    generate(0, 13.25)  # empty 0.25
    environment(1, 14.0, over=True)
    environment(0, 15.0, over=True)
    generate(1, 14.0)  # empty 0, a new episode
    generate(0, 17.0)  # empty 2, another one
    environment(1, 18.0, over=False)  # answered at 21, sought from 18
    environment(0, 19.0, over=True)
    generate(0, 20.0)  # empty 1: the last episode is begun, at 20
    generate(1, 22.0)  # after that
    shares = bench.slot_shares(log, {0: [13.0], 1: [21.0]}, 2, 10.0)
    assert shares["empty"] == pytest.approx((0.5 + 1 + 0.25 + 0 + 2 + 1) / (2 * 10))
    assert shares["searching"] == pytest.approx((1 + 2) / (2 * 10))


def test_slots_wait_for_slow_searches_and_are_not_empty_then() -> None:
    shares = bench.empty_slots(episodes=8, rounds=1, seconds=0.3, scale=0.1)
    assert 0 < shares["empty"] < 1
    assert shares["searching"] > 0.05


@pytest.mark.vllm
@pytest.mark.slow
def test_the_engine_and_generate_sample_as_many_tokens() -> None:
    pytest.importorskip("vllm")
    competitors.SIZES["hidden_size"] = 128  # heads of 32, the smallest that vLLM takes
    result = bench.engine_share(slots=3, rounds=1, length=8)
    names = {"ours", "generate", "without seeds", "without both"}
    assert result["tokens"] == dict.fromkeys(names, 3 * 4 * 8)
    for name, ratio in result["ratios"].items():
        assert ratio == pytest.approx(result["rates"]["ours"] / result["rates"][name])


def test_the_command_says_what_is_missing_and_what_is_met(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "overhead", lambda *_: {"whole": 130.0, "collector": 90.0})
    monkeypatch.setattr(bench, "empty_slots", lambda *_: {"empty": 0.03, "searching": 0.1})
    monkeypatch.setattr(sys, "argv", ["rollouts", "--json"])
    bench.main()
    result = json.loads(capsys.readouterr().out)
    assert result["missing"] == ["trl", "vllm"]
    assert list(result["met"].values()) == [True, False]
    monkeypatch.setattr(sys, "argv", ["rollouts"])
    bench.main()
    told = capsys.readouterr().out
    assert "not installed: trl" in told
    assert "empty 3.00%" in told
    assert told.count("MISSED") == 1
    monkeypatch.setattr(sys, "argv", ["rollouts", "--episodes", "5"])
    with pytest.raises(SystemExit):
        bench.main()


def test_the_client_samples_what_it_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["rollouts", "client", "--turns", "12", "--in-flight", "4"]
    monkeypatch.setattr(sys, "argv", words)
    bench.main()
    told = capsys.readouterr().out
    assert re.search(r"4 turns in flight: \d+\.\d\d ms of CPU per turn, \d+ turns/s", told)
    monkeypatch.setattr(sys, "argv", [*words, "--json"])
    bench.main()
    costs = json.loads(capsys.readouterr().out)
    assert costs["milliseconds"] > 0 and costs["turns_per_second"] > 0
