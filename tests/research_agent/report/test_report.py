"""Reports: what the page holds, and what a real browser makes of it."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from research_agent.cli import main
from research_agent.report import draw, render, series, text_curve
from research_agent.report.index import make_index
from research_agent.report.sources import Predictions, Sources, names
from tests.research_agent.chromium import Chromium, Tab, find

Record = dict[str, Any]

HOSTILE = (
    "</script><script>document.title = 'ran'</script>",
    "</script/ x='<!--<script '",
    "<!--<script><img src=x onerror=\"document.title = 'ran'\">",
    "javascript:document.title='ran'",
    "\" onmouseover=\"document.title='ran'\" x='",
    "</style></title></textarea><svg onload=document.title='ran'>",
    "{{ 7 * 7 }} ${7 * 7} $data $script %s &lt;b&gt; &#60;",
    "a\u2028b\u2029c \u202egnp.exe\u202c",
    "lone \ud800 and \udc00",
    "\x00\x07\x1b[31m\r\x7f\x85",
    "<|im_end|></think></search></result><answer>",
    "__proto__",
    "constructor",
    "x" * 100_000,
)


class Page(HTMLParser):
    """The elements of a page, and what its script elements hold."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.links: list[str] = []
        self.policy = ""
        self.scripts: dict[str, str] = {}
        self._inside: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"] or ""
        if tag == "script":
            self._inside = attributes.get("id", "code")
            self.scripts[self._inside or ""] = ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = None if tag == "script" else self._inside

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[self._inside] += data

    @property
    def index(self) -> Any:
        return json.loads(self.scripts["index"])

    @property
    def records(self) -> list[Record]:
        found: list[Record] = []
        for number in range(len(self.scripts) - 2):
            packed = base64.b64decode(json.loads(self.scripts[f"chunk-{number}"]))
            found += json.loads(gzip.decompress(packed))
        return found


SHOWS = {
    "request": "query",
    "requests": "searches",
    "ids": "passage_ids",
    "titles": "passage_titles",
    "scores": "passage_scores",
    "marked": "supporting_ids",
    "item": "passage",
    "mark": "gold",
}


def record(episode: int, reward: float, *segments: tuple[str, str], **info: Any) -> Record:
    return {
        "episode": episode,
        "sample": 0,
        "reward": reward,
        "terminated": True,
        "truncated": False,
        "stop_reason": "answer",
        "void": False,
        "metrics": {"em": reward},
        "segments": [{"provenance": who, "text": text, "tokens": 3} for who, text in segments],
        "info": info,
    }


def evil(text: str) -> Record:
    """A record that says a text wherever one can be said."""
    shown = record(0, 1.0, ("prompt", text), ("action", f"<think>{text}</think>{text}"))
    seen = {"query": text, "passage_ids": [text], "passage_titles": [text], "passage_scores": [1]}
    piece = {"pieces": [text, text], "logprobs": [-0.5, None]}
    shown["segments"] += [
        {"provenance": "observation", "text": f"<result>{text}\n{text}", "tokens": 1, "info": seen},
        {"provenance": "action", "text": text, "tokens": 2, **piece},
    ]
    shown["metrics"][text] = 1.0
    shown["stop_reason"] = text
    shown["info"] = {
        "question_id": text,
        "question": text,
        "prediction": text,
        "answers": [text],
        "supporting_ids": [text],
        "strata": {text: text},
        text: text,
    }
    return shown


def page(*sides: Sequence[Record], title: str = "t", limit: int | None = None) -> str:
    files = [
        Predictions(Path(f"/{n}.jsonl"), {"shows": SHOWS}, records)
        for n, records in enumerate(sides)
    ]
    return render(title, *make_index(Sources(predictions=files), limit))


