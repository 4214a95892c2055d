"""Functions that a user names as ``package.module:function``."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

from ptq4dit_ao.errors import ArgumentError


def call_by_name(what: str, spec: str, others: Iterable[str]) -> Any:
    """Import a function by its name and call it without arguments.

    Args:
        what: name of the object that it returns, for messages.
        spec: ``package.module:function``.
        others: the other values that ``spec`` could have had, for messages.

    Raises:
        ArgumentError: ``spec`` is not of that form, there is no such function, or it fails.
    """
    module, colon, function = spec.partition(":")
    if not (colon and all(part.isidentifier() for part in module.split(".")) and function.isidentifier()):
        raise ArgumentError(
            f"{what} {spec!r} is none of {', '.join(others)}, 'package.module:function'; check its spelling"
        )
    try:
        return getattr(importlib.import_module(module), function)()
    except Exception as error:  # whatever the user's function raises
        raise ArgumentError(f"{what} {spec!r} cannot be loaded: {error}") from error
