"""Values of a graph that depend on parameters only."""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from ptq4dit_ao.graph.names import CONSTANT, LINEAR, get_attribute

_SOURCES = "ptq4dit_folded_sources"


def fold_constant_weights(graph_module: GraphModule) -> int:
    """Replace every weight and bias of a linear that is computed from parameters only by a buffer; return the number.

    Examples are ``weight * gain``, or a slice of one long bias. Quantizers, folds and kernels cannot work with a
    weight that is computed at every call. The parameters themselves do not change.
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
    """The nodes whose values depend on attributes only and have fixed shapes, the attributes' nodes included."""
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
    """Paths of the parameters that folded weights were computed from; edits of them no longer affect those weights."""
    return graph_module.meta.get(_SOURCES, frozenset())


def _pure(node: Node) -> bool:
    """Whether the op is deterministic and does not modify its inputs."""
    op = node.target
    if isinstance(op, torch._ops.OpOverload):
        return not op._schema.is_mutable and torch.Tag.nondeterministic_seeded not in op.tags
    return op is operator.getitem


def _as_buffer(graph_module: GraphModule, node: Node) -> Node:
    """Add a buffer with the value of a constant node, in the module of the first parameter that the node depends on."""
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
    """Paths of the attributes that a constant is computed from."""
    if node.op == "get_attr":
        return {str(node.target)}
    return set().union(*(_sources(source) for source in node.all_input_nodes))


class _Evaluate(Interpreter):
    """Interpreter that runs only the nodes that a given node depends on."""

    @torch.no_grad()
    def value(self, node: Node) -> torch.Tensor:
        for source in node.all_input_nodes:
            if source not in self.env:
                self.value(source)
        self.env[node] = self.run_node(node)
        return self.env[node]
