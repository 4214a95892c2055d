"""Nesting of a model's inputs and outputs as JSON: ``"*"`` is one value, and the rest mirrors the containers.

``(x, {"t": t})`` is ``{"tuple": ["*", {"dict": {"t": "*"}}]}``. The order of dict keys matters.
"""

from __future__ import annotations

from typing import Any

from torch.utils import _pytree as pytree

from ptq4dit_ao.errors import ArtifactError

_LEAF = "*"
_SEQUENCES: dict[type, str] = {tuple: "tuple", list: "list"}


def spec_to_json(spec: pytree.TreeSpec) -> Any:
    """Encode a pytree spec of tuples, lists and dicts with string keys as JSON.

    Raises:
        ArtifactError: it has another container.
    """
    if spec.is_leaf():
        return _LEAF
    children = [spec_to_json(child) for child in spec.children()]
    if spec.type in _SEQUENCES:
        return {_SEQUENCES[spec.type]: children}
    if spec.type is dict:
        _check_keys(spec.context)
        return {"dict": dict(zip(spec.context, children, strict=True))}
    raise ArtifactError(
        f"an input or output of type {getattr(spec.type, '__qualname__', spec.type)} cannot be stored; export the "
        f"model so that it returns tensors, tuples, lists or dicts"
    )


def spec_from_json(spec: Any) -> pytree.TreeSpec:
    """Decode a pytree spec from JSON, the inverse of ``spec_to_json``.

    Raises:
        ArtifactError: the JSON is not such a spec.
    """
    return pytree.tree_structure(_skeleton(spec))


def _skeleton(spec: Any) -> Any:
    """The containers of ``spec``, with 0 as every leaf."""
    if spec == _LEAF:
        return 0
    match spec:
        case {"tuple": list(items), **rest} if not rest:
            return tuple(_skeleton(item) for item in items)
        case {"list": list(items), **rest} if not rest:
            return [_skeleton(item) for item in items]
        case {"dict": dict(items), **rest} if not rest:
            return {key: _skeleton(item) for key, item in items.items()}
    raise ArtifactError(f"input or output nesting {spec!r} is not readable; save the model again")


def _check_keys(keys: list[object]) -> None:
    for key in keys:
        if not isinstance(key, str):
            raise ArtifactError(
                f"an input or output dict has the key {key!r}, a {type(key).__name__}; export the model with dicts "
                f"whose keys are strings"
            )
