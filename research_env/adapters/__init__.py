"""The environment in other people's trainers: one module per framework, over sessions.

Import the module of your framework, for example ``from research_env.adapters.trl import Rollouts``;
importing this package loads no framework. ``docs/how-to/trainers.md`` says what each one promises.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from research_env.errors import ResearchEnvError


class FrameworkError(ResearchEnvError, ImportError):
    """A framework that is not installed, or has a version that the adapter does not support."""


def require(distribution: str, supported: str | tuple[str, ...], extra: str) -> None:
    """Check the version of a framework before it is imported.

    Args:
        distribution: its name for pip.
        supported: the major and minor versions with which the adapter is tested.
        extra: the extra of this package that installs it.

    Raises:
        FrameworkError: it is not installed, or has another major or minor version.
    """
    versions = (supported,) if isinstance(supported, str) else supported
    wanted = " or ".join(f"{distribution}=={each}.*" for each in versions)
    suggestion = f"install {wanted}, for example with pip install '.[{extra}]'"
    try:
        found = version(distribution)
    except PackageNotFoundError:
        raise FrameworkError(f"{distribution} is not installed; {suggestion}") from None
    if not any(re.match(rf"{re.escape(each)}(\D|$)", found) for each in versions):
        raise FrameworkError(f"{distribution} {found} is not supported; {suggestion}")
