"""A module as a function of tensors by position."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ptq4dit_ao.capture.signature import CallSignature, TensorName, flatten_call
from ptq4dit_ao.errors import ExportError


@dataclass(frozen=True)
class Call:
    """A module as a function of tensors by position."""

    model: nn.Module
    signature: CallSignature | None
    """Keyword arguments of the call; None passes the tensors by position."""

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """Call the module; return its only output tensor, or a tuple of several."""
        forward = self.model.forward
        options = {"return_dict": False} if "return_dict" in inspect.signature(forward).parameters else {}
        if self.signature is None:
            output = forward(*tensors, **options)
        else:
            output = forward(**{**self.signature.bind(tensors), **options})
        found = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        return found[0] if len(found) == 1 else tuple(found)

    @property
    def numbers(self) -> frozenset[str]:
        """Names of the tensors that stand for numbers."""
        return frozenset() if self.signature is None else frozenset(self.signature.numbers)

    def has_batch(self, first: str) -> bool:
        """Whether an input is an argument of its own, so that its first axis is the batch, and no sample in a list."""
        return self.signature is None or isinstance(self.signature.arguments.get(first), TensorName)


def named_call(
    model: nn.Module, example_inputs: Sequence[Tensor] | Mapping[str, Any]
) -> tuple[Call, dict[str, Tensor]]:
    """A call of a module like the example, and the example's tensors by name.

    Raises:
        ExportError: the example is neither a tuple of tensors nor a dict, or has more tensors than ``forward`` takes.
    """
    if isinstance(example_inputs, Mapping):
        signature, tensors = flatten_call(model, example_inputs)
        return Call(model, signature), tensors
    if not isinstance(example_inputs, Sequence) or not all(isinstance(x, Tensor) for x in example_inputs):
        raise ExportError(
            f"the example inputs are a {type(example_inputs).__name__}; give a tuple of tensors in the order of "
            "forward, or its keyword arguments"
        )
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        names += [f"input_{i}" for i in range(len(names), len(example_inputs))]
    if len(example_inputs) > len(names):
        raise ExportError(
            f"{type(model).__name__} takes {len(names)} inputs ({', '.join(names)}), got {len(example_inputs)}"
        )
    return Call(model, None), dict(zip(names, example_inputs, strict=False))


def with_forward(
    model: nn.Module, names: Sequence[str], forward: Callable[..., Tensor | tuple[Tensor, ...]]
) -> nn.Module:
    """A shallow copy with another ``forward``, whose inputs have these names; parameter names stay the same."""
    view = copy.copy(model)
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # gives the graph's inputs their names
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    )
    view.forward = forward  # type: ignore[method-assign]
    return view
