"""Signature of a denoiser's call: keyword arguments, and the tensors among them as a flat, named list.

Transformers of diffusers take tensors, lists of tensors, None and plain values. A graph takes tensors by position, and
its plain values are fixed to those that it was captured with. Numbers that are sizes, such as ``height`` or those in
``img_shapes``, are no such values: each is carried by a tensor of that length, whose axis is free like any other. So
everything that handles a graph sees tensors only.
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

from ptq4dit_ao.capture.axes import NUMBERS, number_kind
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
class NumberName:
    """Placeholder for a number that is a size in a :class:`CallSignature`, named as the tensor that has this length."""

    name: str

    def __repr__(self) -> str:
        """The text that error messages show."""
        return "a size"


@dataclass(frozen=True)
class CallSignature:
    """The arguments of a call with each tensor, and each number that is a size, replaced by its name."""

    arguments: Mapping[str, Any]

    @property
    def names(self) -> list[str]:
        """Names of the tensors, in the order in which a captured graph takes them; those of numbers are the last."""
        return [*self._named(TensorName), *self.numbers]

    @property
    def numbers(self) -> list[str]:
        """Names of the tensors that stand for numbers."""
        return self._named(NumberName)

    def _named(self, kind: type[TensorName] | type[NumberName]) -> list[str]:
        found: list[str] = []
        _map(self.arguments, lambda leaf: found.append(leaf.name) if isinstance(leaf, kind) else None)
        return found

    def bind(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """The arguments with tensors, or their lengths, in place of their names."""
        table = dict(zip(self.names, tensors, strict=True))

        def value(leaf: Any) -> Any:
            if isinstance(leaf, NumberName):
                return table[leaf.name].shape[0]  # a symbol during an export
            return table[leaf.name] if isinstance(leaf, TensorName) else leaf

        return _map(self.arguments, value)

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


def flatten_call(
    model: nn.Module, arguments: Mapping[str, Any], like: CallSignature | None = None
) -> tuple[CallSignature, dict[str, Tensor]]:
    """Separate the tensors from keyword arguments, in the order of ``model.forward``.

    A tensor in a list, tuple or dict is named after its position, such as ``x_0``, or ``x_0_`` if that name is taken.
    After the tensors come those that stand for numbers: bool zeros, as many as the number says, on the device of the
    first tensor. Numbers below 2 are no sizes, because an export fixes an axis of length 1. A list of equal shapes, one
    per sample, becomes a list of one, because models read only the first and the batch may differ.

    Args:
        model: the module that is called.
        arguments: the keyword arguments of the call.
        like: another call, which has numbers at the same places. Without it, arguments are known by their names.

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
    numbers: dict[str, Tensor] = {}

    def free_name(path: str) -> str:
        while path in tensors or path in numbers:
            path += "_"
        return path

    def take(value: Any, path: str, then: Any) -> Any:
        if isinstance(value, Tensor):
            path = free_name(path)
            tensors[path] = value
            return TensorName(path)
        if isinstance(value, Mapping):
            return {key: take(part, f"{path}_{key}", _part(then, key)) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return _like(value, [take(part, f"{path}_{i}", _part(then, i)) for i, part in enumerate(value)])
        if _is_size(value, path) if like is None else _is_size_like(value, then):
            path = free_name(path)
            numbers[path] = _carrier(value)
            return NumberName(path)
        if isinstance(value, CONSTANTS):
            return value
        raise ArgumentError(
            f"argument {path!r} of {type(model).__name__} is a {type(value).__name__}; only tensors, numbers, strings, "
            "None and lists of them can be captured"
        )

    captured = {} if like is None else like.arguments
    found = {
        name: take(_shape_of_all(name, arguments[name]), name, captured.get(name))
        for name in parameters
        if name in arguments
    }
    device = next((x.device for x in tensors.values()), torch.device("cpu"))
    return CallSignature(found), tensors | {name: x.to(device) for name, x in numbers.items()}


def _part(then: Any, place: Any) -> Any:
    """The part of another call's value at a key or position; None if it has none."""
    if isinstance(then, (list, tuple)):
        return then[place] if isinstance(place, int) and place < len(then) else None
    return then.get(place) if isinstance(then, Mapping) else None


def _carrier(size: int) -> Tensor:
    """The tensor that stands for a number."""
    return torch.zeros(size, dtype=torch.bool)


def _is_size(value: Any, path: str) -> bool:
    return type(value) is int and value > 1 and number_kind(path) is not None


def _is_size_like(value: Any, then: Any) -> bool:
    return type(value) is int and value >= 0 and isinstance(then, NumberName)


def _shape_of_all(name: str, value: Any) -> Any:
    """The shapes of all samples as a list of one, if each sample has the same."""
    return _once(value) if name in NUMBERS and isinstance(value, list) and value else value


def name_numbers(signature: CallSignature) -> tuple[CallSignature, dict[str, Tensor]]:
    """A signature whose numbers that are sizes are named, and the tensors that stand for those that were not yet."""
    numbers: dict[str, Tensor] = {}

    def take(value: Any, path: str) -> Any:
        if isinstance(value, (list, tuple)):
            return _like(value, [take(part, f"{path}_{i}") for i, part in enumerate(value)])
        if not _is_size(value, path):
            return value
        while path in numbers or path in signature.names:
            path += "_"
        numbers[path] = _carrier(value)
        return NumberName(path)

    found = {name: take(_shape_of_all(name, value), name) for name, value in signature.arguments.items()}
    return CallSignature(found), numbers


def tensors_like(captured: CallSignature, model: nn.Module, arguments: Mapping[str, Any]) -> list[Tensor]:
    """The tensors of another call of ``model``, in the order in which the captured graph takes them.

    A number becomes a tensor if the captured call had a tensor there, such as the timestep of many diffusers models.
    Where the captured call had a size, this one may have another.

    Raises:
        ArgumentError: the call differs from the captured one in more than tensors. None, an empty container and a
            default count as equal to a missing argument, and one list as equal to a list of equal lists per sample.
    """
    given = {name: _tensor(captured, name, x) for name, x in arguments.items()}
    signature, tensors = flatten_call(model, given, captured)
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
    same = isinstance(value, list) and isinstance(value[0], (list, tuple)) and all(part == value[0] for part in value)
    return value[:1] if same else value


def _to_json(value: Any) -> Any:
    """A JSON value in which containers and names are objects with one key, their kind; it tells tuples from lists."""
    if isinstance(value, TensorName):
        return {"tensor": value.name}
    if isinstance(value, NumberName):
        return {"size": value.name}
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
        if kind == "size" and isinstance(content, str):
            return NumberName(content)
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
