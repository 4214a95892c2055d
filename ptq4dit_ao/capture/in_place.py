"""Replacement of in-place operations on fresh tensors, such as ``frequencies /= 2``, by those that return a new tensor.

Passes that reorder or merge computations leave a graph alone that writes into tensors.
"""

from __future__ import annotations

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node


def write_out_in_place(graph_module: GraphModule) -> int:
    """Replace in-place operations whose tensor nothing else reads, in place; return their number."""
    replaced = 0
    for node in graph_module.graph.nodes:
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
