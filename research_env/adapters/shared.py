"""Sessions that the workers of a framework find by their settings, one object per process."""

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
        args: those of :class:`research_env.sessions.Sessions`; values that JSON can hold.
    """
    key = json.dumps(dict(args), sort_keys=True)
    with _LOCK:
        if key not in _SHARED:
            _SHARED[key] = Sessions(**args)
        return _SHARED[key]


def share(sessions: Sessions, **args: Any) -> None:
    """Let all in this process who ask for these ``args`` use sessions that you made."""
    with _LOCK:
        _SHARED[json.dumps(args, sort_keys=True)] = sessions
