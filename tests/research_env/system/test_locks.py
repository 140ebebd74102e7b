"""Locks between processes, and file systems that have none."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from pathlib import Path

import pytest

from research_env.retrieval.bm25 import retriever
from research_env.system.locks import exclusive_lock


def test_a_lock_that_another_has(tmp_path: Path) -> None:
    with exclusive_lock(tmp_path / "lock") as file:
        assert file
        with exclusive_lock(tmp_path / "lock", wait=False) as second:
            assert second is None


def test_a_lock_ends_though_a_child_that_was_forked_meanwhile_lives(tmp_path: Path) -> None:
    with exclusive_lock(tmp_path / "lock"):
        child = os.fork()
        if child == 0:
            signal.pause()
    try:
        with exclusive_lock(tmp_path / "lock", wait=False) as file:
            assert file
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_file_system_without_locks_gives_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", refuse)
    error = errno.ENOSYS
    with exclusive_lock(tmp_path / "lock") as file:
        assert file
    assert "lock cannot be locked" in caplog.text
    error = errno.EIO
    with pytest.raises(OSError, match="error"), exclusive_lock(tmp_path / "lock"):
        pass


def test_a_folder_that_cannot_be_flushed_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(error, os.strerror(error))

    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(os, "fsync", refuse)
    error = errno.EINVAL
    retriever._sync(tmp_path)
    with pytest.raises(OSError, match="Invalid argument"):
        retriever._sync(file)
    error = errno.EIO
    with pytest.raises(OSError, match="error"):
        retriever._sync(tmp_path)
