"""Strict JSON for files from unknown sources: only the expected keys are accepted, each of them once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from ptq4dit_ao.errors import ArtifactError


def load_json(path: Path) -> dict[str, Any]:
    """The JSON object in a UTF-8 file.

    Raises:
        ArtifactError: the file is not one JSON object, repeats a key, or holds NaN or Infinity.
    """
    try:
        doc = json.loads(path.read_bytes(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not readable JSON ({error}); copy or save the model again") from error
    if not isinstance(doc, dict):
        raise ArtifactError(f"{path} holds a JSON {type(doc).__name__}, not an object; copy or save the model again")
    return doc


def dump_json(doc: dict[str, Any], indent: int | None = None) -> bytes:
    """UTF-8 text of a JSON-safe dict with its keys in order, on one line unless ``indent`` is given."""
    return (json.dumps(doc, allow_nan=False, indent=indent) + "\n").encode()


def check_json(value: object, path: str) -> None:
    """Refuse values that JSON would drop or change: other types, keys that are not strings, and non-finite floats.

    Raises:
        ArtifactError: there is such a value. The message names its key path.
    """
    match value:
        case None | bool() | int() | str():
            return
        case float() if value - value == 0:
            return
        case list() | tuple():
            for index, item in enumerate(value):
                check_json(item, f"{path}[{index}]")
        case dict() if all(isinstance(key, str) for key in value):
            for key, item in value.items():
                check_json(item, f"{path}.{key}")
        case _:
            raise ArtifactError(
                f"{path} is {value!r}, a {type(value).__name__}, which JSON cannot hold; pass None, bool, int, str, "
                f"finite floats, lists and dicts with string keys"
            )


def check_keys(doc: Any, keys: Set[str], what: str) -> None:
    """Refuse anything but an object with exactly these keys.

    Raises:
        ArtifactError: keys are missing or unknown. The message names them.
    """
    if not isinstance(doc, Mapping):
        raise ArtifactError(f"{what} is a {type(doc).__name__}, not an object; copy or save the model again")
    for problem, names in (("lacks", keys - doc.keys()), ("has the unknown", doc.keys() - keys)):
        if names:
            raise ArtifactError(
                f"{what} {problem} {', '.join(map(repr, sorted(names)))}; it is damaged or of a newer version, save "
                f"the model again with this one"
            )


def check_strings(value: Any, what: str) -> list[str]:
    """The value itself, if it is a list of strings.

    Raises:
        ArtifactError: it is not.
    """
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ArtifactError(f"{what} is {value!r}, not a list of strings; copy or save the model again")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    doc = dict(pairs)
    if len(doc) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} occurs twice")
    return doc


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
