"""Every exception a user can meet. Each message names the thing, its value and the way out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class PTQ4DiTError(Exception):
    """Base of all errors raised on purpose; the CLI prints them without a traceback and exits with 1."""


class ArgumentError(PTQ4DiTError, ValueError):
    """An argument of a public function is out of range or contradicts another."""


class AbsentError(ArgumentError, AttributeError):
    """A quantized transformer does not have what the float model has; ``hasattr`` is False."""


class RecipeError(PTQ4DiTError, ValueError):
    """A recipe file cannot be read or asks for something that does not exist."""


class ExportError(PTQ4DiTError):
    """A model cannot be captured, or a captured graph has a form this library does not read."""


class BalanceError(PTQ4DiTError):
    """Balancing was asked for but cannot be done, or would change what the model computes."""


class CalibrationError(PTQ4DiTError):
    """Calibration data is missing, too little, or not finite."""


class OverrideError(PTQ4DiTError, ValueError):
    """A per-module override matches no layer of the model, or contradicts another override."""


class LoweringError(PTQ4DiTError):
    """A quantized graph cannot run on the asked-for backend, or fewer layers run as integers than promised."""


class ArtifactError(PTQ4DiTError):
    """A saved model is missing, incomplete, altered, or of a format this version does not read."""


class MissingDependencyError(PTQ4DiTError, ImportError):
    """An optional package is not installed."""


def check_type(name: str, value: object, kind: type | tuple[type, ...], wanted: str) -> None:
    """Raises ArgumentError unless ``value`` is of a type; ``wanted`` says in words what to give."""
    if isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
        return
    kind_given = type(value).__name__
    shown = f"{value!r} ({kind_given})" if isinstance(value, (str, int, float)) else f"of type {kind_given}"
    raise ArgumentError(f"{name} is {shown}; give {wanted}")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises ArgumentError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ArgumentError(f"{name} is {value!r}; choose one of {', '.join(allowed)}")


def renamed(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: a keyword argument of an earlier version (old name = new name) raises an ArgumentError."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in names.keys() & kwargs.keys():
                raise ArgumentError(f"the argument {old!r} is called {names[old]!r} now: {names[old]}={kwargs[old]!r}")
            return function(*args, **kwargs)

        return call

    return decorate
