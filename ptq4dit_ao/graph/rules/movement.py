"""Rules of ops that move elements, whose ids move with the elements."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import Node

from ptq4dit_ao.graph.propagation import Propagation, op_name
from ptq4dit_ao.graph.rules.registry import RULES, aten, rule
from ptq4dit_ao.graph.shapes import (
    broadcast_ids,
    embed_ids,
    hint,
    normalize_axis,
    part_sizes,
    reshape_ids,
    shape_of,
    take_axis,
    tensor_of,
)
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
    aten.lift_fresh_copy.default,
)
def copy(p: Propagation, node: Node) -> None:
    """Rule of copies and casts: ``f(x / b) = f(x) / b``."""
    p.equate(_source(node), node)


@rule(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.view_as.default,
    aten.reshape_as.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)
def reshape(p: Propagation, node: Node) -> None:
    """Rule of reshapes, which keep the order of the elements."""
    source = _source(node)
    before, after = shape_of(source), shape_of(node)
    p.link(source, node, lambda ids: reshape_ids(ids, before, after), lambda ids: reshape_ids(ids, after, before))


@rule(aten.permute.default)
def permute(p: Propagation, node: Node) -> None:
    """Rule of permutations: ``y[i_d0, i_d1, ...] = x[i_0, i_1, ...]``."""
    _permute(p, node, [hint(axis) for axis in _listed(node.args[1])])


@rule(aten.movedim.int, aten.movedim.intlist)
def movedim(p: Propagation, node: Node) -> None:
    """Rule of ``movedim``, which moves some axes; the others keep their order."""
    ndim = len(shape_of(node))
    origin, target = ([normalize_axis(hint(axis), ndim) for axis in _listed(arg)] for arg in node.args[1:3])
    placed = dict(zip(target, origin, strict=True))
    others = iter(axis for axis in range(ndim) if axis not in origin)
    _permute(p, node, [placed[axis] if axis in placed else next(others) for axis in range(ndim)])


@rule(aten.transpose.int, aten.swapaxes.default)
def transpose(p: Propagation, node: Node) -> None:
    """Rule of transpositions, which exchange two axes."""
    order = list(range(len(shape_of(node))))
    first, second = (normalize_axis(hint(axis), len(order)) for axis in node.args[1:3])
    order[first], order[second] = order[second], order[first]
    _permute(p, node, order)


@rule(aten.t.default, aten.mT.default)
def matrix_transpose(p: Propagation, node: Node) -> None:
    """Rule of matrix transposition, which exchanges the last two axes, if there are two."""
    axes = list(range(len(shape_of(node))))
    _permute(p, node, [*axes[:-2], *axes[:-3:-1]])


@rule(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def expand(p: Propagation, node: Node) -> None:
    """Rule of broadcasting: copies along an axis share their variables, as the source's axis has length 1."""
    p.equate(_source(node), node)


@rule(aten.slice.Tensor)
def slice_(p: Propagation, node: Node) -> None:
    """Rule of slices, whose ids are those of the source's elements; elements outside the slice stay free."""
    source = _source(node)
    axis, start, end, step = _defaults(node.args[1:], (0, 0, None, 1))
    axis = normalize_axis(axis, len(shape_of(source)))
    size = shape_of(source)[axis]
    positions = range(*slice(_hint(start), _hint(end), _hint(step)).indices(size))
    if positions.step == 1:
        _part(p, source, node, axis, positions.start, len(positions))
    else:
        _gather(p, node, {axis: np.asarray(positions)})


@rule(aten.narrow.default)
def narrow(p: Propagation, node: Node) -> None:
    """Rule of ``narrow``, a slice by start and length."""
    source = _source(node)
    axis, start, length = (hint(arg) for arg in node.args[1:4])
    axis = normalize_axis(axis, len(shape_of(source)))
    _part(p, source, node, axis, start % shape_of(source)[axis], length)


