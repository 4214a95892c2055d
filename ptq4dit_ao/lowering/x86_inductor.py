"""``x86_inductor``: ``torch.compile`` with weights frozen, which fuses quantization into its neighbours.

Without freezing Inductor keeps weights symbolic, matches no int8 pattern and silently runs float; so it is switched
on here, for this compile only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch.fx import GraphModule

from ptq4dit_ao.lowering.fbgemm import has_onednn
from ptq4dit_ao.lowering.lower import Backend, register
from ptq4dit_ao.lowering.match import QuantizedLinear


def refuse(linear: QuantizedLinear) -> str | None:
    """Why oneDNN's fused kernels cannot carry a linear."""
    if not has_onednn():
        return "this torch was built without oneDNN"
    if linear.x_dtype not in (torch.uint8, torch.int8) or linear.weight.dtype != torch.int8:
        return f"needs 8-bit activations and int8 weights, got {linear.x_dtype} and {linear.weight.dtype}"
    if linear.weight_zero_point.any():
        return "needs symmetric weights"
    return None


def build(graph: GraphModule, linears: Sequence[QuantizedLinear]) -> Callable[..., Tensor]:
    """Compile; the first call with a new batch size compiles once more, then any batch runs."""
    compiled = torch.compile(graph)

    def run(*inputs: Tensor) -> Tensor:
        # Around the call, not in torch.compile(options=...): Dynamo reads this setting too, before the backend does.
        with torch.no_grad(), inductor_config.patch(freezing=True):
            return compiled(*inputs)

    return run


register(
    Backend(
        name="x86_inductor",
        summary="torch.compile to fused int8 kernels for x86 (oneDNN); needs a C++ compiler, fastest",
        integer=True,
        refuse=refuse,
        build=build,
    )
)
