"""Specification of a tensor's quantization, and its quantize/dequantize nodes in a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.ao.quantization.fx._decomposed import quantized_decomposed_lib  # noqa: F401  (registers the ops)
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import QuantizationSpec

from ptq4dit_ao.core import affine_qparams
from ptq4dit_ao.core.expansion import CODES, Expansion
from ptq4dit_ao.graph.pending import row_blocks, tensor_at

quantized = torch.ops.quantized_decomposed

FLOAT = torch.int16
"""Dtype that stands for an activation of 16 bits: it stays float, and the weight alone is quantized."""

DEFAULT_EPS = 2**-12
"""Smallest scale, as in torchao's x86 configuration."""

_SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)
_PER_CHANNEL = (torch.per_channel_symmetric, torch.per_channel_affine)


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """Contents of a torchao ``QuantizationSpec`` without its observer; ``channel_axis`` None means per tensor."""

    dtype: torch.dtype
    quant_min: int
    quant_max: int
    symmetric: bool
    channel_axis: int | None
    eps: float
    expansion: Expansion | None = None
    """Rule by which 4-bit codes expand to these integers, for a weight; None if every integer is allowed."""
    dynamic: bool = False
    """Whether every token has a range of its own at run time."""

    @property
    def stays_float(self) -> bool:
        """Whether the tensor is observed, but not quantized (:data:`FLOAT`)."""
        return self.dtype == FLOAT

    @property
    def ranged(self) -> bool:
        """Whether the tensor is quantized in one range, which calibration finds."""
        return not (self.dynamic or self.stays_float)

    @classmethod
    def of(cls, spec: QuantizationSpec, *, eps: float = DEFAULT_EPS) -> QuantSpec:
        """Read a torchao spec; a missing integer range is that of its dtype."""
        bounds = torch.iinfo(spec.dtype)
        return cls(
            dtype=spec.dtype,
            quant_min=bounds.min if spec.quant_min is None else spec.quant_min,
            quant_max=bounds.max if spec.quant_max is None else spec.quant_max,
            symmetric=spec.qscheme in _SYMMETRIC,
            channel_axis=spec.ch_axis if spec.qscheme in _PER_CHANNEL else None,
            eps=eps,
            dynamic=spec.is_dynamic,
        )

    @property
    def levels(self) -> int:
        """Number of different values that an element of the tensor can take."""
        return CODES if self.expansion is not None else self.quant_max - self.quant_min + 1

    def qparams(self, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point for a range; any shape, elementwise."""
        return affine_qparams(minimum, maximum, self.quant_min, self.quant_max, symmetric=self.symmetric, eps=self.eps)


def insert_qdq(
    model: GraphModule,
    observer: Node,
    spec: QuantSpec,
    scale: Tensor,
    zero_point: Tensor,
    integers: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Node:
    """Replace an observer node by ``dequantize(quantize(x))``, in the form that torchao's own convert writes.

    It dequantizes to ``out_dtype``; None is the dtype of x.

    A weight (an attribute) is quantized here, unless its integers are given, because torchao's own folding fails on
    graphs that write in place.

    Returns:
        Node of the integers.
    """
    source = observer.args[0]
    assert isinstance(source, Node)
    graph = model.graph
    with graph.inserting_before(observer):
        if spec.channel_axis is None:
            kind = "per_tensor"
            arguments: tuple[Any, ...] = (float(scale), int(zero_point))
        else:
            device = source.meta["val"].device if "val" in source.meta else "cpu"
            buffers = (("scale", scale), ("zero_point", zero_point))
            arguments = (
                *(buffer(model, f"_{observer.name}_{n}", v.to(device)) for n, v in buffers),
                spec.channel_axis,
            )
            kind = "per_channel"
        arguments = (*arguments, spec.quant_min, spec.quant_max, spec.dtype)
        value = source.meta.get("val")
        if out_dtype is None:
            out_dtype = torch.float32 if value is None else value.dtype
        kwargs = {} if out_dtype == torch.float32 else {"out_dtype": out_dtype}
        if source.op == "get_attr":
            if integers is None:
                integers = _integers(tensor_at(model, str(source.target)).detach(), spec, scale, zero_point)
            q = buffer(model, f"_{observer.name}_integers", integers)
            if value is not None:
                q.meta["val"] = value.fake_mode.from_tensor(integers, static_shapes=True)
        else:
            q = graph.call_function(getattr(quantized, f"quantize_{kind}").default, (source, *arguments))
        dq = graph.call_function(getattr(quantized, f"dequantize_{kind}").default, (q, *arguments), kwargs)
    observer.replace_all_uses_with(dq)
    graph.erase_node(observer)
    return q


def insert_bias(model: GraphModule, linear: Node, bias: Tensor) -> None:
    """Give a linear this bias, (C_out,), in place of its own, if it has one."""
    value = linear.meta.get("val")
    stored = bias if value is None else bias.to(value.device, value.dtype)
    with model.graph.inserting_before(linear):
        node = buffer(model, f"_{linear.name}_bias", stored)
    if value is not None:
        node.meta["val"] = value.fake_mode.from_tensor(stored, static_shapes=True)
    linear.args = (*linear.args[:2], node, *linear.args[3:])


def _integers(tensor: Tensor, spec: QuantSpec, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Result of torchao's quantize op, computed in blocks to avoid float temporaries of the tensor's size."""
    stored = torch.empty_like(tensor, dtype=spec.dtype)
    bounds = (spec.quant_min, spec.quant_max, spec.dtype)
    scale, zero_point = scale.to(tensor.device), zero_point.to(tensor.device)
    for rows in row_blocks(tensor):
        if spec.channel_axis is None:
            part = quantized.quantize_per_tensor.default(tensor[rows], float(scale), int(zero_point), *bounds)
        else:
            of = rows if spec.channel_axis == 0 else slice(None)
            part = quantized.quantize_per_channel.default(
                tensor[rows], scale[of], zero_point[of], spec.channel_axis, *bounds
            )
        stored[rows] = part
    return stored


def buffer(model: GraphModule, name: str, value: Tensor) -> Node:
    """Add a buffer to a graph; return the node that reads it, at the current place."""
    model.register_buffer(name, value)
    node = model.graph.get_attr(name)
    return node
