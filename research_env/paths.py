"""Where this package keeps what it can make again: indexes, converted data sets, fingerprints."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder that ``RESEARCH_CACHE`` names, else ``research-env`` in the user's cache folder.

    The user's cache folder is ``XDG_CACHE_HOME`` or ``~/.cache``.
    """
    named = os.environ.get("RESEARCH_CACHE")
    if named:
        return Path(named).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "research-env"
