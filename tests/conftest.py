"""Fixtures that every part of the suite shares."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests import global_state

settings.register_profile("suite", deadline=None)  # on a busy machine any example may be slow
settings.load_profile("suite")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell lets background processes ignore Ctrl-C; the processes of tests must not inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, so that no worker waits for another at the end."""
    slow, vllm = (
        {item.path for item in items if item.get_closest_marker(mark)} for mark in ("slow", "vllm")
    )
    items.sort(key=lambda item: (item.path not in slow & vllm, item.path not in slow))


@pytest.fixture(scope="module", autouse=True)
def _leaves_no_global_state() -> Iterator[None]:
    """Fail each module whose tests change the global state."""
    before, running = global_state.snapshot(), global_state.running()
    yield
    after = global_state.snapshot()
    if "vllm" in sys.modules:  # its engine keeps a process group until the session ends
        for each in (before, after):
            each.pop("torch's process group", None)
    changed = list(global_state.differences(before, after))
    left = sorted(global_state.leftovers(running))
    assert not changed and not left, f"these tests leave behind: {[*changed, *left]}"


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Let no test depend on the random numbers that earlier tests drew."""
    global_state.seed_all()


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the processes that our code starts from one that has loaded torch."""
    from tests.forks import FORKS

    monkeypatch.setattr("multiprocessing.get_context", lambda _: FORKS)


@pytest.fixture(scope="session")
def research_data() -> Path:
    """The folder of real questions and passages, or a skip.

    Under CI a missing folder is a failure, unless CI_WITHOUT_DATA says that there is none.
    """
    named = os.environ.get("RESEARCH_DATA")
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(named) if named else beside
    if folder.is_dir():
        return folder
    message = f"no data folder at {folder}; set RESEARCH_DATA"
    if os.environ.get("CI") == "true" and os.environ.get("CI_WITHOUT_DATA") != "true":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def elasticsearch(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a real Elasticsearch server, or a skip (a failure under CI).

    It is ELASTICSEARCH_URL if that is set, else a server that the session starts for all workers.
    """
    from tests.elasticsearch.server import ServerError, save, saved, start

    named = os.environ.get("ELASTICSEARCH_URL")
    if named:
        return named.rstrip("/")
    note = _note(tmp_path_factory)
    with note.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        server = saved(note)
        if server is None:
            try:
                server = start()
            except ServerError as error:
                if os.environ.get("CI") == "true":
                    pytest.fail(str(error))
                pytest.skip(str(error))
            save(server, note)
    return server.url


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Stop the server of the session when its workers are done."""
    if not hasattr(session.config, "workerinput") and hasattr(session.config, "_tmp_path_factory"):
        from tests.elasticsearch.server import saved

        server = saved(_note(session.config._tmp_path_factory))
        if server is not None:
            server.stop()


def _note(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that describes the session's server; workers have folders in the session's."""
    folder = tmp_path_factory.getbasetemp()
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    return (folder.parent if worker else folder) / "elasticsearch.json"
