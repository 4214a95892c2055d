"""Weights times vectors that are multiplied out when somebody reads them.

Balancing scales rows and columns of nearly every weight of a model. While a prepared graph is converted, the factors
wait beside the weights, so that a float copy of each exists only for as long as it takes to quantize it, and never all
of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.fx import GraphModule

from ptq4dit_ao.graph.names import get_attribute, set_tensor

Factors = dict[str, list[Tensor]]
"""Tensor path -> float64 factors that broadcast to its shape."""

_KEY = "ptq4dit_pending"

BLOCK = 2**18
"""Elements that are computed at a time."""

SMALL = 8
"""A factor waits if it has so many times fewer elements than its tensor."""


def tensor_at(model: GraphModule, path: str) -> Tensor:
    """The tensor at a path, with its factors; computed in float64, of its own dtype."""
    tensor: Tensor = get_attribute(model, path)
    factors = pending(model).get(path)
    if not factors:
        return tensor
    product = torch.empty_like(tensor, requires_grad=False)
    for rows in row_blocks(tensor):
        block = tensor[rows].detach().to("cpu", torch.float64)
        for factor in factors:
            block *= factor.expand(tensor.shape)[rows]
        product[rows] = block
    return product


def row_blocks(tensor: Tensor) -> Iterator[slice]:
    """Slices of the first axis, small enough that what is computed from them is no burden."""
    step = max(1, BLOCK * len(tensor) // max(1, tensor.numel()))
    for start in range(0, len(tensor), step):
        yield slice(start, start + step)


def scale_later(model: GraphModule, paths: Sequence[str], factor: Tensor) -> bool:
    """Note a factor of a tensor, under all its paths; False if it must be multiplied now."""
    if _KEY not in model.meta or factor.numel() * SMALL > get_attribute(model, paths[0]).numel():
        return False
    for path in paths:
        model.meta[_KEY].setdefault(path, []).append(factor)
    return True


def pending(model: GraphModule) -> Factors:
    """All factors that wait."""
    return model.meta.get(_KEY, {})


def set_pending(model: GraphModule, factors: Factors) -> None:
    """Let these wait instead, if any may."""
    if _KEY in model.meta:
        model.meta[_KEY] = {path: list(waiting) for path, waiting in factors.items()}


@contextmanager
def factors_wait(model: GraphModule, may_stay: Callable[[str], bool]) -> Iterator[None]:
    """Within, :func:`scale_later` takes factors; afterwards those stay of which ``may_stay(path)`` says so.

    Who stays must be read with :func:`tensor_at`.
    """
    model.meta.setdefault(_KEY, {})
    yield
    for path in [path for path in pending(model) if not may_stay(path)]:
        set_tensor(model, path, tensor_at(model, path))
        del model.meta[_KEY][path]
