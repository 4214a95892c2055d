"""Fold explicit balancing: move the multiplies that :mod:`.insert` put before the consumers into parameters.

This is the re-parameterisation of PTQ4DiT (section 3.3), for any graph that scale propagation can read:

* Rows of a linear (adaLN's shift and scale, V) and affine norms become ``W / b`` and ``bias / b``.
* A norm without a weight gets the weight ``1/b``.
* A modulation vector that serves all blocks is multiplied by ``1/b`` where it is read. This is the only fold that
  costs an op, on (N, C) numbers.
* The constant of ``1 + scale`` becomes the tensor ``1/b``. The paper's form keeps the 1 and stores
  ``(1 + bias)/b - 1``. It is exact too, but it loses digits of 16-bit parameters and needs a bias. It serves to write
  the folds back to checkpoints.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4dit_ao.choices import FOLD_FORMS, FoldForm
from ptq4dit_ao.errors import BalanceError, check_choice
from ptq4dit_ao.graph import ScalarEdit, Site
from ptq4dit_ao.passes.bias_form import bias_shift
from ptq4dit_ao.passes.edit import add_constant, replace_tensor, scale_of, scale_tensor
from ptq4dit_ao.passes.insert import MARK

CUT = "ptq4dit_cut"
"""Key in ``node.meta`` that marks a multiply which a fold inserted."""


def fold_balance(model: GraphModule, site: Site, b: Tensor, form: FoldForm = "constant") -> None:
    """Remove a site's balancing nodes and make its producers compute ``x / b``.

    A site that is multiplied at run time keeps its nodes.

    Args:
        model: a graph to which :func:`.insert_balance` was applied; changed in place.
        site: a site without refusal.
        b: (num_variables,) float64, the vector that was inserted.
        form: where the 1 of ``1 + scale`` goes.

    Raises:
        ArgumentError: ``form`` is unknown.
        BalanceError: the site is refused, or its scalars are not added to a linear's output with a bias (form "bias").
    """
    check_choice("fold form", form, FOLD_FORMS)
    if site.refusal is not None:
        raise BalanceError(f"{site.name} cannot be folded: {site.refusal}")
    if site.premultiply:
        return
    nodes = {node.name: node for node in model.graph.nodes}
    shifts = []
    if form == "bias":  # before any edit, so that a refusal leaves the model unchanged
        shifts = [bias_shift(nodes[s.node], s.index, scale_of(b, s.variables)) for s in site.scalars]
    for edit in site.parameters:
        scale_tensor(model, edit.paths, 1 / scale_of(b, edit.variables))
    for path, shift in shifts:
        replace_tensor(model, (path,), partial(torch.add, shift))
    if form == "constant":
        for scalar in site.scalars:
            _divide_scalar(model, nodes[scalar.node], scalar, b)
    for norm in site.norms:
        _divide_norm(model, nodes[norm.node], scale_of(b, norm.variables))
    for cut in site.cuts:
        _cut(model, nodes[cut.node], cut.index, scale_of(b, cut.variables))
    _remove_balance(model, site)


def _divide_scalar(model: GraphModule, node: Node, scalar: ScalarEdit, b: Tensor) -> None:
    value, scale = node.args[scalar.index], scale_of(b, scalar.variables)
    if isinstance(value, Node):  # an earlier site has replaced the number by a tensor
        replace_tensor(model, (str(value.target),), lambda c: c / scale)
        return
    assert isinstance(value, (int, float))
    with model.graph.inserting_before(node):
        node.update_arg(scalar.index, add_constant(model, "constant", value / scale, like=node))
    if node.target in _TENSOR_OVERLOAD:
        node.target = _TENSOR_OVERLOAD[node.target]
        if len(node.args) > 2:  # alpha is positional in the scalar overload only
            node.kwargs = {**node.kwargs, "alpha": node.args[2]}
            node.args = node.args[:2]


_TENSOR_OVERLOAD: dict[object, torch._ops.OpOverload] = {
    torch.ops.aten.add.Scalar: torch.ops.aten.add.Tensor,
    torch.ops.aten.sub.Scalar: torch.ops.aten.sub.Tensor,
}


def _divide_norm(model: GraphModule, node: Node, scale: Tensor) -> None:
    """Give a norm the weight 1/b, or divide the weight that it has by b."""
    weight = node.args[2] if len(node.args) > 2 else None
    if isinstance(weight, Node):  # an earlier site has added the weight
        replace_tensor(model, (str(weight.target),), lambda w: w / scale)
        return
    with model.graph.inserting_before(node):
        weight = add_constant(model, "norm", 1 / scale, like=node)
    node.args = (*node.args[:2], weight, *node.args[3:])


def _cut(model: GraphModule, node: Node, index: int, scale: Tensor) -> None:
    """Multiply an operand by 1/b where ``node`` reads it."""
    operand = node.args[index]
    assert isinstance(operand, Node)
    if operand.meta.get(CUT):  # an earlier site has inserted the multiply
        replace_tensor(model, (str(operand.args[1].target),), lambda c: c / scale)  # type: ignore[union-attr]
        return
    with model.graph.inserting_before(node):
        inverse = add_constant(model, "cut", 1 / scale, like=operand)
        product = model.graph.call_function(torch.ops.aten.mul.Tensor, (operand, inverse))
    product.meta.update(operand.meta)
    product.meta[CUT] = True
    node.update_arg(index, product)


def _remove_balance(model: GraphModule, site: Site) -> None:
    for node in list(model.graph.nodes):
        if node.meta.get(MARK) == site.name:
            source, inverse = node.args
            node.replace_all_uses_with(source)
            model.graph.erase_node(node)
            model.graph.erase_node(inverse)
            delattr(model, str(inverse.target))
