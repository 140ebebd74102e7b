"""What came from elsewhere cannot control the terminal."""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from research_agent.evaluation.summary import Outcome, print_tables, summarize, tables
from research_agent.run_logger import RunLogger
from research_agent.system.signals import stop_signals
from research_agent.system.terminal import escaped_logs, printable, show

OSC_52 = "\x1b]52;c;cm0gLXJmIC8=\x07"  # writes to the clipboard of whoever looks


def test_control_characters_are_shown() -> None:
    assert printable(f"a{OSC_52}b") == "a\\x1b]52;c;cm0gLXJmIC8=\\x07b"
    assert printable("\x9b31m") == "\\x9b31m"  # C1: an ESC [ of one character
    assert printable("abc\u202egnp.exe") == "abc\\u202egnp.exe"  # text that runs backwards
    assert printable("\ud800") == "\\ud800"
    assert printable("Żółć\t東京\n[/bold]") == "Żółć\t東京\n[/bold]"


@given(st.text())
def test_what_is_shown_has_no_control_character_but_tab_and_newline(text: str) -> None:
    assert all(c in "\t\n" or c.isprintable() or ord(c) > 0x9F for c in printable(text))


def test_show_prints_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    show(f"{OSC_52} {7}")
    assert capsys.readouterr().out == "\\x1b]52;c;cm0gLXJmIC8=\\x07 7\n"


def test_names_of_metrics_are_text_and_no_markup() -> None:
    outcome = Outcome(
        question="q", sample=0, reward=1.0,
        metrics={"[/nope]": 1.0, OSC_52: 0.5, "tokens": 1.0, "turns": 1.0},
        void=False, prediction="", strata={"[red]": "[/x]"}, asked="",
    )  # fmt: skip
    out = io.StringIO()
    Console(file=out, width=200).print(*tables(summarize([outcome])))
    assert "[/nope]" in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_tables_lose_nothing_in_a_narrow_terminal_or_a_pipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = [
        Outcome(
            question=str(hops), sample=0, reward=1.0, metrics={"support_recall_of_pages": 1.0},
            void=False, prediction="", strata={"hops": str(hops)}, asked="",
        )
        for hops in range(8)
    ]  # fmt: skip
    out = io.StringIO()
    Console(file=out, width=80).print(*tables(summarize(outcomes)))
    assert "…" not in out.getvalue()
    monkeypatch.setenv("COLUMNS", "80")
    print_tables(*tables(summarize(outcomes)))
    by_hops = capsys.readouterr().out.partition("by hops")[2].splitlines()
    [row] = [line for line in by_hops if "support_recall_of_pages" in line]
    assert row.count("1.000 [1.000,1.000]") == 8


def test_the_log_of_a_run_shows_metrics_as_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLogger(tmp_path, 0, 1) as logger:
        logger.print(f"[/nope] {OSC_52}")
        logger.record(1, {"reward": 1.0, "env/[/nope]": 1.0, f"env/{OSC_52}": 1.0}, {})
    said = capsys.readouterr().err
    assert "[/nope]" in said and "\\x1b]52" in said
    assert "\x1b" not in said


def test_a_signal_counts_where_the_terminal_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Gone())
    with stop_signals() as seen:
        os.kill(os.getpid(), signal.SIGHUP)
    assert seen == [signal.SIGHUP]


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
