"""What came from elsewhere cannot control the terminal."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from hypothesis import given
from hypothesis import strategies as st

import research_env
from research_env.cli import main
from research_env.system.terminal import escaped_logs, printable, show, show_json

assert research_env.IDS

OSC_52 = "\x1b]52;c;cm0gLXJmIC8=\x07"  # writes to the clipboard of whoever looks


@given(st.text())
def test_what_is_shown_has_no_control_character_but_tab_and_newline(text: str) -> None:
    assert all(c in "\t\n" or c.isprintable() or ord(c) > 0x9F for c in printable(text))


def test_lines_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    show(f"{OSC_52} Żółć {7}")
    show_json({"a": f"{OSC_52}\x9b\ud800\u202e Żółć"})
    line, text = capsys.readouterr().out.splitlines()
    assert line == "\\x1b]52;c;cm0gLXJmIC8=\\x07 Żółć 7"
    assert printable(text) == text
    assert json.loads(text) == {"a": f"{OSC_52}\x9b\ud800\u202e Żółć"}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Questions and passages by a stranger."""
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    question = {"id": "q", "question": f"Who? {OSC_52}", "answers": [f"Ann\x9b {OSC_52}"]}
    passage = {"id": f"p{OSC_52}", "title": f"[/nope] {OSC_52}", "text": f"Ann {OSC_52} did it."}
    (tmp_path / "q.jsonl").write_text(json.dumps(question) + "\n")
    (tmp_path / "c.jsonl").write_text(json.dumps(passage) + "\n")
    return [f"questions={tmp_path / 'q.jsonl'}", f"corpus={tmp_path / 'c.jsonl'}"]


def test_play_shows_what_a_stranger_wrote(
    files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    actions = f"<search>Ann {OSC_52}</search>\n<answer>\\boxed{{{OSC_52}}}</answer>\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(actions))
    main(["play", "SearchQA-v0", "--env-args", *files])
    told = capsys.readouterr()
    assert "\\x1b]52" in told.out and "reward" in told.out
    for character in "\x1b\x07\x9b":
        assert character not in told.out + told.err


def test_search_shows_what_a_stranger_wrote(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = files[1].partition("=")[2]
    folder = str(Path(corpus).parent / "index")
    main(["index", "--corpus", corpus, "--to", folder])
    for more in ([], ["--json"]):
        main(["search", f"Ann {OSC_52}", "--retriever", f"embedded:{folder}?corpus=any", *more])
    told = capsys.readouterr()
    assert "[/nope]" in told.out
    assert "\x1b" not in told.out + told.err and "\x07" not in told.out + told.err
    with pytest.raises(SystemExit):
        main(["search", "Ann", "--retriever", f"embedded:/{OSC_52}"])
    assert "\x1b" not in capsys.readouterr().err


def test_the_environment_renders_text(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = dict(word.split("=") for word in files)
    env = gym.make("SearchQA-v0", render_mode="human", **settings)
    env.reset(seed=0)
    env.step(f"<search>Ann {OSC_52}</search>")
    env.close()
    assert "\x1b" not in capsys.readouterr().out


def test_logs_and_warnings_of_libraries_show_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log, factory = logging.getLogger("a.library"), logging.getLogRecordFactory()
    log.addHandler(logging.StreamHandler())
    with escaped_logs():
        log.warning("\x1b[1mkey\x1b[0m %s", OSC_52)  # colors are dropped
        try:
            raise ValueError(OSC_52)
        except ValueError:
            log.exception("failed")
        warned = warnings.formatwarning(f"beware of {OSC_52}", UserWarning, "file", 1)
    log.handlers.clear()
    said = capsys.readouterr().err + warned
    for line in ("key {}", "ValueError: {}", "beware of {}"):
        assert line.format("\\x1b]52;c;cm0gLXJmIC8=\\x07") in said
    assert "\x1b" not in said and "\x07" not in said
    assert logging.getLogRecordFactory() is factory


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_an_output_that_cannot_encode_a_character_shows_it_as_an_escape(
    tmp_path: Path, more: list[str]
) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text(json.dumps({"id": "p", "title": "capital 首都", "text": "é"}) + "\n")
    command = [
        sys.executable,
        "-m",
        "research_env.cli",
        "search",
        "capital",
        "--corpus",
        str(corpus),
    ]
    found = {"PYTHONIOENCODING": "ascii", "RESEARCH_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [*command, *more], capture_output=True, text=True, timeout=300, check=True,
        env={**os.environ, **found},
    )  # fmt: skip
    assert "\\u9996\\u90fd" in done.stdout
    if more:
        assert "首都" in json.dumps(json.loads(done.stdout), ensure_ascii=False)
