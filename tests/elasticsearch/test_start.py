"""The command that starts a server starts none where one is named, and stops only its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
        # A note that outlived its server: another process has its pid now.
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


def make_command(folder: Path, name: str, script: str) -> None:
    """Make a command that runs a shell script."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def interrupt(*_: object) -> bool:
    raise KeyboardInterrupt


def test_an_interrupted_start_leaves_no_server_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    (home / "config").mkdir(parents=True)
    make_command(home / "bin", "elasticsearch", "exec sleep 600")
    for name in ("mvn", "javac", "chown"):
        make_command(tmp_path / "bin", name, "exit 0")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(module, "_base", lambda: tmp_path)
    monkeypatch.setattr(module, "_home", lambda: home)
    monkeypatch.setattr(module, "_install", lambda: None)
    monkeypatch.setattr(os, "geteuid", lambda: 1)
    started: list[int] = []

    def born(pid: int, real: Callable[[int], str] = module._born) -> str:
        started.append(pid)
        return real(pid)

    monkeypatch.setattr(module, "_born", born)
    monkeypatch.setattr(module, "_is_healthy", interrupt)
    with pytest.raises(KeyboardInterrupt):
        start()
    assert started
    assert not Path(f"/proc/{started[0]}").exists()
    assert list((tmp_path / "servers").iterdir()) == []


def test_an_interrupted_start_leaves_no_container_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    script = f'echo "$1" >> {log}; case "$1" in run) echo c1;; port) echo 127.0.0.1:1;; esac'
    make_command(tmp_path / "bin", "docker", script)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}")
    monkeypatch.setattr(module, "_is_healthy", interrupt)
    with pytest.raises(KeyboardInterrupt):
        start()
    assert log.read_text().split() == ["info", "run", "port", "stop"]


def test_a_container_that_is_busy_is_not_taken_for_gone(
    note: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server("http://127.0.0.1:1", container="c1")  # where nothing answers
    save(server, note)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}")
    assert saved(note) is None  # no Docker
    for script, expected in (("echo true", server), ("echo false", None), ("exit 1", None)):
        make_command(tmp_path / "bin", "docker", script)
        assert saved(note) == expected


def test_health_is_asked_for_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # which reads these variables only once
    with ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert module._is_healthy(f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()


def test_where_nothing_can_be_started_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ServerError, match=r"openjdk-17.*Docker.*ELASTICSEARCH_URL"):
        start()
