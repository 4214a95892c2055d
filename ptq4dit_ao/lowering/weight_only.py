"""Linears of float inputs and integer weights, for backends that run their graph as modules.

The product is float: ``y = (x Q^T) s + bias``. The integers Q stay in memory as int8, and a float copy of them lives
for one call. torch's ``_weight_int8pack_mm`` makes no copy, but takes 4 to 40 times as long as a float product in
float32, and crashes at some sizes in bfloat16 (torch 2.13).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptq4dit_ao.lowering.backend import Request


def multiply(x: Tensor, integers: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Linear of float rows, (..., C_in) -> (..., C_out) of the same dtype; ``scale`` is (C_out,) float32."""
    if x.dtype == torch.float16:  # sums of integers would exceed its largest number
        y = functional.linear(x, (integers * scale.unsqueeze(1)).to(x.dtype))
    else:
        y = functional.linear(x, integers.to(x.dtype)) * scale
    return (y if bias is None else y + bias).to(x.dtype)


class WeightOnly(nn.Module):
    """Module of :func:`multiply`."""

    integers: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, integers: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("integers", integers.contiguous())
        self.register_buffer("scale", scale.to(torch.float32))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (..., C_in) floats by the weight."""
        return multiply(x, self.integers, self.scale, self.bias)


def replace_weight_only(request: Request, device: torch.device) -> None:
    """Put a module on a device in the place of every linear of a float input and symmetric integer weights."""
    graph = request.graph
    for i, linear in enumerate(request.weight_only):
        if linear.weight_zero_point.any():
            continue  # it dequantizes its weight in every call
        name, x = f"_weight_only_{i}", linear.node.args[0]
        graph.add_submodule(name, WeightOnly(linear.weight, linear.weight_scale, linear.bias).to(device))
        with graph.graph.inserting_before(linear.node):
            linear.replace_by(graph.graph.call_module(name, (x,)))
