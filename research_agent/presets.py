"""Presets: configurations by name, from installed packages.

A package offers presets by an entry point in the group ``research_agent.presets``. It names a
mapping of preset names to plain data: settings by section of ``TrainConfig``, and a
``description``::

    [project.entry-points."research_agent.presets"]
    mine = "my_package.presets:PRESETS"
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from research_agent.config import TrainConfig
from research_agent.errors import ConfigError

GROUP = "research_agent.presets"
_DEFAULTS = {
    section.name: getattr(TrainConfig(), section.name)
    for section in fields(TrainConfig)
    if section.name != "preset"
}


def make_preset(name: str, data: Mapping[str, Any]) -> TrainConfig:
    """Make a configuration from plain data.

    Args:
        name: name of the preset; its run writes to ``runs/NAME`` unless ``data`` names a folder.
        data: settings by section; those that are left out have their defaults.

    Raises:
        ConfigError: a section or setting that does not exist.
    """
    sections = {}
    for section, settings in data.items():
        if section == "description":
            continue
        if section not in _DEFAULTS:
            known = ", ".join(_DEFAULTS)
            raise ConfigError(f"preset {name}: unknown section {section!r}; known: {known}")
        known_settings = {field.name for field in fields(_DEFAULTS[section])}
        if odd := sorted(settings.keys() - known_settings):
            raise ConfigError(f"preset {name}: {section} has no setting {odd[0]!r}")
        values = dict(settings)
        if section == "run" and "output" in values:
            values["output"] = Path(values["output"])
        sections[section] = values
    sections["run"] = {"output": Path("runs") / name, **sections.get("run", {})}
    made = {name: replace(_DEFAULTS[name], **values) for name, values in sections.items()}
    return TrainConfig(preset=name, **made)


def offered(group: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the names and plain data of the presets that installed packages offer in a group."""
    for entry in entry_points(group=group):
        try:
            data = dict(entry.load())
        except Exception as error:  # somebody else's package must not stop ours
            warnings.warn(f"the presets {entry.value} cannot be loaded: {error!r}", stacklevel=2)
            continue
        yield from data.items()


_DATA = dict(offered(GROUP))
PRESETS: dict[str, TrainConfig] = {name: make_preset(name, data) for name, data in _DATA.items()}
"""Configurations by name."""
DESCRIPTIONS: dict[str, str] = {
    name: str(data.get("description", "")) for name, data in _DATA.items()
}
"""A sentence about each preset."""
