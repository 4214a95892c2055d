"""Ops that move elements: the ids move with them."""

from __future__ import annotations

import operator

import numpy as np
from torch.fx import Node

from ptq4dit_ao.graph.propagation import Propagation, op_name
from ptq4dit_ao.graph.rules.table import RULES, aten, rule
from ptq4dit_ao.graph.shapes import embed_ids, hint, normalize_axis, part_sizes, reshape_ids, shape_of, take_axis
from ptq4dit_ao.graph.variables import Ids


@rule(
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.type_as.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
)
def copy(p: Propagation, node: Node) -> None:
    """``f(x / b) = f(x) / b``: the same elements, perhaps in another dtype."""
    p.equate(_source(node), node)


@rule(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)
def reshape(p: Propagation, node: Node) -> None:
    """Elements keep their order; only the shapes matter."""
    source = _source(node)
    before, after = shape_of(source), shape_of(node)
    p.link(source, node, lambda ids: reshape_ids(ids, before, after), lambda ids: reshape_ids(ids, after, before))


@rule(aten.permute.default)
def permute(p: Propagation, node: Node) -> None:
    """``y[i_d0, i_d1, ...] = x[i_0, i_1, ...]``."""
    axes = node.args[1]
    assert isinstance(axes, (list, tuple))
    _permute(p, node, [hint(axis) for axis in axes])


@rule(aten.transpose.int)
def transpose(p: Propagation, node: Node) -> None:
    """A permutation of two axes."""
    order = list(range(len(shape_of(node))))
    first, second = (normalize_axis(hint(axis), len(order)) for axis in node.args[1:3])
    order[first], order[second] = order[second], order[first]
    _permute(p, node, order)


@rule(aten.t.default)
def matrix_transpose(p: Propagation, node: Node) -> None:
    """A permutation of two axes."""
    _permute(p, node, list(range(len(shape_of(node))))[::-1])


@rule(aten.expand.default)
def expand(p: Propagation, node: Node) -> None:
    """Copies along an axis share their variables: the source's axis has length 1."""
    p.equate(_source(node), node)


@rule(aten.slice.Tensor)
def slice_(p: Propagation, node: Node) -> None:
    """The slice takes its ids along; what lies outside it is free."""
    source = _source(node)
    axis, start, end, step = _defaults(node.args[1:], (0, 0, None, 1))
    axis = normalize_axis(axis, len(shape_of(source)))
    size = shape_of(source)[axis]
    positions = range(*slice(_hint(start), _hint(end), _hint(step)).indices(size))
    if positions.step != 1:
        p.pin(node, node, "slices with a step are not read")
        p.pin(source, node, "slices with a step are not read")
        return
    _part(p, source, node, axis, positions.start, len(positions))


@rule(aten.select.int)
def select(p: Propagation, node: Node) -> None:
    """A slice of length 1 without its axis."""
    source = _source(node)
    axis, position = (hint(arg) for arg in node.args[1:3])
    axis = normalize_axis(axis, len(shape_of(source)))
    _part(p, source, node, axis, position % shape_of(source)[axis], 1, drop_axis=True)


@rule(aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)
def split(p: Propagation, node: Node) -> None:
    """Each part is a slice."""
    source = _source(node)
    axis, sizes = _split_sizes(node)
    starts = np.cumsum([0, *sizes])
    for part in node.users:
        index = _index(part)
        _part(p, source, part, axis, int(starts[index]), sizes[index])


@rule(aten.unbind.int)
def unbind(p: Propagation, node: Node) -> None:
    """Each part is a slice of length 1 without its axis."""
    source = _source(node)
    axis = normalize_axis(_defaults(node.args[1:], (0,))[0], len(shape_of(source)))
    for part in node.users:
        _part(p, source, part, axis, _index(part), 1, drop_axis=True)


@rule(operator.getitem)
def getitem(p: Propagation, node: Node) -> None:
    """A part of what a splitting op made: that op's rule links it."""
    source = _source(node)
    if source.target in RULES:
        RULES[source.target](p, source)
    else:
        p.refuse(source)
        p.pin(node, source, f"{op_name(source)} does not commute with a scale per channel")


@rule(aten.cat.default)
def cat(p: Propagation, node: Node) -> None:
    """Each operand is a slice of the result."""
    operands = node.args[0]
    assert isinstance(operands, (list, tuple))
    axis = normalize_axis(_defaults(node.args[1:], (0,))[0], len(shape_of(node)))
    start = 0
    for operand in operands:
        assert isinstance(operand, Node)
        length = shape_of(operand)[axis]
        _part(p, node, operand, axis, start, length)
        start += length


def _permute(p: Propagation, node: Node, order: list[int]) -> None:
    inverse = np.argsort([normalize_axis(axis, len(order)) for axis in order])
    p.link(_source(node), node, lambda ids: ids.transpose(order), lambda ids: ids.transpose(inverse))


def _part(
    p: Propagation, whole: Node, part: Node, axis: int, start: int, length: int, *, drop_axis: bool = False
) -> None:
    """``part = whole[start : start + length]`` along ``axis``, known on either side first.

    A part that is uniform along ``axis`` makes the whole uniform: right for token axes, whose positions never differ.
    """
    shape = shape_of(whole)

    def backward(ids: Ids) -> Ids:
        ids = np.expand_dims(ids, axis) if drop_axis else ids
        if ids.shape[axis] == 1 and length > 1:
            return ids
        outside = p.variables.fresh((*ids.shape[:axis], shape[axis], *ids.shape[axis + 1 :]))
        return embed_ids(ids, axis, start, outside)

    def forward(ids: Ids) -> Ids:
        taken = take_axis(ids, axis, start, length)
        return taken.squeeze(axis) if drop_axis else taken

    if p.known(whole) and p.known(part):
        p.merge(part, forward(p.values[p._key(whole)]))
    else:
        p.link(whole, part, forward, backward)


def _split_sizes(node: Node) -> tuple[int, list[int]]:
    shape = shape_of(_source(node))
    axis = normalize_axis(_defaults(node.args[2:], (0,))[0], len(shape))
    how = node.args[1]
    if isinstance(how, (list, tuple)):
        return axis, [hint(size) for size in how]
    if node.target is aten.chunk.default:
        return axis, part_sizes(shape[axis], hint(how))
    return axis, [min(hint(how), shape[axis] - start) for start in range(0, shape[axis], hint(how))]


def _source(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _index(part: Node) -> int:
    index = part.args[1]
    assert isinstance(index, int)
    return index


def _hint(value: object) -> int | None:
    return None if value is None else hint(value)


def _defaults(given: tuple[object, ...], defaults: tuple) -> list:
    return [*given, *defaults[len(given) :]]


MOVEMENT = frozenset(op for op, function in RULES.items() if function.__module__ == __name__) - {aten.cat.default}
"""Ops that rearrange the elements of one tensor."""

COPIES = frozenset(op for op, function in RULES.items() if function is copy)
"""Those among them that leave every element where it is."""
