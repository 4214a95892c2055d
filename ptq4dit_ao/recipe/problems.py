"""Sentences for pydantic's errors, with the key path, the value, the allowed values and the nearest name.

The allowed values are read from the JSON Schema of the model, so that each bound is written once, in ``schema.py``.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ptq4dit_ao.recipe.allowed import allowed, choices, model_json_schema, node_at
from ptq4dit_ao.recipe.yaml_text import KeyPath, dotted

READ_VERSIONS = (1,)
"""Versions of the recipe format that this release reads."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One error at one key path. ``text`` begins with the path, unless the error is of the whole recipe."""

    path: KeyPath
    text: str


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The text ``"; did you mean 'alpha'?"``, or nothing if no known name is similar."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def version_problem(data: Mapping[str, object]) -> Problem | None:
    """The problem with the recipe's version, if any. It is checked first, because other checks assume the version."""
    versions = " and ".join(map(str, READ_VERSIONS))
    if "version" not in data:
        return Problem(
            path=("version",), text=f"version: missing; add 'version: {READ_VERSIONS[-1]}' on a line of its own"
        )
    version = data["version"]
    if type(version) is int and version in READ_VERSIONS:
        return None
    text = f"version: {show(version)} is no recipe version that this release reads; it reads version {versions}"
    return Problem(path=("version",), text=text)


def describe(error: ValidationError, model: type[BaseModel], data: Mapping[str, object]) -> list[Problem]:
    """One problem per error in ``data``, in the order in which pydantic reports them."""
    problems = [_describe(details, _schema(model), data) for details in error.errors(include_url=False)]
    # pydantic also reports a list without a valid item as "too short", but only the item is wrong.
    return [problem for problem in problems if not any(_is_below(other.path, problem.path) for other in problems)]


def _is_below(path: KeyPath, other: KeyPath) -> bool:
    return len(path) > len(other) and path[: len(other)] == other


@cache
def _schema(model: type[BaseModel]) -> dict[str, object]:
    return model_json_schema(model)


def _describe(details: ErrorDetails, schema: Mapping[str, object], data: Mapping[str, object]) -> Problem:
    path, value = _found(data, details["loc"], missing=details["type"] == "missing")
    where = f"{dotted(path)}: " if path else ""  # a rule of several sections stands nowhere
    return Problem(path=path, text=where + _sentence(details, path, value, schema))


def _sentence(details: ErrorDetails, path: KeyPath, value: object, schema: Mapping[str, object]) -> str:
    match details["type"]:
        case "recipe_rule":
            return details["msg"]
        case "invalid_key":
            return "a key must be text"
        case "extra_forbidden":
            known = choices(node_at(schema, path[:-1]))
            return f"unknown key{did_you_mean(path[-1], known) or '; the keys here are ' + ', '.join(known)}"
        case "missing":
            return f"missing; it must be {allowed(node_at(schema, path))}"
    node = node_at(schema, path)
    near = did_you_mean(value, choices(node)) if isinstance(value, str) and "enum" in node else ""
    return f"{show(value)} is not allowed; it must be {allowed(node)}{near}"


def _found(data: object, loc: KeyPath, *, missing: bool) -> tuple[KeyPath, object]:
    """The key path that ``loc`` means, and the value there.

    For a union, pydantic inserts the name of the branch into ``loc``. It is recognized because ``data`` has no such
    key. A missing key looks alike, but it is the last part of ``loc``.
    """
    path: list[str | int] = []
    for i, part in enumerate(loc):
        if isinstance(data, Mapping):
            if part not in data and not (missing and i == len(loc) - 1):
                continue
            data = data.get(part)
        elif isinstance(part, int) and isinstance(data, Sequence):
            data = data[part]
        else:
            continue
        path.append(part)
    return tuple(path), data


def show(value: object, limit: int = 60) -> str:
    """``value`` as it would be written in the file, cut to ``limit`` characters. Text is quoted and marked as text."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    text = text if len(text) <= limit else f"{text[: limit - 3]}..."
    return f"{text} (text)" if isinstance(value, str) else text
