"""Exceptions of this package. Each message names the thing, its value and the way out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class PTQ4DiTError(Exception):
    """Base class of all errors raised on purpose. The command line prints them without a traceback and exits with 1."""


class ArgumentError(PTQ4DiTError, ValueError):
    """An argument of a public function is out of range, or contradicts another one."""


class AbsentError(ArgumentError, AttributeError):
    """A quantized transformer lacks an attribute of the float model, so that ``hasattr`` is False."""


class RecipeError(PTQ4DiTError, ValueError):
    """A recipe file cannot be read, or asks for something that does not exist."""


class ExportError(PTQ4DiTError):
    """A model cannot be captured, or a captured graph has a form that this library does not read."""


class BalanceError(PTQ4DiTError):
    """Balancing was requested but is not possible, or would change the model's output."""


class CalibrationError(PTQ4DiTError):
    """Calibration data is missing, too little, or not finite."""


class OverrideError(PTQ4DiTError, ValueError):
    """A per-module override matches no layer of the model, or contradicts another override."""


class LoweringError(PTQ4DiTError):
    """A quantized graph cannot run on the requested backend, or fewer layers run on integer kernels than promised."""


class ArtifactError(PTQ4DiTError):
    """A saved model is missing, incomplete, altered, or of a format that this version does not read."""


class MissingDependencyError(PTQ4DiTError, ImportError):
    """An optional package is not installed."""


def check_type(name: str, value: object, kind: type | tuple[type, ...], wanted: str) -> None:
    """Check the type of an argument; ``wanted`` names, in the message, what to give instead.

    Raises:
        ArgumentError: ``value`` is of another type.
    """
    if isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
        return
    kind_given = type(value).__name__
    shown = f"{value!r} ({kind_given})" if isinstance(value, (str, int, float)) else f"of type {kind_given}"
    raise ArgumentError(f"{name} is {shown}; give {wanted}")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Check that an argument is one of ``allowed``.

    Raises:
        ArgumentError: it is not.
    """
    if value not in allowed:
        raise ArgumentError(f"{name} is {value!r}; choose one of {', '.join(allowed)}")


def first_line(error: Exception) -> str:
    """The type of an exception and the first line of its text."""
    lines = str(error).strip().splitlines()  # empty for a bare assert
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def renamed(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a decorator that refuses keyword arguments of an earlier version, given as old name = new name.

    The decorated function raises an ArgumentError that names the new argument.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in names.keys() & kwargs.keys():
                raise ArgumentError(f"the argument {old!r} is called {names[old]!r} now: {names[old]}={kwargs[old]!r}")
            return function(*args, **kwargs)

        return call

    return decorate
