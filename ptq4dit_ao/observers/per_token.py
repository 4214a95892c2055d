"""Nodes of linears whose input is quantized per token, as :mod:`ptq4dit_ao.core.per_token` derives them.

Before the quantizer, each row is shifted and scaled to ``u = (x - middle) / scale``. After the linear, which has no
bias, this is undone: ``y = u W^T * scale + (middle * sums + bias)``. Between them is a static linear as any other, so
every backend has kernels for it. Linears that read one tensor share the nodes before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4dit_ao.core.per_token import EPS, middle_step
from ptq4dit_ao.graph.names import LINEAR, calls
from ptq4dit_ao.graph.pending import tensor_at
from ptq4dit_ao.observers.qdq import QuantSpec, buffer, insert_qdq, quantized

aten = torch.ops.aten

WIDE = (torch.float32, torch.float64)
"""Dtypes in which rows are shifted and scaled as they are; others are cast to float32."""


@dataclass(frozen=True, kw_only=True)
class PerToken:
    """Nodes around one linear."""

    x: Node
    """The float activation, (..., C_in)."""
    middle: Node
    scale: Node
    shift: Node
    """``middle * sums``, (..., C_out)."""
    sums: Node
    """Row sums of the dequantized weight, (C_out,)."""
    biased: Node | None
    """``shift + bias``; None without a bias."""
    output: Node
    """The layer's output, (..., C_out)."""

    @property
    def bias(self) -> Node | None:
        """The layer's bias, (C_out,)."""
        if self.biased is None:
            return None
        bias = self.biased.args[1]
        assert isinstance(bias, Node)
        return bias


def insert_per_token(model: GraphModule, observer: Node, spec: QuantSpec) -> None:
    """Replace an observer node by the shift, the scaling and the static quantizer of what they leave."""
    source = observer.args[0]
    assert isinstance(source, Node)
    value = source.meta.get("val")
    dtype = torch.float32 if value is None else value.dtype
    call, steps = model.graph.call_function, spec.quant_max - spec.quant_min
    half = middle_step(steps)
    with model.graph.inserting_before(observer):
        x = source if dtype in WIDE else call(aten.to.dtype, (source, torch.float32))
        low, high = call(aten.amin.default, (x, [-1], True)), call(aten.amax.default, (x, [-1], True))
        scale = call(aten.mul.Tensor, (call(aten.sub.Tensor, (high, low)), half / steps))
        middle = call(aten.add.Tensor, (low, scale))
        divisor = call(aten.clamp_min.default, (scale, EPS))
        unit = call(aten.div.Tensor, (call(aten.sub.Tensor, (x, middle)), divisor))
    observer.update_arg(0, unit)
    readers = [user for user in observer.users if user.target is LINEAR]
    insert_qdq(model, observer, spec, torch.tensor(1 / half), torch.tensor(spec.quant_min + half), out_dtype=dtype)
    for linear in readers:
        complete(model, linear)


def complete(model: GraphModule, linear: Node) -> None:
    """Undo the shift and the scaling after a linear, once its weight and its input have been converted."""
    unit = _unit(linear)
    x, weight, *rest = linear.args
    assert isinstance(weight, Node)
    if unit is None or weight.op == "call_module" or _rescaled(linear) is not None:
        return
    _, middle, scale = unit
    value = linear.meta.get("val")
    dtype = torch.float32 if value is None else value.dtype
    call, bias = model.graph.call_function, rest[0] if rest else None
    sums = _value(model, weight).sum(1, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
    with model.graph.inserting_before(linear.next):
        added = call(aten.mul.Tensor, (middle, buffer(model, f"_{linear.name}_sums", sums)))
        if bias is not None:
            added = call(aten.add.Tensor, (added, bias))
        scaled = call(aten.mul.Tensor, (linear, scale))
        output = call(aten.add.Tensor, (scaled, added))
        if dtype not in WIDE:
            output = call(aten.to.dtype, (output, dtype))
    linear.replace_all_uses_with(output, delete_user_cb=lambda user: user is not scaled)
    linear.args = (x, weight)
    if value is not None:
        output.meta["val"] = value


def per_token(linear: Node) -> PerToken | None:
    """The nodes around a linear of a converted graph; None if its input is not quantized per token."""
    unit, rescaled = _unit(linear), _rescaled(linear)
    if unit is None or rescaled is None:
        return None
    x, middle, scale = unit
    added, output = rescaled
    biased = added if added.target is aten.add.Tensor else None
    shift = added if biased is None else biased.args[0]
    assert isinstance(shift, Node)
    sums = shift.args[1]
    assert isinstance(sums, Node)
    return PerToken(x=x, middle=middle, scale=scale, shift=shift, sums=sums, biased=biased, output=output)


def _unit(linear: Node) -> tuple[Node, Node, Node] | None:
    """The float activation, its middle and its scale; None if a linear's input is not quantized per token."""
    dequantize: Any = linear.args[0]
    quantize: Any = dequantize.args[0] if calls(dequantize, quantized.dequantize_per_tensor.default) else None
    unit: Any = quantize.args[0] if calls(quantize, quantized.quantize_per_tensor.default) else None
    if not (calls(unit, aten.div.Tensor) and calls(unit.args[0], aten.sub.Tensor)):
        return None
    (x, middle), divisor = unit.args[0].args, unit.args[1]
    if not (calls(divisor, aten.clamp_min.default) and divisor.args[1] == EPS):
        return None
    return (x if _dtype(dequantize) in WIDE else x.args[0]), middle, divisor.args[0]


def _rescaled(linear: Node) -> tuple[Node, Node] | None:
    """The nodes ``middle * sums + bias`` and the output; None if :func:`complete` has not made them."""
    unit, users = _unit(linear), list(linear.users)
    if unit is None or len(users) != 1 or users[0].args != (linear, unit[2]):
        return None
    (output,) = users[0].users
    added = output.args[1]
    assert isinstance(added, Node)
    if _dtype(linear.args[0]) not in WIDE:
        (output,) = output.users
    return added, output


def _dtype(dequantize: Any) -> torch.dtype:
    """Dtype of the float model around a linear."""
    return dequantize.kwargs.get("out_dtype") or torch.float32


def _value(model: GraphModule, node: Node) -> Tensor:
    """The value of a weight, float, (C_out, C_in), from the node that holds or dequantizes it."""
    if node.op == "get_attr":
        return tensor_at(model, str(node.target)).detach()
    target: Any = node.target
    value: Tensor = target(*(_value(model, a) if isinstance(a, Node) else a for a in node.args))
    return value