@rule(aten.repeat.default)
def repeat(p: Propagation, node: Node) -> None:
    """Rule of ``repeat``, which tiles axes; copies share their variables."""
    counts = [hint(count) for count in _listed(node.args[1])]
    sizes = [size // count for size, count in zip(shape_of(node), counts, strict=True)]
    _gather(p, node, {axis: np.tile(np.arange(sizes[axis]), count) for axis, count in enumerate(counts) if count > 1})


@rule(aten.repeat_interleave.self_int)
def repeat_interleave(p: Propagation, node: Node) -> None:
    """Rule of ``repeat_interleave``, which repeats every position, like the heads of grouped-query attention."""
    source = _source(node)
    count, axis = hint(node.args[1]), _defaults(node.args[2:], (node.kwargs.get("dim"),))[0]
    if axis is None:
        p.refuse(node)
    else:
        axis = normalize_axis(axis, len(shape_of(source)))
        _gather(p, node, {axis: np.repeat(np.arange(shape_of(source)[axis]), count)})


@rule(aten.flip.default)
def flip(p: Propagation, node: Node) -> None:
    """Rule of ``flip``, which reverses the positions of some axes."""
    shape = shape_of(node)
    axes = [normalize_axis(hint(axis), len(shape)) for axis in _listed(node.args[1])]
    _gather(p, node, {axis: np.arange(shape[axis])[::-1] for axis in axes})


@rule(aten.roll.default)
def roll(p: Propagation, node: Node) -> None:
    """Rule of ``roll``, which shifts the positions of some axes cyclically."""
    shape = shape_of(node)
    shifts, axes = (_listed(arg) for arg in _defaults(node.args[1:], ([], [])))
    if not axes:
        p.refuse(node)
    turned = {normalize_axis(hint(axis), len(shape)): hint(shift) for axis, shift in zip(axes, shifts, strict=False)}
    _gather(p, node, {axis: np.roll(np.arange(shape[axis]), shift) for axis, shift in turned.items()})


@rule(aten.index.Tensor)
def index(p: Propagation, node: Node) -> None:
    """Rule of indexing, which picks positions of one axis at run time; that axis is uniform."""
    indices = _listed(node.args[1])
    axes = [axis for axis, chosen in enumerate(indices) if chosen is not None]
    picked = indices[axes[0]]
    assert isinstance(picked, Node)
    value = tensor_of(picked)
    if len(axes) > 1 or value is None or (value.dtype is torch.bool and value.dim() > 1):
        p.refuse(node)  # the result's axes would not be the source's
    else:
        _pick(p, node, axes[0], value.dim())


@rule(aten.index_select.default)
def index_select(p: Propagation, node: Node) -> None:
    """Rule of ``index_select``, which picks positions of one axis at run time; that axis is uniform."""
    _pick(p, node, normalize_axis(hint(node.args[1]), len(shape_of(node))), 1)


@rule(aten.pad.default, aten.constant_pad_nd.default)
def pad(p: Propagation, node: Node) -> None:
    """Rule of padding: the source is a slice of the result; padding with 0 may have any scale, other padding none."""
    source = _source(node)
    widths = [hint(width) for width in _listed(node.args[1])]
    last = 2 if node.target is aten.constant_pad_nd.default else 3
    value = _defaults(node.args[last:], (node.kwargs.get("value", 0),))[0] or 0
    mode = "constant" if last == 2 else _defaults(node.args[2:3], (node.kwargs.get("mode", "constant"),))[0]
    if mode != "constant" or min(widths) < 0:
        p.refuse(node)
        return
    shape = shape_of(source)
    before = {len(shape) - 1 - i // 2: widths[i] for i in range(0, len(widths), 2)}
    padded = [axis for axis in before if shape_of(node)[axis] != shape[axis]]

    def forward(ids: Ids) -> Ids:
        for axis in padded:
            if ids.shape[axis] == 1 and value == 0:
                continue
            whole = (*ids.shape[:axis], shape_of(node)[axis], *ids.shape[axis + 1 :])
            outside = p.variables.fresh(whole) if value == 0 else np.zeros(whole, dtype=np.int64)
            ids = embed_ids(np.repeat(ids, shape[axis] // ids.shape[axis], axis), axis, before[axis], outside)
        return ids

    def backward(ids: Ids) -> Ids:
        inside = ids
        for axis in padded:
            inside = take_axis(inside, axis, before[axis], shape[axis])
        if value != 0:
            p.merge(node, forward(inside))
        return inside

    p.link(source, node, forward, backward)


@rule(aten.select.int)
def select(p: Propagation, node: Node) -> None:
    """Rule of ``select``, a slice of length 1 without its axis."""
    source = _source(node)
    axis, position = (hint(arg) for arg in node.args[1:3])
    axis = normalize_axis(axis, len(shape_of(source)))
    _part(p, source, node, axis, position % shape_of(source)[axis], 1, drop_axis=True)


@rule(aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)
def split(p: Propagation, node: Node) -> None:
    """Rule of splits, whose parts are slices."""
    source = _source(node)
    axis, sizes = _split_sizes(node)
    starts = np.cumsum([0, *sizes])
    for part in node.users:
        index = _index(part)
        _part(p, source, part, axis, int(starts[index]), sizes[index])


@rule(aten.unbind.int)
def unbind(p: Propagation, node: Node) -> None:
    """Rule of ``unbind``, whose parts are slices of length 1 without their axis."""
    source = _source(node)
    axis = normalize_axis(_defaults(node.args[1:], (0,))[0], len(shape_of(source)))
    for part in node.users:
        _part(p, source, part, axis, _index(part), 1, drop_axis=True)


@rule(operator.getitem)
def getitem(p: Propagation, node: Node) -> None:
    """Rule of the parts of a splitting op, which that op's rule links."""
    source = _source(node)
    if source.target in RULES:
        RULES[source.target](p, source)
    else:
        p.refuse(source)
        p.pin(node, source, f"{op_name(source)} does not commute with a scale per channel")


@rule(aten.stack.default)
def stack(p: Propagation, node: Node) -> None:
    """Rule of ``stack``, whose operands are slices of length 1 of the result, without their axis."""
    axis = normalize_axis(_defaults(node.args[1:], (0,))[0], len(shape_of(node)))
    for position, operand in enumerate(_listed(node.args[0])):
        assert isinstance(operand, Node)
        _part(p, node, operand, axis, position, 1, drop_axis=True)


@rule(aten.cat.default, aten.concat.default)
def cat(p: Propagation, node: Node) -> None:
    """Rule of concatenation, whose operands are slices of the result."""
    operands = _listed(node.args[0])
    axis = normalize_axis(_defaults(node.args[1:], (0,))[0], len(shape_of(node)))
    start = 0
    for operand in operands:
        assert isinstance(operand, Node)
        if shape_of(operand) == (0,):  # torch.cat ignores it, whatever the others' shapes
            continue
        length = shape_of(operand)[axis]
        _part(p, node, operand, axis, start, length)
        start += length


def _permute(p: Propagation, node: Node, order: list[int]) -> None:
    inverse = np.argsort([normalize_axis(axis, len(order)) for axis in order])
    p.link(_source(node), node, lambda ids: ids.transpose(order), lambda ids: ids.transpose(inverse))


def _part(
    p: Propagation, whole: Node, part: Node, axis: int, start: int, length: int, *, drop_axis: bool = False
) -> None:
    """Link two nodes with ``part = whole[start : start + length]`` along ``axis``, from the one that is known.

    A part that is uniform along ``axis`` makes the whole uniform. This suits token axes, whose positions never differ.
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


def _gather(p: Propagation, node: Node, positions: dict[int, NDArray[np.int64]]) -> None:
    """Link a node to its source, where element j of the result is element ``positions[axis][j]`` along these axes."""
    source = _source(node)
    ndim = len(shape_of(node))
    shape = (1,) * (ndim - len(shape_of(source))) + shape_of(source)

    def forward(ids: Ids) -> Ids:
        ids = broadcast_ids(ids, ndim)
        for axis, where in positions.items():
            ids = ids.take(where, axis) if ids.shape[axis] > 1 else ids
        return ids

    def backward(ids: Ids) -> Ids:
        varies = [axis in positions and size > 1 for axis, size in enumerate(ids.shape)]
        whole = p.variables.fresh(tuple(np.where(varies, shape, ids.shape).tolist()))
        p.variables.union(forward(whole), ids)
        return whole

    p.link(source, node, forward, backward)


def _pick(p: Propagation, node: Node, axis: int, ndim: int) -> None:
    """Link a source axis to the ``ndim`` axes that replace it and hold any of its positions; all become uniform."""
    where = [axis + i for i in range(ndim)]

    def forward(ids: Ids) -> Ids:
        one = p.uniform(ids, [axis])
        return one.reshape(*one.shape[:axis], *(1 for _ in where), *one.shape[axis + 1 :])

    def backward(ids: Ids) -> Ids:
        one = p.uniform(ids, where)
        return one.reshape(*one.shape[:axis], 1, *one.shape[axis + ndim :])

    p.link(_source(node), node, forward, backward)


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


def _listed(value: object) -> list[Any]:
    """A list argument as a list; a single number becomes a list of one."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _index(part: Node) -> int:
    index = part.args[1]
    assert isinstance(index, int)
    return index


def _hint(value: object) -> int | None:
    return None if value is None else hint(value)


def _defaults(given: tuple[object, ...], defaults: tuple[object, ...]) -> list[Any]:
    return [*given, *defaults[len(given) :]]


SEVERAL = frozenset(op for op, function in RULES.items() if function in (cat, stack, pad, index, index_select))
"""Ops of this file that read several tensors, or add elements of their own."""

MOVEMENT = frozenset(op for op, function in RULES.items() if function.__module__ == __name__) - SEVERAL
"""Ops that rearrange the elements of one tensor."""

COPIES = frozenset(op for op, function in RULES.items() if function is copy)
"""Ops of :data:`MOVEMENT` that keep every element at its position."""
