"""Node arguments as JSON.

None, bool, int, str and finite floats are themselves, and a list is a JSON list. Everything else is an object with one
key that names its type: ``{"node": "linear"}``, ``{"tuple": [1, 2]}``, ``{"dtype": "int8"}``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from ptq4dit_ao.errors import ArtifactError


def _constants_of(kind: type) -> dict[str, Any]:
    return {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, kind)}


DTYPES: dict[str, torch.dtype] = _constants_of(torch.dtype)
"""Name -> dtype of torch."""
_ENUMS: dict[str, dict[str, Any]] = {
    "dtype": DTYPES,
    "layout": _constants_of(torch.layout),
    "memory_format": _constants_of(torch.memory_format),
}
_ENUM_TYPES: dict[type, str] = {
    torch.dtype: "dtype",
    torch.layout: "layout",
    torch.memory_format: "memory_format",
}
_FLOATS = ("inf", "-inf", "nan")


def encode_value(value: object) -> Any:
    """Encode a node argument as JSON.

    Raises:
        ArtifactError: the value has no JSON form.
    """
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, list):
        return [encode_value(v) for v in value]
    # isinstance would also match a named tuple, which would come back as a plain one.
    if type(value) in (tuple, torch.Size):
        return {"tuple": [encode_value(v) for v in value]}  # type: ignore[attr-defined]
    if isinstance(value, slice):
        return {"slice": [encode_value(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    return _encode_enum(value)


def decode_value(value: Any, nodes: Mapping[str, Node], device: torch.device | None = None) -> Any:
    """Decode a node argument from JSON, the inverse of ``encode_value``. ``device`` replaces every stored device.

    Raises:
        ArtifactError: the JSON has none of these forms, or refers to a node that does not come before.
    """
    if value is None or isinstance(value, (bool, str, int, float)):
        return value
    if isinstance(value, list):
        return [decode_value(v, nodes, device) for v in value]
    if not isinstance(value, dict) or len(value) != 1:
        raise _unreadable(value)
    ((tag, content),) = value.items()
    if tag in ("tuple", "slice"):
        return _decode_sequence(tag, content, lambda v: decode_value(v, nodes, device))
    if not isinstance(content, str):
        raise _unreadable(value)
    if tag == "node":
        return _decode_node(content, nodes)
    if tag == "device":
        return device or _decode_device(content)
    if tag == "float" and content in _FLOATS:
        return float(content)
    if content not in _ENUMS.get(tag, ()):
        raise _unreadable(value)
    return _ENUMS[tag][content]


def _encode_enum(value: object) -> dict[str, str]:
    tag = _ENUM_TYPES.get(type(value))
    if tag is None:
        raise ArtifactError(
            f"an argument of type {type(value).__module__}.{type(value).__qualname__} cannot be stored: {value!r}; "
            f"replace it by a number, string, list or tensor before saving"
        )
    return {tag: str(value).removeprefix("torch.")}


def _decode_sequence(tag: str, content: object, decode: Callable[[Any], Any]) -> tuple[Any, ...] | slice:
    if not isinstance(content, list) or (tag == "slice" and len(content) != 3):
        raise _unreadable({tag: content})
    items = tuple(decode(v) for v in content)
    return slice(*items) if tag == "slice" else items


def _decode_node(name: str, nodes: Mapping[str, Node]) -> Node:
    if name not in nodes:
        raise ArtifactError(f"argument refers to node {name!r}, which does not come before it; save the model again")
    return nodes[name]


def _decode_device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise _unreadable({"device": name}) from error


def _unreadable(value: object) -> ArtifactError:
    return ArtifactError(f"argument {value!r} is not readable; the file is damaged or newer, save the model again")
