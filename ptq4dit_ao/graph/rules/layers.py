"""Rules of ops with parameters, which can absorb scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.fx import Node

from ptq4dit_ao.graph.names import is_linear
from ptq4dit_ao.graph.propagation import Columns, NewWeight, Propagation
from ptq4dit_ao.graph.rules.registry import aten, rule
from ptq4dit_ao.graph.shapes import shape_of
from ptq4dit_ao.graph.variables import Ids


@rule(aten.linear.default)
def linear(p: Propagation, node: Node) -> None:
    """Rule of linears: rows absorb, ``(W/b) x + c/b = (W x + c)/b``; columns undo, ``(W diag(b)) (x/b) = W x``."""
    x, weight = node.args[:2]
    bias = node.args[2] if len(node.args) > 2 else None
    assert isinstance(x, Node) and isinstance(weight, Node)
    if not is_linear(node) or len(shape_of(weight)) != 2:
        p.refuse(node, "the weight is computed, not a parameter" if not is_linear(node) else "the weight is a vector")
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
    """Rule of norms: an affine norm absorbs, ``norm(x) (w/b) + c/b``; its input cannot carry a scale.

    A norm without a weight can get the weight ``1/b``.
    """
    x = node.args[0]
    assert isinstance(x, Node)
    p.pin(x, node, "a norm undoes the scale of its input")
    shape: Any = node.args[1]
    if not all(isinstance(size, int) for size in shape):
        p.refuse(node, "a norm over a size that differs from call to call has no weight, so no place for a scale")
        return
    _affine(p, node, shape)


@rule(aten.group_norm.default)
def group_norm(p: Propagation, node: Node) -> None:
    """Rule of group norms, whose weight and bias lie along the second axis; otherwise like :func:`norm`."""
    x = node.args[0]
    assert isinstance(x, Node)
    p.pin(x, node, "a norm undoes the scale of its input")
    weight, bias = _parameters(node)
    if weight is None:
        p.refuse(node, "a group norm without a weight has no place for a scale")  # a bias alone cannot absorb one
        return
    _channels(p, node, 1, [weight, bias])


@rule(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def convolution(p: Propagation, node: Node) -> None:
    """Rule of convolutions, whose rows absorb like a linear's; channels are the second axis. The input is pinned."""
    x, weight = node.args[:2]
    bias = node.args[2] if len(node.args) > 2 else None
    assert isinstance(x, Node) and isinstance(weight, Node)
    for slot in (x, Columns(p.index.slot[weight.name])):
        p.pin(slot, node, "a convolution reads it")
    if weight.op != "get_attr" or len(shape_of(node)) != len(shape_of(weight)):
        p.refuse(node, "the weight is computed, not a parameter, or there is no batch")
        return
    ids = p.value(weight)
    if ids is not None:
        rows = p.uniform(ids, range(1, ids.ndim)).reshape(-1)
        p.merge(node, rows.reshape(-1, *(1 for _ in ids.shape[2:])))
    _channels(p, node, 1, [bias] if isinstance(bias, Node) else [])
    ids = p.value(node)
    if ids is not None:
        rows = p.uniform(ids, [axis for axis in range(ids.ndim) if axis != 1])
        p.merge(weight, rows.reshape(-1, *(1 for _ in shape_of(weight)[1:])))


@rule(aten.embedding.default)
def embedding(p: Propagation, node: Node) -> None:
    """Rule of embeddings, whose table absorbs in its columns: ``(W diag(1/b))[i] = W[i] diag(1/b)``."""
    weight, indices = node.args[:2]
    assert isinstance(weight, Node) and isinstance(indices, Node)

    def columns(ids: Ids) -> Ids:
        return p.uniform(ids, range(ids.ndim - 1)).reshape(-1)

    p.link(weight, node, columns, lambda ids: columns(ids).reshape(1, -1))


def _affine(p: Propagation, node: Node, shape: list[int]) -> None:
    """Link the output to weight and bias, which have this ``shape`` along the last axes, or to a new weight."""
    weight, bias = _parameters(node)
    p.equate(node, *(parameter for parameter in (weight, bias) if parameter is not None))
    ids = p.value(node)
    if weight is None and ids is not None:
        leading = tuple(range(ids.ndim - len(shape)))
        p.merge(NewWeight(node.name), np.broadcast_to(p.uniform(ids, leading).squeeze(leading), shape))


def _parameters(node: Node) -> tuple[Node | None, Node | None]:
    """Weight and bias of a norm; None for each that is missing."""
    weight, bias = (arg if isinstance(arg, Node) else None for arg in (*node.args[2:4], None, None)[:2])
    return weight, bias


def _channels(p: Propagation, node: Node, axis: int, parameters: Sequence[Node | None]) -> None:
    """Join the ids of the output along ``axis`` and of parameters that are vectors."""
    ndim = len(shape_of(node))
    present = [parameter for parameter in parameters if parameter is not None]
    vectors = [p.value(parameter) for parameter in present]
    ids = p.value(node)
    known = next((v for v in vectors if v is not None), None)
    if ids is not None:
        known = p.uniform(ids, [i for i in range(ndim) if i != axis]).reshape(-1)
    if known is not None:
        p.merge(node, known.reshape(-1, *(1 for _ in range(ndim - axis - 1))))
        for parameter in present:
            p.merge(parameter, known)


def _rows(p: Propagation, node: Node, weight: Node, bias: Node | None) -> None:
    """Join the ids of the output's last axis, the weight's rows and the bias."""
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
