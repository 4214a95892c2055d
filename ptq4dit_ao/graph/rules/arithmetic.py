"""Rules of ops that compute: a sum has the same scale in all operands, a product has it in exactly one factor."""

from __future__ import annotations

import math

import numpy as np
from torch.fx import Node

from ptq4dit_ao.graph.propagation import Cut, Propagation, Scalar
from ptq4dit_ao.graph.rules.registry import aten, rule
from ptq4dit_ao.graph.shapes import hint, normalize_axis, shape_of, size_per_sample, tensor_of
from ptq4dit_ao.graph.variables import Ids

SMALL = 4
"""Ratio of sizes from which on the smaller tensor counts as modulation of the larger one."""


@rule(aten.neg.default, aten.relu.default, aten.leaky_relu.default)
def homogeneous(p: Propagation, node: Node) -> None:
    """Rule of positively homogeneous functions: ``f(x / b) = f(x) / b`` for b > 0."""
    source = node.args[0]
    assert isinstance(source, Node)
    p.equate(source, node)


@rule(aten.dropout.default)
def dropout(p: Propagation, node: Node) -> None:
    """Rule of dropout, which is the identity in eval mode and a multiplication by a random mask in training."""
    homogeneous(p, node)


@rule(aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar)
def add(p: Propagation, node: Node) -> None:
    """Rule of sums: ``x/b + y/b = (x + y)/b``; a number c, such as the 1 of ``1 + scale``, becomes the tensor c/b."""
    p.equate(node, *(operand(p, node, index) for index in _tensors(node)))
    if any(isinstance(arg, Node) and tensor_of(arg) is None for arg in node.args[:2]):
        p.pin(node, node, "a number known only at run time cannot be scaled")
    ids = p.value(node)
    for index, arg in enumerate(node.args[:2]):
        if ids is not None and isinstance(arg, (int, float)) and arg != 0:
            p.equate(node, Scalar(node.name, index))


@rule(aten.mul.Tensor, aten.mul.Scalar)
def mul(p: Propagation, node: Node) -> None:
    """Rule of products: ``(x/b) y = (x y)/b``; one factor carries the scale, and the other one must not."""
    factors = _tensors(node)
    if len(factors) == 1:
        p.equate(node, *(_argument(node, index) for index in factors))
        return
    if node.args[0] is node.args[1]:
        for slot in (_argument(node, 0), node):
            p.pin(slot, node, "a square does not commute with a scale")
        return
    # A parameter absorbs a scale offline, and a small tensor (modulation) leads to one, so these are tried first.
    # If cuts are allowed, the small tensor may cost a multiply, so the large one is tried before it.
    sizes = [math.prod(shape_of(_argument(node, index))) for index in (0, 1)]
    order = sorted((0, 1), key=lambda i: (_argument(node, i).op != "get_attr", -sizes[i] if p.cut else sizes[i]))
    _product(p, node, order)


@rule(aten.div.Tensor, aten.div.Scalar)
def div(p: Propagation, node: Node) -> None:
    """Rule of quotients: ``(x/b) / y = (x/y)/b``; a scaled divisor is refused."""
    for index in _tensors(node):
        if index == 1:
            p.pin(_argument(node, 1), node, "a divisor would need the inverse scale")
        else:
            p.equate(_argument(node, 0), node)
    if 0 not in _tensors(node):
        p.pin(node, node, "a number over a tensor does not commute with a scale")


@rule(aten.where.self)
def where(p: Propagation, node: Node) -> None:
    """Rule of ``where``, whose operands must have the same scale as its output."""
    _, one, other = node.args
    assert isinstance(one, Node) and isinstance(other, Node)
    p.equate(node, one, other)


@rule(aten.masked_fill.Scalar, aten.where.ScalarOther)
def masked_fill(p: Propagation, node: Node) -> None:
    """Rule of masked fills: filling with 0 commutes with a scale, as ``0 / b = 0``."""
    if node.args[2] == 0:
        p.equate(_argument(node, 0 if node.target is aten.masked_fill.Scalar else 1), node)
    else:
        p.refuse(node)


@rule(aten.sum.dim_IntList, aten.mean.dim)
def total(p: Propagation, node: Node) -> None:
    """Rule of sums over axes: ``sum_t x_t / b = (sum_t x_t) / b``, with a uniform scale along these axes."""
    source = _argument(node, 0)
    ndim = len(shape_of(source))
    axes = node.args[1] if len(node.args) > 1 and node.args[1] else list(range(ndim))
    assert isinstance(axes, (list, tuple))
    summed = sorted(normalize_axis(hint(axis), ndim) for axis in axes)
    kept = len(shape_of(node)) == ndim

    def forward(ids: Ids) -> Ids:
        one = p.uniform(ids, summed)
        return one if kept else one.squeeze(tuple(summed))

    p.link(source, node, forward, lambda ids: ids if kept else np.expand_dims(ids, summed))