# --- what the file holds ------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_stays_data(text: str) -> None:
    html = page([evil(text)], title=text)
    html.encode("utf-8")
    read = Page(html)
    assert read.tags == Page(page([evil("x")])).tags
    assert read.records == [evil(text)]
    [item] = read.index["items"]
    assert item["question"] == item["sides"][0]["prediction"] == text
    assert item["id"] == text.replace("\ud800", "\\ud800").replace("\udc00", "\\udc00")
    assert read.index["sets"][0]["values"][text] == 1.0
    assert read.index["title"] == text


@given(st.text(st.characters(codec=None), min_size=1))
def test_any_text_stays_data(text: str) -> None:
    read = Page(page([evil(text)], title=text))
    assert read.tags == Page(page([evil("x")])).tags
    assert read.records == [evil(text)]


def test_nothing_is_loaded_from_elsewhere_and_only_the_pages_own_script_may_run() -> None:
    read = Page(page([record(0, 0.0, ("prompt", "see http://example.org/a.png"))]))
    assert read.links == []
    assert read.tags.count("script") == 3  # its code, the index, a chunk of records
    assert "default-src 'none'; script-src 'sha256-" in read.policy
    assert "unsafe" not in read.policy


def test_numbers_that_are_not_finite_do_not_break_the_page() -> None:
    broken = record(0, float("nan"), ("action", "x"))
    assert Page(page([broken])).records == [broken | {"reward": None, "metrics": {"em": None}}]


def test_samples_are_matched_by_question_and_else_by_episode() -> None:
    first = [record(1, 0.0, question_id="a"), record(2, 0.0, question_id="b"), record(3, 1.0)]
    second = [record(9, 1.0, question_id="b"), record(3, 0.0), record(4, 0.0, question_id="c")]
    items = Page(page(first, second)).index["items"]
    rights = {item["id"]: [s and s["correct"] for s in item["sides"]] for item in items}
    assert rights == {
        "a": [False, None],
        "b": [False, True],
        "3": [True, False],
        "c": [None, False],
    }
    assert [i["id"] for i in Page(page(first, second, limit=2)).index["items"]] == ["a", "b"]
    assert "2 of 4" in Page(page(first, second, limit=2)).index["notes"][0]


def test_right_is_more_than_half_an_exact_match_or_else_of_the_reward() -> None:
    by_reward = record(1, 0.6) | {"metrics": {}}
    by_match = record(2, 0.9) | {"metrics": {"em": 0.5}}
    void = record(3, 0.0) | {"void": True}
    first = record(1, -3.0) | {"metrics": {"success": 1.0, "tokens": 3.0}}
    (item,) = Page(page([first])).index["items"]
    assert item["sides"][0]["correct"] is True  # the first metric, where there is no exact match
    (item,) = Page(page([by_reward])).index["items"]
    assert item["sides"][0]["correct"] is True
    items = Page(page([by_reward, by_match, void])).index["items"]
    assert [item["sides"][0]["correct"] for item in items] == [False, False, None]


