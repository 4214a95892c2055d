"""The float part of a quantized graph in 16 bits: matrix products compute in it, everything else stays as it was.

What autocast does for modules, as nodes of the graph. Each product's operands are cast before it and its result back
after it, so no other node sees another dtype than the one it was traced with; compilers fuse the casts.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from ptq4dit_ao.graph.names import LINEAR
from ptq4dit_ao.graph.shapes import tensor_of

aten = torch.ops.aten
PRODUCTS = {
    LINEAR,
    aten.scaled_dot_product_attention.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.mm.default,
    aten.addmm.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
}


def compute_in(graph_module: GraphModule, dtype: torch.dtype) -> None:
    """Let every float32 matrix product of a graph compute in ``dtype``, in place."""
    graph = graph_module.graph
    narrowed: dict[Node, Node] = {}
    for node in [node for node in graph.nodes if node.target in PRODUCTS and _is_float32(node)]:
        for operand in [operand for operand in node.all_input_nodes if _is_float32(operand)]:
            if operand not in narrowed:
                with graph.inserting_after(operand):
                    narrowed[operand] = _cast(graph_module, operand, dtype)
            node.replace_input_with(operand, narrowed[operand])
        result = tensor_of(node)
        assert result is not None
        with graph.inserting_after(node):
            widened = graph.call_function(aten.to.dtype, (node, result.dtype))
        widened.meta["val"] = result
        node.replace_all_uses_with(widened, delete_user_cb=lambda user, widened=widened: user is not widened)
        node.meta["val"] = result.to(dtype)
    graph.lint()
    graph_module.recompile()


def _cast(graph_module: GraphModule, node: Node, dtype: torch.dtype) -> Node:
    cast = graph_module.graph.call_function(aten.to.dtype, (node, dtype))
    value = tensor_of(node)
    assert value is not None
    cast.meta["val"] = value.to(dtype)
    return cast


def _is_float32(node: Node) -> bool:
    value = tensor_of(node)
    return value is not None and value.dtype == torch.float32 and node.target is not operator.getitem
