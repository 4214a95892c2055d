"""Ops that compute: sums scale all operands alike, products exactly one factor."""

from __future__ import annotations

import math

from torch.fx import Node

from ptq4dit_ao.graph.propagation import Propagation, Scalar
from ptq4dit_ao.graph.rules.table import aten, rule
from ptq4dit_ao.graph.shapes import shape_of, tensor_of


@rule(aten.neg.default, aten.relu.default)
def homogeneous(p: Propagation, node: Node) -> None:
    """``f(x / b) = f(x) / b`` for b > 0."""
    source = node.args[0]
    assert isinstance(source, Node)
    p.equate(source, node)


@rule(aten.dropout.default)
def dropout(p: Propagation, node: Node) -> None:
    """The identity in eval mode, and a random mask in training, which scales alike."""
    homogeneous(p, node)


@rule(aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar)
def add(p: Propagation, node: Node) -> None:
    """``x/b + y/b = (x + y)/b``; a Python number c becomes the tensor c/b, such as the 1 of ``1 + scale``."""
    p.equate(node, *_tensors(node))
    if any(isinstance(arg, Node) and tensor_of(arg) is None for arg in node.args[:2]):
        p.pin(node, node, "a number known only at run time cannot be scaled")
    ids = p.value(node)
    for index, arg in enumerate(node.args[:2]):
        if ids is not None and isinstance(arg, (int, float)) and arg != 0:
            p.equate(node, Scalar(node.name, index))


@rule(aten.mul.Tensor, aten.mul.Scalar)
def mul(p: Propagation, node: Node) -> None:
    """``(x/b) y = (x y)/b``: one factor carries the scale and the other must not."""
    factors = _tensors(node)
    if len(factors) == 1 or factors[0] is factors[1]:
        _only_factor(p, node, factors)
        return
    # A parameter absorbs a scale offline, and a small tensor (modulation) leads to one; try these before the rest.
    order = sorted((0, 1), key=lambda i: (factors[i].op != "get_attr", math.prod(shape_of(factors[i]))))
    _product(p, node, order)


@rule(aten.div.Tensor, aten.div.Scalar)
def div(p: Propagation, node: Node) -> None:
    """``(x/b) / y = (x/y)/b``; a scaled denominator is refused."""
    numerator, denominator = node.args[:2]
    if isinstance(denominator, Node) and tensor_of(denominator) is not None:
        p.pin(denominator, node, "a divisor would need the inverse scale")
    if isinstance(numerator, Node) and tensor_of(numerator) is not None:
        p.equate(numerator, node)
    else:
        p.pin(node, node, "a number over a tensor does not commute with a scale")


@rule(aten.matmul.default, aten.bmm.default)
def matmul(p: Propagation, node: Node) -> None:
    """``A (V diag(1/b)) = (A V) diag(1/b)``: columns of the right factor, rows of the left; never the inner axis."""
    left, right = node.args[:2]
    assert isinstance(left, Node) and isinstance(right, Node)
    if min(len(shape_of(left)), len(shape_of(right))) < 2:
        for slot in (left, right, node):
            p.pin(slot, node, "products of vectors are not read")
        return
    out = p.value(node)
    by_rows = out.shape[-1] == 1 and out.shape[-2] > 1 if out is not None else p.live(left)
    carrier, other, uniform = (left, right, -1) if by_rows else (right, left, -2)
    p.pin(other, node, "only one factor of a matrix product may carry a scale")
    for source, target in ((node, carrier), (carrier, node)):
        ids = p.value(source)
        if ids is not None:
            p.merge(target, p.uniform(ids, [ids.ndim + uniform]))


@rule(aten.scaled_dot_product_attention.default)
def attention(p: Propagation, node: Node) -> None:
    """``softmax(q k^T) (V diag(1/b)) = (softmax(q k^T) V) diag(1/b)``: V's channels, the same for every token."""
    q, k, v = node.args[:3]
    assert isinstance(q, Node) and isinstance(k, Node) and isinstance(v, Node)
    for slot in (q, k):
        p.pin(slot, node, "queries and keys pass through a softmax")
    for arg in (*node.args[3:], *node.kwargs.values()):
        if isinstance(arg, Node):
            p.pin(arg, node, "an attention mask passes through a softmax")
    if shape_of(v)[-3:-2] != shape_of(node)[-3:-2]:
        p.pin(v, node, "grouped-query attention inside the op is not read yet")
        p.pin(node, node, "grouped-query attention inside the op is not read yet")
        return
    for source, target in ((node, v), (v, node)):
        ids = p.value(source)
        if ids is not None:
            p.merge(target, p.uniform(ids, [ids.ndim - 2]))


def _tensors(node: Node) -> list[Node]:
    """The tensors among the first two arguments; sizes known only at run time are nodes, too."""
    return [arg for arg in node.args[:2] if isinstance(arg, Node) and tensor_of(arg) is not None]


def _only_factor(p: Propagation, node: Node, factors: list[Node]) -> None:
    if len(factors) == 1:
        p.equate(factors[0], node)
        return
    for slot in (factors[0], node):
        p.pin(slot, node, "a square does not commute with a scale")


def _product(p: Propagation, node: Node, candidates: list[int]) -> None:
    live = [i for i in candidates if p.live(node.args[i])]  # type: ignore[arg-type]
    if not live and not p.live(node):
        return
    chosen = p.choose(node, live + [i for i in candidates if i not in live])
    carrier, other = node.args[chosen], node.args[1 - chosen]
    assert isinstance(carrier, Node) and isinstance(other, Node)
    p.equate(carrier, node)
    p.pin(other, node, "only one factor of a product may carry a scale")