def test_means_have_intervals_and_strata() -> None:
    records = [
        record(n, float(n % 2), strata={"hops": str(2 + n // 4)}, question_id=f"q{n}")
        for n in range(8)
    ]
    [shown] = Page(page(records)).index["sets"]
    assert shown["values"]["em"] == 0.5
    low, high = shown["intervals"]["em"]
    assert 0 <= low < 0.5 < high <= 1
    assert {k: v["episodes"] for k, v in shown["strata"]["hops"].items()} == {"2": 4, "3": 4}


def test_several_samples_show_pass_at_k_and_the_majority() -> None:
    told = [(0, "x", 0.0), (1, "y", 1.0), (2, "y", 1.0)]
    records = [
        record(0, em, question_id="q", prediction=said) | {"sample": sample}
        for sample, said, em in told
    ]
    [shown] = Page(page(records)).index["sets"]
    assert shown["values"]["em"] == pytest.approx(2 / 3)
    assert shown["values"]["em pass@3"] == shown["values"]["em of the majority"] == 1.0


def test_names_are_the_ends_of_paths_that_tell_them_apart() -> None:
    one = [Path("/r/v1.5/evaluations/step-1/predictions.jsonl"), Path("/r/v1.5/b.jsonl")]
    assert names(one) == ["step-1", "b"]
    two = [Path("/r/a/evaluations/step-1/predictions.jsonl"), Path("/r/b/step-1")]
    assert names(two) == ["a/step-1", "b/step-1"]


# --- curves ---------------------------------------------------------------------------------------


def test_series_hold_finite_values_of_training_and_evaluations() -> None:
    records: list[Record] = [
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


def test_one_run_or_several_are_drawn(tmp_path: Path) -> None:
    log: list[Record] = [
        {"step": 0, "eval/searches": 3.0},
        {"step": 1, "reward": 0.5, "eval/searches": 4.0},
    ]
    odd: list[Record] = [{"step": 1, "eval/$\\frac$": 0.5, "eval/\ud800": 0.5}]  # no formula
    several: list[dict[str, list[Record]]] = [{"a": log}, {"a": log, "b": log[:1]}, {"a": []}]
    several += [{"a": odd}, {"a$b$\ud800": log, "$\\frac$": log}]
    for runs in several:
        draw(runs, tmp_path / "curve.png")
        assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG\r\n")


# --- the command line -----------------------------------------------------------------------------


def write(folder: Path, records: Sequence[Record], name: str = "predictions.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    header = {"header": {"model": folder.name, "versions": {"torch": "9"}}}
    lines = "".join(json.dumps(line) + "\n" for line in [header, *records])
    (folder / name).write_text(lines, encoding="utf-8")
    return folder / name


def a_run(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"run": {"seed": 3}}))
    lines = [{"step": 0, "eval/reward": 0.1}, {"step": 1, "reward": 0.2, "eval/reward": 0.9}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step, reward in ((0, 0.0), (5, 0.5), (10, 1.0)):
        one = record(5, reward, ("prompt", "Q"), ("action", HOSTILE[0]))
        write(folder / "evaluations" / f"step-{step:06d}", [one])
        (folder / "evaluations" / f"step-{step:06d}" / "summary.json").write_text("{}")
    write(folder / "evaluations" / "step-000015", [])  # killed
    return folder


def test_a_run_is_shown_with_its_first_and_last_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "run")
    main(["report", str(run)])
    out = capsys.readouterr().out
    assert "eval/reward" in out
    assert f"{run / 'report.html'} (0.0 MB)" in out
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG\r\n")
    index = Page((run / "report.html").read_text(encoding="utf-8")).index
    assert [shown["name"] for shown in index["sets"]] == ["step-000000", "step-000010"]
    assert index["runs"][0]["curves"]["eval/reward"] == [[0, 0.1], [1, 0.9]]
    assert index["runs"][0]["settings"] == {"run.seed": 3}
    assert index["sets"][0]["settings"] == {"model": "step-000000", "versions.torch": "9"}


def test_evaluations_files_and_runs_stand_in_one_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "ours", [record(1, 1.0, ("action", "x"))])
    file = write(tmp_path / "theirs", [record(1, 0.0, ("action", "y"))], "other.jsonl")
    run, output = a_run(tmp_path / "run"), tmp_path / "new" / "all.html"
    words = [str(tmp_path / "ours"), str(file), str(run), str(file), "--output", str(output)]
    main(["report", *words])
    shown = Page(output.read_text(encoding="utf-8")).index["sets"]
    assert [s["name"] for s in shown] == ["ours", "other", "step-000000", "step-000010"]
    assert (output.parent / "curve.png").exists()
    capsys.readouterr()

    main(["report", str(file)])
    assert (tmp_path / "theirs" / "report.html").exists()
    assert not (tmp_path / "theirs" / "curve.png").exists()
    assert capsys.readouterr().out.startswith("page ")


def test_a_line_that_was_cut_short_is_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "cut", [record(1, 1.0), record(2, 1.0)])
    file.write_bytes(file.read_bytes()[:-30])
    main(["report", str(file)])
    assert "cut short" in capsys.readouterr().err
    index = Page((tmp_path / "cut" / "report.html").read_text(encoding="utf-8")).index
    assert [item["id"] for item in index["items"]] == ["1"]
    assert "cut short" in index["notes"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to report"),
        (["{tmp}/none"], "there is no"),
        (["{tmp}"], "holds no run and no evaluation"),
        (["{tmp}/run", "--metric", "nope"], "they have eval/reward, reward"),
        (["{tmp}/run", "{tmp}/no.jsonl"], "there is no"),
        (["{tmp}/run", "--limit", "0"], "--limit is 0"),
        (["{tmp}/run/metrics.jsonl"], "is no record"),
        (["{tmp}/run/config.json"], "holds no prediction"),
        (["{tmp}/empty.jsonl"], "holds no prediction"),
        (["{tmp}/strange.jsonl"], "strange.jsonl:2: this line is no record"),
    ],
)
def test_report_refuses_what_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    a_run(tmp_path / "run")
    write(tmp_path, [], "empty.jsonl")
    strange = record(1, 1.0)
    strange["segments"] = [{"provenance": "action", "text": 7, "tokens": 1}]
    write(tmp_path, [strange], "strange.jsonl")
    with pytest.raises(SystemExit) as caught:
        main(["report", *(word.format(tmp=tmp_path) for word in arguments)])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    program = find()
    if program is None:
        message = "no Chromium is installed (Debian's package is chromium)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    started = Chromium(program, tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


