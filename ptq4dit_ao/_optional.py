"""Optional packages, imported where they are used. A clear error names the extra that installs a missing one."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

from ptq4dit_ao.errors import MissingDependencyError


def require(module: str, *, extra: str) -> Any:
    """Import ``module``, or raise an error that names the extra which installs it.

    Raises:
        MissingDependencyError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).split(".")[0]
        if missing != module.split(".")[0]:
            raise
        raise MissingDependencyError(_not_installed(missing, extra)) from error


def missing_package(packages: tuple[str, ...], extra: str | None) -> str | None:
    """The reason why one of ``packages`` cannot be imported, with its installation; None if all are installed."""
    absent = next((name for name in packages if find_spec(name) is None), None)
    return None if absent is None else _not_installed(absent, extra)


def _not_installed(package: str, extra: str | None) -> str:
    name = package if extra is None else f"'ptq4dit-ao[{extra}]'"
    return f"{package!r} is not installed; it comes with: python -m pip install {name}"
