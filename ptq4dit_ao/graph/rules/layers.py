"""Ops with parameters: this is where scales come to rest."""

from __future__ import annotations

from torch.fx import Node

from ptq4dit_ao.graph.names import is_linear
from ptq4dit_ao.graph.propagation import Columns, Propagation
from ptq4dit_ao.graph.rules.table import aten, rule


@rule(aten.linear.default)
def linear(p: Propagation, node: Node) -> None:
    """Absorb: ``(W/b) x + bias/b = (W x + bias)/b`` in the rows. Undo: ``(W diag(b)) (x/b) = W x`` in the columns."""
    x, weight = node.args[:2]
    bias = node.args[2] if len(node.args) > 2 else None
    assert isinstance(x, Node) and isinstance(weight, Node)
    if not is_linear(node):
        for slot in (x, weight, node):
            p.pin(slot, node, "the weight is computed, not a parameter")
        return
    _rows(p, node, weight, bias if isinstance(bias, Node) else None)
    ids = p.value(x)
    columns = Columns(p.index.slot[weight.name])
    if ids is not None:
        p.merge(columns, p.uniform(ids, range(ids.ndim - 1)).reshape(-1))
    elif (ids := p.value(columns)) is not None:
        p.merge(x, ids)
    if any(
        not is_linear(user) or user.args[1] not in p.index.aliases[columns.weight]
        for user in p.index.users(columns.weight)
    ):
        p.pin(columns, node, "its weight is also read by another kind of op")


@rule(aten.layer_norm.default, aten.rms_norm.default)
def norm(p: Propagation, node: Node) -> None:
    """``norm(x) (w/b) + c/b``: an affine norm absorbs; its input, normalised away, cannot carry anything."""
    x, parameters = node.args[0], [arg for arg in node.args[2:4] if isinstance(arg, Node)]
    assert isinstance(x, Node)
    p.pin(x, node, "a norm undoes the scale of its input")
    if parameters and isinstance(node.args[2], Node):
        p.equate(node, *parameters)
    else:
        p.pin(node, node, "a norm without a weight has no place for a scale")


def _rows(p: Propagation, node: Node, weight: Node, bias: Node | None) -> None:
    """The output's last axis, the weight's rows and the bias hold the same ids."""
    for source, read in ((node, -1), (weight, 0), (bias, -1)):
        ids = p.value(source) if source is not None else None
        if ids is None:
            continue
        axes = [axis for axis in range(ids.ndim) if axis != read % ids.ndim]
        rows = p.uniform(ids, axes).reshape(-1)
        p.merge(weight, rows.reshape(-1, 1))
        p.merge(node, rows)
        if bias is not None:
            p.merge(bias, rows)
        return
