"""Subtract a vector c from a site's input, and undo it in its linears: ``W (x - c) + (bias + W c) = W x + bias``.

The subtraction costs nothing if x is a sum with an operand that comes from a parameter, such as the shift rows of
adaLN's linear or of a block's table, or the bias of an affine norm. Then c is subtracted from that parameter. A
product, such as that with ``1 + scale``, does not commute with the subtraction. A site without such a parameter cannot
be offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4dit_ao.errors import BalanceError
from ptq4dit_ao.graph import Site
from ptq4dit_ao.graph.pending import tensor_at
from ptq4dit_ao.graph.propagation import GraphIndex, op_name
from ptq4dit_ao.graph.rules import IGNORED
from ptq4dit_ao.graph.rules.movement import MOVEMENT
from ptq4dit_ao.graph.shapes import example_shape, tensor_of
from ptq4dit_ao.graph.sites import ShiftEdit
from ptq4dit_ao.passes.bias_form import replay, splits
from ptq4dit_ao.passes.edit import add_constant, replace_tensor

aten = torch.ops.aten

BIAS = {aten.linear.default: 2, aten.layer_norm.default: 3}
"""Position of the bias in the arguments of the ops that add one last."""


def find_shifts(model: GraphModule, sites: Sequence[Site], *, needed: bool = True) -> list[Site]:
    """The sites of a float graph, each with the parameter that shifts its input.

    Args:
        model: the graph.
        sites: its sites.
        needed: whether a site without such a parameter is refused.
    """
    index = GraphIndex(model)
    return [_with_shift(index, site, needed) if site.refusal is None else site for site in sites]


def subtract_offset(model: GraphModule, site: Site, offset: Tensor) -> None:
    """Subtract an offset from a site's input, and compensate for it in the biases of its linears, in place.

    Args:
        model: a graph that is not balanced at this site, because the offset refers to the unbalanced input.
        site: a site with a shift.
        offset: the vector c, (C,) float64.
    """
    assert site.shift is not None, site.name
    channels = torch.as_tensor(site.shift.elements)
    replace_tensor(
        model, site.shift.paths, lambda shift: shift.flatten().index_add(0, channels, -offset).view_as(shift)
    )
    nodes = {node.name: node for node in model.graph.nodes}
    for consumer in site.consumers:
        gain = tensor_at(model, consumer.weight).detach().to("cpu", torch.float64) @ offset
        _add_to_bias(model, nodes[consumer.node], gain)


def _add_to_bias(model: GraphModule, linear: Node, gain: Tensor) -> None:
    bias = linear.args[2] if len(linear.args) > 2 else None
    if isinstance(bias, Node):
        replace_tensor(model, (str(bias.target),), lambda b: b + gain)
        return
    with model.graph.inserting_before(linear):
        linear.args = (*linear.args[:2], add_constant(model, "bias", gain, like=linear))


def _with_shift(index: GraphIndex, site: Site, needed: bool) -> Site:
    try:
        return replace(site, shift=_shift(index, site))
    except BalanceError as error:
        return replace(site, refusal=str(error)) if needed else site


def _shift(index: GraphIndex, site: Site) -> ShiftEdit:
    first = site.consumers[0]
    source = index.nodes[first.input]
    if len(site.inputs) > 1:
        raise BalanceError(f"{first.node}: {len(site.inputs)} tensors share one scale, and need offsets of their own")
    if sorted(first.variables.tolist()) != list(range(1, site.channels + 1)):
        raise BalanceError(f"{first.node}: not every channel has a scale of its own")
    linears = {index.nodes[consumer.node] for consumer in site.consumers}
    for reader in source.users:
        if reader not in linears and reader.target not in IGNORED:
            raise BalanceError(f"{reader.name}: it reads the input, too, and would have to undo the offset")
    for linear in linears:
        bias = linear.args[2] if len(linear.args) > 2 else None
        if isinstance(bias, Node) and (bias.op != "get_attr" or list(index.users(index.slot[bias.name])) != [linear]):
            raise BalanceError(f"{linear.name}: its bias is computed, or read by others, too")
    chain = _from_parameter(index, source)
    elements = replay(chain[1:], chain[0], _numbered(chain[0])).expand(example_shape(source)).reshape(-1, site.channels)
    if not (elements == elements[0]).all() or len(elements[0].unique()) < site.channels:
        raise BalanceError(f"{chain[0].target}: it is not one shift for each channel")
    paths = dict.fromkeys(str(node.target) for node in index.aliases[index.slot[chain[0].name]])
    return ShiftEdit(paths=tuple(paths), elements=elements[0].numpy())


def _numbered(parameter: Node) -> Tensor:
    shape = example_shape(parameter)
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


def _from_parameter(index: GraphIndex, node: Node, reader: Node | None = None) -> list[Node]:
    """The nodes from a parameter that is added into ``node`` to ``node`` itself, each read by the next one only.

    Raises:
        BalanceError: there is no such chain, or a node other than ``reader`` reads ``node``.
    """
    if reader is not None and (other := _other_reader(index, node, reader)) is not None:
        raise BalanceError(f"{node.name}: {other.name} reads it, too")
    if node.op == "get_attr":
        return [node]
    if node.target in BIAS:
        bias = node.args[BIAS[node.target]] if len(node.args) > BIAS[node.target] else None
        if not isinstance(bias, Node):
            raise BalanceError(f"{node.name}: the {op_name(node)} that makes its shift has no bias")
        return [*_from_parameter(index, bias, node), node]
    if node.target is aten.add.Tensor and len(node.args) == 2 and not node.kwargs:
        return [*_from_operand(index, node), node]
    if node.target in MOVEMENT:
        source = node.args[0]
        assert isinstance(source, Node)
        return [*_from_parameter(index, source, node), node]
    raise BalanceError(f"{node.name}: no shift is added here ({op_name(node)})")


def _from_operand(index: GraphIndex, add: Node) -> list[Node]:
    """The chain of the last operand of a sum that comes from a parameter; the shift is usually the last operand."""
    refusals = []
    for operand in reversed(add.args):
        try:
            if isinstance(operand, Node) and tensor_of(operand) is not None:
                return _from_parameter(index, operand, add)
        except BalanceError as error:
            refusals.append(str(error))
    raise BalanceError(refusals[0] if refusals else f"{add.name}: it adds no tensors")


def _other_reader(index: GraphIndex, node: Node, reader: Node) -> Node | None:
    users = list(index.users(index.slot[node.name])) if node.op == "get_attr" else list(node.users)
    if splits(node):  # the other parts have readers of their own
        users = [user for user in users if user.args[1] == reader.args[1]]
    return next((user for user in users if user is not reader and user.target not in IGNORED), None)
