"""Mixed precision of a graph's float part: matrix products compute in 16 bits, everything else stays unchanged.

It is what autocast does for modules, as nodes of the graph. The operands of each product are cast before it, and its
result is cast back after it, so that every other node sees the dtype it was traced with. Compilers fuse the casts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node

from ptq4dit_ao.graph.names import LINEAR

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
"""Operators that compute in 16 bits."""


def compute_in(graph_module: GraphModule, dtype: torch.dtype, example_inputs: Sequence[Tensor]) -> None:
    """Make every float32 matrix product of a graph compute in ``dtype``, in place."""
    graph, float32 = graph_module.graph, _float32_nodes(graph_module, example_inputs)
    narrowed: dict[Node, Node] = {}
    for node in [node for node in graph.nodes if node.target in PRODUCTS and node in float32]:
        for operand in [operand for operand in node.all_input_nodes if operand in float32]:
            if operand not in narrowed:
                with graph.inserting_after(operand):
                    narrowed[operand] = graph.call_function(aten.to.dtype, (operand, dtype))
            node.replace_input_with(operand, narrowed[operand])
        with graph.inserting_after(node):
            widened = graph.call_function(aten.to.dtype, (node, torch.float32))
        float32.add(widened)
        node.replace_all_uses_with(widened, delete_user_cb=lambda user, widened=widened: user is not widened)
    graph.lint()
    graph_module.recompile()


def _float32_nodes(graph_module: GraphModule, example_inputs: Sequence[Tensor]) -> set[Node]:
    """Nodes whose value is a float32 tensor.

    The graph is run on fake tensors, because stored graphs have no metadata.
    """
    found: set[Node] = set()

    class Recorder(Interpreter):
        def run_node(self, n: Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor) and value.dtype == torch.float32:
                found.add(n)
            return value

    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        Recorder(graph_module).run(*(mode.from_tensor(x) for x in example_inputs))
    return found
