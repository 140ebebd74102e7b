"""The cache folder (indexes, converted data sets), and notes in it about files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_MAX_SIZE = 16 << 20  # bytes
_SETTLED = 20_000_000  # nanoseconds, more than a tick of any file system's clock


def cache_folder() -> Path:
    """The folder that ``RESEARCH_CACHE`` names, else ``research-env`` in the user's cache folder.

    The user's cache folder is ``XDG_CACHE_HOME`` or ``~/.cache``.
    """
    named = os.environ.get("RESEARCH_CACHE")
    if named:
        return Path(named).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "research-env"


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


def read_note(kind: str, files: Sequence[Path]) -> dict[str, Any] | None:
    """The note that :func:`write_note` wrote; None if there is none, or a file has changed since.

    Args:
        kind: what the note says, such as "fingerprints"; names a folder in the cache.
        files: the files that it is about.

    Raises:
        OSError: a file is missing.
    """
    state = [_state(file) for file in files]
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        note = json.loads(_place(kind, files).read_text(encoding="utf-8"))
        if note["files"] == state:
            return dict(note["found"])
    return None


def write_note(kind: str, files: Sequence[Path], found: Mapping[str, Any]) -> None:
    """Note what was found out about files; the note holds until one of them changes.

    Nothing is written if the cache cannot be written, or if a file changed a moment ago: the clock
    of a file system is coarse, so its time stamp might not show a further change.

    Args:
        kind: see :func:`read_note`.
        files: the files that it is about.
        found: any JSON object.
    """
    with contextlib.suppress(OSError):
        state = [_state(file) for file in files]
        last_change = max(changed for *_, changed in state)
        if time.time_ns() - last_change < _SETTLED:
            return
        place = _place(kind, files)
        place.parent.mkdir(parents=True, exist_ok=True)
        unfinished = place.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps({"files": state, "found": found}), encoding="utf-8")
        unfinished.replace(place)


def _place(kind: str, files: Sequence[Path]) -> Path:
    names = "\0".join(str(file.resolve()) for file in files)
    digest = hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()
    return cache_folder() / kind / f"{digest[:24]}.json"


def _state(file: Path) -> list[Any]:
    state = file.stat()
    name = os.fsencode(file.resolve()).decode("utf-8", "backslashreplace")
    return [name, state.st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns]