@rule(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matmul(p: Propagation, node: Node) -> None:
    """Rule of matrix products: ``A (V diag(1/b)) = (A V) diag(1/b)``; rows of the left factor may carry b instead.

    The inner axis cannot carry a scale.
    """
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
    """Rule of attention: ``softmax(q k^T) (V diag(1/b)) = (softmax(q k^T) V) diag(1/b)``, b equal for all tokens."""
    q, k, v = node.args[:3]
    assert isinstance(q, Node) and isinstance(k, Node) and isinstance(v, Node)
    for slot in (q, k):
        p.pin(slot, node, "queries and keys pass through a softmax")
    for arg in (*node.args[3:], *node.kwargs.values()):
        if isinstance(arg, Node):
            p.pin(arg, node, "an attention mask passes through a softmax")
    groups = shape_of(node)[-3] // shape_of(v)[-3] if len(shape_of(v)) > 2 else 1

    def forward(ids: Ids) -> Ids:
        one = p.uniform(ids, [ids.ndim - 2])
        return np.repeat(one, groups, -3) if groups > 1 and one.shape[-3] > 1 else one

    def backward(ids: Ids) -> Ids:
        one = p.uniform(ids, [ids.ndim - 2])
        if groups > 1 and one.shape[-3] > 1:  # grouped-query attention: consecutive heads share one of V's
            one = one.reshape(*one.shape[:-3], -1, groups, *one.shape[-2:])
            one = p.uniform(one, [one.ndim - 3]).squeeze(-3)
        return one

    p.link(v, node, forward, backward)


@rule(aten.einsum.default)
def einsum(p: Propagation, node: Node) -> None:
    """Rule of einsum: one operand carries the scale along the output's axes; it is uniform along summed axes."""
    equation, operands = node.args[:2]
    assert isinstance(equation, str) and isinstance(operands, (list, tuple))
    left, arrow, out = equation.replace(" ", "").partition("->")
    letters = left.split(",")
    plain = arrow and all(name.isalpha() and len(set(name)) == len(name) for name in [*letters, out] if name)
    factors = [factor for factor in operands if isinstance(factor, Node)]
    if not plain or len(factors) > 2:
        p.refuse(node)
        return
    live = [i for i, factor in enumerate(factors) if p.live(factor)]
    if not live and not p.live(node):
        return
    chosen = p.choose(node, live + [i for i in range(len(factors)) if i not in live])
    for i, factor in enumerate(factors):
        if i != chosen:
            p.pin(factor, node, "only one factor of a product may carry a scale")

    def forward(ids: Ids) -> Ids:
        one = p.uniform(ids, [axis for axis, name in enumerate(letters[chosen]) if name not in out])
        return _along(one, letters[chosen], out)

    def backward(ids: Ids) -> Ids:
        one = p.uniform(ids, [axis for axis, name in enumerate(out) if name not in letters[chosen]])
        return _along(one, out, letters[chosen])

    p.link(factors[chosen], node, forward, backward)


def operand(p: Propagation, node: Node, index: int) -> Node | Cut:
    """The slot of a tensor argument's scale: the tensor itself, or a cut that scales it only where ``node`` reads it.

    Only a tensor that is far smaller than the node's output is cut, such as modulation, never an activation.
    """
    tensor = _argument(node, index)
    if not p.cut or tensor.op == "get_attr" or SMALL * size_per_sample(tensor) > size_per_sample(node):
        return tensor
    p.pin(tensor, node, "it is multiplied where it is read")
    return Cut(node.name, index)


def _along(ids: Ids, names: str, wanted: str) -> Ids:
    """Rearrange named axes: axes that ``wanted`` lacks (of length 1) are dropped, missing ones get length 1."""
    kept = [name for name in names if name in wanted]
    ids = ids.reshape([size for size, name in zip(ids.shape, names, strict=True) if name in wanted])
    ids = ids.transpose([kept.index(name) for name in wanted if name in kept])
    return ids.reshape(
        [ids.shape[[n for n in wanted if n in kept].index(name)] if name in kept else 1 for name in wanted]
    )


def _tensors(node: Node) -> list[int]:
    """Indices of the tensors among the first two arguments; symbolic sizes are nodes, but no tensors."""
    return [i for i, arg in enumerate(node.args[:2]) if isinstance(arg, Node) and tensor_of(arg) is not None]


def _argument(node: Node, index: int) -> Node:
    argument = node.args[index]
    assert isinstance(argument, Node)
    return argument


def _product(p: Propagation, node: Node, candidates: list[int]) -> None:
    live = [i for i in candidates if p.live(_argument(node, i))]
    if not live and not p.live(node):
        return
    chosen = p.choose(node, live + [i for i in candidates if i not in live])
    p.equate(operand(p, node, chosen), node)
    p.pin(_argument(node, 1 - chosen), node, "only one factor of a product may carry a scale")
