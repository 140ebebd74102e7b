"""Numbers of runs, verdicts and reports."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ablations.__main__ import main
from benchmarks.ablations.numbers import (
    NUMBERS,
    FinishedRun,
    at_equal_budget,
    largest_fall,
    read_run,
    rows_of,
    self_correction,
    with_totals,
)
from benchmarks.ablations.registry import BY_NAME, Claim
from benchmarks.ablations.report import draw, report, verdict, verdicts
from benchmarks.ablations.runs import AblationsConfig, folder_of
from tests.benchmarks.ablations.finished_run import write_run

CONFIG = AblationsConfig("all")


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
            write_run(config, arm, seed, em=(0.2,), worlds=("hard",))
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


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three seeds of RL and of SFT: apart in domain, overlapping out of it."""
    config = replace(CONFIG, output=tmp_path)
    ablation = BY_NAME["sft"]
    rl, sft = ablation.arms
    for seed, (ours, theirs) in enumerate([(0.8, 0.3), (0.6, 0.5), (0.7, 0.4)]):
        write_run(config, rl, seed, em=(ours, 0.5))
        write_run(config, sft, seed, em=(theirs, 0.25 * (seed + 1)))
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
