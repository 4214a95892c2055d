"""Inlining of subgraphs that ``torch.export`` makes for context managers.

``torch.export`` keeps ``with torch.no_grad()`` and ``with torch.autocast(..., enabled=False)`` as calls of subgraphs
(regions). A graph for inference runs without gradients and without autocast anyway, so the regions have no effect, but
nothing in them could be balanced, stored or converted.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ptq4dit_ao.graph.names import get_attribute

higher_order = torch.ops.higher_order


def write_out_regions(graph_module: GraphModule) -> None:
    """Inline every region that has no effect on inference, in place; regions with autocast enabled stay."""
    graph, inlined = graph_module.graph, False
    for node in list(graph.nodes):
        region = _region(graph_module, node)
        if region is not None:
            _write_out(graph_module, node, *region)
            inlined = True
    if not inlined:
        return
    graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph.lint()
    graph_module.recompile()


def _region(graph_module: GraphModule, node: Node) -> tuple[GraphModule, tuple[Any, ...]] | None:
    """The graph of a region and its inputs; None if the node is no call of a region that can be inlined."""
    arguments: tuple[Any, ...] = node.args
    if node.target is higher_order.wrap_with_set_grad_enabled:
        _, body, *inputs = arguments
    elif node.target is higher_order.wrap_with_autocast and arguments[2] is False:
        _, _, _, _, body, *inputs = arguments
    else:
        return None
    graph = graph_module.get_submodule(str(body.target))
    assert isinstance(graph, GraphModule)
    return graph, tuple(inputs)


def _write_out(graph_module: GraphModule, node: Node, body: GraphModule, inputs: tuple[Any, ...]) -> None:
    write_out_regions(body)
    graph = graph_module.graph
    values: dict[Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "get_attr":
                values[inner] = _own(graph_module, body, inner)
            elif inner.op not in ("placeholder", "output"):
                values[inner] = graph.node_copy(inner, values.__getitem__)
    (end,) = body.graph.find_nodes(op="output")
    results = end.args[0]
    assert isinstance(results, (tuple, list))
    for user in list(node.users):
        assert user.target is operator.getitem
        index = user.args[1]
        assert isinstance(index, int)
        user.replace_all_uses_with(values[results[index]])  # type: ignore[index]
        graph.erase_node(user)
    graph.erase_node(node)


def _own(graph_module: GraphModule, body: GraphModule, node: Node) -> Node:
    """Copy an attribute of a region (a tensor or a graph) to the outer graph; return the node that reads it."""
    name = f"{node.name}_of_region"
    while hasattr(graph_module, name):
        name += "_"
    setattr(graph_module, name, get_attribute(body, str(node.target)))
    own = graph_module.graph.get_attr(name)
    own.meta = dict(node.meta)
    return own
