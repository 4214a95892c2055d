"""Conversion of a captured graph to float64, as casts to 32 and 16 bits inside the model would hide errors of folds."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_map

NARROW = (torch.float32, torch.bfloat16, torch.float16)


def in_float64(graph_module: GraphModule) -> GraphModule:
    """A copy of a graph in which float64 (complex128) replaces every narrower floating (complex) dtype."""
    model = copy.deepcopy(graph_module).to(torch.float64)
    for part in model.modules():
        for name, value in [*vars(part).items(), *part._buffers.items()]:
            if isinstance(value, Tensor):
                setattr(part, name, wide(value))
        if isinstance(part, GraphModule):
            for node in part.graph.nodes:
                node.args, node.kwargs = tree_map(_widen, node.args), tree_map(_widen, node.kwargs)
                if node.target is torch.ops.aten.to.dtype_layout:
                    node.kwargs = {key: value for key, value in node.kwargs.items() if key != "layout"}
                if node.target is torch.ops.aten._assert_tensor_metadata.default:
                    node.args, node.kwargs = node.args[:1], {}
                if _makes_narrow(node):
                    node.kwargs = {**node.kwargs, "dtype": torch.float64}
            part.recompile()
    # Running the graph on fake inputs instead would add guards to the symbolic sizes, which the original shares.
    for node in model.graph.nodes:
        node.meta["val"] = tree_map(_wide_fake, node.meta.get("val"))
    return model


def wide(value: Any) -> Any:
    """A floating tensor in float64, a complex one in complex128, and any other value unchanged."""
    if isinstance(value, Tensor) and value.dtype in NARROW:
        return value.to(torch.float64)
    if isinstance(value, Tensor) and value.is_complex():
        return value.to(torch.complex128)
    return value


def _makes_narrow(node: Node) -> bool:
    """Whether a node makes a tensor of the default dtype from numbers, such as ``arange(3.0)``."""
    value = node.meta.get("val")
    if not isinstance(node.target, OpOverload) or not isinstance(value, Tensor) or value.dtype not in NARROW:
        return False
    takes = any(argument.name == "dtype" for argument in node.target._schema.arguments)
    read = any(isinstance(source.meta.get("val"), Tensor) for source in node.all_input_nodes)
    return takes and not read and node.kwargs.get("dtype") is None


def _wide_fake(value: Any) -> Any:
    if not isinstance(value, FakeTensor):
        return value
    with torch.no_grad(), value.fake_mode:
        return wide(value)


def _widen(value: Any) -> Any:
    if value in NARROW:
        return torch.float64
    return torch.complex128 if value is torch.complex64 else value
