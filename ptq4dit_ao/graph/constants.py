"""Weights that are computed from parameters alone become parameters."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Interpreter, Node

from ptq4dit_ao.graph.names import CONSTANT, LINEAR, get_attribute, is_linear
from ptq4dit_ao.graph.shapes import symbolic_axes, tensor_of


def fold_constant_weights(graph_module: GraphModule) -> int:
    """Replace the weight of every linear that parameters alone determine by a buffer; returns how many.

    Such as ``weight * gain``: neither a quantizer nor a fold can work with the product of two parameters. The
    parameters themselves stay as they are.
    """
    constant = _constants(graph_module)
    folded: dict[Node, Node] = {}
    for node in list(graph_module.graph.nodes):
        weight = node.args[1] if node.target is LINEAR else None
        if not isinstance(weight, Node) or is_linear(node) or weight not in constant:
            continue
        if weight not in folded:
            folded[weight] = _as_buffer(graph_module, weight)
        node.replace_input_with(weight, folded[weight])
    if folded:
        graph_module.graph.eliminate_dead_code()
        graph_module.recompile()
    return len(folded)


def _constants(graph_module: GraphModule) -> set[Node]:
    """Tensors of fixed shape that are computed from attributes only."""
    found: set[Node] = set()
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            constant = isinstance(get_attribute(graph_module, str(node.target)), torch.Tensor)
        else:
            made = node.op == "call_function" and tensor_of(node) is not None and not symbolic_axes(node)
            constant = made and bool(node.all_input_nodes) and found.issuperset(node.all_input_nodes)
        if constant:
            found.add(node)
    return found


def _as_buffer(graph_module: GraphModule, node: Node) -> Node:
    """A buffer with the value of a constant node, beside the first parameter it is made of."""
    first = node
    while first.op != "get_attr":
        first = first.all_input_nodes[0]
    value = _Evaluate(graph_module).value(node)
    owner, _, name = str(first.target).rpartition(".")
    module, name = graph_module.get_submodule(owner), f"{name}{CONSTANT}"
    while hasattr(module, name):
        name += "_"
    module.register_buffer(name, value.detach())
    path = f"{owner}.{name}" if owner else name
    with graph_module.graph.inserting_before(node):
        buffer = graph_module.graph.get_attr(path)
    buffer.meta["val"] = node.meta["val"]
    return buffer


class _Evaluate(Interpreter):
    """Runs only what one node needs."""

    @torch.no_grad()
    def value(self, node: Node) -> torch.Tensor:
        for source in node.all_input_nodes:
            if source not in self.env:
                self.value(source)
        self.env[node] = self.run_node(node)
        return self.env[node]