def opened(browser: Chromium, html: str, folder: Path, fragment: str = "", **more: Any) -> Tab:
    file = folder / "page.html"
    file.write_text(html, encoding="utf-8")
    return Tab(browser, file, fragment, **more)


ALLOWED = set(
    re.findall(
        r"\w+",
        """
        html head meta title style body main noscript script div section h1 h2 h3 p span small
        strong table thead tbody tr th td form label select option input ol li a bdi nav article
        details summary dl dt dd mark code figure figcaption svg path line text circle
        """,
    )
)
TITLE = "hostile <b>title</b>"


def innocent(tab: Tab) -> None:
    """Assert that no text of the data became markup or code, and that nothing was loaded."""
    assert tab.run("document.title") == TITLE
    tags = set(tab.run("[...document.querySelectorAll('*')].map((e) => e.localName)"))
    assert tags <= ALLOWED
    assert tab.run("document.scripts.length") == 3
    handlers = "e.getAttributeNames().some((n) => n.startsWith('on') || n === 'src')"
    assert not tab.run(f"[...document.querySelectorAll('*')].some((e) => {handlers})")
    assert tab.run("[...document.links].every((a) => a.getAttribute('href').startsWith('#'))")
    assert tab.events("Runtime.exceptionThrown") == []
    assert tab.events("Log.entryAdded") == []
    requests = tab.events("Network.requestWillBeSent")
    assert len({r["request"]["url"].partition("#")[0] for r in requests}) == 1


def test_no_hostile_text_runs_in_a_browser(browser: Chromium, tmp_path: Path) -> None:
    records = [evil(text) for text in HOSTILE]
    html = page(records, [evil(text) | {"void": True} for text in HOSTILE], title=TITLE)
    tab = opened(browser, html, tmp_path)
    innocent(tab)
    assert tab.texts("h1") == [TITLE]
    assert len(tab.texts(".list li")) == len(HOSTILE)
    assert any("⟨U+202E⟩" in text for text in tab.texts(".question"))
    assert any("⟨U+D800⟩" in text for text in tab.texts(".question"))
    for number, text in enumerate(HOSTILE):
        address = tab.run(f"address(opened(data.items[{number}]))")
        asked = f"data.items[{number}].question"
        for view in ("", "tokens"):
            tab.run(f"location.hash = {json.dumps(f'{address}&view={view}')}")
            tab.wait(
                f"document.querySelector('h2[dir]')?.textContent === readable(clip({asked}, 4000))"
            )
            tab.wait(f"Boolean(document.querySelector('.segment')) === {json.dumps(bool(view))}")
            innocent(tab)
        tokens = tab.run("[...document.querySelectorAll('.token')].map((e) => e.textContent)")
        assert tokens == [tab.run(f"readable({json.dumps(text)})")] * 4
    for width in (1280, 400):
        tab.size(width)
        tab.run("location.hash = ''")
        tab.wait("trajectory.hidden")
        assert tab.run("document.documentElement.scrollWidth") <= width
        tab.run("location.hash = address(opened(data.items.at(-1)))")
        tab.wait("overview.hidden")
        assert tab.run("document.documentElement.scrollWidth") <= width
    tab.close()


