"""One `Sessions` object per process and settings, for frameworks that pass settings to workers."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

from research_env.sessions import Sessions

_SHARED: dict[str, Sessions] = {}
_LOCK = threading.Lock()


def shared_sessions(args: Mapping[str, Any]) -> Sessions:
    """The sessions of these settings: one object per process, made on first use.

    Args:
        args: arguments of :class:`research_env.sessions.Sessions`; values that JSON can hold.
    """
    key = json.dumps(dict(args), sort_keys=True)
    with _LOCK:
        if key not in _SHARED:
            _SHARED[key] = Sessions(**args)
        return _SHARED[key]


def share(sessions: Sessions, **args: Any) -> None:
    """Make ``shared_sessions(args)`` return these sessions in this process."""
    with _LOCK:
        _SHARED[json.dumps(args, sort_keys=True)] = sessions
