"""The cache folder (indexes, converted data sets), and notes in it about files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from research_env.errors import ConfigurationError

_MAX_SIZE = 16 << 20  # bytes
_SETTLED = 20_000_000  # nanoseconds, more than a tick of any file system's clock


def cache_folder() -> Path:
    """The folder that ``RESEARCH_CACHE`` names, else ``research-env`` in the user's cache folder.

    The user's cache folder is ``XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        ConfigurationError: the system names no home folder for this user.
    """
    named = os.environ.get("RESEARCH_CACHE")
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        if named:
            return Path(named).expanduser()
        return (Path(home) if home else Path.home() / ".cache") / "research-env"
    except RuntimeError as error:
        raise ConfigurationError(f"{error} Set RESEARCH_CACHE to a folder for the cache") from None


def read_small_file(path: Path) -> bytes:
    """Read a file that is expected to be small, such as a template, whoever wrote it.

    Raises:
        OSError: it cannot be read, is no regular file (a pipe might never end), or is larger than
            16 MiB.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no regular file")
    with path.open("rb") as file:
        content = file.read(_MAX_SIZE + 1)
    if len(content) > _MAX_SIZE:
        raise OSError(f"{path} has more than {_MAX_SIZE >> 20} MiB")
    return content


def cached(
    kind: str,
    files: Sequence[Path],
    read: Callable[[], Mapping[str, Any]],
    *,
    again: bool = False,
) -> Mapping[str, Any]:
    """Return what reading files finds out; a note in the cache holds until one of them changes.

    No note is written if the cache cannot be written, if a file changes while it is read, or if one
    changed a moment before: the clock of a file system is coarse, so its time stamp might not show
    a further change.

    Args:
        kind: what the note says, such as "fingerprints"; names a folder in the cache.
        files: the files that it is about.
        read: reads the files and returns what it finds, any JSON object.
        again: whether to read them even if there is a note.

    Raises:
        OSError: a file is missing.
    """
    place, state = _place(kind, files), _states(files)  # before they are read
    settled = time.time_ns() - max(changed for *_, changed in state) >= _SETTLED
    if not again:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            note = json.loads(place.read_text(encoding="utf-8"))
            if note["files"] == state:
                return dict(note["found"])
    found = read()
    with contextlib.suppress(OSError):
        if settled and _states(files) == state:
            place.parent.mkdir(parents=True, exist_ok=True)
            unfinished = place.with_suffix(f".{os.getpid()}")
            unfinished.write_text(json.dumps({"files": state, "found": found}), encoding="utf-8")
            unfinished.replace(place)
    return found


def _place(kind: str, files: Sequence[Path]) -> Path:
    names = "\0".join(str(file.resolve()) for file in files)
    digest = hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()
    return cache_folder() / kind / f"{digest[:24]}.json"


def _states(files: Sequence[Path]) -> list[list[Any]]:
    states = []
    for file in files:
        name = os.fsencode(file.resolve()).decode("utf-8", "backslashreplace")
        state = file.stat()
        states.append([name, state.st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns])
    return states
