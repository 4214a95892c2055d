"""Broadcasting, reshaping and slicing of tensors' id arrays.

An id array has as many axes as its tensor. An axis of length 1 has the same variable at every position. Batch and token
axes always have length 1, so the arrays are about as large as the number of channels.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from ptq4dit_ao.graph.variables import Ids

Shape = tuple[int, ...]

INPUT = "ptq4dit_input"
"""Key in a placeholder's meta: the :class:`~ptq4dit_ao.capture.interface.InputSpec` of the input."""

FIRST = 1009
"""Smallest prime in the numbers that replace symbolic sizes; the numbers are larger than a model's fixed sizes."""

DIVISIBLE = 2**5 * 3
"""Common multiple of the sizes of patches, by which the numbers that replace symbolic sizes are divisible."""

_primes: dict[str, int] = {}
_lock = Lock()


def tensor_of(node: Node) -> torch.Tensor | None:
    """The fake tensor that export recorded for a node, if the node is a single tensor."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def shape_of(node: Node) -> Shape:
    """The node's shape, with symbolic sizes replaced by numbers (:func:`hint`)."""
    value = tensor_of(node)
    assert value is not None, f"{node.name} is not a tensor"
    return tuple(hint(size) for size in value.shape)


def symbolic_axes(node: Node) -> list[int]:
    """Axes whose size may differ from call to call."""
    value = tensor_of(node)
    assert value is not None
    return [axis for axis, size in enumerate(value.shape) if _symbols(size)]


@functools.lru_cache(maxsize=4096)
def _evaluate(expression: Any) -> int:
    """The value of a symbolic size with a distinct prime in each symbol, so that sizes are never equal by accident."""
    symbols = sorted(expression.free_symbols, key=str)
    return int(expression.subs({symbol: DIVISIBLE * prime_of(str(symbol)) for symbol in symbols}))


def prime_of(symbol: str) -> int:
    """The prime that replaces a symbol in this process; symbols get primes in order of appearance."""
    with _lock:
        if symbol not in _primes:
            _primes[symbol] = _next_prime(max(_primes.values(), default=FIRST - 1))
        return _primes[symbol]


def _next_prime(number: int) -> int:
    candidates = itertools.count(number + 1)
    return next(n for n in candidates if all(n % divisor for divisor in range(2, math.isqrt(n) + 1)))


def batch_axis(node: Node) -> int | None:
    """The batch axis of a node's tensor; None if the tensor is the same for all samples.

    It is the axis whose size depends on the batch symbol, or the first axis in a graph with a fixed batch.
    """
    batch = _batch_symbols(node.graph.find_nodes(op="placeholder"))
    value = tensor_of(node)
    assert value is not None
    for axis, size in enumerate(value.shape[:-1]):
        if _symbols(size) & batch:
            return axis
    return None if batch else 0


def _batch_symbols(inputs: Sequence[Node]) -> set[object]:
    """Symbols of the batch: of the first axis of inputs that carry it, or of the first input that has a free one."""
    known = [node for node in inputs if INPUT in node.meta]
    batched = [node for node in known if node.meta[INPUT].batched] if known else inputs
    for node in batched:
        if (value := tensor_of(node)) is not None and value.ndim and (symbols := _symbols(value.shape[0])):
            return symbols
    return set()


def _symbols(size: object) -> set[object]:
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


def hint(size: object) -> int:
    """A size as a number; a symbolic size is evaluated with a prime for each of its symbols."""
    if isinstance(size, torch.SymInt):
        return _evaluate(size.node.expr)
    if isinstance(size, Node):
        return hint(size.meta["val"])
    assert isinstance(size, int)
    return size


def example_shape(node: Node) -> Shape:
    """The node's shape at the exported example."""
    value = tensor_of(node)
    assert value is not None, f"{node.name} is not a tensor"
    return tuple(example_size(size) for size in value.shape)


def example_size(size: object) -> int:
    """A size as it was at the exported example."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint)
    return example_size(size.meta["val"]) if isinstance(size, Node) else hint(size)


def size_per_sample(node: Node) -> int:
    """Number of elements of a node's tensor for one sample of the example."""
    value = tensor_of(node)
    assert value is not None, f"{node.name} is not a tensor"
    batch = _batch_symbols(node.graph.find_nodes(op="placeholder"))
    return math.prod(example_size(size) for size in value.shape if not _symbols(size) & batch)


def normalize_axis(axis: int, ndim: int) -> int:
    """The non-negative form of an axis that may count from the end."""
    return axis + ndim if axis < 0 else axis


def align_groups(source: Shape, target: Shape) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Split two shapes with the same number of elements into the shortest runs of axes with equal products."""
    groups, i, j = [], 0, 0
    while i < len(source) or j < len(target):
        start_i, start_j = i, j
        left = source[i] if i < len(source) else 1
        right = target[j] if j < len(target) else 1
        i, j = min(i + 1, len(source)), min(j + 1, len(target))
        while left != right:
            if left < right:
                left *= source[i]
                i += 1
            else:
                right *= target[j]
                j += 1
        groups.append(((start_i, i), (start_j, j)))
    return groups


def reshape_ids(ids: Ids, source: Shape, target: Shape) -> Ids:
    """The id array of ``tensor.reshape(target)``; exchanging the shapes gives the inverse."""
    expanded: list[int] = []
    result: list[int] = []
    for (i0, i1), (j0, j1) in align_groups(source, target):
        uniform = all(size == 1 for size in ids.shape[i0:i1])
        expanded += [1] * (i1 - i0) if uniform else source[i0:i1]
        result += [1] * (j1 - j0) if uniform else target[j0:j1]
    return np.broadcast_to(ids, expanded).reshape(result)


def broadcast_ids(ids: Ids, ndim: int) -> Ids:
    """Prepend axes of length 1 up to ``ndim``, as broadcasting does."""
    return ids.reshape((1,) * (ndim - ids.ndim) + ids.shape)


def embed_ids(part: Ids, axis: int, start: int, whole: Ids) -> Ids:
    """A copy of ``whole`` in which ``part`` replaces ``[start, start + len)`` of ``axis``."""
    shape = np.broadcast_shapes(
        _without(part.shape, axis),
        _without(whole.shape, axis),
    )
    whole = np.broadcast_to(whole, _with(shape, axis, whole.shape[axis])).copy()
    window = [slice(None)] * whole.ndim
    window[axis] = slice(start, start + part.shape[axis])
    whole[tuple(window)] = part
    return whole


def take_axis(ids: Ids, axis: int, start: int, length: int) -> Ids:
    """Ids of a contiguous slice; a uniform axis keeps length 1."""
    if ids.shape[axis] == 1:
        return ids
    return ids.take(range(start, start + length), axis=axis)


def part_sizes(total: int, chunks: int) -> list[int]:
    """Sizes of the parts that ``torch.chunk`` returns."""
    size = math.ceil(total / chunks)
    return [min(size, total - start) for start in range(0, total, size)]


def _without(shape: Sequence[int], axis: int) -> Shape:
    return _with(tuple(shape), axis, 1)


def _with(shape: Sequence[int], axis: int, size: int) -> Shape:
    return (*shape[:axis], size, *shape[axis + 1 :])
