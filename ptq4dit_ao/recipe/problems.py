"""Turn pydantic's errors into sentences: where, the value, what is allowed, and the nearest name.

What is allowed is read off the JSON Schema of the model, so that a bound is written once, in ``schema.py``.
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


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing wrong at one key path; ``text`` begins with the path, if it is not that of the whole recipe."""

    path: KeyPath
    text: str


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """``"; did you mean 'alpha'?"``, or nothing where no known name is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def version_problem(data: Mapping[str, object]) -> Problem | None:
    """Checked before all else: in another version every other complaint would be noise."""
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
    """One problem per fault of ``data``, in the order pydantic met them."""
    problems = [_describe(details, _schema(model), data) for details in error.errors(include_url=False)]
    # pydantic calls a list without one valid item "too short" besides: the fault is the item alone.
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

    For a union, pydantic puts the name of the branch into ``loc``: text that ``data`` has no mapping to look up in, or
    one that does not hold it. So does a key that is missing, but that comes last.
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
    """``value`` as it would stand in the file, cut to ``limit`` characters; text is quoted and called text."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    text = text if len(text) <= limit else f"{text[: limit - 3]}..."
    return f"{text} (text)" if isinstance(value, str) else text
