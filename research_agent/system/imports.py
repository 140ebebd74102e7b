"""Import the modules that settings name."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def import_setting(module: str) -> ModuleType:
    """As ``importlib.import_module``, for a name that a user typed.

    Raises:
        ImportError: there is no such module, or the name is empty or a path.
    """
    if not module or module.startswith("."):  # importlib raises other errors
        raise ImportError(
            f"{module!r} is no name of a module; write it as Python imports it, such as my_module "
            "for my_module.py"
        )
    return import_module(module)
