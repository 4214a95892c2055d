"""Replacement of in-place operations on fresh tensors by those that return a new tensor.

Such are ``frequencies /= 2``, and rotary embeddings that fill ``out[..., 0::2]`` and ``out[..., 1::2]`` of an empty
tensor. Passes that reorder or merge computations leave a graph alone that writes into tensors, and some runtimes do not
take it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch._prims_common import is_contiguous_or_false
from torch.fx import GraphModule, Node

aten = torch.ops.aten

EMPTY = (aten.empty_like.default, aten.empty.memory_format, aten.new_empty.default, aten.empty_permuted.default)
"""Operations that make a tensor whose values are written later."""


def write_out_in_place(graph_module: GraphModule) -> int:
    """Replace in-place operations whose tensor nothing else reads, in place; return their number."""
    replaced = 0
    for node in list(graph_module.graph.nodes):
        if node.target in EMPTY and (writes := _interleaved(node)):
            _interleave(node, writes)
            replaced += len(writes)
            continue
        functional = _functional(node.target)
        if functional is not None and _is_fresh(node.args[0]):
            node.target = functional
            replaced += 1
    if replaced:
        graph_module.recompile()
    return replaced


def _functional(target: object) -> OpOverload | None:
    """The operator that returns a new tensor instead of writing; None if ``target`` does not write, or has none."""
    if not isinstance(target, OpOverload) or not target._schema.is_mutable:
        return None
    packet = getattr(torch.ops.aten, target._opname.removesuffix("_"), None)
    found = getattr(packet, target._overloadname, None)
    same = isinstance(found, OpOverload) and not found._schema.is_mutable
    return found if same and target._opname.endswith("_") else None


def _is_fresh(source: object) -> bool:
    """Whether a value is a new tensor that shares no memory with others, and has one reader."""
    if not isinstance(source, Node) or not isinstance(source.target, OpOverload) or len(source.users) != 1:
        return False
    return all(result.alias_info is None for result in source.target._schema.returns)


def _interleaved(empty: Node) -> list[Node]:
    """The writes that fill an empty tensor of ``n * k`` channels: into ``[..., i::k]`` for each i, in this order.

    Empty if it is filled in another way, or read between the writes.
    """
    value = empty.meta["val"]
    if not value.ndim or not is_contiguous_or_false(value):  # a stack is contiguous
        return []
    size = value.shape[-1]
    views = [user for user in empty.users if user.target is aten.slice.Tensor]
    step = len(views)
    if step < 2 or not isinstance(size, int) or size % step:
        return []
    written: dict[int, Node] = {}
    for view in views:
        first, every = _slice_of_channels(view)
        (write, *others) = view.users or (view,)
        if every != step or others or not _fills(write, view):
            return []
        written[first] = write
    readers = [user for user in empty.users if user not in views]
    last = max(written.values())
    filled = sorted(written) == list(range(step)) and all(last < reader for reader in readers)
    return [written[i] for i in range(step)] if filled and _are_alone(list(written.values())) else []


def _are_alone(writes: Sequence[Node]) -> bool:
    """Whether nothing else is written between the first and the last of these writes, such as into their sources."""
    node, last = min(writes), max(writes)
    while node is not last:
        if node not in writes and isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            return False
        node = node.next
    return True


def _fills(write: Node, view: Node) -> bool:
    """Whether a node writes a tensor of the same shape into a view, and does nothing else."""
    if write.target is not aten.copy_.default or write.users or write.args[0] is not view:
        return False
    source = write.args[1]
    return isinstance(source, Node) and str(source.meta["val"].shape) == str(view.meta["val"].shape)


def _slice_of_channels(view: Node) -> tuple[int, int]:
    """Start and step of a slice of the last axis to its end; a step of 0 for any other slice."""
    given: list[Any] = list(view.args)
    defaults: list[Any] = [None, 0, 0, None, 1]
    source, axis, start, end, step = given + defaults[len(given) :]
    value = source.meta["val"]
    numbers = all(isinstance(n, int) for n in (axis, start, end, step))
    whole = numbers and axis % value.ndim == value.ndim - 1 and end >= value.shape[-1]
    return (start, step) if whole else (0, 0)


def _interleave(empty: Node, writes: Sequence[Node]) -> None:
    """Replace an empty tensor and the writes that fill it by a stack of what they write, with its last axes merged."""
    graph, fake = empty.graph, empty.meta["val"]
    views = [write.args[0] for write in writes]

    def call(target: OpOverload, args: tuple[Any, ...], shape: Sequence[Any]) -> Node:
        node = graph.call_function(target, args)
        node.meta = {**empty.meta, "val": fake.new_empty(tuple(shape))}
        return node

    with graph.inserting_before(max(writes)), fake.fake_mode:
        channels = views[0].meta["val"].shape  # type: ignore[union-attr]
        parts: list[Any] = [write.args[1] for write in writes]
        for i, part in enumerate(parts):
            if part.meta["val"].dtype != fake.dtype:
                parts[i] = call(aten.to.dtype, (part, fake.dtype), channels)
        stacked = call(aten.stack.default, (parts, -1), (*channels, len(parts)))
        result = call(aten.flatten.using_ints, (stacked, -2), fake.shape)
    for write, view in zip(writes, views, strict=True):
        graph.erase_node(write)
        graph.erase_node(view)  # type: ignore[arg-type]
    empty.replace_all_uses_with(result)
    graph.erase_node(empty)