@pytest.mark.parametrize("name", ["constructor", "__proto__"])
def test_names_that_every_object_has_are_names_like_others(
    browser: Chromium, tmp_path: Path, name: str
) -> None:
    tab = opened(browser, page([evil(name)], [record(1, 1.0)]), tmp_path)
    cells = "[...row.cells].map((cell) => cell.textContent.replace(/ \\[.*/, ''))"
    means = tab.run(f"[...document.querySelectorAll('.tables tr')].map((row) => {cells})")
    assert [name, "1.000", "–"] in means
    assert [name, name, "1 / –", "1.000", "–"] in means
    tab.close()


def test_what_slips_through_would_be_stopped_by_the_policy(
    browser: Chromium, tmp_path: Path
) -> None:
    """The payloads do work: without the policy they run, and the tests above would tell."""
    html = page([record(0, 0.0, ("action", "x"))], title=TITLE)
    payload = "<script>document.title = 'ran'</script><p onclick=\"document.title = 'ran'\" id=p>"
    slipped = html.replace("<main", f"{payload}<main", 1)
    tab = opened(browser, slipped, tmp_path)
    assert tab.run("document.title") == TITLE
    assert any(
        "Content Security Policy" in e["entry"]["text"] for e in tab.events("Log.entryAdded")
    )
    assert tab.run("try { main.innerHTML = '<b></b>'; } catch (e) { e.name }") == "TypeError"
    tab.close()
    without = slipped.replace(Page(html).policy, "")
    assert without != slipped
    tab = opened(browser, without, tmp_path)
    assert tab.run("document.title") == "ran"
    tab.close()


def asked(number: int, right: float, **more: Any) -> Record:
    """The record of a question that tells what it is in its text."""
    made = record(number, right, ("prompt", "p"), ("action", "x"), question=f"number {number}?")
    made["info"] |= {"question_id": f"q{number}", "prediction": f"p{number}", "answers": ["g"]}
    made["metrics"]["searches"] = float(number % 3)
    made["info"]["strata"] = {"hops": str(2 + number % 2), "type": "only one"}
    made["stop_reason"] = "length" if number == 4 else "answer"
    return made | more


RIGHTS = ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.0, 1.0), (1.0, 1.0))
BEFORE = [*(asked(n, a) for n, (a, _) in enumerate(RIGHTS)), asked(6, 0.0, void=True)]
AFTER = [*(asked(n, b) for n, (_, b) in enumerate(RIGHTS)), asked(8, 1.0), asked(9, 1.0)]


