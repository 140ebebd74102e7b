"""The command that starts a server starts none where one is named, and stops only its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.elasticsearch import __main__ as command
from tests.elasticsearch import server as module
from tests.elasticsearch.server import Server, ServerError, save, saved, start


@pytest.fixture(autouse=True)
def note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path))
    monkeypatch.delenv("ELASTICSEARCH_URL", raising=False)
    return tmp_path / "elasticsearch" / "server.json"


def test_a_named_server_is_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], note: Path
) -> None:
    monkeypatch.setenv("ELASTICSEARCH_URL", "http://example:9200")
    command.main("start")
    assert capsys.readouterr().out == "http://example:9200\n"
    assert not note.exists()


def test_stop_ends_what_start_started_and_nothing_else(
    note: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    with subprocess.Popen(sleep, start_new_session=True) as process:
        ours = Server("http://127.0.0.1:1", "", process.pid, module._born(process.pid))
        # a note that outlived its server: another process has its number now
        save(Server(ours.url, "", process.pid, "before"), note)
        assert saved(note) is None
        command.main("stop")
        assert "no server" in capsys.readouterr().out
        assert process.poll() is None
        save(ours, note)
        command.main("start")  # it runs already
        assert capsys.readouterr().out == "http://127.0.0.1:1\n"
        os.killpg(process.pid, signal.SIGSTOP)  # a paused one too
        command.main("stop")
        assert capsys.readouterr().out == "stopped http://127.0.0.1:1\n"
    assert process.returncode in (0, -signal.SIGKILL)  # 0: reaped elsewhere
    assert not note.exists()
    command.main("stop")
    assert "no server" in capsys.readouterr().out


def test_where_nothing_can_be_started_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ServerError, match=r"openjdk-17.*Docker.*ELASTICSEARCH_URL"):
        start()
