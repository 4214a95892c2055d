"""Find the quantized linears of a converted graph: ``linear(dq(q(x)), dq(int weight), bias)``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.ao.quantization.fx._decomposed import quantized_decomposed_lib  # noqa: F401  (registers the ops)
from torch.fx import GraphModule, Node

from ptq4dit_ao.graph.names import LINEAR, get_attribute

quantized = torch.ops.quantized_decomposed
_QUANTIZE = quantized.quantize_per_tensor.default
_DEQUANTIZE = quantized.dequantize_per_tensor.default
_DEQUANTIZE_WEIGHT = quantized.dequantize_per_channel.default


@dataclass(frozen=True, kw_only=True)
class QuantizedLinear:
    """One linear of the converted graph with everything an integer kernel needs."""

    node: Node
    quantize: Node
    """The activation's quantize node; linears that read the same tensor may share it."""
    x: Node
    x_scale: float
    x_zero_point: int
    x_range: tuple[int, int]
    x_dtype: torch.dtype
    weight: Tensor
    """(C_out, C_in) int8."""
    weight_scale: Tensor
    """(C_out,)."""
    weight_zero_point: Tensor
    weight_range: tuple[int, int]
    bias: Tensor | None
    dtype: torch.dtype
    """Of the float model around it."""

    @property
    def name(self) -> str:
        return self.node.name


def quantized_linears(graph_module: GraphModule) -> list[QuantizedLinear]:
    """Every linear whose input and weight come from dequantize nodes, in execution order."""
    found = (_match(graph_module, node) for node in graph_module.graph.nodes if node.target is LINEAR)
    return [linear for linear in found if linear is not None]


def float_linears(graph_module: GraphModule) -> list[Node]:
    """Every other linear."""
    matched = {linear.node for linear in quantized_linears(graph_module)}
    return [node for node in graph_module.graph.nodes if node.target is LINEAR and node not in matched]


def unread_linears(graph_module: GraphModule) -> list[Node]:
    """Those whose input is quantized, but whose weight is in a form that no backend reads."""
    return [node for node in float_linears(graph_module) if _calls(node.args[0], _DEQUANTIZE)]


def _match(graph_module: GraphModule, node: Node) -> QuantizedLinear | None:
    # fx types arguments as anything at all; the checks below are what tells.
    arguments: tuple[Any, ...] = node.args
    dq_x, dq_w, *rest = arguments
    if not (_calls(dq_x, _DEQUANTIZE) and _calls(dq_w, _DEQUANTIZE_WEIGHT)):
        return None
    q_x, weight, bias = dq_x.args[0], dq_w.args[0], rest[0] if rest else None
    constant = isinstance(weight, Node) and weight.op == "get_attr" and dq_w.args[3] == 0
    if not (_calls(q_x, _QUANTIZE) and constant and (bias is None or bias.op == "get_attr")):
        return None
    x, scale, zero_point, low, high, dtype = q_x.args
    return QuantizedLinear(
        node=node,
        quantize=q_x,
        x=x,
        x_scale=scale,
        x_zero_point=zero_point,
        x_range=(low, high),
        x_dtype=dtype,
        weight=_tensor(graph_module, weight),
        weight_scale=_tensor(graph_module, dq_w.args[1]),
        weight_zero_point=_tensor(graph_module, dq_w.args[2]),
        weight_range=(dq_w.args[4], dq_w.args[5]),
        bias=None if bias is None else _tensor(graph_module, bias),
        dtype=dq_x.kwargs.get("out_dtype") or torch.float32,
    )


def _calls(node: object, target: object) -> bool:
    return isinstance(node, Node) and node.target is target


def _tensor(graph_module: GraphModule, node: Node) -> Tensor:
    return get_attribute(graph_module, str(node.target)).detach()