@pytest.fixture(scope="module")
def two(browser: Chromium, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    tab = opened(browser, page(BEFORE, AFTER), tmp_path_factory.mktemp("two"))
    yield tab
    assert tab.events("Runtime.exceptionThrown") == []
    tab.close()


def go(tab: Tab, fragment: str) -> None:
    tab.run(f"location.hash = {json.dumps('#' + fragment)}")
    tab.run("new Promise((done) => setTimeout(done))")  # the event comes in a task of its own
    tab.wait()


def rows(tab: Tab) -> list[int]:
    return [int(text.split()[1].rstrip("?")) for text in tab.texts(".list .question")]


@pytest.mark.parametrize(
    ("fragment", "found"),
    [
        ("", [0, 1, 2, 3, 4, 5]),
        ("verdict=gained", [2, 4]),
        ("verdict=lost", [1]),
        ("verdict=correct", [0, 5]),
        ("verdict=wrong", [3]),
        ("sort=gain", [2, 4, 0, 3, 5, 1]),
        ("sort=loss", [1, 0, 3, 5, 2, 4]),
        ("b=", [0, 1, 2, 3, 4, 5, 6]),
        ("b=&verdict=correct", [0, 1, 5]),
        ("b=&verdict=wrong", [2, 3, 4]),
        ("b=&verdict=void", [6]),
        ("a=1&b=", [0, 1, 2, 3, 4, 5, 8, 9]),
        ("a=1&b=0&verdict=lost", [2, 4]),
        ("is.hops=3", [1, 3, 5]),
        ("is.hops=nonsense", []),
        ("requests=2", [2, 5]),
        ("stop=length", [4]),
        ("q=NUMBER+3", [3]),
        ("q=p5", [5]),
        ("is.hops=2&requests=1", [4]),
        ("a=7&b=9&page=99&nonsense=1", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_filters_are_in_the_address(two: Tab, fragment: str, found: list[int]) -> None:
    go(two, fragment)
    assert rows(two) == found


def test_what_does_not_match_is_counted(two: Tab) -> None:
    go(two, "")
    told = two.texts("[role=status]")[0]
    assert told.startswith("6 of 6 pairs")
    assert "1 question of 0 not in 1" in told
    assert "2 questions of 1 not in 0" in told
    go(two, "open=q8")
    assert two.texts(".side .note")[0] == "This run has no such question."
    go(two, "open=gone")
    assert two.texts("[role=status]") == ["There is no trajectory gone in this report."]


def test_filters_and_keys_work_by_hand(two: Tab) -> None:
    go(two, "")
    choices = two.texts("#f-verdict option")
    assert choices == [
        "all",
        "wrong → correct",
        "correct → wrong",
        "both correct",
        "both wrong",
        "void",
    ]
    two.run(
        "(() => { const f = document.getElementById('f-verdict'); f.value = 'gained';"
        "f.dispatchEvent(new Event('change')); })()"
    )
    two.wait("location.hash === '#verdict=gained' && list.children.length === 2")
    two.press("/", "document.activeElement === wordFilter")
    for key in "r 4":
        two.press(key)
    two.wait("location.hash.endsWith('q=r+4') && list.children.length === 1")
    two.press("Escape", "document.activeElement !== wordFilter")
    go(two, "verdict=gained")
    two.press("j")
    two.press("Enter", "document.querySelector('h2[dir]')?.textContent === 'number 2?'")
    two.press("j", "document.querySelector('h2[dir]').textContent === 'number 4?'")
    two.press("j")
    assert two.texts(".bar .quiet")[-1] == "2 of 2"
    two.press("t", "document.querySelector('.segment')")
    two.press("k", "document.querySelector('h2[dir]').textContent === 'number 2?'")
    assert two.run("location.hash") == "#verdict=gained&open=q2&view=tokens"
    two.press("Escape", "trajectory.hidden")
    assert two.run("location.hash") == "#verdict=gained"
    assert rows(two) == [2, 4]
    two.run("history.back()")
    two.wait("!trajectory.hidden && document.querySelector('.segment')")


def test_a_long_list_has_pages(browser: Chromium, tmp_path: Path) -> None:
    html = page([asked(n, 1.0) for n in range(120)])
    tab = opened(browser, html, tmp_path, "#page=3")
    assert rows(tab) == list(range(100, 120))
    assert "page 3 of 3" in tab.texts(".pager")[0]
    go(tab, "page=2&q=number")
    assert rows(tab) == list(range(50, 100))
    tab.run("wordFilter.value = 'number 11'; wordFilter.dispatchEvent(new Event('input'))")
    tab.wait("list.children.length === 11")
    assert rows(tab) == [11, *range(110, 120)]
    go(tab, "page=2")
    tab.run("wordFilter.value = '?'; wordFilter.dispatchEvent(new Event('input'))")
    tab.wait("location.hash === '#q=%3F'")  # a new filter begins at its first page
    assert rows(tab) == list(range(50))
    tab.close()


def a_search() -> Record:
    """An episode as ReSearch plays one, its last action with the sampler's log-probabilities."""
    titles = ["Ann Lee", "Ann", "Nord & Co"]
    bodies = ["Ann Lee is no Ann.", "Ann founded Nord.\n\nIn 1999.", "Based in Oslo."]
    found = "\n\n".join(f'"{t}"\n{b}' for t, b in zip(titles, bodies, strict=True))
    shown = asked(0, 1.0)
    shown["segments"] = [
        {"provenance": "prompt", "text": "Use <think> </think>. Where?", "tokens": 4},
        {
            "provenance": "action",
            "text": "<think> Ann? </think> <search> Ann </search>",
            "tokens": 9,
        },
        {
            "provenance": "observation",
            "text": f" <result>\n{found}\n</result>",
            "tokens": 20,
            "info": {
                "query": "Ann",
                "passage_ids": ["a", "b", "c"],
                "passage_titles": titles,
                "passage_scores": [3.0, 2.5, 1.0],
            },
        },
        {
            "provenance": "action",
            "text": "<think>so</think><answer>Oslo</answer>",
            "tokens": 3,
            "pieces": ["<think>so</think>", "<answer>Oslo", "</answer>"],
            "logprobs": [-0.1054, -2.3026, 0.0],
        },
    ]
    shown["info"] |= {"supporting_ids": ["b", "z"], "prediction": " Oslo", "steps": 2}
    return shown


def test_a_trajectory_is_shown_in_its_parts(browser: Chromium, tmp_path: Path) -> None:
    tab = opened(browser, page([a_search()]), tmp_path, "#open=q0")
    steps = tab.run(
        "[...document.querySelectorAll('.step')].map((s) => "
        "[s.querySelector('.label').textContent, s.querySelector('.text').firstChild.textContent])"
    )
    assert [label for label, _ in steps] == ["Thinks", "Asks", "Reads", "Thinks", "Answers"]
    assert tab.texts(".thought .text") == ["<think> Ann? </think>", "<think>so</think>"]
    assert tab.texts(".step.action mark") == ["Ann", "Oslo"]
    assert tab.texts(".request") == ["for Ann"]
    assert tab.texts(".item .title") == ["Ann Lee", "Ann", "Nord & Co"]
    assert tab.texts(".item .body") == [
        "Ann Lee is no Ann.",
        "Ann founded Nord.\n\nIn 1999.",
        "Based in Oslo.",
    ]
    assert tab.texts(".item.marked .title") == ["Ann"]
    assert tab.texts(".side > .note") == ["Gold passages found: 1 of 2. Not found: z"]
    assert tab.texts(".side > .prediction") == ["Oslo"]
    assert "reward1" in tab.texts(".metrics div")
    assert tab.texts(".words dt") == ["steps"]
    tab.close()


def test_masks_and_log_probabilities_are_shown_on_demand(browser: Chromium, tmp_path: Path) -> None:
    tab = opened(browser, page([a_search()]), tmp_path, "#open=q0&view=tokens")
    assert tab.texts(".segment > .label") == [
        "prompt 4 tokens · mask 0",
        "action 9 tokens · mask 1 · log-probabilities: not recorded",
        "observation 20 tokens · mask 0",
        "action 3 tokens · mask 1",
    ]
    texts = [segment["text"] for segment in a_search()["segments"]]
    assert tab.texts(".segment > .text") == texts
    assert tab.texts(".token") == ["<think>so</think>", "<answer>Oslo", "</answer>"]
    titles = tab.run("[...document.querySelectorAll('.token')].map((t) => t.title)")
    assert titles[1] == 'token 2: "<answer>Oslo", log-probability -2.3026, probability 10.0 %'
    shades = tab.run(
        "[...document.querySelectorAll('.token')].map((t) => getComputedStyle(t).backgroundColor)"
    )
    assert len(set(shades)) == 3
    tab.close()


@pytest.mark.parametrize(
    "text",
    [
        '\n\n<information>Doc 1(Title: "Ann") A.\nDoc 2(Title: "Bo") B.</information>\n\n',
        "<|begin_of_docs|>\n(1)Title: Ann Text: A.\n(2)Title: Bo Text: B.\n<|end_of_docs|>\n",
    ],
)
def test_passages_of_other_protocols_are_told_apart(
    browser: Chromium, tmp_path: Path, text: str
) -> None:
    seen = {"query": "x", "passage_ids": ["1", "2"], "passage_titles": ["Ann", "Bo"]}
    shown = asked(0, 1.0)
    shown["segments"].append({"provenance": "observation", "text": text, "tokens": 9, "info": seen})
    tab = opened(browser, page([shown]), tmp_path, "#open=q0")
    assert [body.removeprefix("Text: ") for body in tab.texts(".item .body")] == ["A.", "B."]
    tab.close()


def test_passages_that_cannot_be_told_apart_are_shown_as_they_were_read(
    browser: Chromium, tmp_path: Path
) -> None:
    shown = asked(0, 1.0)
    seen = {"query": "x", "passage_ids": ["1", "2"], "passage_titles": ["Ann", ""]}
    shown["segments"] += [
        {"provenance": "observation", "text": "Ann\nShe.\n\nHe.", "tokens": 9, "info": seen},
        {"provenance": "observation", "text": "no search", "tokens": 2},
    ]
    tab = opened(browser, page([shown]), tmp_path, "#open=q0")
    assert tab.texts(".item .title") == ["Ann", "2"]
    assert tab.texts(".raw .body") == ["Ann\nShe.\n\nHe."]
    assert tab.texts(".step.observed .text") == ["no search"]
    tab.close()


def test_a_thought_that_the_prompt_began_goes_on_until_it_ends(
    browser: Chromium, tmp_path: Path
) -> None:
    shown = asked(0, 1.0)
    shown["segments"] = [
        {"provenance": "prompt", "text": "Q <think>", "tokens": 1},
        {"provenance": "action", "text": "hm <q>x</q>", "tokens": 1},
        {"provenance": "observation", "text": "found", "tokens": 1, "info": {"query": "x"}},
        {"provenance": "action", "text": "so</think> <answer>p0</answer>", "tokens": 1},
    ]
    tab = opened(browser, page([shown]), tmp_path, "#open=q0")
    assert tab.texts(".thought .text") == ["hm <q>x</q>", "so</think>"]
    assert tab.texts(".step.action .text") == ["<answer>p0</answer>"]
    tab.close()


def test_curves_and_tables_are_drawn(browser: Chromium, tmp_path: Path) -> None:
    run, other = a_run(tmp_path / "run"), a_run(tmp_path / "other")
    main(["report", str(run), str(other), "--output", str(tmp_path / "x.html")])
    tab = Tab(browser, tmp_path / "x.html")
    assert tab.texts("figcaption strong") == ["held-out reward", "training reward"]
    assert tab.run("document.querySelectorAll('figure:first-child svg path').length") == 2
    assert tab.texts(".legend span") == ["run", "other"]
    reward = tab.texts(".tables section:first-child tbody tr:first-child > *")
    assert [cell.split(" ")[0] for cell in reward] == ["reward", "0.000", "1.000", "0.000", "1.000"]
    assert "run.seed" in tab.texts(".settings code")
    assert tab.events("Runtime.exceptionThrown") == []
    tab.close()
