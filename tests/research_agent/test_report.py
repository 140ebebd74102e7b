from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from research_agent.cli import main
from research_agent.report import pairs, render, series, text_curve

HOSTILE = "<script>alert('x')</script> {{ 7 * 7 }} </span> \x00\x1b[31m ]]> &amp; \ud800 \u202e"


class Page(HTMLParser):
    """The text of each classed span, and every tag and attribute seen."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self._open: str | None = None
        self._inside = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        given_ = dict(attrs)
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]
        if given_.get("class") == "text":
            self._inside = True
        elif tag == "span" and self._inside:
            self._open = given_.get("class")
            self.texts.append((self._open or "", ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == "span":
            self._open = None
        if tag == "div":
            self._inside = False

    def handle_data(self, data: str) -> None:
        if self._open and self._inside:
            author, text = self.texts[-1]
            self.texts[-1] = (author, text + data)


def record(episode: int, reward: float, *segments: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {
        "episode": episode,
        "reward": reward,
        "stop_reason": "answer",
        "metrics": {"em": reward},
        "segments": [{"provenance": who, "text": text} for who, text in segments],
        **more,
    }


def page(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> str:
    return render(title="run", shown=pairs(before, after, 9), before={}, after={}, config={})


def test_texts_are_coloured_by_who_wrote_them_thoughts_apart() -> None:
    one = record(
        3,
        1.0,
        ("prompt", "Q\n"),
        ("action", "<think>hm</think><look>x</look>"),
        ("observation", "<think>not the policy's</think>"),
        ("action", "so <think>cut"),
    )
    assert Page(page([one], [])).texts == [
        ("prompt", "Q\n"),
        ("thought", "<think>hm</think>"),
        ("action", "<look>x</look>"),
        ("observation", "<think>not the policy's</think>"),
        ("action", "so "),
        ("thought", "<think>cut"),
    ]


@given(st.text(st.characters(codec=None), min_size=1) | st.just(HOSTILE))
def test_any_text_is_shown_as_text(text: str) -> None:
    plain = Page(page([record(0, 0.0, ("observation", "x"), info={"note": "x"})], []))
    html = page([record(0, 0.0, ("observation", text), info={"note": text})], [])
    html.encode("utf-8")
    assert Page(html).tags == plain.tags
    assert "\x00" not in html
    assert "script" not in Page(html).tags


def test_nothing_is_loaded_from_elsewhere() -> None:
    html = page([record(0, 0.0, ("prompt", "see http://example.org/a.png"))], [])
    assert [link for link in Page(html).links if not link.startswith("data:")] == []
    assert "default-src 'none'" in html


def test_tasks_are_matched_by_episode_and_sorted_by_gain() -> None:
    before = [record(n, r, ("action", "b")) for n, r in [(1, 0.5), (2, 0.0), (3, 1.0), (8, 0.0)]]
    after = [record(n, r, ("action", "a")) for n, r in [(1, 0.5), (2, 1.0), (3, 0.0), (9, 1.0)]]
    assert [(p.episode, p.change) for p in pairs(before, after, 9)] == [(2, 1), (1, 0), (3, -1)]
    assert [p.episode for p in pairs(before, after, 1)] == [2]
    assert [p.episode for p in pairs(before, [], 9)] == [1, 2, 3, 8]


def test_series_hold_finite_values_of_training_and_evaluations() -> None:
    records: list[dict[str, Any]] = [
        {"step": 0, "eval/em": 0.1},
        {"step": 1, "reward": 0.2, "learner/kl": 3.0},
        {"step": 2, "reward": None, "eval/em": 0.9},
    ]
    assert series(records) == {"eval/em": [(0, 0.1), (2, 0.9)], "reward": [(1, 0.2)]}


def test_the_curve_in_the_terminal() -> None:
    drawn = text_curve([(0, 0.0), (5, 0.5), (10, 1.0)], name="em", width=11, height=3)
    assert drawn.splitlines() == [
        "em",
        "    1.00 ┤          ●",
        "         ┤     ●",
        "    0.00 ┤●",
        "         └───────────",
        "          0   step 10",
    ]


def test_a_curve_of_one_point_or_of_equal_values_is_drawn() -> None:
    assert "●" in text_curve([(4, 0.3)])
    assert "●" in text_curve([(0, 7.0), (9, 7.0)])
    assert "nothing" in text_curve([], name="em")


def a_run(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"run": {"seed": 3}}))
    lines = [{"step": 0, "eval/reward": 0.1}, {"step": 1, "reward": 0.2, "eval/reward": 0.9}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step, reward in ((0, 0.0), (1, 1.0)):
        evaluation = folder / "evaluations" / f"step-{step:06d}"
        evaluation.mkdir(parents=True)
        one = record(5, reward, ("prompt", "Q"), ("action", HOSTILE))
        (evaluation / "predictions.jsonl").write_text(json.dumps(one) + "\n")
        (evaluation / "summary.json").write_text(json.dumps({"reward": reward}))
    return folder


def test_report_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path / "run")
    main(["report", str(run)])
    out = capsys.readouterr().out
    assert "eval/reward" in out
    assert str(run / "report.html") in out
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG\r\n")
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "reward +1.00" in html.replace("</span>", "").replace('<span class="up">', "")
    assert "data:image/png;base64," in html
    assert "run.seed" in html
    assert "<script" not in html


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/none"], "holds no run"),
        (["{tmp}/run", "--metric", "nope"], "it has eval/reward, reward"),
        (["{tmp}/run", "--before", "{tmp}/no.jsonl"], "there is no file"),
    ],
)
def test_report_refuses_what_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    a_run(tmp_path / "run")
    with pytest.raises(SystemExit) as caught:
        main(["report", *(word.format(tmp=tmp_path) for word in arguments)])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
