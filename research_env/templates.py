"""The user's own prompt templates: a text, a file, or chat messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from research_env.errors import ConfigurationError, DataError
from research_env.protocol import TEMPLATES
from research_env.system.paths import read_small_file

Template = str | Sequence[Mapping[str, str]]
"""The name of a protocol's template, a text with ``{question}``, a file, or chat messages."""

PLACE = "{question}"
"""Stands for the question."""

_ROLES = ("system", "developer", "user", "assistant")
_CHATS = (".jsonl", ".yaml", ".yml")
_FILES = (*_CHATS, ".txt", ".md", ".prompt")


def own_template(template: Template) -> tuple[tuple[str, str], ...] | None:
    """The messages of the user's own template.

    Args:
        template: a text that contains ``{question}``; a file (.txt, .md) of such a text; a file of
            chat messages, each with ``role`` and ``content``, as JSON Lines (.jsonl) or YAML
            (.yaml); or the messages themselves.

    Returns:
        Role and content of each message (a text is one message of the user); None if it is no
        template, for example because it is the name of one.

    Raises:
        ConfigurationError: ``{question}`` is missing, or something is not a message; the error
            says which.
        DataError: the file cannot be read.
    """
    where, messages = "template", template
    if isinstance(template, str):
        if template in TEMPLATES:
            return None
        path = Path(template)
        if "\n" not in template and (path.suffix in _FILES or _is_file(path)):
            where, messages = str(path), _read(path)
        elif PLACE not in template and " " not in template.strip():
            return None  # an unknown name
        else:
            messages = [{"role": "user", "content": template}]
    elif not isinstance(template, Sequence):
        return None
    return _checked(where, messages)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long for a name, or with a NUL in it
        return False


def _read(path: Path) -> Any:
    """The messages of a file, not yet checked."""
    try:
        text = read_small_file(path).decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, ValueError) as error:
        raise DataError(f"the template {path} cannot be read: {error}") from error
    if path.suffix not in _CHATS:
        return [{"role": "user", "content": text}]
    if path.suffix == ".jsonl":
        found = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    found.append(json.loads(line))
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path}:{number}: not a line of JSON: {error}") from error
        return found
    import yaml  # noqa: PLC0415 (few templates need it)

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        where = " ".join(str(error).split())
        raise DataError(f"the template {path} is not YAML: {where}") from error


def _checked(where: str, messages: Any) -> tuple[tuple[str, str], ...]:
    """Role and content of each message; ``where`` names the template in errors."""
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise ConfigurationError(
            f"{where}: a chat is a list of messages with role and content, not {messages!r:.80}"
        )
    checked = []
    for number, message in enumerate(messages, 1):
        fields = dict(message) if isinstance(message, Mapping) else {}
        role, content = fields.get("role"), fields.get("content")
        if fields.keys() != {"role", "content"} or not isinstance(content, str):
            raise ConfigurationError(
                f"{where}: message {number} has a role and a content, both text, and nothing else, "
                f"not {message!r:.80}"
            )
        if role not in _ROLES:
            raise ConfigurationError(
                f"{where}: message {number} has the role {role!r:.80}; it is one of "
                f"{', '.join(_ROLES)}"
            )
        checked.append((str(role), content))
    if not any(PLACE in content for _, content in checked):
        raise ConfigurationError(
            f"{where}: the template does not say where the question goes; write {PLACE} there: "
            f"{checked[-1][1]!r:.200}"
        )
    return tuple(checked)
