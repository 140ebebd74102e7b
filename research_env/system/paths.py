"""Where this package keeps what it can make again: indexes, converted data sets, notes on files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_LARGEST = 16 << 20  # bytes of a file that is read whole
_SETTLED = 20_000_000  # ns; a file that changes twice within a tick of the clock shows it once


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
    """Read a file that a user or a stranger wrote, such as a template or settings.

    Raises:
        OSError: it cannot be read, is no regular file (a pipe would never end), or is larger than
            16 MiB.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no regular file")
    with path.open("rb") as file:
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise OSError(f"{path} has more than {_LARGEST >> 20} MiB")
    return content


def read_note(kind: str, files: Sequence[Path]) -> dict[str, Any] | None:
    """What :func:`write_note` kept about files; None if there is nothing, or a file has changed.

    Args:
        kind: a name for what is kept, such as "fingerprints": a folder in the cache.
        files: what it is about.

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
    """Keep what was found out about files until one of them changes.

    Nothing is kept where the cache cannot be written, or about a file that changed a moment ago:
    the clock of a file system is coarse, so a further change might not show.

    Args:
        kind: see :func:`read_note`.
        files: what it is about.
        found: any JSON.
    """
    with contextlib.suppress(OSError):
        state = [_state(file) for file in files]
        if time.time_ns() - max(entry[-1] for entry in state) < _SETTLED:
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
