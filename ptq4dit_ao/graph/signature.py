"""What a denoiser is called with: keyword arguments, and the tensors among them as a flat, named list.

Transformers of diffusers take tensors, lists of tensors, None and plain values; a graph takes tensors by position.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ptq4dit_ao.errors import ArgumentError

CONSTANTS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class TensorName:
    """Stands for a tensor in a :class:`CallSignature`."""

    name: str


@dataclass(frozen=True)
class CallSignature:
    """The arguments of a call with each tensor replaced by its name."""

    arguments: Mapping[str, Any]

    @property
    def names(self) -> list[str]:
        """Of the tensors, in the order in which a captured graph takes them."""
        found: list[str] = []
        _map(self.arguments, lambda leaf: found.append(leaf.name) if isinstance(leaf, TensorName) else None)
        return found

    def bind(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """The arguments again, with these tensors."""
        table = dict(zip(self.names, tensors, strict=True))
        return _map(self.arguments, lambda leaf: table[leaf.name] if isinstance(leaf, TensorName) else leaf)


def flatten_call(model: nn.Module, arguments: Mapping[str, Any]) -> tuple[CallSignature, dict[str, Tensor]]:
    """Take the tensors out of keyword arguments, in the order of ``model.forward``.

    A tensor in a list, tuple or dict is named after its place: ``x_0``; if that is taken, ``x_0_``.

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


def _map(value: Any, change: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _map(part, change) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return _like(value, [_map(part, change) for part in value])
    return change(value)


def _like(value: Sequence[Any], parts: list[Any]) -> Sequence[Any]:
    """A list, tuple or named tuple of these parts; what is more special, as ``torch.Size``, becomes a plain one."""
    if hasattr(value, "_fields"):
        return type(value)(*parts)
    return tuple(parts) if isinstance(value, tuple) else parts
