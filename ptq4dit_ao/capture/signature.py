"""Signature of a denoiser's call: keyword arguments, and the tensors among them as a flat, named list.

Transformers of diffusers take tensors, lists of tensors, None and plain values. A graph takes tensors by position, and
its plain values are fixed to those that it was captured with.
"""

from __future__ import annotations

import inspect
import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptq4dit_ao.errors import ArgumentError

CONSTANTS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class TensorName:
    """Placeholder for a tensor in a :class:`CallSignature`."""

    name: str

    def __repr__(self) -> str:
        """The text that error messages show."""
        return "a tensor"


@dataclass(frozen=True)
class CallSignature:
    """The arguments of a call with each tensor replaced by its name."""

    arguments: Mapping[str, Any]

    @property
    def names(self) -> list[str]:
        """Names of the tensors, in the order in which a captured graph takes them."""
        found: list[str] = []
        _map(self.arguments, lambda leaf: found.append(leaf.name) if isinstance(leaf, TensorName) else None)
        return found

    def bind(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """The arguments with tensors in place of their names."""
        table = dict(zip(self.names, tensors, strict=True))
        return _map(self.arguments, lambda leaf: table[leaf.name] if isinstance(leaf, TensorName) else leaf)

    def to_json(self) -> dict[str, Any]:
        """The arguments as JSON values.

        Raises:
            ValueError: a dict has keys that are no strings, which JSON would change.
        """
        return {name: _to_json(value) for name, value in self.arguments.items()}

    @classmethod
    def from_json(cls, data: object) -> CallSignature:
        """Read what :meth:`to_json` has written.

        Raises:
            ValueError: ``data`` has another form.
        """
        if not isinstance(data, dict):
            raise ValueError(f"unknown structure {json.dumps(data)} in the signature")
        return cls({name: _from_json(value) for name, value in data.items()})


def flatten_call(model: nn.Module, arguments: Mapping[str, Any]) -> tuple[CallSignature, dict[str, Tensor]]:
    """Separate the tensors from keyword arguments, in the order of ``model.forward``.

    A tensor in a list, tuple or dict is named after its position, such as ``x_0``, or ``x_0_`` if that name is taken.

    Raises:
        ArgumentError: ``forward`` has no such argument, or a value is neither a tensor, a plain value nor a container.
    """
    parameters = list(inspect.signature(model.forward).parameters)
    kinds = {p.kind for p in inspect.signature(model.forward).parameters.values()}
    unknown = [name for name in arguments if name not in parameters]
    if unknown and inspect.Parameter.VAR_KEYWORD in kinds:
        parameters += unknown
    elif unknown:
        raise ArgumentError(
            f"{type(model).__name__} takes no argument {unknown[0]!r}; it takes {', '.join(map(repr, parameters))}"
        )
    tensors: dict[str, Tensor] = {}

    def take(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            while path in tensors:
                path += "_"
            tensors[path] = value
            return TensorName(path)
        if isinstance(value, Mapping):
            return {key: take(part, f"{path}_{key}") for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return _like(value, [take(part, f"{path}_{i}") for i, part in enumerate(value)])
        if isinstance(value, CONSTANTS):
            return value
        raise ArgumentError(
            f"argument {path!r} of {type(model).__name__} is a {type(value).__name__}; only tensors, numbers, strings, "
            "None and lists of them can be captured"
        )

    return CallSignature({name: take(arguments[name], name) for name in parameters if name in arguments}), tensors


def tensors_like(captured: CallSignature, model: nn.Module, arguments: Mapping[str, Any]) -> list[Tensor]:
    """The tensors of another call of ``model``, in the order in which the captured graph takes them.

    A number becomes a tensor if the captured call had a tensor there, such as the timestep of many diffusers models.

    Raises:
        ArgumentError: the call differs from the captured one in more than tensors. None, an empty container and a
            default count as equal to a missing argument, and one list as equal to a list of equal lists per sample.
    """
    signature, tensors = flatten_call(model, {name: _tensor(captured, name, x) for name, x in arguments.items()})
    defaults = {name: p.default for name, p in inspect.signature(model.forward).parameters.items()}
    for name in {**captured.arguments, **signature.arguments}:
        then, now = (call.arguments.get(name, defaults.get(name)) for call in (captured, signature))
        if _once(_meaning(then)) != _once(_meaning(now)):
            raise ArgumentError(
                f"argument {name!r} of {type(model).__name__} is {reprlib.repr(now)}, but the graph was captured with "
                f"{reprlib.repr(then)}; call it with that, or record samples with this call and quantize again"
            )
    return [tensors[name] for name in captured.names]


def _tensor(captured: CallSignature, name: str, value: Any) -> Any:
    """A number as a tensor, if the captured call had a tensor there; else the value itself."""
    if type(value) not in (int, float) or not isinstance(captured.arguments.get(name), TensorName):
        return value
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float32)


def _meaning(value: Any) -> Any:
    """A normal form of a value, in which lists equal tuples, and empty containers equal None."""
    if isinstance(value, Mapping):
        return {key: said for key, part in value.items() if (said := _meaning(part)) is not None} or None
    if isinstance(value, (list, tuple)):
        return [_meaning(part) for part in value] or None
    return value


def _once(value: Any) -> Any:
    """The first of equal lists as a list of one; Qwen-Image takes each sample's shape, but reads only the first."""
    same = isinstance(value, list) and isinstance(value[0], list) and all(part == value[0] for part in value)
    return value[:1] if same else value


def _to_json(value: Any) -> Any:
    """A JSON value in which containers and tensors are objects with one key, their kind; it tells tuples from lists."""
    if isinstance(value, TensorName):
        return {"tensor": value.name}
    if isinstance(value, Mapping):
        odd = [key for key in value if not isinstance(key, str)]
        if odd:
            raise ValueError(f"an argument is a dict with the key {odd[0]!r}; only string keys can be saved")
        return {"dict": {key: _to_json(part) for key, part in value.items()}}
    if isinstance(value, (list, tuple)):
        return {"tuple" if isinstance(value, tuple) else "list": [_to_json(part) for part in value]}
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, CONSTANTS):
        return value
    if isinstance(value, dict) and len(value) == 1:
        ((kind, content),) = value.items()
        if kind == "tensor" and isinstance(content, str):
            return TensorName(content)
        if kind == "dict" and isinstance(content, dict):
            return {key: _from_json(part) for key, part in content.items()}
        if kind in ("list", "tuple") and isinstance(content, list):
            parts = [_from_json(part) for part in content]
            return tuple(parts) if kind == "tuple" else parts
    raise ValueError(f"unknown structure {json.dumps(value)} in the signature")


def _map(value: Any, change: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _map(part, change) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return _like(value, [_map(part, change) for part in value])
    return change(value)


def _like(value: Sequence[Any], parts: list[Any]) -> Sequence[Any]:
    """A list, tuple or named tuple of these parts; a special type such as ``torch.Size`` becomes a plain tuple."""
    if hasattr(value, "_fields"):
        return type(value)(*parts)
    return tuple(parts) if isinstance(value, tuple) else parts
