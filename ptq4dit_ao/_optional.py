"""Optional packages, imported where they are used and missed with a clear message."""

from __future__ import annotations

import importlib
from typing import Any

from ptq4dit_ao.errors import MissingDependencyError


def require(module: str, *, extra: str) -> Any:
    """Import ``module``, or say which extra installs it.

    Raises:
        MissingDependencyError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).split(".")[0]
        if missing != module.split(".")[0]:
            raise
        raise MissingDependencyError(
            f"{missing!r} is not installed; it comes with: python -m pip install 'ptq4dit-ao[{extra}]'"
        ) from error
