from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import pytest

from research_env.errors import ConfigurationError
from research_env.system.paths import cache_folder, cached


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_text(path.name)
    return paths


def wait_until_settled(files: list[Path]) -> None:
    while time.time_ns() - max(path.stat().st_ctime_ns for path in files) < 50_000_000:
        time.sleep(0.01)


def read_note(kind: str, files: list[Path]) -> dict[str, Any] | None:
    """The note about files; None if there is none."""

    def read() -> dict[str, Any]:
        raise LookupError

    with contextlib.suppress(LookupError):
        return dict(cached(kind, files, read))
    return None


def write_note(kind: str, files: list[Path], found: dict[str, Any]) -> None:
    assert cached(kind, files, lambda: found) == found


def test_a_note_holds_until_a_file_changes(files: list[Path]) -> None:
    assert read_note("kind", files) is None
    wait_until_settled(files)
    write_note("kind", files, {"count": 3})
    assert read_note("kind", files) == {"count": 3}
    assert read_note("other", files) is None
    assert read_note("kind", files[:1]) is None
    assert cached("kind", files, lambda: {"count": 4}, again=True) == {"count": 4}
    assert read_note("kind", files) == {"count": 4}
    times = files[1].stat()
    files[1].write_text("c")  # same size and time
    os.utime(files[1], ns=(times.st_atime_ns, times.st_mtime_ns))
    assert read_note("kind", files) is None
    files[1].unlink()
    with pytest.raises(FileNotFoundError):
        read_note("kind", files)


def test_nothing_is_noted_about_a_file_that_has_just_changed(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = max(path.stat().st_ctime_ns for path in files)
    monkeypatch.setattr(time, "time_ns", lambda: changed + 1_000)
    write_note("kind", files, {})
    assert read_note("kind", files) is None


def test_a_file_that_had_just_changed_when_its_reading_began_does_not_settle_meanwhile(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = max(path.stat().st_ctime_ns for path in files)

    def read() -> dict[str, Any]:
        monkeypatch.setattr(time, "time_ns", lambda: changed + 1_000_000_000)
        return {}

    monkeypatch.setattr(time, "time_ns", lambda: changed + 1_000)
    cached("kind", files, read)
    assert read_note("kind", files) is None


def test_nothing_is_noted_about_a_file_that_changes_while_it_is_read(files: list[Path]) -> None:
    def read() -> dict[str, Any]:
        files[1].write_text("changed")
        wait_until_settled(files)
        return {}

    wait_until_settled(files)
    cached("kind", files, read)
    assert read_note("kind", files) is None


def test_a_cache_that_cannot_be_written_is_no_error(files: list[Path], cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    wait_until_settled(files)
    write_note("kind", files, {})
    assert read_note("kind", files) is None


@pytest.mark.parametrize("content", ["", "[]", '{"files": []}', "[" * 100_000, "\0"])
def test_a_damaged_note_is_no_note(files: list[Path], cache: Path, content: str) -> None:
    wait_until_settled(files)
    write_note("kind", files, {})
    [place] = (cache / "kind").iterdir()
    place.write_text(content)
    assert read_note("kind", files) is None


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("RESEARCH_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(ConfigurationError, match=r"home directory.*Set RESEARCH_CACHE"):
        cache_folder()
