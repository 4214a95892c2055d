"""``x86_inductor``: ``torch.compile`` with frozen weights, which fuses quantization into neighbouring operations.

Without freezing, Inductor keeps weights symbolic, matches no int8 pattern and silently computes in float. Freezing is
therefore switched on here, for this compilation only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._inductor import config as inductor_config

from ptq4dit_ao.lowering.backend import Backend, Capabilities, Request, Runnable, register
from ptq4dit_ao.lowering.machine import no_compiler, no_onednn, no_x86, saturates
from ptq4dit_ao.lowering.match import make_unsigned, quantized_products, quantizers_of
from ptq4dit_ao.lowering.mixed import compute_in
from ptq4dit_ao.lowering.unshare import unshare_weights

aten = torch.ops.aten

KERNELS = ("onednn::qlinear_pointwise",)
"""Names of its integer kernels in torch's profiler."""

INT8 = Capabilities(activation_dtypes=(torch.uint8, torch.int8), float_dtypes=(torch.bfloat16,))
"""Linears that Inductor's int8 patterns match."""


def lacks() -> str | None:
    """The reason why this machine cannot compile to oneDNN; None if it can."""
    return no_x86() or no_onednn() or no_compiler()


def prepare(request: Request) -> None:
    """Bring a graph into the form that Inductor's int8 patterns match, in place."""
    make_unsigned(quantizers_of(quantized_products(request.graph)))
    unshare_weights(request.graph, request.linears)
    # Without this, Inductor decomposes a linear of a non-contiguous input into a form that its pattern fails on.
    for quantize in dict.fromkeys(linear.quantize for linear in request.linears):
        with quantize.graph.inserting_before(quantize):
            quantize.update_arg(0, quantize.graph.call_function(aten.contiguous.default, (quantize.args[0],)))
    request.graph.recompile()
    if request.float_dtype is not None:
        compute_in(request.graph, request.float_dtype, request.example_inputs)


def build(request: Request) -> Runnable:
    """Compile the graph. The first call with a new batch size compiles again, and from then on any batch size runs."""
    prepare(request)
    compiled = torch.compile(request.graph)

    def run(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        # The patch surrounds the call instead of torch.compile(options=...), because Dynamo reads this setting before
        # the backend does.
        with torch.no_grad(), inductor_config.patch(freezing=True):
            return compiled(*inputs)

    return run


register(
    Backend(
        name="x86_inductor",
        summary="torch.compile to fused int8 kernels for x86 (oneDNN); needs a C++ compiler",
        integer=True,
        carries=INT8,
        rank=1,
        kernels=KERNELS,
        refuse=saturates,
        lacks=lacks,
        build=build,
        compiles=True,
        prunes=True,
    )
)
