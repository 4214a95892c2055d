"""What is computed from parameters alone."""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from ptq4dit_ao.graph.names import CONSTANT, LINEAR, get_attribute

_SOURCES = "ptq4dit_folded_sources"


def fold_constant_weights(graph_module: GraphModule) -> int:
    """Replace every weight and bias of a linear that parameters alone determine by a buffer; returns how many.

    Such as ``weight * gain``, or a part of one long bias: neither a quantizer nor a fold nor a kernel can work with
    what is computed at every call. The parameters themselves stay as they are.
    """
    constant = constants(graph_module)
    folded: dict[Node, Node] = {}
    sources: set[str] = set()
    for node in list(graph_module.graph.nodes):
        for source in node.args[1:3] if node.target is LINEAR else ():
            if not isinstance(source, Node) or source.op == "get_attr" or source not in constant:
                continue
            if source not in folded:
                sources |= _sources(source)
                folded[source] = _as_buffer(graph_module, source)
            node.replace_input_with(source, folded[source])
    if folded:
        graph_module.meta[_SOURCES] = frozenset(sources)
        graph_module.graph.eliminate_dead_code()
        graph_module.recompile()
    return len(folded)


def constants(graph_module: GraphModule) -> set[Node]:
    """What is computed from attributes only, with fixed shapes."""
    found: set[Node] = set()
    for node in graph_module.graph.nodes:
        values = tree_leaves(node.meta.get("val"))
        if node.op == "get_attr":
            constant = isinstance(get_attribute(graph_module, str(node.target)), torch.Tensor)
        else:
            made = _pure(node) and all(isinstance(value, torch.Tensor) for value in values)
            fixed = made and not any(isinstance(size, torch.SymInt) for value in values for size in value.shape)
            constant = fixed and bool(node.all_input_nodes) and found.issuperset(node.all_input_nodes)
        if constant:
            found.add(node)
    return found


def folded_sources(graph_module: GraphModule) -> frozenset[str]:
    """Parameters that a folded weight was computed from: an edit of one of them no longer reaches it."""
    return graph_module.meta.get(_SOURCES, frozenset())


def _pure(node: Node) -> bool:
    """Does the op give the same for the same inputs, and leave them as they are?"""
    op = node.target
    if isinstance(op, torch._ops.OpOverload):
        return not op._schema.is_mutable and torch.Tag.nondeterministic_seeded not in op.tags
    return op is operator.getitem


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


def _sources(node: Node) -> set[str]:
    """The attributes that a constant is computed from."""
    if node.op == "get_attr":
        return {str(node.target)}
    return set().union(*(_sources(source) for source in node.all_input_nodes))


class _Evaluate(Interpreter):
    """Runs only what one node needs."""

    @torch.no_grad()
    def value(self, node: Node) -> torch.Tensor:
        for source in node.all_input_nodes:
            if source not in self.env:
                self.value(source)
        self.env[node] = self.run_node(node)
        return self.env[node]
