"""Old names and values that are still accepted, with a DeprecationWarning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def renamed(
    module: str, new_names: Mapping[str, str], otherwise: Callable[[str], Any] | None = None
) -> Callable[[str], Any]:
    """A ``__getattr__`` for a module that resolves the module's old names.

        __getattr__ = renamed(__name__, {"shape": "config"})

    Args:
        module: its ``__name__``.
        new_names: old name -> new name.
        otherwise: the ``__getattr__`` for all other names, if the module has one.
    """

    def old_name(name: str) -> Any:
        if name not in new_names:
            if otherwise is not None:
                return otherwise(name)
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", f"{module}.{new_names[name]}")
        return getattr(sys.modules[module], new_names[name])

    return old_name


def warn_renamed(old: str, new: str, category: type[Warning] = DeprecationWarning) -> None:
    """Warn that ``old`` is now called ``new``; the warning points to the caller of this function's caller.

    Args:
        category: FutureWarning for users of a command line, from whom Python hides a DeprecationWarning.
    """
    warnings.warn(f"{old} is now called {new}; the old name will be removed in version 0.4.", category, stacklevel=3)
