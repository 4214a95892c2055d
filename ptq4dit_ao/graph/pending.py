"""Weights times vectors that are multiplied only when they are read.

Balancing scales rows and columns of nearly every weight of a model. During the conversion of a prepared graph, the
factors are pending: they are stored next to the weights. So the scaled float copy of a weight exists only while that
weight is quantized, and memory never holds all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.fx import GraphModule

from ptq4dit_ao.graph.names import get_attribute, set_tensor

Factors = dict[str, list[Tensor]]
"""Pending float64 factors by tensor path; they broadcast to the tensor's shape."""

_KEY = "ptq4dit_pending"

BLOCK = 2**18
"""Number of elements that are computed at a time."""

SMALL = 8
"""Ratio of a tensor's elements to a factor's from which on the factor is kept pending."""


def tensor_at(model: GraphModule, path: str) -> Tensor:
    """The tensor at a path times its pending factors, computed in float64 and returned in the tensor's own dtype."""
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
    """Slices of the first axis of about :data:`BLOCK` elements each."""
    step = max(1, BLOCK * len(tensor) // max(1, tensor.numel()))
    for start in range(0, len(tensor), step):
        yield slice(start, start + step)


def scale_later(model: GraphModule, paths: Sequence[str], factor: Tensor) -> bool:
    """Add a pending factor of a tensor under all its paths; False if the caller must multiply it now."""
    if _KEY not in model.meta or factor.numel() * SMALL > get_attribute(model, paths[0]).numel():
        return False
    for path in paths:
        model.meta[_KEY].setdefault(path, []).append(factor)
    return True


def pending(model: GraphModule) -> Factors:
    """All pending factors of a graph."""
    return model.meta.get(_KEY, {})


def set_pending(model: GraphModule, factors: Factors) -> None:
    """Replace all pending factors, if the graph is inside :func:`factors_wait`."""
    if _KEY in model.meta:
        model.meta[_KEY] = {path: list(waiting) for path, waiting in factors.items()}


@contextmanager
def factors_wait(model: GraphModule, may_stay: Callable[[str], bool]) -> Iterator[None]:
    """Context in which :func:`scale_later` keeps factors pending.

    On exit the factors are multiplied, except those of tensors for which ``may_stay(path)`` is true. Such tensors must
    still be read with :func:`tensor_at`, until :func:`drop_unread` finds that nothing reads them.
    """
    model.meta.setdefault(_KEY, {})
    yield
    for path in [path for path in pending(model) if not may_stay(path)]:
        set_tensor(model, path, tensor_at(model, path))
        del model.meta[_KEY][path]
    if not pending(model):
        del model.meta[_KEY]


def drop_unread(model: GraphModule) -> None:
    """Drop the pending factors of tensors that no node reads any more, such as weights that integers have replaced."""
    waiting = pending(model)
    read = {str(node.target) for node in model.graph.find_nodes(op="get_attr") if node.users}
    for path in waiting.keys() - read:
        del waiting[path]
    if not waiting:
        model.meta.pop(_KEY, None)
