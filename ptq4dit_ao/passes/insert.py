"""Insert explicit balancing: ``x -> x * (1/b)`` before the consumers of a site, ``W -> W diag(b)`` in them.

This is exact for any site and any positive b. It costs one multiply per site input, which :mod:`.fold` removes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4dit_ao.graph import Site
from ptq4dit_ao.passes.edit import add_constant, scale_of, scale_tensor

MARK = "ptq4dit_balance"
"""Key in ``node.meta`` of an explicit balancing node; its value is the name of the site."""


def insert_balance(model: GraphModule, site: Site, b: Tensor) -> None:
    """Add the balancing nodes of one site and scale its consumers' columns.

    Args:
        model: the graph, changed in place; parameters are replaced, never modified.
        site: from :func:`ptq4dit_ao.graph.find_sites` on this graph.
        b: (num_variables,) float64, positive.
    """
    nodes = {node.name: node for node in model.graph.nodes}
    for consumer in site.inputs.values():
        source = nodes[consumer.input]
        users = [_reader(nodes[c.node], source) for c in site.consumers if c.input == consumer.input]
        with model.graph.inserting_after(source):
            inverse = add_constant(model, "balance", 1 / scale_of(b, consumer.variables), like=source)
        with model.graph.inserting_after(inverse):
            balanced = model.graph.call_function(torch.ops.aten.mul.Tensor, (source, inverse))
        balanced.meta.update(source.meta)
        balanced.meta[MARK] = site.name
        for user in dict.fromkeys(users):
            user.replace_input_with(source, balanced)
    for weight in dict.fromkeys((c.weight, tuple(c.variables)) for c in site.consumers):
        path, variables = weight
        scale_tensor(model, (path,), scale_of(b, variables))


def _reader(linear: Node, source: Node) -> Node:
    """The node that reads ``source`` on the way into ``linear``: itself, or its observer."""
    reader, arg = linear, linear.args[0]
    while arg is not source:
        assert isinstance(arg, Node)
        reader, arg = arg, arg.args[0]
    return reader
